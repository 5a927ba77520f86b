"""Writes cleaned training files: every row but the ones to drop, and a list of these. Called by `job`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from engine.atomic import need_space, new_folder, write_json
from engine.errors import BadInputError
from engine.jobs.events import EventWriter
from training.audit.chunks import is_plain_jsonl
from training.audit.report import rows_to_drop
from training.data.rows import data_files, read_rows

DROPPED, REPORT = "dropped.jsonl", "audit.json"
Snapshot = dict[str, list[tuple[str, int, int]]]


def snapshot(paths: Sequence[Path]) -> Snapshot:
    """Size and time of every file, to see whether one changed between the audit and the writing."""
    return {
        str(path): [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in data_files(path)]
        for path in paths
    }


def write_clean(
    folder: Path,
    train: Sequence[Path],
    result: dict[str, Any],
    before: Snapshot,
    duplicates: str,
    events: EventWriter,
) -> dict[str, Any]:
    """Write `folder` whole or not at all: each training file without its dropped rows, dropped.jsonl and audit.json.

    JSON lines keep the very bytes of the lines that stay. Rows of other formats are written as JSON lines.

    Returns:
        {"folder", "files": [{train_file, file, rows, dropped, rewritten}], "dropped": {"leaks", "duplicates"}}.

    Raises:
        TargetExistsError, NoSpaceError: see `engine.atomic.new_folder`.
        BadInputError: a training file changed since the audit began.
    """
    leaks = rows_to_drop(result)
    everything = rows_to_drop(result, duplicates=duplicates)
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for leak in sorted(result["leaks"], key=lambda leak: -leak["score"]):
        best.setdefault((leak["train_file"], leak["train_row"]), leak)
    copies = {(repeat["file"], repeat["row"]): repeat for repeat in result["duplicates"]}
    need_space(
        folder.parent, sum(size for files in before.values() for _, size, _ in files), "the cleaned data"
    )
    summary: dict[str, Any] = {"folder": str(folder), "files": []}
    with new_folder(folder) as partial:
        names: set[str] = {DROPPED, REPORT}
        with (partial / DROPPED).open("w", encoding="utf-8") as list_file:
            for number, path in enumerate(train):
                events.progress(number, len(train), "files", path.name, phase="writing cleaned data")
                drop = everything.get(str(path), {})
                name = _name(path, names)
                names.add(name)
                with (partial / name).open("wb") as out:
                    kept = (_copy_lines if is_plain_jsonl(path) else _write_rows)(path, set(drop), out)
                for row, reason in drop.items():
                    entry = {"file": str(path), "row": row, "reason": reason}
                    if leak := best.get((str(path), row)):
                        entry |= {key: leak[key] for key in ("test_file", "test_row", "detector", "score")}
                    elif repeat := copies.get((str(path), row)):
                        entry |= {key: repeat[key] for key in ("of_file", "of_row", "detector", "score")}
                    list_file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                summary["files"].append(
                    {
                        "train_file": str(path),
                        "file": str(folder / name),
                        "rows": kept,
                        "dropped": len(drop),
                        "rewritten": not is_plain_jsonl(path),
                    }
                )
        if snapshot(train) != before:
            changed = next(name for name, files in snapshot(train).items() if files != before.get(name))
            raise BadInputError(
                f"{changed} changed during the audit", "let nothing write to it and start again"
            )
        both = sum(len(rows) for rows in everything.values())
        by_leak = sum(len(rows) for rows in leaks.values())
        summary["dropped"] = {"leaks": by_leak, "duplicates": both - by_leak}
        write_json(partial / REPORT, {**result, "cleaned": summary})
        events.progress(len(train), len(train), "files", phase="writing cleaned data")
    return summary


def _name(path: Path, taken: set[str]) -> str:
    """A file name for the cleaned rows of `path`: its own for .jsonl, else NAME.jsonl, numbered where it is taken."""
    stem = path.name if path.is_dir() else path.name.removesuffix(".gz").rpartition(".")[0]
    name = path.name if is_plain_jsonl(path) else f"{stem}.jsonl"
    number = 2
    while name in taken:
        name = f"{stem}-{number}.jsonl"
        number += 1
    return name


def _copy_lines(path: Path, drop: set[int], out: IO[bytes]) -> int:
    kept, row = 0, 0
    with path.open("rb") as file:
        for line in file:
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                keep = row not in drop
                row += 1
                kept += keep
                if not keep:
                    continue
            out.write(line)
    return kept


def _write_rows(path: Path, drop: set[int], out: IO[bytes]) -> int:
    kept = 0
    for row in read_rows(path):
        if row.index not in drop:
            out.write(json.dumps(row.values, ensure_ascii=False, default=str).encode() + b"\n")
            kept += 1
    return kept
