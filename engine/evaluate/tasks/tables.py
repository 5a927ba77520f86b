"""Data files as rows with their place in the file: JSONL, JSON, CSV, TSV, Parquet, xlsx.

Called by engine/evaluate/data.py.

Nothing is guessed from the values: a CSV field is text, a cell of Parquet or xlsx that is a number becomes its text.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadDataError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".xlsx")
LONGEST_FIELD = 1 << 28  # characters of a CSV field; the module's default is 128 kB
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """places: "line 12" or "row 3" of each row, counted from 1. A row of JSON may lack columns that others have."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    places: list[str]


def read_table(path: Path, header: bool = True) -> Table:
    """All rows of a file, by its ending. `header`: the first line of a CSV or TSV holds names.

    Raises BadDataError naming file and line: unreadable, binary, not UTF-8, an unknown ending, broken syntax, a
    column or key that stands twice, no rows.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise BadDataError(
            f"{path} has the ending {ending or '(none)'}, which no reader here knows",
            f"known: {', '.join(ENDINGS)}",
        )
    if ending == ".parquet":
        rows = _cells(path, _parquet(path))
    elif ending == ".xlsx":
        rows = _cells(path, _xlsx(path))
    elif ending in (".csv", ".tsv"):
        rows = list(_delimited(path, _text(path), "," if ending == ".csv" else "\t", header))
    else:
        rows = list(_json(path, _text(path), lines_only=ending != ".json"))
    if not rows:
        raise BadDataError(f"{path} holds no samples")
    columns = dict.fromkeys(name for _, row in rows for name in row)
    return Table(path, tuple(columns), [row for _, row in rows], [place for place, _ in rows])


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadDataError(f"cannot read {path}: {error.strerror}") from error


def _text(path: Path) -> str:
    data = _bytes(path)
    if data.startswith(UTF16):
        raise BadDataError(f"{path} is UTF-16 text, and should be UTF-8", "save it as UTF-8")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise BadDataError(
            f"{path} is a binary file (a zero byte in line {line})", "give the text file itself"
        )
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadDataError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x})",
            f"save it as UTF-8, for example: iconv -f GB18030 -t UTF-8 {path.name}",
        ) from error


def _json(path: Path, text: str, lines_only: bool) -> Iterator[tuple[str, Row]]:
    """JSON lines, or one document: a list of objects, or a mapping of ids to objects (the id becomes column id)."""
    if not lines_only:
        try:
            whole = _loads(text)
        except ValueError as error:
            if not _is_lines(text):
                line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                raise BadDataError(f"{path}{line} is not JSON: {error}") from error
        else:
            yield from _document(path, whole)
            return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except ValueError as error:
            raise BadDataError(
                f"{path} line {number} is not JSON: {error}", "correct or remove that line"
            ) from error
        if not isinstance(row, dict):
            raise BadDataError(f"{path} line {number} should be a JSON object")
        yield f"line {number}", row


def _is_lines(text: str) -> bool:
    """Whether the first line is a JSON object by itself: JSON lines under the name .json."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(_loads(first), dict)
    except ValueError:
        return False


def _document(path: Path, whole: Any) -> Iterator[tuple[str, Row]]:
    if isinstance(whole, dict) and whole and all(isinstance(row, dict) for row in whole.values()):
        for number, (name, row) in enumerate(whole.items(), 1):
            yield f"row {number}", {"id": name, **row}
        return
    if isinstance(whole, dict) and whole and not any(isinstance(v, dict | list) for v in whole.values()):
        yield "row 1", whole  # JSON lines with one line
        return
    if not isinstance(whole, list):
        raise BadDataError(
            f"{path} should be a list of rows, or a mapping of ids to rows", "for example [{...}, {...}]"
        )
    for number, row in enumerate(whole, 1):
        if not isinstance(row, dict):
            raise BadDataError(f"{path} row {number} should be a JSON object")
        yield f"row {number}", row


def _loads(text: str) -> Any:
    """JSON without repeated keys. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"key {twice!r} stands twice")
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _delimited(path: Path, text: str, delimiter: str, header: bool) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            kind = "CSV" if delimiter == "," else "TSV"
            raise BadDataError(
                f"{path} line {line} is not valid {kind}: {error}",
                'a field with a quote, a delimiter or a line end is quoted, its quotes doubled: "a ""b"""',
            ) from error
        if fields is None:
            return
        if not fields:
            continue
        if names is None:
            names = fields if header else [f"column_{n}" for n in range(1, len(fields) + 1)]
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                hint = "name each column once; header: false for a file without names"
                raise BadDataError(f"{path} line {line}: column {twice[0]!r} stands twice", hint)
            if header:
                continue
        if len(fields) != len(names):
            wanted = f"the header has {len(names)}" if header else f"line 1 has {len(names)}"
            raise BadDataError(
                f"{path} line {line} has {len(fields)} fields, and {wanted}",
                "quote fields that hold the delimiter",
            )
        yield f"line {line}", dict(zip(names, fields, strict=True))


def _parquet(path: Path) -> Iterable[Row]:
    import polars as pl

    data = _bytes(path)
    try:
        return pl.read_parquet(io.BytesIO(data)).iter_rows(named=True)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise BadDataError(f"{path} is not a Parquet file: {error}") from error


def _xlsx(path: Path) -> Iterable[Row]:
    """The first sheet of a workbook."""
    try:
        import fastexcel
    except ImportError as error:
        raise BadDataError(
            f"{path}: reading .xlsx needs the package fastexcel",
            "pip install 'medmerge-tui[xlsx]', or save the sheet as CSV",
        ) from error
    import polars as pl

    data = _bytes(path)
    try:
        return pl.read_excel(io.BytesIO(data), engine="calamine").iter_rows(named=True)
    except pl.exceptions.NoDataError as error:
        raise BadDataError(f"{path} holds no samples") from error
    except (pl.exceptions.PolarsError, fastexcel.FastExcelError, OSError, ValueError) as error:
        raise BadDataError(f"{path} is not an xlsx workbook: {error}") from error


def _cells(path: Path, rows: Iterable[Row]) -> list[tuple[str, Row]]:
    """Rows of typed columns: numbers, dates and truth values become text (3.0 of a worksheet is 3)."""
    found = []
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if isinstance(value, bytes):
                raise BadDataError(f"{path} row {number}: column {name!r} holds bytes", "write it as text")
        found.append((f"row {number}", {name: _cell(value) for name, value in row.items()}))
    return found


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):  # what pandas writes for an empty cell
        return None
    if isinstance(value, list):
        return [_cell(item) for item in value]
    if isinstance(value, dict):  # a struct has all keys in all rows
        return {name: item for name, item in value.items() if item is not None}
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
