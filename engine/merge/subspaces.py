"""Principal angles between the spaces two low-rank factors span (Björck and Golub 1973), from factors alone.

Two spaces of dimensions p <= q in n dimensions have p principal angles, 0 (a shared direction) to 90 degrees.
With orthonormal bases Q_1 and Q_2 their cosines are the singular values of Q_1^T Q_2 and their sines those of
Q_2 - Q_1 Q_1^T Q_2; small angles are taken from the sines, since arccos near 1 keeps half the digits only
(Knyazev and Argentati 2002, as scipy.linalg.subspace_angles).

Where all angles are wide and the factors well conditioned the bases are not needed: with Gram matrices
G_ij = M_i^T M_j and Cholesky factors G_ii = L_i L_i^T the cosines are the singular values of
L_1^-1 G_12 L_2^-T, right to about eps * cond(G). Else the bases of well conditioned factors are M L^-T, made
orthonormal to rounding by a second turn (CholeskyQR2, Yamamoto et al. 2015): products in place of a QR.
Called by engine/merge/interference.py.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Grams = tuple[Matrix, Matrix, Matrix]  # M_1^T M_1, M_2^T M_2, M_1^T M_2
_WELL_CONDITIONED = 1e-6  # smallest over largest eigenvalue of a Gram matrix


@dataclass(frozen=True)
class Angles:
    """Principal angles in degrees, smallest first; none when a space is empty (a zero matrix)."""

    degrees: tuple[float, ...]
    chance: float  # mean squared cosine expected of random spaces of these dimensions, max(p, q) / n

    @property
    def smallest(self) -> float | None:
        return self.degrees[0] if self.degrees else None

    @property
    def median(self) -> float | None:
        return statistics.median(self.degrees) if self.degrees else None

    @property
    def overlap(self) -> float:
        """Mean squared cosine: 1 when one space holds the other; 0 when orthogonal, or when one is empty."""
        return statistics.fmean(math.cos(math.radians(d)) ** 2 for d in self.degrees) if self.degrees else 0.0


def principal_angles(first: Matrix, second: Matrix, grams: Grams | None = None) -> Angles:
    """Angles between the column spaces of first (n, r1) and second (n, r2), float64; costs O(n (r1 + r2)^2).

    Zero and repeated columns do not count: the spaces are spanned by the singular vectors with singular values
    above rounding. `grams`: their Gram matrices, where the caller has them already.
    """
    own, other, between = grams or (first.T @ first, second.T @ second, first.T @ second)
    wide = _wide_angles(own, other, between)
    if wide is not None:
        return Angles(wide, max(first.shape[1], second.shape[1]) / first.shape[0])
    one, two = _basis(first, own), _basis(second, other)
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    if two.shape[1] == 0:
        return Angles((), 0.0)
    across = one.T @ two
    _, cosines, turn = np.linalg.svd(across)  # largest first: smallest angle first
    angles = np.arccos(np.minimum(cosines, 1.0))
    small = int(np.count_nonzero(cosines**2 >= 0.5))
    if small:
        # (Q_2 - Q_1 Q_1^T Q_2) v of the right singular vectors v: orthogonal, and as long as the sines.
        rest = (two - one @ across) @ turn[:small].T
        angles[:small] = np.arcsin(np.minimum(_singular_values(rest)[::-1], 1.0))
    return Angles(tuple(sorted(float(x) for x in np.degrees(angles))), one.shape[1] / first.shape[0])


def _wide_angles(one: Matrix, two: Matrix, across: Matrix) -> tuple[float, ...] | None:
    """The angles from Gram matrices; None where those cannot tell them well: bases decide then."""
    if not (_well_conditioned(one) and _well_conditioned(two)):
        return None
    left = np.linalg.solve(np.linalg.cholesky(one), across)
    both = np.linalg.solve(np.linalg.cholesky(two), left.T)
    cosines = np.linalg.svd(both, compute_uv=False)
    if cosines[0] ** 2 >= 0.5:
        return None
    return tuple(sorted(float(x) for x in np.degrees(np.arccos(cosines))))


def _well_conditioned(gram: Matrix) -> bool:
    values = np.linalg.eigvalsh(gram)
    return bool(values[0] > _WELL_CONDITIONED * values[-1])


def _singular_values(matrix: Matrix) -> Matrix:
    """Of (n, r), largest first: from the Gram matrix of the columns made equally long, where that tells them well."""
    lengths = np.linalg.norm(matrix, axis=0)
    if lengths.all():
        scaled = matrix / lengths
        gram = scaled.T @ scaled
        if _well_conditioned(gram):
            return np.asarray(np.linalg.svd(np.linalg.cholesky(gram).T * lengths, compute_uv=False))
    return np.asarray(np.linalg.svd(np.linalg.qr(matrix, mode="r"), compute_uv=False))


def _basis(matrix: Matrix, gram: Matrix) -> Matrix:
    """Orthonormal basis of the column space of (n, r) with this Gram matrix; spurious directions are left out."""
    if _well_conditioned(gram):
        once = matrix @ np.linalg.inv(np.linalg.cholesky(gram)).T
        return np.asarray(once @ np.linalg.inv(np.linalg.cholesky(once.T @ once)).T)
    q, triangle = np.linalg.qr(matrix)
    values = np.linalg.svd(triangle, compute_uv=False)
    rank = int(np.count_nonzero(values > values[0] * max(matrix.shape) * 1e-13)) if values.size else 0
    if rank == matrix.shape[1]:
        return np.asarray(q)
    left, _, _ = np.linalg.svd(triangle)
    return np.asarray(q @ left[:, :rank])
