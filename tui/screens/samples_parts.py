"""What the samples screen draws: a line of its list, the question, an answer, options; and what its filters keep."""

from __future__ import annotations

import re
from collections.abc import Callable

from textual.content import Content

from tui.differences import marked
from tui.safe_text import plain
from tui.snapshots import SampleRow, SampleSet
from tui.text import cut, fit

LABELS = {
    "refusal": ("full refusal", "$error"),
    "partial": ("partial refusal", "$warning"),
    "safe_completion": ("safe completion", "$success"),
    "compliance": ("compliance", "$foreground"),
    "empty": ("empty", "$faint"),
    "unparsed": ("no letter read", "$warning"),
}
SHORT = {"refusal": "refusal", "partial": "partial", "safe_completion": "safe", "compliance": "comply"}
BY_HAND = "✎"
FOLDED = 2  # lines of a prompt before it is unfolded
HEAD = "bold $faint"


def line(row: SampleRow, other: SampleRow | None, second: bool, width: int) -> Content:
    """One line of the list: right or wrong, id, label or score; of both models where there are two."""
    marks = _mark(row) + (_mark(other) if second else Content(""))
    told = _told(row)
    if second and other is not None and differ(row, other):
        told = Content.styled("≠ ", "bold $primary") + told
    room = max(4, width - marks.cell_length - told.cell_length - 2)
    return marks + Content(" " + fit(row.id + (f" #{row.seed}" if row.seed else ""), room) + " ") + told


def _mark(row: SampleRow | None) -> Content:
    if row is None:
        return Content.styled(" ", "$faint")
    if row.right is None:
        return Content.styled("·", "$faint")
    return Content.styled("✓", "$success") if row.right else Content.styled("✗", "$error")


def _told(row: SampleRow) -> Content:
    if row.label:
        words, style = LABELS.get(row.label, (row.label, ""))
        hand = Content.styled(BY_HAND, "bold $primary") if row.by_hand else Content("")
        return hand + Content.styled(cut(SHORT.get(row.label, words), 14), style)
    if row.score is not None:
        return Content.styled(score(row.score), "$faint")
    return Content("")


def score(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def differ(first: SampleRow, second: SampleRow) -> bool:
    """Whether two models did something else: another option or label, else another text."""
    if first.options:
        return first.chosen != second.chosen
    if first.label or second.label:
        return first.label != second.label
    return first.text != second.text


# ---- filters ------------------------------------------------------------------------------------------------

Keep = Callable[[SampleRow, "SampleRow | None"], bool]


def filters(shown: SampleSet, second: SampleSet | None) -> list[tuple[str, str]]:
    """The filters that mean something here, as (key, words)."""
    rows = shown.rows
    found = [("", "all samples")]
    if any(row.right is not None for row in rows):
        found += [("wrong", "only wrong"), ("right", "only right")]
    if second is not None:
        found.append(("differ", "only where they differ"))
        if any(row.right is not None for row in rows):
            found += [("lost", f"right for {shown.model} only"), ("won", f"right for {second.model} only")]
    labels = dict.fromkeys(row.label for row in rows if row.label)
    found += [(f"label={label}", f"only {LABELS.get(label, (label, ''))[0]}") for label in labels]
    if any(row.by_hand for row in rows):
        found.append(("hand", "only corrected by hand"))
    if any(row.think not in ("none", "untagged") for row in rows):
        found.append(("thought", "only with a think block"))
    if any(("finish", "length") in row.facts for row in rows):
        found.append(("cut", "only cut at the token limit"))
    return found


def keeper(name: str) -> Keep:
    """What a filter keeps, given a sample and the same of the second model."""
    if name.startswith("label="):
        label = name.removeprefix("label=")
        return lambda row, other: row.label == label
    keep: dict[str, Keep] = {
        "wrong": lambda row, other: row.right is False,
        "right": lambda row, other: row.right is True,
        "differ": lambda row, other: other is not None and differ(row, other),
        "lost": lambda row, other: row.right is True and other is not None and other.right is False,
        "won": lambda row, other: row.right is False and other is not None and other.right is True,
        "hand": lambda row, other: row.by_hand,
        "thought": lambda row, other: row.think not in ("none", "untagged"),
        "cut": lambda row, other: ("finish", "length") in row.facts,
    }
    return keep.get(name, lambda row, other: True)


def text_of(row: SampleRow) -> str:
    """What the text filter looks at."""
    options = " ".join(option for option, _ in row.options)
    return f"{row.id} {row.prompt} {row.reference} {row.text} {row.thought} {options} {row.label}".lower()


# ---- one sample -----------------------------------------------------------------------------------------------


def question(row: SampleRow, width: int, unfolded: bool) -> Content:
    """The prompt as sent, folded to the first lines of what was asked last, or whole; then the reference."""
    text = plain(row.prompt, lines=True)
    whole = Content(text).wrap(max(10, width))
    asked = Content(plain(asked_last(row.prompt), lines=True)).wrap(max(10, width))
    if unfolded or (len(whole) <= FOLDED + 1):
        parts = [Content.styled("prompt as sent", HEAD), *whole]
    else:
        head = f"▸ prompt as sent, {len(whole)} lines"
        parts = [Content.assemble((head, HEAD), ("   p unfolds", "$faint")), *asked[:FOLDED]]
        if len(asked) > FOLDED:
            parts[-1] = (parts[-1] + Content(" …")).truncate(max(10, width), ellipsis=True)
    if row.reference:
        parts += [
            Content(""), Content.styled("reference", HEAD), Content(plain(row.reference, lines=True)),
        ]  # fmt: skip
    return Content("\n").join(parts)


_MARK = re.compile(r"<\|[^|<>]*\|>|</?s>|\[/?INST\]")
_ROLE = re.compile(r"^\s*(?:system|user|assistant)\s*$")


def asked_last(prompt: str) -> str:
    """What the prompt asks in its last turn, without the template's marks."""
    turns = [turn for turn in _MARK.split(prompt) if turn.strip()]
    told = []
    for turn in turns:
        lines = [line for line in turn.strip().splitlines() if line.strip() and not _ROLE.match(line)]
        if lines and not all(line.strip() in ("<think>", "</think>") for line in lines):
            told.append("\n".join(lines))
    return told[-1] if told else prompt


def answers(
    first: SampleRow, second: SampleRow | None, width: int, open_thought: bool
) -> tuple[Content, Content | None]:
    """The answer of one model or of two, differing words marked."""
    if second is None:
        return _answer(first, Content(plain(first.text, lines=True)), width, open_thought), None
    if first.options:
        return _answer(first, Content(plain(first.text, lines=True)), width, open_thought), _answer(
            second, Content(plain(second.text, lines=True)), width, open_thought
        )
    left, right = marked(first.text, second.text)
    return _answer(first, left, width, open_thought), _answer(second, right, width, open_thought)


def _answer(row: SampleRow, text: Content, width: int, open_thought: bool) -> Content:
    parts: list[Content] = []
    facts = "  ".join(f"{what} {value}" for what, value in row.facts if what not in ("category", "seed"))
    if facts:
        parts.append(Content.styled(plain(facts), "$faint"))
    if row.label:
        parts.append(label_words(row))
    parts += _thought(row, open_thought)
    if row.options:
        parts += _options(row, width)
    if text.plain.strip():
        parts.append(text)
    elif not row.options and not row.reads:
        parts.append(
            Content.styled("(nothing outside the think block)" if row.thought else "(nothing)", "$faint")
        )
    return Content("\n").join(parts)


def label_words(row: SampleRow) -> Content:
    """The label, and that a person gave it."""
    words, style = LABELS.get(row.label, (row.label, ""))
    shown = Content.styled(plain(words), f"bold {style}".strip())
    if row.by_hand:
        rules = LABELS.get(row.automatic, (row.automatic, ""))[0]
        shown += Content.styled(plain(f"   {BY_HAND} by hand; the rules say {rules}"), "$primary")
    return shown


def _thought(row: SampleRow, unfolded: bool) -> list[Content]:
    if row.think == "empty":
        return [Content.styled("▸ thought nothing (empty block)", "italic $faint")]
    if row.think == "untagged":
        return [Content.styled("reasons without a think block", "italic $faint")]
    if not row.thought:
        return []
    verb = "thinking, never ended" if row.think == "unclosed" else "thought"
    head = f"{'▾' if unfolded else '▸'} {verb} {len(row.thought.split()):,} words"
    parts = [Content.styled(head, "italic $faint")]
    if unfolded:
        parts.append(Content.styled(plain(row.thought, lines=True), "italic $faint"))
    return parts


def _options(row: SampleRow, width: int) -> list[Content]:
    """`→ B text  -4.2` with the right one in green, a wrong choice in red."""
    found = []
    for place, (option, value) in enumerate(row.options):
        here, right = place == row.chosen, place == row.answer
        style = "$success" if right else "$error" if here else ""
        said = "" if value is None else f"  {value:.2f}"
        mark = "→" if here else " "
        letter = chr(65 + place) if place < 26 else str(place + 1)
        end = "  right" if right else ""
        found.append(
            Content.assemble(
                (f"{mark} {letter} ", f"bold {style}".strip()), (plain(option), style), (said, "$faint"),
                (end, "$success"),
            )
        )  # fmt: skip
    return found
