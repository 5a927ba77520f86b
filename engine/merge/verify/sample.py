"""A bounded sample of rows of the touched tensors, dense and in float64: what hypotheses are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.merge.verify.bits import Rows, read_block
from engine.merge.verify.deltas import reference
from engine.merge.verify.rounding import Array, Float64Array, round_to
from engine.merge.verify.stats import UNIT, TensorStats
from engine.merge.verify.terms import Delta, Term
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorInfo

BUDGET = 120_000  # elements
THIN = 6_000


@dataclass(frozen=True)
class Sample:
    """N elements: base and merge, K scaled deltas (weight 1), what was asked of each, and the allowed slack.

    `coarse` are the deltas made from A and B rounded to the merge's dtype first (equal to `deltas` where the
    adapter is stored in it); `joined` is what was asked of all of them, from B and weight * scale * A rounded so.
    `owner[i]` indexes `names`, the tensor an element is of.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    dtype: str
    base: Float64Array
    merged: Float64Array
    deltas: Float64Array  # (K, N)
    coarse: Float64Array  # (K, N)
    joined: Float64Array  # (N,)
    asked: Float64Array  # (K, N)
    bound: Float64Array  # (N,) e of measure.py, for weights up to the larger of 1 and those asked
    owner: Array
    implied: int | None = None  # the label that counts what the others leave of `whole`; its delta is 0
    whole: float = 1.0

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
            self.coarse[:, keep], self.joined[keep], self.asked[:, keep], self.bound[keep], self.owner[keep],
            self.implied, self.whole,
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
    implied: str | None = None,
) -> Sample:
    """Evenly spaced rows of every tensor given (always the row of its first wrong element), `budget` in all."""
    position = {label: i for i, label in enumerate(labels)}
    parts = []
    share = max(1, budget // max(1, len(tensors)))
    for number, stats in enumerate(tensors):
        theirs = merged.tensors[stats.name]
        rows = _rows(theirs, stats, max(1, share // max(1, theirs.columns)))
        ours = reference(base, stats.name)
        assert ours is not None
        w, y = _values(ours, rows), _values(theirs, rows)
        shape = (len(labels), w.size)
        deltas, coarse, asked = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        joined, spread, ranks = np.zeros(shape[1]), np.zeros(shape[1]), 0
        for term, weight in zip(stats.terms, stats.asked, strict=True):
            k = position[term.label]
            deltas[k], coarse[k], size, roundings = _changes(term, ours, rows, w, stats.dtype)
            asked[k] = weight
            joined += _joined(term, weight, deltas[k], rows, stats.dtype)
            spread += max(1.0, abs(weight)) * size
            ranks += roundings
        if implied is not None:
            asked[position[implied]] = stats.base_share - asked.sum(axis=0)
        bound = (ranks + 2 * len(stats.terms) + 4) * UNIT * (np.abs(w).reshape(-1) + spread)
        base_part = stats.base_share * w.reshape(-1)
        own = (base_part, y.reshape(-1), deltas, coarse, joined, asked, bound, np.full(shape[1], number))
        parts.append(own)
    w, y, deltas, coarse, joined, asked, bound, owner = (
        np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)
    )
    return Sample(
        tuple(labels),
        tuple(stats.name for stats in tensors),
        tensors[0].dtype,
        w,
        y,
        deltas,
        coarse,
        joined,
        asked,
        bound,
        owner,
        None if implied is None else position[implied],
        tensors[0].base_share,
    )


def _changes(
    term: Term, base: TensorInfo, rows: Array, values: Float64Array, dtype: str
) -> tuple[Float64Array, Float64Array, Float64Array, int]:
    """Deltas, deltas from factors rounded to `dtype` first, sizes (all flat) and roundings of some whole rows."""
    if isinstance(term, Delta):
        left, right = term.factors()
        some, whole = left[rows].astype(np.float64), right.astype(np.float64)
        size = abs(term.scale) * np.outer(np.linalg.norm(some, axis=1), np.linalg.norm(whole, axis=0))
        rounded = term.scale * (round_to(some, dtype) @ round_to(whole, dtype))
        return (term.scale * (some @ whole)).reshape(-1), rounded.reshape(-1), size.reshape(-1), term.rank
    loaded = term.load(base)
    width = values.shape[1]
    pairs = [
        loaded.block(int(row), Rows.of(values[i : i + 1].astype(np.float32))).exact(np.arange(width))
        for i, row in enumerate(rows)
    ]
    delta, size = np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
    return delta, delta, size + np.abs(values).reshape(-1), loaded.roundings


def _joined(term: Term, weight: float, delta: Float64Array, rows: Array, dtype: str) -> Float64Array:
    """weight * delta of some whole rows (flat), from B and weight * scale * A, each rounded to `dtype`.

    The weight and the scale go to A one after the other in float32, as PEFT's `add_weighted_adapter` does for "cat".
    """
    if not isinstance(term, Delta):
        return weight * delta
    left, right = term.factors()
    left = left[rows]
    if term.stored_transposed:
        left = left * np.float32(weight) * np.float32(term.scale)
    else:
        right = right * np.float32(weight) * np.float32(term.scale)
    some, whole = left.astype(np.float64), right.astype(np.float64)
    return (round_to(some, dtype) @ round_to(whole, dtype)).reshape(-1)


def _rows(tensor: TensorInfo, stats: TensorStats, count: int) -> Array:
    rows = np.linspace(0, tensor.rows - 1, min(count, tensor.rows)).astype(np.int64)
    if stats.first_wrong is not None:
        rows = np.append(rows, stats.first_wrong[0])
    return np.unique(rows)


def _values(tensor: TensorInfo, rows: Array) -> Float64Array:
    """Whole rows, float64 (rows, columns)."""
    runs = np.split(
        rows, np.flatnonzero(np.diff(rows) != 1) + 1
    )  # rows that follow each other are read at once
    return np.concatenate([read_block(tensor, int(run[0]), run.size) for run in runs]).astype(np.float64)
