"""The audit over files: leaks between training and test files, repeats within the training files, as plain JSON.

Called by `training.audit.job` and by every training run. `rows_to_drop` says what a cleaned training set leaves out.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic import need_space
from engine.errors import BadDataError
from engine.jobs.events import EventWriter
from training.audit import chunks, limits
from training.audit.examples import add_examples
from training.audit.fields import Reading, describe
from training.audit.index import IndexBuilder
from training.audit.repeats import Collected, Repeat
from training.audit.scan import without_phrases
from training.data.rows import data_files, read_rows

SCRATCH_SHARE = 1.6  # bytes of scratch for a byte of training data: 4 a word, 128 a row; measured 0.7 to 1.2
EXAMPLES = 3  # for each pair of a training and a test file


class _Files:
    """Files with their rows counted through: which file and row is row number n?"""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.rows = [0] * len(paths)

    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.rows)])

    def locate(self, rows: np.ndarray) -> list[tuple[str, int]]:
        starts = self.starts()
        files = np.searchsorted(starts, rows, side="right") - 1
        return [
            (str(self.paths[file]), int(row - starts[file]))
            for file, row in zip(files.tolist(), np.asarray(rows).tolist(), strict=True)
        ]


def audit_files(
    train: Sequence[Path],
    test: Sequence[Path],
    events: EventWriter,
    *,
    column: str = "",
    id_columns: Sequence[str] = (),
    scratch: Path | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """What of the test files stands in the training files, and what repeats within these.

    Rows are counted from 0 in each file (a folder counts through its files). Memory does not grow with the training
    data but for about 40 bytes a row; scratch files need about as many bytes as the data, and are removed at the end.

    Args:
        train, test: data files or folders, as `training.data.rows.read_rows` reads them.
        events: progress in bytes of training data, phase "audit".
        column: the only column to compare; by default `text`, else all text columns.
        id_columns: further columns that hold source ids, besides those in `fields.ID_COLUMNS`.
        scratch: a folder to put scratch files in; by default the system's temporary folder.
        workers: processes; 0 for none; by default up to 2 where the data is large enough to pay.

    Returns:
        leaks: [{train_file, train_row, test_file, test_row, detector, score}], one for each pair and detector.
        duplicates: [{file, row, of_file, of_row, detector, score}], one for each row that repeats an earlier one.
        phrases: [{test_file, test_row, train_rows}], test rows that many different training rows hold in part.
        pairs: [{train_file, test_file, train_rows, test_rows, leaking_train_rows, leaked_test_rows, detectors}].
        examples: a few leaks of each pair with their texts (see `training.audit.examples`).
        counts: rows, leaks, leaking_train_rows, leaked_test_rows, duplicates, textless, templates, phrases.

    Raises:
        BadDataError: a file that cannot be read, holds no rows or no text, or lacks the column.
        NoSpaceError: too little room for the scratch files.
    """
    reading = Reading.of(column, id_columns)
    train_files, test_files = _Files(train), _Files(test)
    sizes = [sum(file.stat().st_size for file in data_files(path)) for path in train]
    builder = _index(test_files, reading, events)
    with scratch_folder(scratch, int(SCRATCH_SHARE * sum(sizes))) as folder:
        if test:
            builder.build().save(folder / "index")
        if workers is None:
            workers = min(2, os.cpu_count() or 1) if sum(sizes) >= chunks.POOL_FROM else 0
        work = chunks.Work(folder, reading, bool(test))
        collected = Collected(folder)
        try:
            found, hit, textless, ranges = _scan(work, train_files, sizes, workers, collected, events)
            found, phrases = without_phrases(found, collected.hashes())
            hit = hit[~np.isin(hit, phrases[:, 0])] if len(phrases) else hit
            repeats = _repeats(collected, events)
        finally:
            collected.close()
    result = _result(train_files, test_files, found, hit, phrases, repeats)
    result["counts"] |= {
        "textless": dict(textless),
        "templates": builder.templates,
        "phrases": len(phrases),
    }
    add_examples(result, reading, ranges, EXAMPLES)
    return result


def _index(files: _Files, reading: Reading, events: EventWriter) -> IndexBuilder:
    builder = IndexBuilder(reading)
    for number, path in enumerate(files.paths):
        events.progress(number, len(files.paths), "files", path.name, phase="reading test sets")
        first: dict[str, Any] = {}

        def rows(path: Path = path, first: dict[str, Any] = first) -> Iterator[tuple[str, dict[str, Any]]]:
            for row in read_rows(path):
                if not first:
                    first.update(row.values)
                yield row.place, row.values

        files.rows[number], textless = builder.add_file(rows())
        if textless == files.rows[number]:
            raise _no_text(path, describe(first))
    return builder


def _no_text(path: Path, columns: str) -> BadDataError:
    return BadDataError(
        f"{path}: no text to compare, its rows hold {columns}",
        "expected a column of text (text, question, prompt ...); name one with --column",
    )


@contextmanager
def scratch_folder(parent: Path | None, needed: int) -> Iterator[Path]:
    """A new folder for scratch files, removed at the end whatever happens. Raises NoSpaceError before anything."""
    place = parent or Path(tempfile.gettempdir())
    need_space(place, needed, "the audit's scratch")
    folder = Path(tempfile.mkdtemp(prefix="medmerge-audit-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _scan(
    work: chunks.Work,
    files: _Files,
    sizes: list[int],
    workers: int,
    collected: Collected,
    events: EventWriter,
) -> tuple[np.ndarray, np.ndarray, Counter[str], dict[str, list[tuple[int, int, int]]]]:
    """(FOUND records, test rows hit, rows without text by file, where rows lie in .jsonl files: row, start, end)."""
    total, at, row = sum(sizes), 0, 0
    found: list[np.ndarray] = []
    hit = np.empty(0, dtype=np.int32)
    textless: Counter[str] = Counter()
    ranges: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    samples: dict[int, str] = {}
    events.progress(0, total, "B", phase="audit")
    with closing(chunks.run(work, files.paths, workers)) as results:
        for done in results:
            path = files.paths[done.file]
            before = sum(sizes[: done.file])
            at = before + min(max(at - before, 0) + done.size, sizes[done.file])
            if done.rows:
                samples.setdefault(done.file, done.sample)
            if chunks.is_plain_jsonl(path):
                ranges[str(path)].append((files.rows[done.file], done.start, done.end))
            files.rows[done.file] += done.rows
            if done.textless:
                textless[str(path)] += done.textless
            collected.add(done.hashes, done.bands, done.counts)
            done.found["row"] += row
            found.append(done.found)
            hit = np.union1d(hit, done.tests)
            row += done.rows
            events.progress(at, total, "B", path.name, phase="audit")
    for number, path in enumerate(files.paths):
        if not files.rows[number]:
            raise BadDataError(f"{path} holds no rows", "is it empty?")
        if textless[str(path)] == files.rows[number]:
            raise _no_text(path, samples[number])
    events.progress(total, total, "B", phase="audit")
    textless += Counter()
    return np.concatenate(found), hit, textless, dict(ranges)


def _repeats(collected: Collected, events: EventWriter) -> list[Repeat]:
    found: list[Repeat] = []
    for item in collected.repeats():
        if isinstance(item, Repeat):
            found.append(item)
        else:
            events.progress(item, 16, "bands", f"{len(found):,} found", phase="repeats")
    return sorted(found, key=lambda repeat: repeat.row)


def _result(
    train: _Files,
    test: _Files,
    found: np.ndarray,
    hit: np.ndarray,
    phrases: np.ndarray,
    repeats: list[Repeat],
) -> dict[str, Any]:
    found = found[np.lexsort((found["detector"], found["test"], found["row"]))]
    left, right = train.locate(found["row"]), test.locate(found["test"])
    leaks = [
        {
            "train_file": train_file,
            "train_row": train_row,
            "test_file": test_file,
            "test_row": test_row,
            "detector": limits.DETECTORS[detector],
            "score": round(score, 4),
        }
        for (train_file, train_row), (test_file, test_row), detector, score in zip(
            left, right, found["detector"].tolist(), found["score"].tolist(), strict=True
        )
    ]
    copies, firsts = (
        train.locate(np.array([getattr(repeat, side) for repeat in repeats], dtype=np.int64))
        for side in ("row", "of")
    )
    duplicates = [
        {
            "file": file,
            "row": row,
            "of_file": of_file,
            "of_row": of_row,
            "detector": "near_duplicate" if repeat.near else "exact",
            "score": round(repeat.score, 4),
        }
        for (file, row), (of_file, of_row), repeat in zip(copies, firsts, repeats, strict=True)
    ]
    held = zip(test.locate(phrases[:, 0]), phrases[:, 1].tolist(), strict=True)
    return {
        "leaks": leaks,
        "duplicates": duplicates,
        "phrases": [{"test_file": file, "test_row": row, "train_rows": rows} for (file, row), rows in held],
        "pairs": _pairs(train, test, leaks),
        "counts": {
            "rows": {
                str(path): rows
                for files in (train, test)
                for path, rows in zip(files.paths, files.rows, strict=True)
            },
            "leaks": dict(Counter(leak["detector"] for leak in leaks)),
            "leaking_train_rows": len(np.unique(found["row"])),
            "leaked_test_rows": len(hit),
            "duplicates": dict(Counter(repeat["detector"] for repeat in duplicates)),
        },
    }


def _pairs(train: _Files, test: _Files, leaks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each training and test file: how many rows leak, in all and by detector (training rows)."""
    by_pair: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for leak in leaks:
        by_pair[leak["train_file"], leak["test_file"]].append(leak)

    def rows(of: list[dict[str, Any]], key: str) -> int:
        return len({leak[key] for leak in of})

    out = []
    for left, left_rows in zip(train.paths, train.rows, strict=True):
        for right, right_rows in zip(test.paths, test.rows, strict=True):
            mine = by_pair[str(left), str(right)]
            out.append(
                {
                    "train_file": str(left),
                    "test_file": str(right),
                    "train_rows": left_rows,
                    "test_rows": right_rows,
                    "leaking_train_rows": rows(mine, "train_row"),
                    "leaked_test_rows": rows(mine, "test_row"),
                    "detectors": {
                        name: rows([leak for leak in mine if leak["detector"] == name], "train_row")
                        for name in limits.DETECTORS
                    },
                }
            )
    return out


def rows_to_drop(
    result: dict[str, Any], *, leaks: bool = True, duplicates: str = "none"
) -> dict[str, dict[int, str]]:
    """{training file: {row: reason}} of what a cleaned training set leaves out, from the result of `audit_files`.

    Args:
        leaks: drop every training row that leaks a test row.
        duplicates: "none", "exact" (drop rows equal to an earlier one) or "near" (also near duplicates of one).
    """
    kinds = {"none": (), "exact": ("exact",), "near": ("exact", "near_duplicate")}[duplicates]
    dropped: dict[str, dict[int, str]] = defaultdict(dict)
    strongest: Callable[[dict[str, Any]], float] = lambda leak: -leak["score"]  # noqa: E731
    for leak in sorted(result["leaks"], key=strongest) if leaks else ():
        reason = f"{leak['detector']} {leak['score']:.2f} with {leak['test_file']} row {leak['test_row']}"
        dropped[leak["train_file"]].setdefault(leak["train_row"], reason)
    for repeat in result["duplicates"]:
        if repeat["detector"] in kinds:
            reason = f"repeats ({repeat['detector']} {repeat['score']:.2f}) {repeat['of_file']} row {repeat['of_row']}"
            dropped[repeat["file"]].setdefault(repeat["row"], reason)
    return {file: dict(sorted(rows.items())) for file, rows in dropped.items()}
