"""Which texts of a row the audit compares, and which of its columns are source ids. Used by index, scan and examples.

Rule: the column `--column` where one is given, else the column `text`, else all columns that hold text (texts, lists
and objects of texts, the contents of messages and conversations), in their order. The *whole* is all of these joined;
each is a *field* that is compared on its own too. Columns that only name a row (id, url, source ...) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from engine.errors import BadDataError

LABELS = frozenset({
    "id", "idx", "index", "uid", "uuid", "guid", "key", "source", "sources", "url", "link", "file", "filename",
    "path", "split", "license", "licence", "dataset", "collection", "hash", "sha256", "date", "lang", "language",
    "role", "from",
})  # fmt: skip
LABEL_WORDS = 8  # a value of this many words is text, whatever its column is called
ID_COLUMNS = {  # column -> what it numbers: PMIDs are the same thing under three names
    "pmid": "pmid",
    "pubmed_id": "pmid",
    "pubid": "pmid",
    "question_id": "question_id",
    "qid": "question_id",
    "document_id": "document_id",
    "doc_id": "document_id",
}
ASKING = frozenset({"text", "question", "prompt", "instruction", "input", "query", "problem", "content"})
OPTIONS = frozenset(
    {"options", "choices", "opa", "opb", "opc", "opd", "ending0", "ending1", "ending2", "ending3"}
)
ANSWERING = ("assistant", "gpt", "model", "function_call")
_CLOSERS = " \t\n\r\"'”’)）」』"
_SEPARATORS = re.compile(r"[\s-]+")


@dataclass(frozen=True)
class Reading:
    """How rows are read: `column` is the one to compare ("" by the rule above), `ids` column -> what it numbers."""

    column: str = ""
    ids: tuple[tuple[str, str], ...] = tuple(ID_COLUMNS.items())

    @cached_property
    def numbered(self) -> dict[str, str]:
        return dict(self.ids)

    @classmethod
    def of(cls, column: str = "", id_columns: Sequence[str] = ()) -> Reading:
        named = {plain_name(name): plain_name(name) for name in id_columns}
        return cls(column, tuple({**named, **ID_COLUMNS}.items()))


@dataclass(frozen=True)
class Field:
    """One text of a row.

    Attributes:
        asks: it puts the question (a column such as question or prompt, a user's turn, a text that ends in "?").
            Half of a question copied is a copy; of an answer of a sentence or two it may be a phrase all answers use.
        listed: it stands in a list of texts or is the options of a multiple choice. Two rows may share such names and
            be strangers.
    """

    text: str
    asks: bool = True
    listed: bool = False


@lru_cache(maxsize=4096)
def plain_name(column: str) -> str:
    return _SEPARATORS.sub("_", column.strip().lower())


def fields(row: dict[str, Any], reading: Reading, place: str = "") -> list[Field]:
    """The texts of a row; empty when it holds none. Raises BadDataError when the column asked for is missing."""
    if reading.column:
        if reading.column not in row:
            raise BadDataError(
                f"{place}: no column {reading.column!r}; it has {', '.join(map(str, row)) or 'none'}",
                "name one of these with --column, or leave it out to compare all text columns",
            )
        return list(_texts(row[reading.column], asks=True))
    text = row.get("text")
    if isinstance(text, str) and text.strip():
        return [Field(text)]
    found: list[Field] = []
    for column, value in row.items():
        name = plain_name(str(column))
        if name in reading.numbered:
            continue
        if name in LABELS and not (isinstance(value, str) and len(value.split()) >= LABEL_WORDS):
            continue
        found += _texts(value, name in ASKING, name in OPTIONS)
    options = {field.text for field in found if field.listed}
    if not options:
        return found
    return [
        Field(field.text, False, True) if field.text in options else field
        for field in found
        if field.text.strip()
    ]


def source_ids(row: dict[str, Any], reading: Reading) -> list[tuple[str, str]]:
    """(what it numbers, value as text) of every id column that holds a value."""
    found = []
    for column, value in row.items():
        kind = reading.numbered.get(plain_name(str(column)))
        if kind is None or value is None or isinstance(value, bool | list | dict):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of integers with gaps, as tables give it
        if text := str(value).strip():
            found.append((kind, text))
    return list(dict.fromkeys(found))


def describe(row: dict[str, Any]) -> str:
    """The columns of a row with what they hold, for messages."""
    return ", ".join(f"{column} ({type(value).__name__})" for column, value in row.items()) or "no columns"


def _texts(value: Any, asks: bool, listed: bool = False) -> Iterator[Field]:
    if isinstance(value, str):
        if value.strip():
            yield Field(value, not listed and (asks or value.rstrip(_CLOSERS).endswith(("?", "？"))), listed)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and (turn := _turn(item)) is not None:
                yield turn
            else:
                yield from _texts(item, asks, True)
    elif isinstance(value, dict):
        for key, item in value.items():
            if plain_name(str(key)) not in LABELS:
                yield from _texts(item, asks, True)


def _turn(item: dict[str, Any]) -> Field | None:
    """A message ({role, content} or {from, value}), None for other objects and for empty ones."""
    for who, what in (("role", "content"), ("from", "value")):
        content = item.get(what)
        if who in item and isinstance(content, str):
            return Field(content, item[who] not in ANSWERING)
    return None
