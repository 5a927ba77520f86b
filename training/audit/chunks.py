"""Training files cut into tasks, and what a worker does with one. Called by `report`.

A plain .jsonl is cut at line ends and read by the workers themselves; other formats are read here, row by row, and
handed over in lists of rows. The results do not depend on where the cuts are, nor on the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadDataError, ChildFailedError
from training.audit import repeats
from training.audit.fields import Reading, describe
from training.audit.index import TestIndex
from training.audit.scan import FOUND, Batch, matches
from training.data.rows import read_rows

RANGE = 16 << 20  # bytes of a .jsonl a task reads
HANDED = 4 << 20  # about the characters of rows handed over in a task of another format
ENCODED = 1 << 20  # characters compared at a time: small enough for the processor's caches
POOL_FROM = 48 << 20  # bytes of training data from which worker processes pay


@dataclass(frozen=True)
class Task:
    """A piece of training file `file`: a byte range of it, or the rows themselves with their places."""

    number: int
    file: int
    path: Path
    start: int = 0
    end: int = 0
    rows: tuple[dict[str, Any], ...] = ()
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What a task gives back.

    Attributes:
        rows: how many there were; `textless` of them hold no text.
        sample: the first row, described, for a message when no row of the file holds text.
        found: FOUND records, rows counted within the task; `tests` all test rows hit.
        hashes: of each row's whole, 0 for short ones. `bands` [rows, 16]: see `repeats`.
        counts: words of each row; the words themselves are in the task's scratch file.
        size: bytes (or characters) read, for the progress.
    """

    task: int
    file: int
    start: int
    end: int
    rows: int
    textless: int
    sample: str
    found: np.ndarray
    tests: np.ndarray
    hashes: np.ndarray
    bands: np.ndarray
    counts: np.ndarray
    size: int


@dataclass(frozen=True)
class Work:
    """What every task needs: where the index and the scratch files are, and how rows are read."""

    scratch: Path
    reading: Reading
    tests: bool
    index: TestIndex | None = None  # loaded once in each process

    def ready(self) -> Work:
        index = TestIndex.load(self.scratch / "index") if self.tests else None
        return Work(self.scratch, self.reading, self.tests, index)


def tasks(paths: list[Path]) -> Iterator[Task]:
    """The files cut up, in order. Raises what `read_rows` raises."""
    number = 0
    for file, path in enumerate(paths):
        if is_plain_jsonl(path):
            for start, end in _ranges(path):
                yield Task(number, file, path, start, end)
                number += 1
            continue
        rows: list[dict[str, Any]] = []
        places: list[str] = []
        size = 0
        for row in read_rows(path):
            rows.append(row.values)
            places.append(row.place)
            size += _weight(row.values)
            if size > HANDED:
                yield Task(number, file, path, 0, size, tuple(rows), tuple(places))
                number, rows, places, size = number + 1, [], [], 0
        if rows:
            yield Task(number, file, path, 0, size, tuple(rows), tuple(places))
            number += 1


def is_plain_jsonl(path: Path) -> bool:
    """Whether the file is JSON lines that can be cut by bytes."""
    return path.suffix.lower() in (".jsonl", ".ndjson") and path.is_file()


def _weight(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_weight(item) for item in value.values())
    return sum(_weight(item) for item in value) if isinstance(value, list) else 8


def _ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Byte ranges of about RANGE that end at line ends (a longer line is a range of its own)."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise BadDataError(f"cannot read {path}: {error.strerror}", "give a data file") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise BadDataError(f"{path} is empty", "give a file with one row a line")
        start = 0
        while start < size:
            file.seek(min(start + RANGE, size))
            file.readline(1 << 30)
            end = min(file.tell(), size)
            yield start, end
            start = end


def rows_of(task: Task) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a task and their places. Raises BadDataError naming file and line."""
    if task.rows:
        return list(task.rows), list(task.places)
    try:
        with task.path.open("rb") as file:
            file.seek(task.start)
            text = file.read(task.end - task.start).decode("utf-8-sig" if task.start == 0 else "utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line and not line.isspace()]
        if all(isinstance(row, dict) for row in rows):
            return rows, []
    except (ValueError, RecursionError, OSError):
        pass
    raise _fault(task.path)


def _fault(path: Path) -> BadDataError:
    """What the row reader says of a file that is broken somewhere."""
    try:
        for _ in read_rows(path):
            pass
    except BadDataError as error:
        return error
    return BadDataError(f"{path} changed while it was read", "let nothing write to it during the audit")


def perform(task: Task, work: Work) -> Done:
    """Read, compare with the index, and leave the words in the scratch file of the task for `repeats`."""
    rows, places = rows_of(task)
    found, tests, hashes, bands, counts = [], [], [], [], []
    textless, at = 0, 0
    with repeats.words_file(work.scratch, task.number).open("wb") as file:
        for first, last in _batches(rows):
            try:
                batch = Batch.read(
                    rows[first:last], work.reading, places[first:last] or [f"{task.path}"] * (last - first)
                )
            except UnicodeEncodeError:  # half a surrogate pair
                raise _fault(task.path) from None
            textless += int(np.count_nonzero(np.diff(batch.first) == 0))
            if work.index is not None:
                new, hit = matches(batch, work.index)
                new["row"] += at
                found.append(new)
                tests.append(hit)
            batch.words.codes.astype(np.uint32).tofile(file)
            hashes.append(batch.hashes)
            bands.append(repeats.bands(batch))
            counts.append(np.diff(batch.starts))
            at += last - first
    return Done(
        task=task.number,
        file=task.file,
        start=task.start,
        end=task.end,
        rows=len(rows),
        textless=textless,
        sample=describe(rows[0]) if rows else "",
        found=_joined(found, FOUND),
        tests=np.unique(_joined(tests, np.int32)),
        hashes=_joined(hashes, np.uint64),
        bands=_joined(bands, np.uint64, repeats.BANDS),
        counts=_joined(counts, np.int64),
        size=task.end - task.start,
    )


def _joined(parts: list[np.ndarray], kind: Any, width: int | None = None) -> np.ndarray:
    empty = np.empty((0, width) if width else 0, dtype=kind)
    return np.concatenate(parts) if parts else empty


def _batches(rows: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    first = size = 0
    for number, row in enumerate(rows, 1):
        size += _weight(row)
        if size >= ENCODED or number == len(rows):
            yield first, number
            first, size = number, 0


_work: Work | None = None  # of a worker process, set once when it starts


def _start(work: Work, parent: int) -> None:
    global _work
    os.environ["RAYON_NUM_THREADS"] = "1"
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # whoever stops the audit tells its parent, which ends the workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _work = work.ready()


def _leave_with(parent: int) -> None:
    """End this worker when the process that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _perform(task: Task) -> Done:
    assert _work is not None
    return perform(task, _work)


def run(work: Work, paths: list[Path], workers: int) -> Generator[Done, None, None]:
    """Every task done, in order; in this process with `workers` 0. A few tasks at a time are under way."""
    if not workers:
        ready = work.ready()
        for task in tasks(paths):
            yield perform(task, ready)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(work, os.getpid())
    )
    waiting: deque[Future[Done]] = deque()
    try:
        for task in tasks(paths):
            waiting.append(pool.submit(_perform, task))
            if len(waiting) > workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        pool.shutdown(wait=True)
    except BrokenProcessPool as error:
        raise ChildFailedError(
            "a worker of the audit died",
            "it may have run out of memory: give it fewer workers or smaller files",
        ) from error
    finally:
        for process in list((pool._processes or {}).values()):  # on error and cancel nothing may go on
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
