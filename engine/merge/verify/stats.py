"""What measuring one touched tensor gives: counts of right and wrong elements, and the sums a fit needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.merge.verify.rounding import Float64Array
from engine.merge.verify.terms import Delta, Term

UNIT = 2.0**-24


def _nothing() -> Float64Array:
    return np.zeros((0, 0))


@dataclass
class FactorSums:
    """Sums by rank, R x R with R the sum of ranks, where all changes are low-rank products."""

    deltas: tuple[Delta, ...]
    left_gram: Float64Array = field(default_factory=_nothing)  # B^T B
    right_gram: Float64Array = field(default_factory=_nothing)  # A A^T
    found: Float64Array = field(default_factory=_nothing)  # B^T E A^T
    ideal: Float64Array = field(default_factory=_nothing)  # the same, ideally rounded

    @property
    def spans(self) -> list[slice]:
        """Where each delta's ranks lie in the R x R sums."""
        ends = np.cumsum([delta.rank for delta in self.deltas])
        return [slice(int(end) - delta.rank, int(end)) for end, delta in zip(ends, self.deltas, strict=True)]

    def gram(self) -> Float64Array:
        """<dW_k, dW_l>, (K, K)."""
        product = self.left_gram * self.right_gram
        scales = [delta.scale for delta in self.deltas]
        spans = self.spans
        return np.array(
            [
                [scales[k] * scales[m] * product[a, b].sum() for m, b in enumerate(spans)]
                for k, a in enumerate(spans)
            ]
        )

    def against(self, sums: Float64Array) -> Float64Array:
        """<E, dW_k> from B^T E A^T, (K,)."""
        return np.array(
            [
                delta.scale * np.trace(sums[span, span])
                for delta, span in zip(self.deltas, self.spans, strict=True)
            ]
        )


@dataclass
class TensorStats:
    """What one touched tensor holds. Sums are float64; E is the merge minus what was asked for.

    For methods that are not linear in the weights there are no sums: `linear` is False, and ||E||^2 alone is kept.
    """

    name: str
    terms: tuple[Term, ...]
    asked: Float64Array  # (K,) coefficient of each delta
    dtype: str
    linear: bool = True
    base_share: float = 1.0  # coefficient of the base itself
    elements: int = 0
    wrong: int = 0
    unchanged: int = 0
    ideal_unchanged: int = 0
    not_finite: int = 0
    first_wrong: tuple[int, int, float, float, float] | None = None  # row, column, found, lowest, highest
    gram: Float64Array = field(default_factory=_nothing)  # <dW_k, dW_l>
    found: Float64Array = field(default_factory=lambda: np.zeros(0))  # <E, dW_k>
    ideal: Float64Array = field(default_factory=lambda: np.zeros(0))  # the same, ideally rounded
    found_square: float = 0.0  # ||E||^2
    ideal_square: float = 0.0
    factors: FactorSums | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(term.label for term in self.terms)

    @property
    def untouched_in_fact(self) -> bool:
        """Every element still is the base's."""
        return self.unchanged == self.elements

    @property
    def relative_error(self) -> float:
        """||E|| of the merge over that of an ideally rounded one (1 is right)."""
        if self.ideal_square <= 0:
            return 1.0 if self.found_square <= 0 else float("inf")
        return float(max(self.found_square, 0.0) / self.ideal_square) ** 0.5
