"""`<think>` traces: what a model wrote inside them, what is left outside, and whether they were closed.

Metrics and refusal rules look at the answer (outside); both it and the raw text are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Thought:
    """kind: `none` (no tags), `closed`, `empty` (closed with nothing inside), `unclosed` (never ended).

    thought: the text inside, blocks joined by newlines. answer: the text outside, stripped of outer space.
    """

    kind: str
    thought: str
    answer: str


def split_think(text: str, opened: bool = False) -> Thought:
    """Split generated text. `opened`: the prompt itself ended in an open `<think>`.

    An unclosed block swallows the rest. A `</think>` without its opening closes one that began before the
    text (some servers cut the opening off). Of several blocks the worst kind is reported: unclosed, then
    closed, then empty.
    """
    first_open, first_close = text.find(OPEN), text.find(CLOSE)
    if first_close != -1 and (first_open == -1 or first_close < first_open):
        opened = True
    inside, outside, kinds, rest = [], [], set(), text
    while opened or OPEN in rest:
        if not opened:
            before, _, rest = rest.partition(OPEN)
            outside.append(before)
        opened = False
        body, closed, rest = rest.partition(CLOSE)
        kinds.add("unclosed" if not closed else "closed" if body.strip() else "empty")
        inside.append(body.strip())
    outside.append(rest)
    kind = next((kind for kind in ("unclosed", "closed", "empty") if kind in kinds), "none")
    return Thought(kind, "\n".join(part for part in inside if part), "".join(outside).strip())


def ends_open(prompt: str) -> bool:
    """Whether a prompt leaves a think block open for the model to go on in."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE)
