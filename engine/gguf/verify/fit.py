"""Least squares on the deltas: which weights are in a GGUF, how sharply that is known, and what a right file gives.

With x the stored values and v = W + sum a_k D_k: the weights found are a + G^-1 <x - v, D>, G = <D_k, D_l>. The
rest is quantisation noise, of another size s_t^2 per element in every tensor, so the covariance of the weights is
G^-1 (sum over t of s_t^2 G_t) G^-1 (the "sandwich"; White 1980).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.gguf.verify.asked import Float64Array
from engine.gguf.verify.measure import TensorStats


@dataclass(frozen=True)
class Fit:
    """Weights in the order of `labels`; `error` is the standard error of `found`, infinite where nothing tells."""

    labels: tuple[str, ...]
    asked: Float64Array
    expected: Float64Array
    found: Float64Array
    error: Float64Array
    residual: float  # |x - W - fit| / |x - W|
    floor: float  # the same of what llama.cpp makes of the asked values
    cosines: Float64Array
    shift_error: Float64Array  # (K,) standard error of found - expected, in which most of the noise cancels

    @property
    def implied(self) -> Float64Array:
        """The weights that would lead to `found`: asked + found - expected, without the format's shrinking."""
        return np.asarray(self.asked + self.found - self.expected)


def fit(stats: Sequence[TensorStats], labels: Sequence[str]) -> Fit:
    """Fit all given tensors together. A label that touches none of them has weight 0 and an infinite error."""
    k = len(labels)
    gram, asked, cross, ideal = np.zeros((k, k)), np.zeros(k), np.zeros(k), np.zeros(k)
    noise, shift_noise = np.zeros((k, k)), np.zeros((k, k))
    square = ideal_square = asked_square = asked_cross = asked_ideal = 0.0
    for tensor in stats:
        at = [labels.index(label) for label in tensor.pair.labels]
        gram[np.ix_(at, at)] += tensor.gram
        asked[at] += tensor.gram @ tensor.weights
        cross[at] += tensor.cross
        ideal[at] += tensor.ideal_cross
        asked_square += float(tensor.weights @ tensor.gram @ tensor.weights)
        asked_cross += float(tensor.weights @ tensor.cross)
        asked_ideal += float(tensor.weights @ tensor.ideal_cross)
        square += tensor.square
        ideal_square += tensor.ideal_square
    sizes = np.sqrt(np.diagonal(gram))
    safe = np.where(sizes > 0, sizes, 1.0)
    cosines = gram / np.outer(safe, safe)
    inverse = np.linalg.pinv(cosines, rcond=1e-9) / np.outer(safe, safe)
    start, shift, ideal_shift = inverse @ asked, inverse @ cross, inverse @ ideal
    for tensor in stats:
        at = [labels.index(label) for label in tensor.pair.labels]
        own = shift[at]
        left = tensor.square - 2 * float(own @ tensor.cross) + float(own @ tensor.gram @ own)
        noise[np.ix_(at, at)] += max(left, 0.0) / max(tensor.elements, 1) * tensor.gram
        shift_noise[np.ix_(at, at)] += tensor.replay_square * tensor.gram
    error = np.sqrt(np.maximum(np.diagonal(inverse @ noise @ inverse), 0.0))
    return Fit(
        tuple(labels),
        start,
        start + ideal_shift,
        start + shift,
        np.where(_known(cosines, sizes), error, np.inf),
        _ratio(square - float(shift @ cross), square + 2 * asked_cross + asked_square),
        _ratio(ideal_square - float(ideal_shift @ ideal), ideal_square + 2 * asked_ideal + asked_square),
        cosines,
        np.sqrt(np.maximum(np.diagonal(inverse @ shift_noise @ inverse), 0.0)),
    )


def _known(cosines: Float64Array, sizes: Float64Array) -> Float64Array:
    """Which weights the deltas determine: not those of zero deltas, nor of deltas that are one another's multiple."""
    if not cosines.size:
        return np.zeros(0, bool)
    values, vectors = np.linalg.eigh(cosines)
    free = np.abs(vectors[:, values < 1e-6]).max(axis=1, initial=0.0) > 1e-3
    return np.asarray((sizes > 0) & ~free)


def _ratio(left: float, size: float) -> float:
    return (max(left, 0.0) / size) ** 0.5 if size > 0 else 0.0
