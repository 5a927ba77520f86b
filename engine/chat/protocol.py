"""What the app and a chat child say to each other: one JSON object a line, each answer with its request's id.

Requests: `load` (first, once), `open`, `scales`, `ask`, `stop`, `close`, `quit`. A request is answered by `ok`
or `failed`; `load` by `loaded`; `ask` by any number of `token` and one `done` or `failed`. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STOP_REASONS = ("end", "length", "stopped", "context")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature, then top-k, then top-p (the order of transformers and vLLM).

    temperature 0 is greedy. top_k 0 and top_p 1 switch those off. max_tokens 0 means: until the context is full.
    The same prompt, seed and adapter scales give the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42
    max_tokens: int = 512


@dataclass(frozen=True)
class Loaded:
    """The model is in memory. `context` is the length it was trained for, in tokens; `seconds` the load took."""

    name: str
    description: str
    parameters: int
    nbytes: int
    context: int
    adapters: tuple[str, ...]
    has_template: bool
    gpu: bool
    seconds: float
    source: Mapping[str, Any] = field(default_factory=dict)  # what the file says it was made from


@dataclass(frozen=True)
class Token:
    """A piece of the answer: whole characters, perhaps of several tokens."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer ended. `reason`: end (the model ended it), length, stopped (by the user), context (full).

    `tokens` were generated (`think_tokens` of them between think tags) at `tokens_per_s`, after a prompt of
    `prompt_tokens` (`reused_tokens` of them still in memory) that took `prompt_s` seconds to read.
    """

    reason: str
    tokens: int
    tokens_per_s: float
    prompt_tokens: int
    think_tokens: int
    prompt_s: float = 0.0
    reused_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """This request failed, or the child died: what happened, and what to do."""

    message: str
    hint: str = ""
    exit_code: int = 3


@dataclass(frozen=True)
class Ok:
    """A request without other result is done. `context` is the pane's length in tokens, after `open`."""

    context: int = 0


Event = Loaded | Token | Done | Failed | Ok
_NAMES: dict[str, type[Event]] = {
    "loaded": Loaded,
    "token": Token,
    "done": Done,
    "failed": Failed,
    "ok": Ok,
}


def to_line(request: int, event: Event) -> dict[str, Any]:
    """An event as the object of its line."""
    name = type(event).__name__.lower()
    return {"id": request, "event": name, **asdict(event)}


def from_line(raw: dict[str, Any]) -> tuple[int, Event]:
    """The request's id and the event of a line. Raises ValueError when it is none of ours."""
    try:
        fields = dict(raw)
        request, kind = int(fields.pop("id")), _NAMES[str(fields.pop("event"))]
        if kind is Loaded:
            fields["adapters"] = tuple(fields["adapters"])
        return request, kind(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an event: {str(raw)[:200]}") from error
