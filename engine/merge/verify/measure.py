"""One tensor of the merge, read once beside the base's: is every element right, and the sums a fit needs.

Let W be the base, y the merge, v = W + sum_k a_k s_k B_k A_k in real numbers, u = 2^-24.

*Right.* Any tool that sums in float32, in any order, ends within e of v before it rounds to the dtype T:

    e = c u (|W| + sum_k |a_k s_k| |B_k row| |A_k column|)         c = sum of ranks + 2 adapters + 4

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1; row and column norms bound the sum
of absolute products by Cauchy-Schwarz). So y is right if round_T(v - e) <= y <= round_T(v + e).

*Quick.* Our own float32 sum v' obeys the same bound, so v - e <= v' <= v + e and, rounding being monotone,
round_T(v') lies in the interval: an element equal to round_T(v') is right without float64. Only the others
are computed in float64 and judged by the interval itself.

*Sums.* With E = (y - W) - sum_k a_k s_k B_k A_k, all that a least-squares fit on the deltas needs is B^T B, A A^T
and B^T E A^T (each R x R, R the sum of ranks): <E, B_k A_k> = tr(B_k^T E A_k^T). The same sums for the ideally
rounded merge, round_T(v) - v, differ only where y is not round_T(v).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.merge.verify.bits import BLOCK_ELEMENTS, raw_rows, widen_bits
from engine.merge.verify.quick import STORED, Compared, Source, linear
from engine.merge.verify.rounding import FORMATS, Array, Float32Array, Float64Array, fast_bits, round_to
from engine.merge.verify.stats import UNIT, FactorSums, TensorStats
from engine.merge.verify.terms import Delta
from engine.weights.tensorfile import TensorInfo

BLOCKS_READ = 4  # blocks read, and fitted, at once
_DENSE_SHARE = 0.02  # above this share of unresolved elements a whole block is done in float64
_GATHER = 1 << 15  # elements resolved at once


@dataclass(frozen=True)
class Factors:
    """The concatenated factors of one tensor: left (rows, R), right (R, columns), coefficient per rank."""

    left: Float32Array
    right: Float32Array
    coefficients: Float64Array
    scaled_left: Float32Array
    row_bounds: Float64Array  # (rows, K): |a_k s_k| times the norm of each row of B_k
    column_norms: Float64Array  # (K, columns)
    column_norms32: Float32Array
    slack: float  # c u
    own_slack: float  # the same for our own sum: one product of R terms, one rounding of the scale, one sum

    @classmethod
    def load(cls, deltas: Sequence[Delta], weights: Float64Array) -> Factors:
        pairs = [delta.factors() for delta in deltas]
        left = np.concatenate([pair[0] for pair in pairs], axis=1)
        right = np.concatenate([pair[1] for pair in pairs], axis=0)
        strengths = np.array([w * delta.scale for w, delta in zip(weights, deltas, strict=True)])
        coefficients = np.repeat(strengths, [delta.rank for delta in deltas])
        row_bounds = np.stack(
            [
                abs(s) * np.linalg.norm(pair[0].astype(np.float64), axis=1)
                for s, pair in zip(strengths, pairs, strict=True)
            ],
            axis=1,
        )
        column_norms = np.stack([np.linalg.norm(pair[1].astype(np.float64), axis=0) for pair in pairs])
        scaled = (left.astype(np.float64) * coefficients).astype(np.float32)
        slack = (len(coefficients) + 2 * len(deltas) + 4) * UNIT
        return cls(
            left, right, coefficients, scaled, row_bounds, column_norms, column_norms.astype(np.float32),
            slack, (len(coefficients) + 3) * UNIT,
        )  # fmt: skip

    def exact(self, rows: Array, columns: Array) -> Float64Array:
        """sum_k a_k s_k B_k A_k at the given elements, float64."""
        picked = self.left[rows].astype(np.float64) * self.coefficients
        return np.asarray(np.einsum("nr,rn->n", picked, self.right[:, columns].astype(np.float64)))

    def bound(self, base: Float64Array, rows: Array, columns: Array) -> Float64Array:
        """e at the given elements."""
        spread = np.einsum("nk,kn->n", self.row_bounds[rows], self.column_norms[:, columns])
        return np.asarray(self.slack * (np.abs(base) + spread))


class _Sums:
    """What grows over the rows of one tensor: B^T E and B^T (I - E), with I the ideal rounding error."""

    def __init__(self, factors: Factors, rows: int) -> None:
        ranks, columns = factors.right.shape
        self.found = np.zeros((ranks, columns))
        self.shift = np.zeros((ranks, columns))  # from blocks done densely
        self.ideal = np.zeros((ranks, ranks))  # B^T (I - E) A^T from single elements
        self.error = np.empty((rows, columns), dtype=np.float32)  # E of the rows read last


@dataclass(frozen=True)
class _Block:
    """Some rows of both models as float32 (flat), and E = merge - sum (rows, columns)."""

    first: int
    columns: int
    base: Float32Array
    merged: Float32Array
    error: Float32Array


def measure(
    base: TensorInfo,
    merged: TensorInfo,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    judge: bool = True,
) -> TensorStats:
    """Compare a touched tensor with what the weights ask for, block by block.

    Args:
        base, merged: the tensor in both models, same shape, dtypes BF16, F16 or F32.
        deltas: what changes it, one per adapter.
        weights: the weight of each delta.
        judge: whether to judge elements; without it only the sums of the merge itself are taken.
    """
    asked = np.asarray(weights, dtype=np.float64)
    factors = Factors.load(deltas, asked)
    stats = TensorStats(merged.name, tuple(deltas), asked, merged.dtype, elements=base.elements)
    left64, right64 = factors.left.astype(np.float64), factors.right.astype(np.float64)
    by_rank = FactorSums(tuple(deltas), left64.T @ left64, right64 @ right64.T)
    step = max(1, BLOCK_ELEMENTS // max(1, base.columns))
    span = min(step * BLOCKS_READ, base.rows)
    sums = _Sums(factors, span)
    for first in range(0, base.rows, span):
        count = min(span, base.rows - first)
        base_raw, merged_raw = raw_rows(base, first, count), raw_rows(merged, first, count)
        for start in range(0, count, step):
            rows = min(step, count - start)
            part = slice(start * base.columns, (start + rows) * base.columns)
            error = sums.error[start : start + rows]
            _measure_block(
                base.dtype,
                base_raw[part],
                merged_raw[part],
                factors,
                stats,
                sums,
                first + start,
                error,
                judge,
            )
        sums.found += factors.left[first : first + count].T @ sums.error[:count]
    by_rank.found = sums.found @ right64.T
    by_rank.ideal = by_rank.found + sums.shift @ right64.T + sums.ideal
    stats.factors, stats.gram = by_rank, by_rank.gram()
    stats.found, stats.ideal = by_rank.against(by_rank.found), by_rank.against(by_rank.ideal)
    return stats


def _measure_block(
    base_dtype: str,
    base_raw: Array,
    merged_raw: Array,
    factors: Factors,
    stats: TensorStats,
    sums: _Sums,
    first: int,
    error: Float32Array,
    judge: bool,
) -> None:
    """Add one block of rows, given as stored bits, to `stats` and `sums`; E goes into `error` (rows, columns)."""
    count, columns = error.shape
    delta = (factors.scaled_left[first : first + count] @ factors.right).reshape(-1)
    flat = error.reshape(-1)
    ours, theirs = Source(base_raw, STORED[base_dtype]), Source(merged_raw, STORED[stats.dtype])
    compared = linear(ours, theirs, delta, flat)
    if compared is None:
        compared = _compare(base_dtype, base_raw, merged_raw, delta, stats.dtype, flat)
    differing, same = compared.unequal, compared.unchanged
    stats.unchanged += same
    with np.errstate(invalid="ignore", over="ignore"):
        square = float(np.dot(flat, flat))
    finite = bool(np.isfinite(square))
    if not finite:
        _not_finite(stats, error)
        square = float(np.sum(np.square(flat, dtype=np.float64)))
    stats.found_square += square
    stats.ideal_square += square
    if not differing or not judge:
        stats.ideal_unchanged += same
        return
    base32, merged32 = widen_bits(base_raw, base_dtype), widen_bits(merged_raw, stats.dtype)
    stats.ideal_unchanged += compared.ideal_unchanged
    block = _Block(first, columns, base32, merged32, error)
    where = np.flatnonzero(compared.differs)
    if finite and differing > _DENSE_SHARE * flat.size:
        wanted = widen_bits(fast_bits(delta + base32, stats.dtype), stats.dtype)
        where = _judge_block(stats, factors, sums, block, wanted, compared.differs)
        for start in range(0, where.size, _GATHER):
            _judge_elements(stats, factors, None, block, where[start : start + _GATHER])
        return
    for start in range(0, where.size, _GATHER):
        _judge_elements(stats, factors, sums, block, where[start : start + _GATHER])


def _compare(
    base_dtype: str, base_raw: Array, merged_raw: Array, delta: Float32Array, dtype: str, error: Float32Array
) -> Compared:
    """In numpy, for any dtypes: which elements are not round(W + delta); E goes into `error`."""
    base32, merged32 = widen_bits(base_raw, base_dtype), widen_bits(merged_raw, dtype)
    differs = ~quick_equal(delta + base32, merged32, merged_raw, dtype)
    kept = base_raw if base_dtype == dtype else fast_bits(base32.copy(), dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        # (y - W) - delta, not y - (W + delta): what float32 would lose of a small delta beside a large W stays
        np.subtract(merged32, base32, out=error)
        error -= delta
    unequal, same = int(np.count_nonzero(differs)), int(np.count_nonzero(kept == merged_raw))
    ideal = int(np.count_nonzero(kept == fast_bits(delta + base32, dtype))) if unequal else same
    return Compared(error, differs, unequal, same, ideal)


def quick_equal(
    total: Float32Array, merged: Float32Array, merged_raw: Array, dtype: str
) -> npt.NDArray[np.bool_]:
    """Where the merge (values and stored bits) is our float32 sum rounded to nearest. Destroys `total`.

    In bfloat16 exact ties go up here, not to even: as our sum is nearer to v than e, both neighbours of a tie
    lie in the interval, and an element unequal to this one is judged by the interval itself.
    """
    if dtype != "BF16":
        return np.asarray(fast_bits(total, dtype) == merged_raw)
    bits = total.view(np.uint32)
    bits += 0x8000
    bits &= 0xFFFF0000  # a bfloat16 is the upper half of a float32
    return np.asarray(bits == merged.view(np.uint32))


def _judge_block(
    stats: TensorStats,
    factors: Factors,
    sums: _Sums,
    block: _Block,
    rounded: Float32Array,
    different: Array,
) -> Array:
    """Judge a block with many unequal elements in float32; returns the flat positions it cannot decide.

    With e' <= e the bound of our own float32 error E = y - v and h(y) half a step at y: an element is surely
    right when |E| + e' <= e, and surely wrong when |E| > e' + e + h(y). Float32 rounding of these tests is
    covered by a margin of 2^-18.
    """
    rows = len(block.error)
    size = factors.row_bounds[block.first : block.first + rows].astype(np.float32) @ factors.column_norms32
    size += np.abs(block.base).reshape(rows, block.columns)
    size = size.reshape(-1)
    off = np.abs(block.error).reshape(-1)
    margin = 1 - 2.0**-18
    sure = different & (off > (half_step(block.merged, stats.dtype) + size * (2 * factors.slack)) / margin)
    stats.wrong += int(np.count_nonzero(sure))
    if stats.first_wrong is None and sure.any():
        _note_first(stats, factors, block, int(np.argmax(sure)))
    fine = off <= size * ((factors.slack - factors.own_slack) * margin)
    change = rounded - block.merged
    sums.shift += factors.left[block.first : block.first + rows].T @ change.reshape(rows, block.columns)
    ideal = block.error.reshape(-1) + change
    stats.ideal_square += float(np.dot(ideal, ideal)) - float(np.dot(off, off))
    return np.flatnonzero(different & ~sure & ~fine)


def half_step(values: Float32Array, dtype: str) -> Float32Array:
    """Half the distance between neighbours of `dtype` at each value: 2^(e - digits - 1), e its exponent."""
    form = FORMATS[dtype]
    power = (values.view(np.uint32) & 0x7F800000).view(np.float32)  # 2^(e-1) of every normal float32
    half = power * np.float32(2.0**-form.digits)
    return np.maximum(half, np.float32(max(2.0 ** (form.least - 1), 2.0**-149)), out=half)


def _note_first(stats: TensorStats, factors: Factors, block: _Block, position: int) -> None:
    """Remember the first wrong element of the tensor with the interval it should lie in."""
    row, column = position // block.columns + block.first, position % block.columns
    rows, columns = np.array([row]), np.array([column])
    base = block.base[position : position + 1].astype(np.float64)
    value, bound = base + factors.exact(rows, columns), factors.bound(base, rows, columns)
    low, high = round_to(value - bound, stats.dtype), round_to(value + bound, stats.dtype)
    stats.first_wrong = (row, column, float(block.merged[position]), float(low[0]), float(high[0]))


def _judge_elements(
    stats: TensorStats, factors: Factors, sums: _Sums | None, block: _Block, where: Array
) -> None:
    """Judge the elements at flat positions `where` by the interval itself, in float64.

    With `sums` also moves the ideal sums from the merge's element to the ideally rounded one.
    """
    rows, cols = where // block.columns + block.first, where % block.columns
    base, merged = block.base[where].astype(np.float64), block.merged[where].astype(np.float64)
    value = base + factors.exact(rows, cols)
    bound = factors.bound(base, rows, cols)
    low, high = round_to(value - bound, stats.dtype), round_to(value + bound, stats.dtype)
    wrong = ~((low <= merged) & (merged <= high) & np.isfinite(merged))
    stats.wrong += int(np.count_nonzero(wrong))
    if stats.first_wrong is None and wrong.any():
        _note_first(stats, factors, block, int(where[np.argmax(wrong)]))
    if sums is None:
        return
    finite = np.isfinite(merged)
    right = round_to(value, stats.dtype)
    change = np.where(finite, right - merged, 0.0)
    picked = factors.left[rows].astype(np.float64) * change[:, None]
    sums.ideal += picked.T @ factors.right[:, cols].astype(np.float64).T
    before = np.where(finite, (merged - value) ** 2, 0.0)
    stats.ideal_square += float(np.sum((right - value) ** 2 - before))


def _not_finite(stats: TensorStats, error: Float32Array) -> None:
    """Elements that are NaN or infinite count apart and leave the sums alone."""
    bad = ~np.isfinite(error)
    stats.not_finite += int(np.count_nonzero(bad))
    error[bad] = 0.0
