"""Sums of low-rank deltas as one pair of factors: exactly, by stacking ranks, or truncated by an SVD.

    sum_k w_k s_k B_k A_k  =  B A,    B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]  (out, R)
                                      A = [A_1; A_2; ...]                  (R, in),   R = r_1 + r_2 + ...

The truncated SVD needs no dense delta: with the thin QR factorisations B = Q T and A^T = P S (Q (out, R),
P (in, R)), the singular values of B A are those of the R x R core T S^T. Cutting after r of them is the best
approximation of that rank in the Frobenius norm (Eckart and Young 1936), and its error is exactly
sqrt(sum of the squares of the dropped singular values).

Pure numpy on arrays in memory. Called by engine/merge/combine.py, one module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """One summand: scale * B @ A, with B (out, r) and A (r, in); `scale` has the merge weight in it."""

    scale: float
    b: npt.NDArray[np.float32]
    a: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one module's summed delta, largest first, and how many of them were kept."""

    values: tuple[float, ...]
    kept: int

    @property
    def norm(self) -> float:
        """||delta||_F = sqrt(sum of all squares)."""
        return math.sqrt(sum(value * value for value in self.values))

    @property
    def dropped(self) -> float:
        """||delta - delta_r||_F = sqrt(sum of the dropped squares), before A and B are rounded to float32."""
        return math.sqrt(sum(value * value for value in self.values[self.kept :]))

    @property
    def error(self) -> float:
        """||delta - delta_r||_F / ||delta||_F; 0 for a delta that is zero."""
        return self.dropped / self.norm if self.norm > 0 else 0.0

    @property
    def energy(self) -> float:
        """Share of the squared norm that was kept: 1 - error^2."""
        return 1.0 - self.error**2

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the squared norm."""
        wanted, sum_ = energy * self.norm**2, 0.0
        for rank, value in enumerate(self.values, 1):
            sum_ += value * value
            if sum_ >= wanted * (1 - 1e-12):
                return rank
        return len(self.values)


def stack(terms: Sequence[Term]) -> tuple[Matrix, Matrix]:
    """B (out, R) with the scales in it and A (R, in), in float64: exact but for one rounding per element of B."""
    b = np.concatenate([term.scale * term.b.astype(np.float64) for term in terms], axis=1)
    a = np.concatenate([term.a.astype(np.float64) for term in terms], axis=0)
    return b, a


def truncate(b: Matrix, a: Matrix, rank: int) -> tuple[Matrix, Matrix, Spectrum]:
    """The best rank-r approximation of b @ a, r = min(rank, R), split evenly: B = U sqrt(S), A = sqrt(S) V^T.

    Args: b (out, R), a (R, in), float64; rank >= 1.
    Returns: B (out, r), A (r, in), and the spectrum of b @ a (min(R, out, in) singular values).
    """
    q, t = np.linalg.qr(b)
    p, s = np.linalg.qr(a.T)
    u, values, vt = np.linalg.svd(t @ s.T, full_matrices=False)
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    return (
        (q @ u[:, :kept]) * root,
        root[:, None] * (vt[:kept] @ p.T),
        Spectrum(tuple(float(value) for value in values), kept),
    )
