"""Refusal labels corrected by hand: kept apart from the rows, counted, and gone when the text they judged is.

RUN/corrections.jsonl, one line each, only appended to: {"cell", "id", "text_sha256", "label", "was", "note", "time"},
`was` being the automatic label of that moment. The last line of a key wins; label null takes a correction back.
The app and scripts write, tables read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from engine.claim import NO_SPACE
from engine.errors import BadInputError, NoSpaceError
from engine.evaluate.refusals import LABELS, label_answer
from engine.evaluate.rows import sha256
from engine.evaluate.store import RunStore
from engine.evaluate.think import split_think

FILE = "corrections.jsonl"
Key = tuple[str, str, str]  # cell hash, sample id, SHA-256 of the think-stripped text


def load(run: Path) -> dict[Key, str]:
    """The labels given by hand. A line that is torn or not understood is skipped.

    Raises BadInputError when the file is there and cannot be read: a table without it would be another table.
    """
    found: dict[Key, str] = {}
    path = run / FILE
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return found
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    for line in lines:
        try:
            told = json.loads(line)
            key, label = (str(told["cell"]), str(told["id"]), str(told["text_sha256"])), told["label"]
        except (ValueError, KeyError, TypeError):
            continue
        if label is None:
            found.pop(key, None)
        elif label in LABELS:
            found[key] = label
    return found


def write(run: Path, cell: str, sample: str, label: str | None, note: str = "") -> None:
    """Correct the label of one stored answer (None: back to the automatic one); one line, fsynced.

    Raises BadInputError: an unknown label, no such answer in a done cell of this run, or a file that cannot be
    written. NoSpaceError: the disk is full.
    """
    if label is not None and label not in LABELS:
        raise BadInputError(f"{label!r} is no label of an answer", f"known: {', '.join(LABELS)}")
    text = _text(run, cell, sample)
    line = {
        "cell": cell, "id": sample, "text_sha256": sha256(text), "label": label, "was": label_answer(text),
        "note": note, "time": round(time.time(), 3),
    }  # fmt: skip
    _append(run / FILE, (json.dumps(line, ensure_ascii=False) + "\n").encode())


def _append(path: Path, data: bytes) -> None:
    """One write of one line, fsynced; of two writers one waits for the other."""
    try:
        with path.open("ab+") as file:
            with contextlib.suppress(OSError):  # a file system without locks: appending is still one write
                fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a torn line of a killed process
                    data = b"\n" + data
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kind = NoSpaceError if error.errno in NO_SPACE else BadInputError
        raise kind(f"cannot write {path}: {error.strerror}; the label is not kept") from error


def stamp(run: Path) -> list[int]:
    """Changes when the corrections do: size and time of the file, [] without one."""
    try:
        stat = (run / FILE).stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _text(run: Path, cell: str, sample: str) -> str:
    store = RunStore(run)
    if not store.is_done(cell):
        raise BadInputError(
            f"{run.name} has no finished cell {cell}", "labels are corrected when a cell is done"
        )
    rows: list[dict[str, Any]] = [row for row in store.frame(cell).to_dicts() if row["id"] == sample]
    if not rows or "raw" not in rows[0]:
        raise BadInputError(f"cell {cell} of {run.name} has no answer {sample!r}")
    return split_think(str(rows[0]["raw"]), opened=bool(rows[0].get("opened"))).answer
