"""A search on disk, so that it can stop at any point and go on. One process writes.

WORKSPACE/runs/NAME/
  search.json         config, hashes of what is measured, versions: what the values depend on
  evaluations.jsonl   one line per mixture tried: {n, phase, point, sum, count, value, seconds}
  samples.jsonl       one line per sample of the mixtures compared in the end: {candidate, half, id, sum, count, ...}
  result.json         the comparison, computed from samples.jsonl
  uniform.yaml, layerwise.yaml    recipes of the two winners
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.atomic import NO_SPACE, write_json
from engine.errors import BadInputError, NoSpaceError, TargetExistsError
from engine.evaluate.search.space import Point

NOTE, EVALUATIONS, SAMPLES, RESULT, LOCK = (
    "search.json", "evaluations.jsonl", "samples.jsonl", "result.json", ".lock",
)  # fmt: skip
FORMAT = "medmerge.search/1"


class SearchLog:
    """The evaluations of one search folder. `recall` answers from the log, `add` appends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def writing(self, note: Mapping[str, Any], resume: bool) -> Iterator[None]:
        """Make the folder (or continue one), hold its lock, read what is there.

        Raises:
            TargetExistsError: it is there and `resume` is false.
            BadInputError: it is no search, one of other settings or inputs (named), or is being written.
        """
        path = self.folder / NOTE
        if self.folder.exists() and not resume:
            raise TargetExistsError(
                f"{self.folder} is already there", "choose another name, or continue it (--resume)"
            )
        if self.folder.exists() and not path.is_file() and any(self.folder.iterdir()):
            raise BadInputError(f"{self.folder} is not a search: it has no {NOTE}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadInputError(
                    f"{self.folder} is being written by another process", "see medmerge jobs"
                ) from error
            if path.is_file():
                _refuse_other(path, note)
            else:
                write_json(path, dict(note))
            self.rows = read_lines(self.folder / EVALUATIONS)
            yield

    def recall(self, n: int, point: Point) -> dict[str, Any] | None:
        """The row of evaluation n, None when it has not been done.

        Raises BadInputError when the n-th evaluation on disk was of another point: the search cannot go on from it.
        """
        if n >= len(self.rows):
            return None
        row = self.rows[n]
        if row.get("n") != n or tuple(row.get("point", ())) != point:
            raise BadInputError(
                f"{self.folder / EVALUATIONS} line {n + 1} is of another mixture than this search tries there",
                "start a new search under another name",
            )
        return row

    def add(self, row: Mapping[str, Any]) -> None:
        append_lines(self.folder / EVALUATIONS, [row])
        self.rows.append(dict(row))

    def samples(self, candidate: str, half: str, ids: Sequence[str]) -> list[dict[str, Any]] | None:
        """The kept rows of one candidate in the order of `ids`; None unless all are there."""
        kept = {
            row["id"]: row
            for row in read_lines(self.folder / SAMPLES)
            if row["candidate"] == candidate and row["half"] == half
        }
        return [kept[id_] for id_ in ids] if kept.keys() == set(ids) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a torn or damaged one and all after it are cut off the file."""
    if not path.is_file():
        return []
    rows, good = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        rows.append(row)
        good += len(line)
    if good < path.stat().st_size:
        os.truncate(path, good)
    return rows


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One write, fsynced. Raises NoSpaceError on a full disk."""
    data = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpaceError(f"no space left while writing {path}", "free some and resume") from error
        raise


def _refuse_other(path: Path, note: Mapping[str, Any]) -> None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path} cannot be read as JSON: {error}") from error
    now = json.loads(json.dumps(dict(note)))
    if not isinstance(kept, dict):
        raise BadInputError(f"{path} should hold a JSON object")
    differ = sorted(key for key in kept.keys() | now.keys() if kept.get(key) != now.get(key))
    if differ:
        raise BadInputError(
            f"{path} was written for another {', '.join(differ)} than given now",
            "a search is continued with its own config and inputs; give a changed one another name",
        )
