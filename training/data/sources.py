"""What a run reads: files with weights and layouts, as a config says it; samples of them, their keys and copies.

Called by `training.config` (parse_sources), `training.prepare` (the rest) and the preview.

    data: corpus.txt
    data: [a.jsonl, {path: b.csv, weight: 0.5, columns: {instruction: question, output: answer}}]
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadDataError, BadRecipeError
from training.data.rows import Row, data_files, read_rows
from training.data.samples import COLUMNS, LAYOUTS, TAGS, Layout, Sample, find_layout, samples_of
from training.data.texts import SPLITS

KEY_BYTES = 16
HEAVIEST = 1000.0


@dataclass(frozen=True)
class Source:
    """One file or folder of a run.

    Attributes:
        path: the file or folder.
        weight: how often every row is used in an epoch: 2 is twice, 0.5 is half of the rows, chosen by content.
        layout: how rows become samples: auto, text, alpaca, sharegpt or messages.
        split: how plain text becomes rows: auto, line, paragraph or document.
        columns: our column -> the file's (text, instruction, input, output, system, history, messages); "" is unused.
        tags: keys and roles of turns, as LLaMA-Factory names them (role_tag, content_tag, user_tag, ...).
        name: what to call it, for tables.
        limit: read the first rows only, so many; 0 reads all.
        sample: use so many rows, chosen by a hash of their number; 0 uses all.
    """

    path: str
    weight: float = 1.0
    layout: str = "auto"
    split: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    name: str = ""
    limit: int = 0
    sample: int = 0


@dataclass(frozen=True)
class DataFile:
    """What the manifest says about a data file, or a folder (then of all its files together)."""

    file: str
    sha256: str
    rows: int


def parse_sources(value: Any, where: str = "data") -> tuple[Source, ...]:
    """Sources from a config's value: a path, a mapping {path, weight, ...}, or a list of either.

    Raises BadRecipeError naming the key, with the nearest known one.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise BadRecipeError(f"{where} is empty", "name at least one file")
    several = isinstance(value, list | tuple) and len(items) > 1
    return tuple(_source(item, f"{where}[{n}]" if several else where) for n, item in enumerate(items))


def _source(item: Any, where: str) -> Source:
    if isinstance(item, Source):
        return item
    if isinstance(item, str | Path) and str(item):
        return Source(str(item))
    if not isinstance(item, Mapping):
        raise BadRecipeError(
            f"{where} must be a path or a mapping with `path`, found {item!r:.60}",
            f"known keys: {', '.join(one.name for one in fields(Source))}",
        )
    known = {one.name: one for one in fields(Source)}
    check_keys(item, known, where)
    if not isinstance(item.get("path"), str) or not item["path"]:
        raise BadRecipeError(f"{where}: path is missing", "each source names a file or folder")
    values: dict[str, Any] = dict(item)
    if "weight" in values:
        values["weight"] = _weight(values["weight"], where)
    for key in ("limit", "sample"):
        if key in values and (type(values[key]) is not int or values[key] < 0):
            raise BadRecipeError(f"{where}: {key} must be a whole number from 0, found {values[key]!r}")
    for key, choices in (("layout", LAYOUTS), ("split", SPLITS)):
        if key in values and values[key] not in choices:
            raise BadRecipeError(f"{where}: {key} is {values[key]!r}, expected one of {', '.join(choices)}")
    for key, names in {"columns": COLUMNS, "tags": TAGS}.items():
        if key in values:
            values[key] = _names(values[key], names, f"{where}.{key}")
    if not isinstance(values.get("name", ""), str):
        raise BadRecipeError(f"{where}: name must be a text, found {values['name']!r}")
    return Source(**values)


def check_keys(item: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """Raise BadRecipeError for the first unknown key, with the nearest known one."""
    names = list(known)
    for key in item:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BadRecipeError(f"{where}: unknown key {key!r}", f"{hint}known keys: {', '.join(names)}")


def _weight(value: Any, where: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 < value <= HEAVIEST:
        raise BadRecipeError(
            f"{where}: weight is {value!r}, expected a number above 0 and up to {HEAVIEST:g}",
            "2 uses every row twice in an epoch, 0.5 half of the rows; leave a file out to use none",
        )
    return float(value)


def _names(value: Any, known: tuple[str, ...], where: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value.values()):
        raise BadRecipeError(
            f"{where} must map names to texts, found {value!r:.60}", f"known: {', '.join(known)}"
        )
    check_keys(value, known, where)
    return dict(value)


def read_source(source: Source, kind: str) -> Iterator[Sample]:
    """The samples of a source, streamed; each counted once, whatever its weight. `kind` is "pt" or "sft".

    Raises BadDataError naming file, line and column.
    """
    return samples_of(_rows(source), kind, source.layout, source.columns, source.tags)


def layouts(source: Source, kind: str) -> dict[str, Layout]:
    """File -> the layout chosen for it from its first row; `str(layout)` says it."""
    found = {}
    for file in data_files(Path(source.path)):
        split = "document" if source.split == "auto" and Path(source.path).is_dir() else source.split
        row = next(read_rows(file, split=split))
        found[str(file)] = find_layout(row, kind, source.layout, source.columns, source.tags)
    return found


def _rows(source: Source) -> Iterator[Row]:
    def read() -> Iterator[Row]:
        rows = read_rows(Path(source.path), split=source.split)
        return islice(rows, source.limit) if source.limit else rows

    if not source.sample:
        return read()
    total = sum(1 for _ in read())
    if source.sample > total:
        raise BadDataError(
            f"{source.path}: a sample of {source.sample} rows was asked, there are {total}",
            "use `weight` to use rows more than once",
        )
    chosen = set(
        heapq.nsmallest(source.sample, range(total), key=lambda index: _hash(index.to_bytes(8, "big")))
    )
    return (row for row in read() if row.index in chosen)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def sample_key(sample: Sample) -> bytes:
    """16 bytes (BLAKE2b) of a sample's content; equal contents have equal keys, wherever they stand."""
    content = json.dumps(sample.messages, ensure_ascii=False) if sample.messages else sample.text
    return _hash(content.encode())


def copies(key: bytes, weight: float, seed: int) -> int:
    """How often a sample is used in an epoch: the weight's whole part, and once more for its fraction of the samples.

    Which samples those are hangs on seed and content alone, so order and number of files do not change it.
    """
    whole = math.floor(weight)
    share = weight - whole
    if not share:
        return whole
    drawn = int.from_bytes(_hash(b"copies:%d:" % seed + key)[:8], "big") / 2**64
    return whole + (drawn < share)


def held_out_keys(keys: np.ndarray | Iterable[bytes], count: int, seed: int) -> set[bytes]:
    """The keys of `count` different contents to hold out, chosen by a hash of seed and content.

    Raises BadDataError when that is more than half of the different rows: an eval split larger than the data.
    """
    distinct = {key.tobytes() for key in keys} if isinstance(keys, np.ndarray) else set(keys)
    if count > len(distinct) // 2:
        raise BadDataError(
            f"{count:,} held-out rows were asked of {len(distinct):,} different rows: the eval split is larger than "
            "what would be left to train on",
            f"hold out at most half: {len(distinct) // 2:,}",
        )
    return set(heapq.nsmallest(count, distinct, key=lambda key: (_hash(b"held out:%d:" % seed + key), key)))


def describe(source: Source) -> DataFile:
    """Name, SHA-256 of the bytes and number of rows, read as streams.

    A folder's SHA-256 is that of the lines "sha256  name" of its files in order, as `sha256sum` prints them.
    `limit`, `sample` and `weight` do not count: this is about the file.
    """
    path = Path(source.path)
    files = data_files(path)
    hashes = [_sha256(file) for file in files]
    rows = sum(1 for _ in read_rows(path, split=source.split))
    if not path.is_dir():
        return DataFile(path.name, hashes[0], rows)
    lines = [f"{value}  {file.relative_to(path)}\n" for value, file in zip(hashes, files, strict=True)]
    return DataFile(path.name, hashlib.sha256("".join(lines).encode()).hexdigest(), rows)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
