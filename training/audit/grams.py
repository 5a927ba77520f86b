"""Hashes of n-word sequences over whole batches of rows, and sets of them. Used by index, scan and repeats."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from training.audit.text import mixed, powers_of

_BASE = 0xD1342543DE82EF95
_INVERSE = pow(_BASE, -1, 1 << 64)


class Sequences:
    """Hashes of any run of words of `codes` from two reads of a prefix sum.

    hash(i, n) = mix( sum over k < n of codes[i + k] * BASE^k  modulo 2^64, plus n ): equal runs have equal hashes
    wherever they stand; unequal ones differ but for one chance in about 2^64.
    """

    def __init__(self, codes: np.ndarray) -> None:
        self.count = len(codes)
        powers, self._inverses = _powers(1 << max(12, self.count.bit_length()))
        self._sums = np.zeros(self.count + 1, dtype=np.uint64)
        np.cumsum(codes * powers[: self.count], out=self._sums[1:])

    def ngrams(self, n: int) -> np.ndarray:
        """hash(i, n) for i in 0 .. count - n; empty where there are fewer than n words. Borders are not looked at."""
        if self.count < n:
            return np.empty(0, dtype=np.uint64)
        out = self._sums[n:] - self._sums[:-n]
        out *= self._inverses[: len(out)]
        out += np.uint64(n)
        return mixed(out)

    def runs(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """hash(start, end - start) of each run [start, end)."""
        out = (self._sums[ends] - self._sums[starts]) * self._inverses[starts]
        out += (ends - starts).astype(np.uint64)
        return mixed(out)


def inside(starts: np.ndarray, n: int) -> np.ndarray:
    """Which n-grams of a batch stand within one text: bool [words - n + 1]; `starts` as in `Words`."""
    count = int(starts[-1]) - n + 1
    if count <= 0:
        return np.empty(0, dtype=bool)
    crossing = np.zeros(count + 1, dtype=np.int32)
    borders = starts[1:-1]
    borders = borders[(borders > 0) & (borders < starts[-1])]
    np.add.at(crossing, np.clip(borders - n + 1, 0, count), 1)
    np.add.at(crossing, np.clip(borders, 0, count), -1)
    return np.cumsum(crossing[:-1]) == 0


def shingles(codes: np.ndarray, n: int = 5) -> np.ndarray:
    """The set (sorted, unique) of a text's n-word shingles; a text of fewer words is one shingle of all its words."""
    return np.unique(Sequences(codes).ngrams(min(n, len(codes)) or n))


def shingle_sets(codes: np.ndarray, starts: np.ndarray, n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """`shingles` of every text of a batch: (flat hashes, offsets [texts + 1]), each text's sorted and unique."""
    sequences = Sequences(codes)
    lengths = np.diff(starts)
    mask = inside(starts, n)
    places = np.flatnonzero(mask)
    hashes = sequences.ngrams(n)[places]
    owners = np.repeat(np.arange(len(lengths)), np.maximum(lengths - n + 1, 0))
    short = np.flatnonzero((lengths > 0) & (lengths < n))
    if len(short):
        hashes = np.concatenate([hashes, sequences.runs(starts[short], starts[short + 1])])
        owners = np.concatenate([owners, short])
    hashes, owners = unique_pairs(hashes, owners)
    return hashes, np.searchsorted(owners, np.arange(len(lengths) + 1))


def unique_pairs(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (owner, hash) pairs, sorted by owner, then hash."""
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    return hashes[new], owners[new]


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted unique arrays; 0 when one is empty."""
    if not len(left) or not len(right):
        return 0.0
    common = common_count(left, right)
    return common / (len(left) + len(right) - common)


def common_count(left: np.ndarray, right: np.ndarray) -> int:
    """|A and B| of two sorted unique arrays."""
    small, large = (left, right) if len(left) < len(right) else (right, left)
    if not len(small):
        return 0
    places = np.minimum(np.searchsorted(large, small), len(large) - 1)
    return int(np.count_nonzero(large[places] == small))


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    return powers_of(_BASE, count), powers_of(_INVERSE, count)
