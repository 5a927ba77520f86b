"""A bounded sample of rows of the touched tensors, dense and in float64: what hypotheses are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.merge.verify.measure import UNIT, TensorStats, widen_bits
from engine.merge.verify.rounding import FORMATS, Array, Float64Array, round_to
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import ITEM_SIZE, TensorInfo, read_bytes

BUDGET = 120_000  # elements
THIN = 6_000


@dataclass(frozen=True)
class Sample:
    """N elements: base and merge, K scaled deltas (weight 1), what was asked of each, and the allowed slack.

    `coarse` are the deltas made from A and B rounded to the merge's dtype first (equal to `deltas` where the
    adapter is stored in it). `owner[i]` indexes `names`, the tensor an element is of.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    dtype: str
    base: Float64Array
    merged: Float64Array
    deltas: Float64Array  # (K, N)
    coarse: Float64Array  # (K, N)
    asked: Float64Array  # (K, N)
    bound: Float64Array  # (N,) e of measure.py, for weights up to the larger of 1 and those asked
    owner: Array

    def fits(self, weights: Float64Array) -> Array:
        """Which elements lie in the interval that one rounding of base + sum weights * delta allows."""
        value = self.base + np.sum(weights * self.deltas, axis=0)
        low, high = round_to(value - self.bound, self.dtype), round_to(value + self.bound, self.dtype)
        return np.asarray((low <= self.merged) & (self.merged <= high))

    def equals(self, predicted: Float64Array) -> Array:
        """Which elements are the predicted ones (within float32's own slack where the merge is float32)."""
        if self.dtype == "F32":
            return np.asarray(np.abs(predicted - self.merged) <= self.bound)
        return np.asarray(predicted == self.merged)

    def fit(self, merged: Float64Array) -> Float64Array:
        """Least-squares weights of merged - base on the deltas, (K,)."""
        gram = self.deltas @ self.deltas.T
        return np.asarray(np.linalg.pinv(gram, rcond=1e-11) @ (self.deltas @ (merged - self.base)))

    def where(self, keep: Array | slice) -> Sample:
        """Some of the elements only, by mask or slice."""
        return Sample(
            self.labels, self.names, self.dtype, self.base[keep], self.merged[keep], self.deltas[:, keep],
            self.coarse[:, keep], self.asked[:, keep], self.bound[keep], self.owner[keep],
        )  # fmt: skip

    @property
    def thin(self) -> slice:
        """Every n-th element, some THIN in all: enough to see which hypotheses are worth the whole sample."""
        return slice(None, None, max(1, self.base.size // THIN))


def draw(
    tensors: Sequence[TensorStats],
    base: Checkpoint,
    merged: Checkpoint,
    labels: Sequence[str],
    budget: int = BUDGET,
) -> Sample:
    """Evenly spaced rows of every tensor given (always the row of its first wrong element), `budget` in all."""
    position = {label: i for i, label in enumerate(labels)}
    parts = []
    share = max(1, budget // max(1, len(tensors)))
    for number, stats in enumerate(tensors):
        ours, theirs = base.tensors[stats.name], merged.tensors[stats.name]
        rows = _rows(ours, stats, max(1, share // max(1, ours.columns)))
        w, y = _values(ours, rows), _values(theirs, rows)
        shape = (len(labels), rows.size * ours.columns)
        deltas, coarse, asked = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        spread, ranks = np.zeros(shape[1]), 0
        for delta, weight in zip(stats.deltas, stats.asked, strict=True):
            left, right = delta.factors()
            k = position[delta.label]
            some, whole = left[rows].astype(np.float64), right.astype(np.float64)
            deltas[k] = delta.scale * (some @ whole).reshape(-1)
            rounded = round_to(some, stats.dtype) @ round_to(whole, stats.dtype)
            coarse[k] = delta.scale * rounded.reshape(-1)
            asked[k] = weight
            norms = np.outer(np.linalg.norm(some, axis=1), np.linalg.norm(whole, axis=0))
            spread += max(1.0, abs(weight)) * delta.scale * norms.reshape(-1)
            ranks += delta.rank
        bound = (ranks + 2 * len(stats.deltas) + 4) * UNIT * (np.abs(w) + spread)
        parts.append((w, y, deltas, coarse, asked, bound, np.full(shape[1], number)))
    columns = list(zip(*parts, strict=True))
    return Sample(
        tuple(labels),
        tuple(stats.name for stats in tensors),
        tensors[0].dtype,
        *(np.concatenate(column, axis=-1) for column in columns),
    )


def _rows(tensor: TensorInfo, stats: TensorStats, count: int) -> Array:
    rows = np.linspace(0, tensor.rows - 1, min(count, tensor.rows)).astype(np.int64)
    if stats.first_wrong is not None:
        rows = np.append(rows, stats.first_wrong[0])
    return np.unique(rows)


def _values(tensor: TensorInfo, rows: Array) -> Float64Array:
    size = tensor.columns * ITEM_SIZE[tensor.dtype]
    raw = b"".join(read_bytes(tensor, int(row) * size, size) for row in rows)
    bits = np.frombuffer(raw, dtype=FORMATS[tensor.dtype].bits)
    return widen_bits(bits, tensor.dtype).astype(np.float64)
