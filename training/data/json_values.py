"""Rows from JSON: JSON lines, and JSON documents of any size read value by value.

Called by `training.data.rows`. A document is a list of objects, {"data": [objects]}, an object of objects (each
key becomes the column "id") or an object of columns ({"text": [...], ...}, which alone is held in memory).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from training.data import encoded

NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
CONVERSATIONS = ("messages", "conversations")  # a column of this name alone is one row's conversation
_decode = json.JSONDecoder().raw_decode


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank."""
    for number, line in encoded.lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadDataError(
                f"{path}, line {number}: not valid JSON ({_reason(error)}{_column(error)})",
                "one JSON object on each line, UTF-8",
            ) from error
        if not isinstance(row, dict):
            raise BadDataError(
                f"{path}, line {number}: expected an object, found {name(row)}",
                "a JSON document (a list of objects) should end in .json"
                if isinstance(row, list) and number == 1
                else "one JSON object on each line",
            )
        if SURROGATE.search(line):
            _check_surrogates(row, f"{path}, line {number}")
        yield number, row


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(record number from 1, object) of a .json file, (line number, object) where it holds JSON lines."""
    if _is_lines(path):
        return read_lines(path)
    return _rows(path)


def name(value: object) -> str:
    """What a JSON value is, for messages."""
    return NAMES.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _is_lines(path: Path) -> bool:
    """Whether an object stands on one line with more after it, or alone and is one row."""
    text = _Text(path)
    kinds: dict[str, type] = {}
    try:
        if text.peek() != "{":
            return False
        text.take("{")
        text.crossed_line = False
        while text.peek() == '"':
            key = text.value()
            text.take(":")
            kinds[key] = type(text.value())
            if text.crossed_line or text.read > encoded.LARGEST:
                return False
            if text.take(",}") == "}":
                return bool(text.peek()) or _is_row(kinds)
        text.take("}")
        return bool(text.peek())
    except BadDataError:
        return False  # what is broken is said by the reader of documents, or of lines where more follows


def _is_row(kinds: dict[str, type]) -> bool:
    """Whether a document that is one object is one row, and not rows by key or columns."""
    found = set(kinds.values())
    if "data" in kinds or found == {dict}:
        return False
    return found != {list} or set(kinds) <= set(CONVERSATIONS)


class _Text:
    """The text of a document through a window that moves on: `peek` and `value` at the place reached so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chunks = encoded.chunks(path)
        self._window, self._at, self._lines, self._ended = "", 0, 0, False
        self._last = 0  # where the value taken last begins: places are counted for messages only
        self.read = 0  # characters
        self.crossed_line = False  # whether a line ended between two values

    def peek(self) -> str:
        """The next character that is not space, "" at the end."""
        while True:
            match = SPACE.match(self._window, self._at)
            if match and match.end() > self._at:
                self.crossed_line = self.crossed_line or "\n" in match.group()
                self._at = match.end()
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Steps over the next character, which must be one of `wanted`."""
        found = self.peek()
        self._last = self._at
        if not found or found not in wanted:
            shown = f"found {found!r}" if found else "the file ends"
            raise self.broken(f"expected {' or '.join(wanted)}, {shown}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The JSON value that starts here."""
        self.peek()
        self._last = self._at
        while True:
            try:
                value, end = _decode(self._window, self._at)
            except (ValueError, RecursionError) as error:
                if not self._may_be_cut(error) or not self._more():
                    raise self.broken(_reason(error), error) from error
                continue
            # A number may go on in the next chunk; all else ends with its own mark.
            if end < len(self._window) or isinstance(value, dict | list | str) or not self._more():
                break
        if SURROGATE.search(self._window, self._at, end):
            _check_surrogates(value, self.place())
        self._at = end
        return value

    def place(self, at: int | None = None) -> str:
        """File and line, as messages name them; of the value taken last where no position is given."""
        line = self._lines + self._window.count("\n", 0, self._last if at is None else at) + 1
        return f"{self.path}, line {line}"

    def broken(self, reason: str, error: Exception | None = None) -> BadDataError:
        at = error.pos if isinstance(error, json.JSONDecodeError) else None
        return BadDataError(
            f"{self.place(at)}: not valid JSON ({reason})",
            "a list of objects was expected; one object on each line should end in .jsonl",
        )

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether the error can come from the window's end alone, so that a longer one may decode."""
        if not isinstance(error, json.JSONDecodeError) or len(self._window) - self._at > encoded.LARGEST:
            return False
        return error.pos > len(self._window) - 16 or error.msg.startswith("Unterminated string")

    def _more(self) -> bool:
        """Another chunk, or as much again as the value begun here already has (so that long values stay linear)."""
        wanted = max(1, len(self._window) - self._at)
        parts = []
        while wanted > 0 and not self._ended:
            chunk = next(self._chunks, "")
            self._ended = not chunk
            parts.append(chunk)
            wanted -= len(chunk)
            self.read += len(chunk)
        if not any(parts):
            return False
        self._lines += self._window.count("\n", 0, self._at)
        self._window = self._window[self._at :] + "".join(parts)
        self._last = max(0, self._last - self._at)
        self._at = 0
        return True


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _Text(path)
    opening = text.peek()
    if opening == "[":
        yield from _items(text)
    elif opening == "{":
        yield from _members(text)
    elif opening:
        found = name(text.value())
        raise BadDataError(f"{text.place()}: expected a list of objects, found {found}")
    if rest := text.peek():
        raise text.broken(f"more after the end of the document, beginning with {rest!r}")


def _items(text: _Text) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of the list that starts here."""
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    number = 0
    while True:
        number += 1
        row = text.value()
        if not isinstance(row, dict):
            raise BadDataError(f"{text.place()}: record {number} should be an object, found {name(row)}")
        yield number, row
        if text.take(",]") == "]":
            return


def _members(text: _Text) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of the object that starts here: its "data", its objects, or its columns."""
    text.take("{")
    columns: dict[str, Any] = {}
    number, listed = 0, False
    while text.peek() != "}" or number or columns or listed:
        if text.peek() != '"':
            raise text.broken("expected a key in double quotes")
        key = text.value()
        text.take(":")
        if text.peek() == "[" and key == "data" and not number:
            listed = True
            yield from _items(text)
        else:
            value = text.value()
            if isinstance(value, dict) and not columns and not listed:
                number += 1
                yield number, {"id": key, **value}
            elif number:
                raise BadDataError(
                    f"{text.place()}: {key!r} should be an object as before, found {name(value)}"
                )
            elif not listed:
                columns[key] = value
                if text.read > encoded.LARGEST:
                    raise BadDataError(
                        f"{text.path}: an object of columns larger than {encoded.LARGEST >> 20} MB",
                        "write it as JSON lines (.jsonl), CSV or Parquet",
                    )
        if text.take(",}") == "}":
            break
    else:
        text.take("}")
    if not listed and columns:
        yield from _columns(columns, text.path)


def _columns(columns: dict[str, Any], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, values in columns.items():
        if not isinstance(values, list):
            raise BadDataError(
                f"{path}: an object whose {key!r} is {name(values)}",
                'expected a list of objects, {"data": [objects]}, an object of objects, or columns that are lists',
            )
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise BadDataError(f"{path}: columns of different lengths {lengths}")
    for number, row in enumerate(zip(*columns.values(), strict=True), 1):
        yield number, dict(zip(columns, row, strict=True))


def _check_surrogates(row: Any, place: str) -> None:
    """Half of a surrogate pair is no character: no tokenizer and no file can hold it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise BadDataError(
            f"{place}: \\u{ord(found):04x} is half of a surrogate pair, not a character"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at").removesuffix(" starting")
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _column(error: Exception) -> str:
    return f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
