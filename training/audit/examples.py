"""Leaks with their texts side by side: what of the test row stands where in the training row. Called by `report`.

Only the rows shown are read again: in a .jsonl the byte range they lie in, in other formats the file up to them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.audit.fields import Reading, fields
from training.audit.text import word_spans
from training.data.rows import read_rows

LONGEST = 360  # characters of a text shown
BEFORE = 60  # of them before the first word that matches
RUN = 4  # words in a row that count as matching


def add_examples(
    result: dict[str, Any], reading: Reading, ranges: dict[str, list[tuple[int, int, int]]], count: int
) -> None:
    """Put result["examples"]: up to `count` leaks of each pair of files, of different detectors where there are some.

    An example is a leak with "train" and "test": [[text, whether it matches], ...], the pieces of an excerpt in order.
    """
    chosen: list[dict[str, Any]] = []
    by_pair: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for leak in result["leaks"]:
        by_pair[leak["train_file"], leak["test_file"]].append(leak)
    for leaks in by_pair.values():
        seen: set[int] = set()
        detectors: dict[str, int] = defaultdict(int)
        for leak in sorted(leaks, key=lambda leak: -leak["score"]):
            if len(seen) == count:
                break
            if leak["train_row"] not in seen and detectors[leak["detector"]] * 2 < count:
                seen.add(leak["train_row"])
                detectors[leak["detector"]] += 1
                chosen.append(leak)
    wanted: dict[str, set[int]] = defaultdict(set)
    for leak in chosen:
        wanted[leak["train_file"]].add(leak["train_row"])
        wanted[leak["test_file"]].add(leak["test_row"])
    rows = {file: _rows(Path(file), numbers, ranges.get(file)) for file, numbers in wanted.items()}
    result["examples"] = []
    for leak in chosen:
        train = _text(rows[leak["train_file"]].get(leak["train_row"], {}), reading)
        test = _text(rows[leak["test_file"]].get(leak["test_row"], {}), reading)
        left, right = side_by_side(train, test)
        result["examples"].append({**leak, "train": left, "test": right})


def _text(row: dict[str, Any], reading: Reading) -> str:
    return "\n".join(field.text for field in fields(row, reading)) if row else ""


def _rows(
    path: Path, wanted: set[int], ranges: list[tuple[int, int, int]] | None
) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    if ranges:
        firsts = [first for first, _, _ in ranges]
        for number in sorted({bisect_right(firsts, wish) - 1 for wish in wanted}):
            first, start, end = ranges[number]
            with path.open("rb") as file:
                file.seek(start)
                lines = file.read(end - start).decode("utf-8-sig").split("\n")
            for index, line in enumerate((line for line in lines if line.strip()), first):
                if index in wanted:
                    found[index] = json.loads(line)
        return found
    last = max(wanted)
    for row in read_rows(path):
        if row.index in wanted:
            found[row.index] = row.values
        if row.index >= last:
            break
    return found


Pieces = list[list[Any]]


def side_by_side(train: str, test: str) -> tuple[Pieces, Pieces]:
    """Excerpts of two texts around what they share: runs of at least RUN equal words are marked.

    Where no run is shared (source ids), both are shown from their beginning.
    """
    left, right = word_spans(train), word_spans(test)
    runs = {tuple(word for word, _, _ in right[i : i + RUN]) for i in range(len(right) - RUN + 1)}
    shared = {
        run
        for i in range(len(left) - RUN + 1)
        if (run := tuple(word for word, _, _ in left[i : i + RUN])) in runs
    }
    return _excerpt(train, left, shared), _excerpt(test, right, shared)


def _excerpt(text: str, spans: list[tuple[str, int, int]], shared: set[tuple[str, ...]]) -> Pieces:
    marked = [False] * len(spans)
    for i in range(len(spans) - RUN + 1):
        if tuple(word for word, _, _ in spans[i : i + RUN]) in shared:
            marked[i : i + RUN] = [True] * RUN
    start = max(0, _densest(spans, marked) - BEFORE)
    start = next((first for _, first, _ in spans if first >= start), start) if start else 0
    end = min(len(text), start + LONGEST)
    pieces: Pieces = [["…", False]] if start else []
    for piece, match in _pieces(text, spans, marked, start, end):
        if pieces and pieces[-1][1] == match:
            pieces[-1][0] += piece
        elif piece:
            pieces.append([piece, match])
    if end < len(text):
        pieces.append(["…", False])
    return pieces


def _densest(spans: list[tuple[str, int, int]], marked: list[bool]) -> int:
    """Where the LONGEST characters with the most matching words begin."""
    places = [start for (_, start, _), match in zip(spans, marked, strict=True) if match]
    best, most, last = 0, 0, 0
    for first, start in enumerate(places):
        while last < len(places) and places[last] < start + LONGEST - BEFORE:
            last += 1
        if last - first > most:
            best, most = start, last - first
    return best


def _pieces(
    text: str, spans: list[tuple[str, int, int]], marked: list[bool], start: int, end: int
) -> Iterable[tuple[str, bool]]:
    at = start
    before = False
    for (_, first, last), match in zip(spans, marked, strict=True):
        if last <= start or first >= end:
            continue
        yield (
            text[at : max(first, at)],
            before and match,
        )  # the space between two matching words belongs to them
        yield text[max(first, at) : min(last, end)], match
        at, before = min(last, end), match
    yield text[at:end], False
