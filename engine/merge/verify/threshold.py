"""The k-th largest |d| of a whole tensor, exactly, in bounded memory: what TIES trims by.

float32 numbers without their sign are ordered as their bits are. One pass counts the upper 16 bits of every |d|,
which says in which bin the k-th largest lies; a second pass counts the lower 16 bits within that bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from engine.merge.verify.quick import Source, count_sizes, count_within
from engine.merge.verify.rounding import Array

Deltas = Callable[[], Iterable[tuple[Source, Sequence[Source]]]]  # every block once more: W and the K deltas


class Sizes:
    """How large the elements of K deltas of one tensor are."""

    def __init__(self, deltas: Deltas, count: int) -> None:
        self._deltas = deltas
        self.counts = np.zeros((count, 1 << 15), dtype=np.int64)
        for base, sources in deltas():
            count_sizes(base, sources, self.counts)
        self._above = [_from_above(counts) for counts in self.counts]
        self.elements = int(self.counts[0].sum()) if count else 0

    def thresholds(self, densities: Sequence[float]) -> list[float]:
        """For each delta the max(1, int(density n))-th largest |d|: 0 at density 1 (all stay), inf at density 0."""
        bins = [self._bin(k, density) for k, density in enumerate(densities)]
        low = np.zeros((len(bins), 1 << 16), dtype=np.int64)
        if any(found is not None for found in bins):
            upper = [-1 if found is None else found[0] for found in bins]
            for base, sources in self._deltas():
                count_within(base, sources, upper, low)
        return [
            _outside(density)
            if found is None
            else _number(found[0], _at_rank(_from_above(low[k]), found[1])[0])
            for k, (density, found) in enumerate(zip(densities, bins, strict=True))
        ]

    def nearly(self, densities: Sequence[float]) -> list[float]:
        """The same to 8 bits, without another pass: the lower ends of the bins."""
        bins = [self._bin(k, density) for k, density in enumerate(densities)]
        return [
            _outside(density) if found is None else _number(found[0], 0)
            for density, found in zip(densities, bins, strict=True)
        ]

    def _bin(self, k: int, density: float) -> tuple[int, int] | None:
        keep = max(1, int(density * self.elements)) if density > 0 else 0
        return None if density >= 1 or keep == 0 else _at_rank(self._above[k], keep)


def _outside(density: float) -> float:
    return 0.0 if density >= 1 else math.inf


def _number(upper: int, lower: int) -> float:
    return float(np.array([(upper << 16) | lower], dtype=np.uint32).view(np.float32)[0])


def _from_above(counts: Array) -> Array:
    return np.cumsum(counts[::-1])


def _at_rank(above: Array, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest (1 is the largest), and its rank within the bin.

    `above` counts how many lie in the last bin, in the last two, and so on.
    """
    place = int(np.searchsorted(above, rank))
    return len(above) - 1 - place, rank - (int(above[place - 1]) if place else 0)
