"""Some rows of some tensors, kept in memory: what other weights, routes and known mistakes are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from engine.gguf.blocks import FLOATS, LAYOUTS, Grid, dequantise, grid, requantise, sizes
from engine.gguf.reader import read_raw
from engine.gguf.verify.asked import Float64Array, Pair
from engine.gguf.verify.measure import WORSE, Mask, misses, through
from engine.weights.tensorfile import Float32Array

BUDGET = 400_000  # elements of all tensors together
UNEVEN_BUDGET = 40_000  # the same where each try quantises them again
NOISE = np.float32(2.0**-19)  # float32 summation of a sample's deltas; measuring bounds it exactly
ROUTES = ("", "BF16", "F16")


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor: stored values x, their grids, base and unit deltas; flat float32 arrays."""

    pair: Pair
    base: Float32Array
    deltas: Float32Array
    x: Float32Array
    places: Grid | None

    @property
    def size(self) -> Float32Array:
        """What float32 sums work with, roughly: |W| + the sum of |delta|."""
        return np.asarray(np.abs(self.base) + np.abs(self.deltas).sum(axis=0))

    def value(self, weights: Float64Array) -> Float32Array:
        """base + sum over k of weights[k] * delta_k."""
        if not len(self.deltas):
            return self.base
        return np.asarray(weights.astype(np.float32) @ self.deltas + self.base)

    def thin(self, every: int) -> Piece:
        """Every n-th element of it (all where whole blocks are needed)."""
        if every == 1 or (self.places is None and self.pair.stored.type not in FLOATS):
            return self
        places = self.places and Grid(*(getattr(self.places, f.name)[::every] for f in fields(Grid)))
        return Piece(self.pair, self.base[::every], self.deltas[:, ::every], self.x[::every], places)

    def wrong(self, weights: Float64Array, route: str, spread: float = 0.0) -> Mask:
        """Elements that base + sum weights * delta does not explain.

        `spread` allows the value to be off by this share of itself, for sums whose roundings are not known.
        """
        kind = self.pair.stored.type
        v = through(self.value(weights), route)
        if kind in FLOATS or spread:
            slack = np.asarray(NOISE * self.size + np.float32(spread) * np.abs(v), dtype=np.float32)
            return _outside(self.x, v - slack, v + slack, kind, self.places)
        if self.places is None:
            return self._worse(v)
        return misses(self.x, v, kind, self.places)

    def _worse(self, v: Float32Array) -> Mask:
        kind = self.pair.stored.type
        size = sizes(kind)[0]
        best = dequantise(requantise(v.reshape(-1, self.pair.stored.columns), kind), kind)
        ours, own = (np.square(y - v).reshape(-1, size).sum(axis=1) for y in (self.x, best))
        return np.repeat(ours > WORSE**2 * own + 1e-14 * size, size)


def _outside(x: Float32Array, low: Float32Array, high: Float32Array, kind: str, places: Grid | None) -> Mask:
    if places is None:
        dtype = "" if kind == "F32" else kind
        return np.asarray((x < through(low, dtype)) | (x > through(high, dtype)))
    half = places.half
    ends = ((x >= places.high) & (high > x)) | ((x <= places.low) & (low < x))
    return np.asarray(((x < low - half) | (x > high + half)) & ~ends)


def draw(pairs: Sequence[Pair]) -> list[Piece]:
    """Evenly spread rows of every pair given, BUDGET elements in all, at least one head or row of each."""
    pieces = []
    for pair in pairs:
        uneven = pair.stored.type not in FLOATS and pair.stored.type not in LAYOUTS
        share = max(1, (UNEVEN_BUDGET if uneven else BUDGET) // len(pairs))
        stored, unit = pair.stored, pair.unit
        units = stored.rows // unit
        count = max(1, min(units, share // (stored.columns * unit)))
        loaded = pair.load()
        chosen = np.unique(np.linspace(0, units - 1, count).astype(np.int64)) * unit
        parts = [pair.rows(int(first), unit, loaded) for first in chosen]
        base = np.concatenate([part.base for part in parts])
        deltas = np.concatenate([part.deltas for part in parts], axis=1)
        raw = np.frombuffer(b"".join(read_raw(stored, int(first), unit) for first in chosen), np.uint8)
        x = np.nan_to_num(dequantise(raw, stored.type), nan=0.0, posinf=0.0, neginf=0.0)
        pieces.append(Piece(pair, base, deltas, x, grid(raw, stored.type, x)))
    return pieces


def best_route(pieces: Sequence[Piece], weights: Sequence[Float64Array]) -> str:
    """The route that leaves the fewest elements of the sample unexplained; the first of equals."""
    counts = {
        route: sum(
            int(np.count_nonzero(piece.wrong(own, route))) for piece, own in zip(pieces, weights, strict=True)
        )
        for route in ROUTES
    }
    return min(ROUTES, key=lambda route: counts[route])


def least_squares(pieces: Sequence[Piece], labels: Sequence[str]) -> tuple[Float64Array, Float64Array]:
    """Weights and their standard errors from the sample alone: x - W on the deltas."""
    k = len(labels)
    gram, cross, noise = np.zeros((k, k)), np.zeros(k), np.zeros((k, k))
    parts: list[tuple[npt.NDArray[np.int64], Float64Array, Float64Array, float, int]] = []
    for piece in pieces:
        at = np.array([labels.index(label) for label in piece.pair.labels], dtype=np.int64)
        deltas = piece.deltas.astype(np.float64)
        change = piece.x - piece.base.astype(np.float64)
        own, right = deltas @ deltas.T, deltas @ change
        gram[np.ix_(at, at)] += own
        cross[at] += right
        parts.append((at, own, right, float(change @ change), change.size))
    size = np.sqrt(np.diagonal(gram))
    safe = np.where(size > 0, size, 1.0)
    inverse = np.linalg.pinv(gram / np.outer(safe, safe), rcond=1e-9) / np.outer(safe, safe)
    found = inverse @ cross
    for at, own, right, square, elements in parts:
        left = square - 2 * float(found[at] @ right) + float(found[at] @ own @ found[at])
        noise[np.ix_(at, at)] += max(left, 0.0) / elements * own
    return found, np.sqrt(np.maximum(np.diagonal(inverse @ noise @ inverse), 0.0))
