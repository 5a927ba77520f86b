"""Instruction following as IFEval checks it (Zhou et al., arXiv 2311.07911). `series.py` and task readers call this.

The checks themselves are Google's (google/, Apache-2.0). Nothing is downloaded and nothing is drawn at random, so an
answer has one verdict. `strict`: the text as it is; `loose`: any of eight variants of it (without its first or last
line, without both, without asterisks), which forgives an introduction or markdown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import BadDataError

_NUMBERS = {
    "num_sentences", "num_placeholders", "num_bullets", "num_highlights", "num_sections", "num_paragraphs",
    "nth_paragraph", "num_words", "frequency", "let_frequency", "capital_frequency",
}  # fmt: skip
_LISTS = {"keywords", "forbidden_words"}

Instructions = Sequence[Mapping[str, Any]]  # ({"id": "punctuation:no_comma", "kwargs": {...}}, ...)


@dataclass(frozen=True)
class Checked:
    """Whether each instruction was followed, in their order."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def check_answer(instructions: Instructions, prompt: str, text: str) -> Checked:
    """The verdicts on one answer (without its think block). prompt: what was asked, as the user wrote it."""
    variants = _variants(text)
    strict, loose = [], []
    for told in instructions:
        checker = _checker(told, prompt)
        strict.append(bool(text.strip()) and bool(checker.check_following(text)))
        loose.append(any(bool(checker.check_following(variant)) for variant in variants if variant.strip()))
    return Checked(tuple(strict), tuple(loose))


def validate(instructions: Instructions) -> None:
    """Raises BadDataError for an unknown instruction, or one whose kwargs are missing, unknown or do not fit."""
    known = _registry()
    if not instructions:
        raise BadDataError("there is no instruction to check")
    for told in instructions:
        name = str(told.get("id"))
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1, 0.5)
            raise BadDataError(
                f"{name!r} is no instruction of IFEval", f"did you mean {near[0]}?" if near else ""
            )
        kwargs = told.get("kwargs") or {}
        wanted = set(known[name](name).get_instruction_args_keys() or ())
        if not isinstance(kwargs, Mapping) or not set(kwargs) <= wanted:
            odd = sorted(set(kwargs) - wanted) if isinstance(kwargs, Mapping) else [str(kwargs)]
            raise BadDataError(
                f"{name} takes {', '.join(sorted(wanted)) or 'no kwargs'}, and has {', '.join(odd)}"
            )
        missing = sorted(key for key in wanted if kwargs.get(key) is None)
        if missing:
            raise BadDataError(f"{name} needs {', '.join(missing)}", "put it into kwargs")
        for key in sorted(wanted):
            _check_value(name, key, kwargs)
        try:
            _checker(told, "").check_following("Yes.")  # words are regular expressions there
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, re.error) as error:
            raise BadDataError(f"{name} does not take {dict(kwargs)}: {error}") from error


def _check_value(name: str, key: str, kwargs: Mapping[str, Any]) -> None:
    """Google's checkers draw another value at random in place of one they cannot use; here it is an error."""
    value = kwargs[key]
    if key in _NUMBERS:
        most = kwargs.get("num_paragraphs") if key == "nth_paragraph" else None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < (key == "nth_paragraph") or (isinstance(most, int) and value > most):
            bound = f" from 1 to num_paragraphs ({most})" if key == "nth_paragraph" else " of at least 0"
            raise BadDataError(f"{name}: {key} is {value!r}, and must be a whole number{bound}")
    elif key in _LISTS:
        if (
            not isinstance(value, list | tuple)
            or not value
            or not all(isinstance(v, str) and v for v in value)
        ):
            raise BadDataError(f"{name}: {key} is {value!r}, and must be a list of words")
    elif not isinstance(value, str) or not value.strip():
        raise BadDataError(f"{name}: {key} is {value!r}, and must be text")
    elif key == "letter" and len(value) != 1:
        raise BadDataError(f"{name}: {key} is {value!r}, and must be one letter")
    elif key == "language" and value not in _languages():
        known = ", ".join(sorted(_languages()))
        raise BadDataError(f"{name}: {value!r} is none of IFEval's languages", f"one of {known}")


def _registry() -> Mapping[str, Any]:
    from engine.evaluate.instructions.google import instructions_registry

    return instructions_registry.INSTRUCTION_DICT


def _languages() -> Mapping[str, str]:
    from engine.evaluate.instructions.google import instructions_util

    codes: Mapping[str, str] = instructions_util.LANGUAGE_CODES
    return codes


def _checker(told: Mapping[str, Any], prompt: str) -> Any:
    """Google's checker of one instruction, with its arguments."""
    name = told["id"]
    checker = _registry()[name](name)
    given = {key: value for key, value in (told.get("kwargs") or {}).items() if value is not None}
    checker.build_description(**given)
    arguments = checker.get_instruction_args()
    if arguments and "prompt" in arguments:
        checker.build_description(prompt=prompt)
    return checker


def _variants(text: str) -> list[str]:
    """The eight texts that count for a loose verdict."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(part.replace("*", "") for part in cut)]
