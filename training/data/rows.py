"""Any data file or folder as rows, streamed. Called by samples, sources, the leakage audit and the previews.

`read_rows(path)` knows the format by the file's name. Text files give rows {"text": …}, tables give a column each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from training.data import json_values, tables, texts

Numbered = Iterator[tuple[int, dict[str, Any]]]
TEXT_SUFFIXES = (".txt", ".md", ".text")
READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": json_values.read_lines,
    ".ndjson": json_values.read_lines,
    ".json": json_values.read,
    ".csv": partial(tables.read_csv, delimiter=","),
    ".tsv": partial(tables.read_csv, delimiter="\t"),
    ".parquet": tables.read_parquet,
    ".xlsx": tables.read_xlsx,
}
PACKABLE = (*TEXT_SUFFIXES, ".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # read from .gz too
# Files that stand beside data and are not data: a folder's notes must not be trained.
BESIDE = ("readme", "license", "licence", "notice", "sources")


RECORDS = (".json", ".parquet", ".xlsx")  # formats whose rows have a number, not a line


@dataclass(frozen=True)
class Row:
    """One record: where it stands and what its columns hold.

    Attributes:
        index: counted from 0 through everything read from the path given (a folder's files in their order).
        line: from 1: the line where the record starts in `file` (text, JSON lines, CSV), else the record's number.
        values: column -> value.
        file: the file it is in.
    """

    index: int
    line: int
    values: dict[str, Any]
    file: Path

    @property
    def place(self) -> str:
        return place(self.file, self.line)


def read_rows(path: Path, *, split: str = "auto") -> Iterator[Row]:
    """Every record of a file, or of every readable file below a folder in the order of their names.

    Args:
        path: a file or folder.
        split: how plain text becomes rows: "line", "paragraph" (separated by blank lines), "document" (a file is one
            row), or "auto": paragraphs of a file, documents of a folder's files. Other formats have rows already.

    Raises:
        BadDataError: at once for a path that cannot be read or a name of no known format; while reading for an
            empty file, another encoding than UTF-8 or a broken record, naming file and line.
    """
    if split not in texts.SPLITS:
        raise BadDataError(f"split is {split!r}, expected one of {', '.join(texts.SPLITS)}")
    files = data_files(path)
    if split == "auto" and path.is_dir():
        split = "document"
    readers = [(file, _reader(file, split)) for file in files]
    return _numbered(readers)


def data_files(path: Path) -> list[Path]:
    """The file itself, or a folder's readable files at any depth, sorted by name.

    Hidden files, README, LICENSE and the like, and dataset_info.json are left out of a folder.
    Raises BadDataError for a missing path, an unknown format and a folder without a readable file.
    """
    if not path.is_dir():
        if not path.exists():
            raise BadDataError(f"{path} does not exist", "give a data file or a folder of them")
        if _format(path) is None:
            raise BadDataError(f"{path}: unknown format {path.suffix!r}", f"known formats: {known()}")
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_data(file.relative_to(path))]
    if not files:
        raise BadDataError(f"{path} holds no readable data file", f"known formats: {known()}")
    return files


def place(file: Path, line: int) -> str:
    """Where a row stands, for messages."""
    return f"{file}, {'record' if _format(file) in RECORDS else 'line'} {line}"


def known() -> str:
    """The formats, for messages."""
    return ", ".join((*TEXT_SUFFIXES, *READERS)) + "; .gz of all but .parquet and .xlsx"


def _format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in PACKABLE else None
    return suffix if suffix in TEXT_SUFFIXES or suffix in READERS else None


def _is_data(name: Path) -> bool:
    if any(part.startswith(".") for part in name.parts) or name.name == "dataset_info.json":
        return False
    return _format(name) is not None and name.name.partition(".")[0].lower() not in BESIDE


def _reader(path: Path, split: str) -> Callable[[], Numbered]:
    suffix = _format(path) or ""
    return partial(texts.read, path, split) if suffix in TEXT_SUFFIXES else partial(READERS[suffix], path)


def _numbered(readers: list[tuple[Path, Callable[[], Numbered]]]) -> Iterator[Row]:
    index = 0
    for file, reader in readers:
        before = index
        for line, values in reader():
            yield Row(index, line, values, file)
            index += 1
        if index == before:
            raise BadDataError(f"{file} holds no rows", "is it empty, or a header alone?")
