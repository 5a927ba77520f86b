"""Training rows against the index of the test sets, a batch at a time; and what each row leaves for the search for
repeats. The inner loop of the audit, run in workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.audit import limits
from training.audit.fields import Reading, fields, source_ids
from training.audit.grams import Sequences, common_count, jaccard, shingles
from training.audit.index import Postings, TestIndex, lookup, possible
from training.audit.text import Words, encode

EXACT, NEAR, WORDS_8, WORDS_13, WORDS_5, CJK_5, SOURCE = range(7)
EXPANDED = 1 << 21  # (row, test text) pairs counted at a time
FOUND = np.dtype([("row", np.int64), ("test", np.int32), ("detector", np.int8), ("score", np.float32)])


@dataclass(frozen=True)
class Batch:
    """Rows read: row i has the texts first[i]:first[i + 1] of `words`, and the words starts[i]:starts[i + 1]."""

    words: Words
    first: np.ndarray
    starts: np.ndarray
    sequences: Sequences
    ids: list[list[tuple[str, str]]]

    @classmethod
    def read(cls, rows: Sequence[dict[str, Any]], reading: Reading, places: Sequence[str] = ()) -> Batch:
        found = [
            fields(row, reading, places[number] if places else f"row {number}")
            for number, row in enumerate(rows)
        ]
        words = encode([field.text for row in found for field in row])
        first = np.cumsum([0, *map(len, found)])
        ids = [source_ids(row, reading) for row in rows]
        return cls(words, first, words.starts[first], Sequences(words.codes), ids)

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def hashes(self) -> np.ndarray:
        """Of the whole of every row; rows too short to compare get 0."""
        out = self.sequences.runs(self.starts[:-1], self.starts[1:])
        characters = np.concatenate([[0], np.cumsum(self.words.cjk)])[self.starts]
        lengths = np.diff(self.starts) - np.diff(characters) / 2
        return np.where(lengths >= limits.MIN_EXACT[limits.ASKING], out, np.uint64(0))

    def texts_of(self, row: int) -> list[np.ndarray]:
        """The whole, and each field where there are several."""
        whole = self.words.codes[self.starts[row] : self.starts[row + 1]]
        first, last = int(self.first[row]), int(self.first[row + 1])
        return [whole] if last - first < 2 else [whole, *(self.words.of(text) for text in range(first, last))]


def matches(batch: Batch, index: TestIndex) -> tuple[np.ndarray, np.ndarray]:
    """(FOUND records: the best score of each (row, test row, detector), test rows hit by any).

    At most LISTED_ROWS test rows are listed for a training row and detector, the best scores first; the second
    array holds all of them.
    """
    parts = [_exact(batch, index), _by_id(batch, index)]
    starts = possible(batch.sequences.ngrams(limits.SHINGLE), index.postings[0].maybe)
    for posting in index.postings:
        parts += _contained(batch, index, posting, starts)
    found = np.concatenate(parts)
    if not len(found):
        return found, np.empty(0, dtype=np.int32)
    order = np.lexsort((found["test"], -found["score"], found["detector"], found["row"]))
    found = found[order]
    key = np.stack([found["row"], found["detector"], found["test"]])
    _, first = np.unique(key, axis=1, return_index=True)
    found = found[np.sort(first)]
    group = found["row"] * len(limits.DETECTORS) + found["detector"]
    new = np.concatenate([[True], group[1:] != group[:-1]])
    start = np.maximum.accumulate(np.where(new, np.arange(len(found)), 0))
    return found[np.arange(len(found)) - start < limits.LISTED_ROWS], np.unique(found["test"])


def _records(rows: Any, tests: Any, detector: Any, scores: Any) -> np.ndarray:
    out = np.empty(len(rows), dtype=FOUND)
    out["row"], out["test"], out["detector"], out["score"] = rows, tests, detector, scores
    return out


def _expand(first: np.ndarray, values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values[first[k]:first[k + 1]] for every key k, one after the other, and which key each is for."""
    counts = first[keys + 1] - first[keys]
    which = np.repeat(np.arange(len(keys)), counts)
    before = np.concatenate([[0], np.cumsum(counts)])[:-1]
    return values[np.arange(len(which)) - before[which] + first[keys][which]], which


def _rows_of(index: TestIndex, rows: np.ndarray, units: np.ndarray, detector: Any, scores: Any) -> np.ndarray:
    tests, which = _expand(index.row_first, index.row_list, units)
    pick = scores[which] if isinstance(scores, np.ndarray) else scores
    kind = detector[which] if isinstance(detector, np.ndarray) else detector
    return _records(rows[which], tests, kind, pick)


def _exact(batch: Batch, index: TestIndex) -> np.ndarray:
    """Any text of the row, or its whole, equal to any unit."""
    starts = np.concatenate([batch.words.starts[:-1], batch.starts[:-1]])
    ends = np.concatenate([batch.words.starts[1:], batch.starts[1:]])
    owners = np.concatenate([np.repeat(np.arange(len(batch)), np.diff(batch.first)), np.arange(len(batch))])
    wanted, places = lookup(batch.sequences.runs(starts, ends), index.unit_hashes, index.unit_maybe)
    units = index.unit_order[places]
    return _rows_of(index, owners[wanted], units, EXACT, 1.0)


def _by_id(batch: Batch, index: TestIndex) -> np.ndarray:
    pairs = [
        (row, test)
        for row, ids in enumerate(batch.ids)
        for kind, value in ids
        for test in index.ids.get(f"{kind}:{value}", ())
    ]
    rows, tests = zip(*pairs, strict=True) if pairs else ((), ())
    return _records(rows, tests, SOURCE, 1.0)


def _contained(batch: Batch, index: TestIndex, posting: Postings, starts: np.ndarray) -> list[np.ndarray]:
    """Units of which a row holds enough n-grams; for 5-grams also the near duplicates among them.

    `starts`: the words at which a 5-gram of a test text may begin. Longer ones begin nowhere else.
    """
    starts = starts[starts + posting.n <= batch.sequences.count]
    found, places = lookup(batch.sequences.runs(starts, starts + posting.n), posting.hashes, posting.maybe)
    wanted = starts[found]
    rows = np.searchsorted(batch.starts, wanted, side="right") - 1
    within = wanted + posting.n <= batch.starts[rows + 1]
    rows, places = rows[within], places[within]
    pairs = np.unique(rows * len(posting.hashes) + places)  # a row's distinct n-grams
    rows, places = np.divmod(pairs, max(len(posting.hashes), 1))
    sizes = np.cumsum(posting.first[places + 1] - posting.first[places])
    parts: list[np.ndarray] = []
    start = 0
    while start < len(rows):
        # Whole rows up to about EXPANDED pairs: what is counted for a row is counted in one go.
        end = int(np.searchsorted(sizes, (sizes[start - 1] if start else 0) + EXPANDED, side="right"))
        end = max(end, start + 1)
        if end < len(rows):
            left, right = (int(np.searchsorted(rows, rows[end], side=side)) for side in ("left", "right"))
            end = left if left > start else right
        parts += _counted(batch, index, posting, rows[start:end], places[start:end])
        start = end
    return parts


def _counted(
    batch: Batch, index: TestIndex, posting: Postings, rows: np.ndarray, places: np.ndarray
) -> list[np.ndarray]:
    units, which = _expand(posting.first, posting.units, places)
    pairs, inverse = np.unique(rows[which] * len(posting.sizes) + units, return_inverse=True)
    owners, units = np.divmod(pairs, max(len(posting.sizes), 1))
    rare = np.bincount(inverse[posting.rare[places][which]], minlength=len(pairs))
    enough = rare >= posting.needed[units]
    scores = (rare[enough] / posting.sizes[units[enough]]).astype(np.float32)
    detector: Any = {8: WORDS_8, 13: WORDS_13}.get(posting.n)
    if detector is None:
        detector = np.where(index.cjk[units[enough]], CJK_5, WORDS_5)
    parts = [_rows_of(index, owners[enough], units[enough], detector, scores)]
    if posting.n == limits.SHINGLE:
        shared = np.bincount(inverse, minlength=len(pairs))
        proposed = np.maximum(limits.MIN_GRAMS, limits.PROPOSED * posting.sizes[units])
        likely = (shared >= index.near[units]) | (
            ~enough & (rare >= proposed) & (posting.overall[units] != limits.NEVER)
        )
        parts += _verified(batch, index, posting.overall, owners[likely], units[likely])
    return parts


def _verified(
    batch: Batch, index: TestIndex, overall: np.ndarray, rows: np.ndarray, units: np.ndarray
) -> list[np.ndarray]:
    """Of proposed pairs, from the whole sets of 5-word shingles: near duplicates and contained units.

    Near duplicate: the true Jaccard of the unit and the row, or a field of it, is above the limit.
    """
    found: list[tuple[int, int, int, float]] = []
    sets: list[np.ndarray] = []
    current = -1
    for row, unit in zip(rows.tolist(), units.tolist(), strict=True):
        if row != current:
            current, sets = row, [shingles(codes) for codes in batch.texts_of(row) if len(codes)]
        mine = index.shingles_of(unit)
        low, high = limits.JACCARD_LIMIT * len(mine), len(mine) / limits.JACCARD_LIMIT
        score = max((jaccard(each, mine) for each in sets if low < len(each) < high), default=0.0)
        if score > limits.JACCARD_LIMIT:
            found.append((row, unit, NEAR, score))
        held = common_count(sets[0], mine)
        if held >= overall[unit]:
            found.append((row, unit, CJK_5 if index.cjk[unit] else WORDS_5, held / len(mine)))
    if not found:
        return []
    owners, kept, detectors, scores = (np.array(column) for column in zip(*found, strict=True))
    return [_rows_of(index, owners, kept, detectors, scores)]


def without_phrases(found: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the records without the phrases, [test row, different training rows] of these); `hashes` of all rows.

    A test row that more than COMMON_ROWS different training rows hold in part, and none to COMMON_SCORE or by
    another detector, is a phrase that the whole field uses ("is inherited in an autosomal recessive pattern, which
    means ..."). Equal training rows count once: copies of one leaked row, edited or not, stay leaks.
    """
    if not len(found):
        return found, np.empty((0, 2), dtype=np.int64)
    sure = (found["score"] >= limits.COMMON_SCORE) | np.isin(found["detector"], (EXACT, NEAR, SOURCE))
    partly = found[~np.isin(found["test"], np.unique(found["test"][sure]))]
    pairs = np.unique(np.stack([partly["test"].astype(np.uint64), hashes[partly["row"]]]), axis=1)
    tests, rows = np.unique(pairs[0].astype(np.int64), return_counts=True)
    phrases = np.stack([tests, rows], axis=1)[rows > limits.COMMON_ROWS]
    return found[~np.isin(found["test"], phrases[:, 0])], phrases
