"""Rows of tables: CSV and TSV with a header row, Parquet in batches, the one sheet of an .xlsx workbook.

Called by `training.data.rows`.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from training.data import encoded

BATCH_BYTES = 16 << 20  # of a Parquet file in memory at a time, in rows by the size of those before
BATCH_ROWS = (64, 8192)
LONGEST_FIELD = 16 << 20  # characters; an unclosed quote would else swallow the file


def read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1 where it starts, row) of every record; quoted fields may hold line ends."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))  # the module's default is 128 kB
    reader = csv.reader((line for _, line in encoded.lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise BadDataError(
                f"{path}, line {line}: not valid {path_kind(delimiter)} ({error})",
                'a field that holds a quote, the delimiter or a line end is quoted, its quotes doubled: "a ""b"""',
            ) from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            repeated = [name for name, count in Counter(fields).items() if count > 1]
            if repeated:
                raise BadDataError(
                    f"{path}, line {line}: column name {repeated[0]!r} stands there twice",
                    "name each column once",
                )
            header = fields
            continue
        if len(fields) != len(header):
            raise BadDataError(
                f"{path}, line {line}: {len(fields)} fields, the header has {len(header)} ({', '.join(header)})",
                "quote fields that hold the delimiter",
            )
        yield line, dict(zip(header, fields, strict=True))


def path_kind(delimiter: str) -> str:
    return "CSV" if delimiter == "," else "TSV"


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(record number from 1, row). In memory: the packed columns of a row group, and BATCH_BYTES of rows."""
    import polars
    from polars.exceptions import PolarsError

    _readable(path)
    try:
        # Slices, not polars' own batches: those hold a row group unpacked, and read the next ones ahead.
        table = polars.scan_parquet(path, glob=False, low_memory=True)
        total = table.select(polars.len()).collect().item()
        number, wanted = 0, BATCH_ROWS[0]
        while number < total:
            batch = table.slice(number, wanted).collect()
            for row in batch.iter_rows(named=True):
                number += 1
                yield number, row
            per_row = max(1, int(batch.estimated_size()) // max(1, batch.height))
            wanted = min(max(BATCH_BYTES // per_row, BATCH_ROWS[0]), BATCH_ROWS[1])
    except PolarsError as error:
        raise BadDataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def read_xlsx(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(record number from 1, row) of the only sheet that is not empty. The workbook is read whole."""
    import polars

    _readable(path)
    try:
        sheets = polars.read_excel(
            path, sheet_id=0, engine="calamine", infer_schema_length=None, raise_if_empty=False
        )
    except ModuleNotFoundError as error:
        raise BadDataError(
            f"{path}: reading .xlsx needs the package fastexcel, which is not installed",
            "pip install fastexcel, or save the sheet as CSV",
        ) from error
    except Exception as error:  # fastexcel has an error class of its own, and may be absent
        raise BadDataError(f"{path}: not a readable .xlsx workbook ({str(error).splitlines()[0]})") from error
    filled = {name: sheet for name, sheet in sheets.items() if sheet.height}
    if len(filled) > 1:
        raise BadDataError(
            f"{path}: {len(filled)} sheets hold rows ({', '.join(filled)}), expected one",
            "save the sheets as CSV files and name those",
        )
    for sheet in filled.values():
        yield from enumerate(sheet.iter_rows(named=True), 1)


def _readable(path: Path) -> None:
    with encoded.opened(path) as file:
        if not file.read(1):
            raise BadDataError(f"{path} is empty")
