"""One tensor of a GGUF in row blocks: is every element where the asked value must be stored, and sums for the fit.

An element x of a quantised block must be the grid point of its block next to the asked value v: |x - v| is at
most half a step (plus what a float16 scale adds), or x is the end of the grid and v lies beyond it. llama.cpp
chooses a K-quant's grid by a search that may leave single values more than a step outside of it; such elements
are right where llama.cpp's own quantisation of v lies as far off, which is tried on up to REPLAY_ROWS rows of a
tensor. A float type stores v rounded once. Around v lies what float32 summation may do, and the rounding of an
intermediate checkpoint (`route`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.gguf.blocks import FLOATS, Grid, dequantise, grid, requantise, sizes
from engine.gguf.reader import read_raw
from engine.gguf.verify.asked import Float64Array, Pair, Rows
from engine.merge.verify.rounding import round_to
from engine.weights.tensorfile import Float32Array

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32; about 20 such arrays live at once
REPLAY_ROWS = 256  # of one tensor, for elements far outside of their block's grid
FAR_SHARE = (
    0.01  # of a tensor's elements may lie so, where llama.cpp's own cannot be asked (importance matrix)
)
WORSE = 1.1  # a block of a type without an even grid may be this much further off than llama.cpp's own

Mask = npt.NDArray[np.bool_]


@dataclass
class TensorStats:
    """What one pass over a tensor found. Sums are float64 and over all elements unless said otherwise.

    With x the stored values, v the asked ones, D_k the unit deltas, y llama.cpp's own quantisation of v:
    gram = <D_k, D_l>, cross = <x - v, D_k>, square = |x - v|^2, and the same of y - v as `ideal_*` (estimated
    from `replayed` of the elements where quantising takes long).
    """

    pair: Pair
    weights: Float64Array
    gram: Float64Array
    cross: Float64Array
    ideal_cross: Float64Array
    square: float = 0.0
    replay_square: float = 0.0  # mean of (y - x)^2
    ideal_square: float = 0.0
    judged: int = 0
    wrong: int = 0
    not_finite: int = 0
    clipped: int = 0  # beyond the ends of their block's grid
    like_base: int = 0  # elements the base's own value would explain as well
    blocks: int = 0  # blocks compared with llama.cpp's own quantisation
    same_blocks: int = 0
    first_wrong: tuple[int, int, float, float] | None = None  # row, column, stored, asked
    far: int = 0  # of them, by more than a step
    replays: int = field(default=REPLAY_ROWS, repr=False)  # rows that may still be quantised again
    far_wrong: bool = field(default=False, repr=False)

    @property
    def elements(self) -> int:
        return self.pair.stored.elements


def through(values: Float32Array, route: str) -> Float32Array:
    """float32 values rounded to the dtype of an intermediate checkpoint ("BF16", "F16"); "" leaves them."""
    if route == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + (np.uint32(0x7FFF) + odd)) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32)
    if route == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def misses(x: Float32Array, v: Float32Array, kind: str, places: Grid | None) -> Mask:
    """Elements that are not simply the stored form of v (float32, already routed), flat arrays; quick."""
    if places is None:
        return np.asarray(through(v, "" if kind == "F32" else kind) != x)
    off = np.abs(x - v)
    clipped = ((x >= places.high) & (v > x)) | ((x <= places.low) & (v < x))
    return np.asarray(off > places.half + np.where(clipped, places.step, np.float32(0)))


def measure(
    pair: Pair,
    weights: Float64Array,
    route: str,
    every: int = 1,
    imatrix: bool = False,
    advance: Callable[[int], None] = lambda done: None,
) -> TensorStats:
    """Measure one tensor against base + sum weights[k] * delta_k, by way of `route`.

    `every`: each n-th row block is quantised again by llama.cpp for what a right file would give. `imatrix`: the
    file was quantised with an importance matrix, so llama.cpp's own result is not known; values far outside of
    their grid may then be FAR_SHARE of the tensor. `advance` is told the stored bytes of each finished block.
    """
    k = len(pair.deltas)
    stats = TensorStats(pair, weights, np.zeros((k, k)), np.zeros(k), np.zeros(k))
    stats.replays = 0 if imatrix else REPLAY_ROWS
    loaded, stored = pair.load(), pair.stored
    step = max(pair.unit, BLOCK_ELEMENTS // stored.columns // pair.unit * pair.unit)
    sampled, sampled_cross, sampled_square, replay_square = 0, np.zeros(k), 0.0, 0.0
    for number, first in enumerate(range(0, stored.rows, step)):
        count = min(step, stored.rows - first)
        block = _Block(pair, first, count, pair.rows(first, count, loaded), weights, route)
        stats.not_finite += block.not_finite
        flat = block.rows.deltas
        stats.gram += _inner(flat, flat)
        error = block.x - block.v
        stats.cross += _inner(flat, error[None])[:, 0]
        stats.square += float(_inner(error[None], error[None])[0, 0])
        if number % every == 0:
            change = block.ideal - block.x
            sampled += count
            sampled_cross += _inner(flat, change[None])[:, 0]
            own = float(_inner(change[None], change[None])[0, 0])
            replay_square += own
            sampled_square += own + 2 * float(_inner(error[None], change[None])[0, 0])
            blocks, same = block.same_blocks()
            stats.blocks, stats.same_blocks = stats.blocks + blocks, stats.same_blocks + same
        if block.uneven and number % every:
            continue
        stats.judged += count * stored.columns
        _judge(stats, block)
        advance(count * stored.row_bytes)
    if imatrix and stats.far > FAR_SHARE * stored.elements:
        stats.wrong += stats.far
    share = stored.rows / max(sampled, 1)
    stats.ideal_cross = stats.cross + share * sampled_cross
    stats.replay_square = replay_square * share / stored.elements
    stats.ideal_square = max(0.0, stats.square + share * sampled_square)
    return stats


class _Block:
    """Some rows of a tensor with everything derived from them; flat float32 arrays."""

    def __init__(
        self, pair: Pair, first: int, count: int, rows: Rows, weights: Float64Array, route: str
    ) -> None:
        self.pair, self.first, self.rows, self.weights, self.route = pair, first, rows, weights, route
        self.kind = pair.stored.type
        self.raw = np.frombuffer(read_raw(pair.stored, first, count), np.uint8).reshape(count, -1)
        x = dequantise(self.raw, self.kind)
        finite = np.isfinite(x)
        self.not_finite = int(x.size - np.count_nonzero(finite))
        self.x: Float32Array = np.where(finite, x, np.float32(0)) if self.not_finite else x
        self.v: Float32Array = rows.value(weights)
        self.routed = through(self.v, route)
        self.places = grid(self.raw, self.kind, self.x)
        self.uneven = self.places is None and self.kind not in FLOATS
        self._float: Float32Array | None = None
        self._ideal: tuple[npt.NDArray[np.uint8], Float32Array] | None = None

    @property
    def columns(self) -> int:
        return self.pair.stored.columns

    def _rounded(self) -> Float32Array:
        """The routed values in the file's own float type."""
        if self._float is None:
            self._float = through(self.routed, "" if self.kind == "F32" else self.kind)
        return self._float

    def misses(self) -> npt.NDArray[np.int64]:
        """Positions of elements that are not simply the stored form of the asked value."""
        if self.kind in FLOATS:
            return np.flatnonzero(self._rounded() != self.x)
        return np.flatnonzero(misses(self.x, self.routed, self.kind, self.places))

    def _requantised(self) -> tuple[npt.NDArray[np.uint8], Float32Array]:
        if self._ideal is None:
            raw = requantise(self.routed.reshape(-1, self.columns), self.kind)
            self._ideal = raw, dequantise(raw, self.kind)
        return self._ideal

    @property
    def ideal(self) -> Float32Array:
        """llama.cpp's own quantisation of the asked values."""
        return self._rounded() if self.kind in FLOATS else self._requantised()[1]

    def same_blocks(self) -> tuple[int, int]:
        """(blocks, blocks that are llama.cpp's own); a value of a float type counts as a block."""
        if self.kind in FLOATS:
            return self.x.size, int(np.count_nonzero(self.x == self.ideal))
        size = sizes(self.kind)[1]
        differs = (self._requantised()[0] != self.raw).reshape(-1)
        wrong = np.unique(np.flatnonzero(differs) // size).size
        return differs.size // size, differs.size // size - wrong

    def ideal_rows(self, rows: npt.NDArray[np.int64]) -> Float32Array:
        """The same of some rows only, (rows, columns)."""
        if self._ideal is not None:
            return self._ideal[1].reshape(-1, self.columns)[rows]
        raw = requantise(self.routed.reshape(-1, self.columns)[rows], self.kind)
        return dequantise(raw, self.kind).reshape(-1, self.columns)


def _inner(a: Float32Array, b: Float32Array) -> Float64Array:
    """a @ b.T of flat float32 rows: products in float32, partial sums of 4096 elements added in float64."""
    size, run = a.shape[1], 4096
    whole = size // run * run
    left, right = (
        a[:, :whole].reshape(len(a), whole // run, run),
        b[:, :whole].reshape(len(b), whole // run, run),
    )
    total = np.einsum("ijx,kjx->ikj", left, right, optimize=False).sum(axis=2, dtype=np.float64)
    return np.asarray(total + a[:, whole:].astype(np.float64) @ b[:, whole:].astype(np.float64).T)


def _judge(stats: TensorStats, block: _Block) -> None:
    """Count the elements of a block that are wrong, clipped, or the base's as much as the asked one's."""
    if block.uneven:
        wrong = _worse_blocks(block)
    else:
        found = block.misses()
        wrong = _still_wrong(stats, block, found) if found.size else found
        if block.places is not None:
            v, places = block.routed, block.places
            beyond = (v > places.high + places.half) | (v < places.low - places.half)
            stats.clipped += int(np.count_nonzero(beyond))
        if block.pair.deltas:
            base = block.rows.base
            unlike = misses(block.x, base, block.kind, block.places)
            stats.like_base += base.size - int(np.count_nonzero(unlike))
    stats.wrong += wrong.size
    if wrong.size and stats.first_wrong is None:
        row, column = divmod(int(wrong[0]), block.columns)
        stats.first_wrong = (block.first + row, column, float(block.x[wrong[0]]), float(block.v[wrong[0]]))


def _still_wrong(stats: TensorStats, block: _Block, found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Of the elements the quick test finds, those outside what float32 sums and the format allow."""
    x = block.x[found].astype(np.float64)
    low, high = _interval(block, found)
    if block.places is None:
        return found[~((low <= x) & (x <= high))]
    half = block.places.half[found]
    beyond = (x >= block.places.high[found]) & (high > x) | (x <= block.places.low[found]) & (low < x)
    wrong = found[~((low - half <= x) & (x <= high + half) | beyond)]
    return np.concatenate([wrong, _far(stats, block, found[beyond])])


def _far(stats: TensorStats, block: _Block, found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Elements further outside of their grid than llama.cpp's own quantisation leaves them.

    When the tensor's rows to replay are used up, the rest is right if all replayed ones were.
    """
    stats.far += found.size
    rows = np.unique(found // block.columns)[: stats.replays]
    stats.replays -= rows.size
    ideal = np.full((block.x.size // block.columns, block.columns), np.nan, np.float32)
    if rows.size:
        ideal[rows] = block.ideal_rows(rows)
    off = np.abs(block.x[found] - block.routed[found])
    best = np.abs(ideal.reshape(-1)[found] - block.routed[found])
    wrong = off > 1.01 * best + 1e-7
    stats.far_wrong = stats.far_wrong or bool(wrong.any())
    if stats.far_wrong:
        wrong |= np.isnan(best)
    return found[wrong]


def _interval(block: _Block, at: npt.NDArray[np.int64]) -> tuple[Float64Array, Float64Array]:
    """What float32 sums and the roundings on the way allow around the asked values of some elements."""
    value, slack = block.rows.exact(block.weights, at)
    low, high = value - slack, value + slack
    steps = [block.route] if block.route else []
    for dtype in [*steps, block.kind] if block.kind in FLOATS else steps:
        low, high = round_to(low, dtype), round_to(high, dtype)
    return low, high


def _worse_blocks(block: _Block) -> npt.NDArray[np.int64]:
    """Elements of blocks whose error is clearly larger than that of llama.cpp's own quantisation."""
    size = sizes(block.kind)[0]
    ours = np.square(block.x - block.routed).reshape(-1, size).sum(axis=1)
    best = np.square(block.ideal - block.routed).reshape(-1, size).sum(axis=1)
    bad = ours > WORSE**2 * best + 1e-14 * size
    return np.flatnonzero(np.repeat(bad, size))
