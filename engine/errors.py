"""The one tree of typed errors. Every message is for the person: what happened, where, what to do.

`exit_code` is the command-line contract: 2 wrong usage or bad input, 3 failed while running,
130 interrupted. "The check said no" (1) and "could not tell" (4) are results, not errors.
"""

from __future__ import annotations


class MedmergeError(Exception):
    """Base of all errors this program raises on purpose.

    Args:
        message: what happened, naming the file and key.
        hint: what the person can do next; shown on its own line.
    """

    exit_code = 3
    title = "Failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class BadInputError(MedmergeError):
    """A file, folder, setting or argument given by the user is not usable."""

    exit_code = 2
    title = "Bad input"


class BadModelError(BadInputError):
    """Not a model folder, or one that is broken."""

    title = "Not a usable model"


class NotFiniteError(BadModelError):
    """A model whose logits are not numbers (NaN or infinite): nothing it says may be counted."""


class BadAdapterError(BadInputError):
    """Not a LoRA adapter, one of a kind that cannot be merged exactly, or one that does not fit the base."""

    title = "Not a usable adapter"


class BadTensorFileError(BadInputError):
    """A safetensors or GGUF file that is truncated, corrupt or refused."""

    title = "Broken tensor file"


class BadRecipeError(BadInputError):
    """A recipe, config or command line that asks for something meaningless."""

    title = "Bad recipe"


class BadDataError(BadInputError):
    """A data file with a broken line (names file and line, counted from 1)."""

    title = "Bad data"


class TargetExistsError(BadInputError):
    """The output path is already there; results are never overwritten."""

    title = "Target exists"


class NoSpaceError(MedmergeError):
    """Not enough room on the disk, found before or during writing."""

    exit_code = 3
    title = "Disk full"


class ChildFailedError(MedmergeError):
    """A child process died or broke its protocol."""

    title = "Child process failed"


class ServerError(MedmergeError):
    """A server that answers evaluations gave up, refused, or sent what cannot be used."""

    title = "Server failed"


class CancelledError(MedmergeError):
    """The user (or a signal) asked to stop."""

    exit_code = 130
    title = "Cancelled"
