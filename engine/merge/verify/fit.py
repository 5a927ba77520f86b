"""Least squares on the deltas: which weights are in the merge, and what they leave unexplained.

For D = merge - base, E = D - sum_k a_k dW_k and x = argmin ||E - sum_k x_k dW_k||: the weights found are
a + x, and the residual is ||E - sum_k x_k dW_k|| / ||D||. Working with E keeps the digits that
||D||^2 - ... would cancel. Gram matrices come from the factors: <B_k A_k, B_l A_l> = sum (B_k^T B_l)(A_k A_l^T).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.merge.verify.rounding import Float64Array
from engine.merge.verify.stats import FactorSums, TensorStats


@dataclass(frozen=True)
class Fit:
    """Weights by label order, relative residuals, and how well the deltas can be told apart."""

    labels: tuple[str, ...]
    asked: Float64Array  # (K,) what the asked weights fit to (themselves, unless they differ by tensor)
    expected: Float64Array  # (K,) fit of the ideally rounded merge
    found: Float64Array  # (K,)
    error: Float64Array  # (K,) standard error of `found` from what the deltas leave unexplained
    residual: float
    floor: float
    cosines: Float64Array  # (K, K) between the deltas
    norms: Float64Array  # (K,) Frobenius norms of the scaled deltas


def solve(matrix: Float64Array, right: Float64Array) -> Float64Array:
    """matrix^-1 right for a Gram matrix, scaled to correlations first; directions that do not exist get 0."""
    size = np.sqrt(np.diagonal(matrix))
    size = np.where(size > 0, size, 1.0)
    return np.asarray(np.linalg.pinv(matrix / np.outer(size, size), rcond=1e-11) @ (right / size) / size)


def fit(stats: Sequence[TensorStats], labels: Sequence[str]) -> Fit:
    """Fit all given tensors together; an adapter that touches none of them gets weight 0."""
    position = {label: i for i, label in enumerate(labels)}
    k = len(labels)
    matrix, asked, found, ideal = np.zeros((k, k)), np.zeros(k), np.zeros(k), np.zeros(k)
    found_square = ideal_square = asked_square = 0.0
    found_cross = ideal_cross = 0.0
    elements = 0
    for tensor in stats:
        at = [position[label] for label in tensor.labels]
        own, found_own, ideal_own = tensor.gram, tensor.found, tensor.ideal
        matrix[np.ix_(at, at)] += own
        asked[at] += own @ tensor.asked
        found[at] += found_own
        ideal[at] += ideal_own
        asked_square += float(tensor.asked @ own @ tensor.asked)
        found_cross += float(tensor.asked @ found_own)
        ideal_cross += float(tensor.asked @ ideal_own)
        found_square += tensor.found_square
        ideal_square += tensor.ideal_square
        elements += tensor.elements
    start, shift, ideal_shift = solve(matrix, asked), solve(matrix, found), solve(matrix, ideal)
    left = max(0.0, found_square - float(shift @ found))
    ideal_left = max(0.0, ideal_square - float(ideal_shift @ ideal))
    size = max(0.0, found_square + 2 * found_cross + asked_square)
    ideal_size = max(0.0, ideal_square + 2 * ideal_cross + asked_square)
    norms = np.sqrt(np.diagonal(matrix))
    safe = np.where(norms > 0, norms, 1.0)
    correlation = matrix / np.outer(safe, safe)
    spread = np.diagonal(np.linalg.pinv(correlation, rcond=1e-13)) / safe**2
    return Fit(
        tuple(labels),
        start,
        start + ideal_shift,
        start + shift,
        np.sqrt(np.maximum(spread, 0.0) * left / max(elements, 1)),
        (left / size) ** 0.5 if size > 0 else 0.0,
        (ideal_left / ideal_size) ** 0.5 if ideal_size > 0 else 0.0,
        correlation,
        norms,
    )


@dataclass(frozen=True)
class CrossFit:
    """A fit on the deltas and on B_k A_l of different adapters: what mixing A and B apart leaves behind."""

    residual: float
    strengths: dict[tuple[str, str], float]  # coefficient of s^(1/2) s^(1/2) B_k A_l


def fit_cross(stats: Sequence[TensorStats], labels: Sequence[str]) -> CrossFit | None:
    """Fit E on all B_k A_l with equal ranks; None when no tensor has two adapters of one rank."""
    terms = [(k, m) for k in labels for m in labels]
    index = {term: i for i, term in enumerate(terms)}
    matrix, right = np.zeros((len(terms), len(terms))), np.zeros(len(terms))
    square = size = 0.0
    used = False
    for tensor in stats:
        factors = tensor.factors
        if factors is None:
            return None
        place = {label: i for i, label in enumerate(tensor.labels)}
        spans, deltas = factors.spans, factors.deltas
        here = [
            (k, m)
            for k, m in terms
            if k in place and m in place and deltas[place[k]].rank == deltas[place[m]].rank
        ]
        used = used or any(k != m for k, m in here)
        scale = {(k, m): (deltas[place[k]].scale * deltas[place[m]].scale) ** 0.5 for k, m in here}
        for term in here:
            a, b = spans[place[term[0]]], spans[place[term[1]]]
            right[index[term]] += scale[term] * np.trace(factors.found[a, b])
            for other in here:
                c, d = spans[place[other[0]]], spans[place[other[1]]]
                value = np.sum(factors.left_gram[a, c] * factors.right_gram[b, d])
                matrix[index[term], index[other]] += scale[term] * scale[other] * value
        asked = tensor.asked
        square += tensor.found_square
        size += tensor.found_square + float(asked @ (2 * tensor.found + tensor.gram @ asked))
    if not used or size <= 0:
        return None
    x = solve(matrix, right)
    left = max(0.0, square - float(x @ right))
    return CrossFit((left / size) ** 0.5, {t: float(x[index[t]]) for t in terms if t[0] != t[1]})


def rank_weights(factors: FactorSums, weights: Float64Array) -> Float64Array:
    """The weight of each rank-1 piece B[:, i] A[i, :] of one tensor, (R,): partial ranks show as zeros."""
    scales = np.concatenate([np.full(delta.rank, delta.scale) for delta in factors.deltas])
    asked = np.concatenate([np.full(d.rank, w) for d, w in zip(factors.deltas, weights, strict=True)])
    matrix = factors.left_gram * factors.right_gram * np.outer(scales, scales)
    return np.asarray(asked + solve(matrix, np.diagonal(factors.found) * scales))


@dataclass(frozen=True)
class Cut:
    """A sum of deltas cut to a lower rank, as a truncated SVD does (Eckart and Young 1936)."""

    kept: int
    rank: int  # of the whole sum
    error: float  # how far the merge is from that, where 1 is how far it is from the whole sum


def cut(factors: FactorSums, weights: Float64Array) -> Cut | None:
    """The rank to which the summed delta S of one tensor was most likely cut; None for a sum of rank 1 or 0.

    With B = Q T and A^T = P U (Q, P orthonormal, from the Gram matrices) the core of S is T diag(w s) U^T and that of
    the error T^-T (B^T E A^T) U^-1, both of at most R x R; what ideal rounding leaves is taken off the error.
    """
    strengths = [w * delta.scale for w, delta in zip(weights, factors.deltas, strict=True)]
    scales = np.repeat(strengths, [delta.rank for delta in factors.deltas])
    (left, left_inverse), (right, right_inverse) = _root(factors.left_gram), _root(factors.right_gram)
    whole = (left * scales) @ right.T
    error = left_inverse @ (factors.found - factors.ideal) @ right_inverse.T
    u, values, vt = np.linalg.svd(whole)
    rank = int(np.count_nonzero(values > 1e-9 * values[:1].sum()))
    missed = float(np.linalg.norm(error))
    if rank < 2 or missed == 0:
        return None
    lost = [np.linalg.norm(error + (u[:, r:rank] * values[r:rank]) @ vt[r:rank]) for r in range(1, rank)]
    best = int(np.argmin(lost))
    return Cut(best + 1, rank, float(lost[best]) / missed)


def _root(gram: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(T, T^-T) with T^T T = gram, both (rank, R)."""
    values, vectors = np.linalg.eigh(gram)
    there = values > 1e-12 * max(float(values[-1]), 0.0)
    root = np.sqrt(values[there])[:, None]
    return root * vectors.T[there], vectors.T[there] / root


def least_separation(cosines: Float64Array) -> float:
    """Smallest eigenvalue of the correlation matrix of the deltas: 1 - |cosine| for two, 0 when collinear."""
    return float(np.linalg.eigvalsh(cosines)[0]) if cosines.size else 1.0


def most_alike(labels: Sequence[str], cosines: Float64Array) -> tuple[str, str, float]:
    """The two adapters whose deltas point most nearly the same way, and their cosine."""
    pairs = itertools.combinations(range(len(labels)), 2)
    a, b = max(pairs, key=lambda pair: abs(cosines[pair]))
    return labels[a], labels[b], float(cosines[a, b])
