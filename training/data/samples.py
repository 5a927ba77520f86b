"""Rows to training samples: which columns hold the text or the conversation, and what is no conversation.

Called by `training.data.sources`. Texts pass through untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from training.data import conversations
from training.data.rows import Row, place

LAYOUTS = ("auto", "text", "alpaca", "sharegpt", "messages")
COLUMNS = ("text", "instruction", "input", "output", "system", "history", "messages")
# Question and answer columns that `auto` knows, the first pair found counts.
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
SHAREGPT = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
OPENAI = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Sample:
    """One training row: a text (pt) or a conversation ending with an assistant's turn (sft), and where it stood."""

    file: Path
    line: int  # counted from 1
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    index: int = 0  # row from 0 through the path given

    @property
    def place(self) -> str:
        return place(self.file, self.line)


@dataclass(frozen=True)
class Layout:
    """How the rows of a file become samples.

    Attributes:
        name: "text", "alpaca" (a column each for question and answer), "sharegpt" or "messages" (a list of turns).
        columns: our column -> the file's; "" for one that is not used. Of the question's parts, the system text and
            the history, those of these names are used where the user named neither question nor answer.
        tags: for turns: LLaMA-Factory's role_tag, content_tag, user_tag, assistant_tag, system_tag.
        named: our columns that the user named himself: a typing error in one must not pass as "not there".
    """

    name: str
    columns: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    named: tuple[str, ...] = ()

    def __str__(self) -> str:
        used = ", ".join(
            ours if ours == theirs else f"{ours} from {theirs}"
            for ours, theirs in self.columns.items()
            if theirs
        )
        return f"{self.name} ({used})"


def find_layout(
    row: Row, kind: str, layout: str, columns: Mapping[str, str], tags: Mapping[str, str]
) -> Layout:
    """The layout of a file, from its first row and what the user said. Raises BadDataError listing the columns."""
    columns = dict(columns)
    if layout == "auto":
        layout = _guess(row, kind, columns)
    if layout == "text":
        if kind != "pt":
            raise BadDataError(
                f"{row.file}: layout text is for kind pt", "sft rows are questions with answers"
            )
        known: dict[str, str] = {"text": "text"}
    elif layout == "alpaca":
        question, answer = _pair(row) or PAIRS[0]
        known = {name: name for name in ("instruction", "input", "output", "system", "history")}
        if columns.get("instruction") or columns.get("output") or question == "question":
            # As in LLaMA-Factory, what is not named is not used: in a medical table `system` may be of the body.
            known |= {"input": "", "system": "", "history": ""}
        known |= {"instruction": question, "output": answer}
    elif kind == "pt":
        raise BadDataError(
            f"{row.file}: conversations (layout {layout}) cannot train kind pt",
            "name a column of texts: columns: {text: NAME}",
        )
    else:
        known = {"messages": "messages" if layout == "messages" else "conversations", "system": "system"}
    if foreign := [ours for ours, theirs in columns.items() if theirs and ours not in known]:
        raise BadDataError(
            f"{row.file}: the column {foreign[0]!r} has no meaning for kind {kind}, layout {layout}",
            f"columns of this layout: {', '.join(known)}",
        )
    named = tuple(ours for ours, theirs in columns.items() if theirs)
    turns = {"messages": OPENAI, "sharegpt": SHAREGPT}
    return Layout(layout, known | columns, turns[layout] | dict(tags) if layout in turns else {}, named)


def to_sample(row: Row, kind: str, layout: Layout) -> Sample:
    """The sample of a row. Raises BadDataError naming file, line, column and what was found."""
    if kind == "pt":
        return Sample(row.file, row.line, text=_document(row, layout), index=row.index)
    if layout.name == "alpaca":
        turns = conversations.of_columns(row, layout.columns)
    else:
        turns = conversations.of_turns(row, layout.columns, layout.tags)
    return Sample(row.file, row.line, messages=turns, index=row.index)


def samples_of(
    rows: Iterator[Row], kind: str, layout: str, columns: Mapping[str, str], tags: Mapping[str, str]
) -> Iterator[Sample]:
    """All samples; each file's layout is found from its first row.

    Raises BadDataError as `find_layout` and `to_sample` do, and at a file's end where a column that the user named
    was in no row.
    """
    file: Path | None = None
    unseen: set[str] = set()
    chosen: Layout | None = None
    last: Row | None = None
    for row in rows:
        if chosen is None or row.file != file:
            _check_seen(unseen, last)
            chosen = find_layout(row, kind, layout, columns, tags)
            file, unseen = row.file, {chosen.columns[name] for name in chosen.named if name in chosen.columns}
        if unseen:
            unseen -= row.values.keys()
        yield to_sample(row, kind, chosen)
        last = row
    _check_seen(unseen, last)


def _check_seen(unseen: set[str], last: Row | None) -> None:
    if unseen and last is not None:
        raise BadDataError(
            f"{last.file}: no row has a column {sorted(unseen)[0]!r}, found {', '.join(last.values)}",
            "correct `columns`",
        )


def _guess(row: Row, kind: str, columns: dict[str, str]) -> str:
    """The layout that the columns show; the column of turns found is noted in `columns`."""
    if kind == "pt":
        return "text"
    given = columns.get("messages", "")
    if given and given not in row.values:
        raise conversations.missing(row, given)
    if not columns.get("instruction"):
        for name in [given] if given else ["messages", "conversations"]:
            if name in row.values:
                columns["messages"] = name
                return _turns_layout(row.values[name], name)
    if columns.get("output") or columns.get("instruction") or _pair(row):
        return "alpaca"
    pairs = ", ".join(" + ".join(pair) for pair in PAIRS)
    raise BadDataError(
        f"{row.place}: no columns known for kind sft; found {', '.join(row.values) or 'none'}",
        f"expected messages, conversations, or {pairs}; or name yours: columns: {{instruction: NAME, output: NAME}}",
    )


def _turns_layout(value: Any, name: str) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict):
        return "messages" if "role" in first else "sharegpt"
    return "messages" if name == "messages" else "sharegpt"


def _pair(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if set(pair) <= row.values.keys()), None)


def _document(row: Row, layout: Layout) -> str:
    """A text column; with layout alpaca LLaMA-Factory's rule for plain text: prompt, line break, query."""
    if layout.name == "text":
        return conversations.text_of(row, layout.columns["text"])
    return conversations.question_of(row, layout.columns)
