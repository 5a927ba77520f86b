"""Rows that repeat an earlier row of the training data: exactly, or nearly. Called by `chunks` and `report`.

Near: MinHash (128 permutations, 16 bands of 8; Broder 1997, and Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", section 3.4) proposes, the true Jaccard of the sets of 5-word shingles decides. A pair at J = 0.8 is proposed
with probability 1 - (1 - 0.8^8)^16 = 0.95. Words and band hashes lie in scratch files, one band is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.audit import limits
from training.audit.grams import inside, jaccard, shingles
from training.audit.scan import Batch
from training.audit.text import mixed

PERMUTATIONS, BANDS, SEED = 128, 16, 42
# Of a crowded bucket, each row is compared with this many of the first and of the ones before it.
COMPARED = 32
HELD = 1 << 23  # shingles kept in memory, 8 bytes each


@dataclass(frozen=True)
class Repeat:
    """Row `row` repeats the earlier row `of`, both counted through all training files."""

    row: int
    of: int
    near: bool
    score: float


def words_file(scratch: Path, task: int) -> Path:
    return scratch / f"words-{task}.u32"


def bands(batch: Batch) -> np.ndarray:
    """uint64 [rows, 16]: a hash of each band of each row's signature; 0 for rows without words."""
    from rensa import RMinHash

    n = limits.SHINGLE
    starts, lengths = batch.starts, np.diff(batch.starts)
    places = np.flatnonzero(inside(starts, n))
    hashes = batch.sequences.ngrams(n)[places]
    first = np.searchsorted(places, starts)
    short = np.flatnonzero((lengths > 0) & (lengths < n))
    if len(short):  # a text of fewer words is one shingle
        whole = batch.sequences.runs(starts[short], starts[short + 1])
        hashes = np.insert(hashes, first[short], whole)
        first = first + np.concatenate([[0], np.cumsum((lengths > 0) & (lengths < n))])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, first.tolist(), PERMUTATIONS, SEED)
    digest = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(lengths), BANDS, -1)
    out = np.zeros((len(lengths), BANDS), dtype=np.uint64)
    for column in range(digest.shape[2]):
        out = mixed(out * np.uint64(0x9E3779B97F4A7C15) + digest[:, :, column] + np.uint64(1))
    out[lengths == 0] = 0
    return out


class Collected:
    """What all rows leave behind, in the order of the files: a few numbers in memory, the rest in scratch files."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._files = [(scratch / f"band-{band}.u64").open("wb") for band in range(BANDS)]
        self._hashes: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._tasks: list[int] = [0]  # the first row of each task
        self._maps: dict[int, np.ndarray] = {}
        self._sets: dict[int, np.ndarray] = {}  # shingle sets used lately
        self._held = 0

    def add(self, hashes: np.ndarray, signature: np.ndarray, counts: np.ndarray) -> None:
        """The rows of the next task."""
        for band, file in enumerate(self._files):
            signature[:, band].tofile(file)
        self._hashes.append(hashes)
        self._counts.append(counts.astype(np.uint32))
        self._tasks.append(self._tasks[-1] + len(hashes))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def hashes(self) -> np.ndarray:
        """Of the whole of every row."""
        if len(self._hashes) > 1:
            self._hashes = [np.concatenate(self._hashes)]
        return self._hashes[0] if self._hashes else np.empty(0, dtype=np.uint64)

    def repeats(self) -> Iterator[Repeat | int]:
        """Every row that repeats an earlier one, once, `of` being the first it equals or a near one found first.

        Numbers in between say how many of the 16 bands are done.
        """
        self.close()
        hashes = self.hashes()
        if not len(hashes):
            return
        same = _equal_to_first(hashes)
        for row in np.flatnonzero(same != np.arange(len(hashes))).tolist():
            yield Repeat(row, int(same[row]), False, 1.0)
        distinct = np.flatnonzero((same == np.arange(len(hashes))) & (hashes != 0))
        repeated: set[int] = set()
        refused: set[tuple[int, int]] = set()
        for band in range(BANDS):
            column = np.fromfile(self._scratch / f"band-{band}.u64", dtype=np.uint64)[distinct]
            for row, others in _buckets(column, distinct):
                if row in repeated:
                    continue
                for other in others:
                    if (row, other) in refused:
                        continue
                    score = self.score(row, other)
                    if score > limits.JACCARD_LIMIT:
                        repeated.add(row)
                        yield Repeat(row, other, True, score)
                        break
                    if len(refused) < 1_000_000:
                        refused.add((row, other))
            yield band + 1

    def score(self, row: int, other: int) -> float:
        """The true Jaccard of two rows' shingle sets, 0 where their sizes already keep it below the limit."""
        left, right = self._shingles(row), self._shingles(other)
        if min(len(left), len(right)) <= limits.JACCARD_LIMIT * max(len(left), len(right)):
            return 0.0  # too different in size
        return jaccard(left, right)

    def _shingles(self, row: int) -> np.ndarray:
        known = self._sets.get(row)
        if known is None:
            known = self._sets[row] = shingles(self._words(row).astype(np.uint64))
            self._held += len(known)
            if self._held > HELD:
                self._sets, self._held = {row: known}, len(known)
        return known

    def _words(self, row: int) -> np.ndarray:
        task = int(np.searchsorted(self._tasks, row, side="right")) - 1
        if task not in self._maps:
            file = words_file(self._scratch, task)
            mapped = np.memmap(file, np.uint32, "r") if file.stat().st_size else np.empty(0, np.uint32)
            self._maps[task] = mapped.view(np.ndarray)
            self._counts[task] = np.concatenate([[0], np.cumsum(self._counts[task])]).astype(np.uint32)
        starts = self._counts[task]
        place = row - self._tasks[task]
        return self._maps[task][starts[place] : starts[place + 1]]


def _equal_to_first(hashes: np.ndarray) -> np.ndarray:
    """For every row the first row of the same hash; rows of hash 0 (too short) only equal themselves."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    out = np.empty(len(hashes), dtype=np.int64)
    out[order] = first
    return np.where(hashes == 0, np.arange(len(hashes)), out)


def _buckets(column: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, Sequence[int]]]:
    """(row, earlier rows of the same bucket to compare it with), row by row in each bucket."""
    order = np.argsort(column, kind="stable")
    ordered = column[order]
    borders = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    for start in np.flatnonzero(np.diff(borders) > 1).tolist():
        members = rows[order[borders[start] : borders[start + 1]]].tolist()
        for place in range(1, len(members)):
            if place <= 2 * COMPARED:
                yield members[place], members[:place]
            else:
                yield members[place], members[:COMPARED] + members[place - COMPARED : place]
