"""The test sets as an inverted index: which test text holds which n-grams. Built once, read by every worker.

A *unit* is a distinct text of the test sets: a whole row or one of its fields. Units point to the rows they stand
in; n-grams point to units. The index is exact: no pair is lost to sampling, as it would be with MinHash.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.audit import limits
from training.audit.fields import Field, Reading, fields, source_ids
from training.audit.grams import Sequences, inside, unique_pairs
from training.audit.text import encode

WHOLE = Field("")  # a row as a whole asks
BATCH = 1024  # test rows encoded at a time
MIN_BITS, MAX_BITS = 16, 27  # of the table that says quickly "no test text holds this n-gram"


@dataclass(frozen=True)
class Postings:
    """One n-gram size: hashes (sorted), the units of hash i at units[first[i]:first[i + 1]], whether it is rare (no
    boilerplate); per unit how many rare ones it has, and how many a training row must hold (`limits.needed`).

    `maybe` is a table over the upper bits of a hash; where it is False, no such hash is in the index.
    """

    n: int
    hashes: np.ndarray
    first: np.ndarray
    units: np.ndarray
    rare: np.ndarray
    sizes: np.ndarray
    needed: np.ndarray
    overall: np.ndarray
    maybe: np.ndarray


@dataclass(frozen=True)
class TestIndex:
    """The test sets, as arrays that workers map from disk.

    Attributes:
        rows: test rows in all; row numbers below count through the files in order.
        unit_hashes: sorted; `unit_order[i]` is the unit of unit_hashes[i].
        cjk: per unit, whether most of its words are CJK characters.
        row_first, row_list: the rows unit u stands in: row_list[row_first[u]:row_first[u + 1]].
        shingle_first, shingles: the unit's set of 5-word shingles, sorted, boilerplate included.
        near: per unit, how many of its indexed 5-grams a near duplicate shares at least.
        ids: "kind:value" of a source id -> rows.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    rows: int
    unit_hashes: np.ndarray
    unit_order: np.ndarray
    unit_maybe: np.ndarray
    cjk: np.ndarray
    row_first: np.ndarray
    row_list: np.ndarray
    shingle_first: np.ndarray
    shingles: np.ndarray
    near: np.ndarray
    postings: tuple[Postings, ...]
    ids: dict[str, list[int]]

    def shingles_of(self, unit: int) -> np.ndarray:
        return self.shingles[self.shingle_first[unit] : self.shingle_first[unit + 1]]

    def save(self, folder: Path) -> None:
        """Every array as a .npy file in a new folder."""
        folder.mkdir()
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                np.save(folder / f"{name}.npy", value)
        for posting in self.postings:
            for name, value in vars(posting).items():
                if isinstance(value, np.ndarray):
                    np.save(folder / f"{posting.n}-{name}.npy", value)
        notes = {"rows": self.rows, "sizes": [posting.n for posting in self.postings], "ids": self.ids}
        (folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TestIndex:
        """What `save` wrote, mapped: all workers share one copy in memory."""
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))

        def arrays(prefix: str, names: Iterable[str]) -> dict[str, Any]:
            files = {name: folder / f"{prefix}{name}.npy" for name in names}
            return {
                name: np.load(file, mmap_mode="r" if file.stat().st_size > 4096 else None)
                for name, file in files.items()
                if file.exists()
            }

        postings = tuple(
            Postings(n=n, **arrays(f"{n}-", Postings.__dataclass_fields__)) for n in notes["sizes"]
        )
        return cls(
            rows=notes["rows"],
            ids=notes["ids"],
            postings=postings,
            **arrays("", cls.__dataclass_fields__),
        )


class IndexBuilder:
    """Collects test rows file by file; `build` makes the index."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.rows = 0
        self.templates = 0  # fields left out because they stand in many rows of a test file
        self._units: dict[bytes, int] = {}
        self._codes: list[np.ndarray] = []
        self._cjk: list[int] = []
        self._kinds: list[int] = []
        self._whole: list[bool] = []
        self._joined: list[bool] = []  # a whole of several fields, and no field anywhere
        self._rows: list[list[int]] = []
        self._ids: dict[str, list[int]] = defaultdict(list)

    def add_file(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> tuple[int, int]:
        """Take all rows of a file, given as (place, row). Returns (rows, rows that hold no text)."""
        first, textless = self.rows, 0
        used: Counter[int] = Counter()
        batch: list[tuple[str, dict[str, Any]]] = []
        for item in rows:
            batch.append(item)
            if len(batch) == BATCH:
                textless += self._take(batch, used)
                batch = []
        textless += self._take(batch, used)
        count = self.rows - first
        limit = max(limits.FIELD_ROWS, limits.FIELD_SHARE * count)
        for unit, times in used.items():
            if times > limit and not self._whole[unit]:
                self.templates += 1
                self._rows[unit] = [row for row in self._rows[unit] if row < first]
        return count, textless

    def _take(self, batch: Sequence[tuple[str, dict[str, Any]]], used: Counter[int]) -> int:
        found = [fields(row, self._reading, place) for place, row in batch]
        words = encode([field.text for row in found for field in row])
        at = textless = 0
        for (_, row), texts in zip(batch, found, strict=True):
            for kind, value in source_ids(row, self._reading):
                self._ids[f"{kind}:{value}"].append(self.rows)
            textless += not texts
            first, last = words.starts[at], words.starts[at + len(texts)]
            mine = {self._unit(words.codes[first:last], words.cjk[first:last], WHOLE, len(texts) > 1)}
            if len(texts) > 1:
                for number, field in enumerate(texts, at):
                    one = slice(words.starts[number], words.starts[number + 1])
                    mine.add(self._unit(words.codes[one], words.cjk[one], field, False))
            for unit in sorted(mine):
                if unit >= 0:
                    used[unit] += 1
                    self._rows[unit].append(self.rows)
            at += len(texts)
            self.rows += 1
        return textless

    def _unit(self, codes: np.ndarray, cjk: np.ndarray, field: Field, joined: bool) -> int:
        """The number of a text, a new one for a new text; -1 for one too short to compare."""
        characters = int(np.count_nonzero(cjk))
        kind = limits.LISTED if field.listed else limits.ASKING if field.asks else limits.TELLING
        if limits.length(len(codes), characters) < limits.MIN_EXACT[kind]:
            return -1
        key = codes.tobytes()
        unit = self._units.setdefault(key, len(self._codes))
        if unit == len(self._codes):
            self._codes.append(codes.copy())
            self._cjk.append(characters)
            self._kinds.append(kind)
            self._whole.append(field is WHOLE)
            self._joined.append(joined)
            self._rows.append([])
        self._kinds[unit] = min(self._kinds[unit], kind)
        self._whole[unit] |= field is WHOLE
        self._joined[unit] &= joined
        return unit

    def build(self) -> TestIndex:
        """The index of all rows taken."""
        kept = [unit for unit, rows in enumerate(self._rows) if rows]
        codes = [self._codes[unit] for unit in kept]
        rows = [self._rows[unit] for unit in kept]
        flat = np.concatenate(codes) if codes else np.empty(0, dtype=np.uint64)
        starts = np.cumsum([0, *map(len, codes)])
        characters = np.array([self._cjk[unit] for unit in kept], dtype=np.int64)
        counts = np.diff(starts)
        lengths = counts - characters / 2
        kinds = np.array([self._kinds[unit] for unit in kept], dtype=np.int8)
        cjk = 2 * characters >= np.maximum(counts, 1)
        sequences = Sequences(flat)
        joined = np.array([self._joined[unit] for unit in kept], dtype=bool)
        made = [_postings(n, sequences, starts, lengths, cjk, kinds, joined) for n in limits.SIZES]
        owners, hashes = _grams(sequences, starts, limits.SHINGLE)
        shingle_first = np.searchsorted(owners, np.arange(len(kept) + 1))
        whole = np.diff(shingle_first)
        indexed = made[limits.SIZES.index(limits.SHINGLE)][1]
        near = np.ceil(limits.JACCARD_LIMIT * whole - 1e-9) - (whole - indexed)
        unit_hashes = sequences.runs(starts[:-1], starts[1:])
        order = np.argsort(unit_hashes)
        return TestIndex(
            rows=self.rows,
            unit_hashes=unit_hashes[order],
            unit_order=order.astype(np.int32),
            unit_maybe=table(unit_hashes),
            cjk=cjk,
            row_first=np.cumsum([0, *map(len, rows)]),
            row_list=np.array([row for each in rows for row in each], dtype=np.int32),
            shingle_first=shingle_first,
            shingles=hashes,
            near=np.maximum(near, 1).astype(np.int32),
            postings=tuple(posting for posting, _ in made),
            ids=dict(self._ids),
        )


def table(hashes: np.ndarray) -> np.ndarray:
    """The quick table over the upper bits of hashes: about one entry in 16 is set by `hashes` themselves."""
    bits = min(MAX_BITS, max(MIN_BITS, (16 * len(hashes)).bit_length()))
    out = np.zeros(1 << bits, dtype=bool)
    out[hashes >> np.uint64(64 - bits)] = True
    return out


def possible(wanted: np.ndarray, maybe: np.ndarray) -> np.ndarray:
    """Indices of the hashes that the quick table does not rule out."""
    return np.flatnonzero(maybe[wanted >> np.uint64(65 - len(maybe).bit_length())])


def lookup(wanted: np.ndarray, known: np.ndarray, maybe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices into `wanted` of what is in `known`, their indices in `known`, which is sorted)."""
    likely = possible(wanted, maybe)
    if not len(likely) or not len(known):
        return likely[:0], likely[:0]
    values = wanted[likely]
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    good = known[places] == values
    return likely[good], places[good]


def _grams(sequences: Sequences, starts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(unit, hash) of the distinct n-grams of every unit, sorted."""
    places = np.flatnonzero(inside(starts, n))
    hashes = sequences.ngrams(n)[places]
    owners = np.searchsorted(starts, places, side="right") - 1
    hashes, owners = unique_pairs(hashes, owners)
    return owners, hashes


def _postings(
    n: int,
    sequences: Sequences,
    starts: np.ndarray,
    lengths: np.ndarray,
    cjk: np.ndarray,
    kinds: np.ndarray,
    joined: np.ndarray,
) -> tuple[Postings, np.ndarray]:
    """The postings, and how many n-grams of each unit they hold."""
    owners, hashes = _grams(sequences, starts, n)
    if n != limits.SHINGLE:  # CJK texts are compared by runs of 5 characters
        words = ~cjk[owners] if len(owners) else np.empty(0, dtype=bool)
        owners, hashes = owners[words], hashes[words]
    total = np.bincount(owners, minlength=len(lengths))
    order = np.lexsort((owners, hashes))
    owners, hashes = owners[order], hashes[order]
    distinct, counts = np.unique(hashes, return_counts=True)
    # A row's whole repeats its fields: it does not count when a text's spread is asked.
    texts = (
        np.add.reduceat(np.where(joined[owners], 0, 1), np.cumsum(counts) - counts) if len(counts) else counts
    )
    rare = texts <= limits.RARE
    indexed = counts <= limits.LOOKED_UP if n == limits.SHINGLE else rare
    owners, was_rare = owners[np.repeat(indexed, counts)], np.repeat(rare, counts)[np.repeat(indexed, counts)]
    maybe = table(
        distinct
    )  # of all, the common ones too: where no 5-gram of a test text is, no longer one is
    distinct, counts, rare = distinct[indexed], counts[indexed], rare[indexed]
    sizes = np.bincount(owners[was_rare], minlength=len(lengths)).astype(np.int32)
    shared = np.bincount(owners, minlength=len(lengths))
    needed, overall = limits.needed(n, np.diff(starts), lengths, cjk, kinds, sizes, total)
    postings = Postings(
        n=n,
        hashes=distinct,
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        units=owners.astype(np.int32),
        rare=rare,
        sizes=sizes,
        needed=needed,
        overall=overall,
        maybe=maybe,
    )
    return postings, shared
