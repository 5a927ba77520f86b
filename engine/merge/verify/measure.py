"""One tensor of the merge, read once beside the base's: is every element right, and the sums a fit needs.

Let W be the base, y the merge, v = W + sum_k a_k s_k B_k A_k in real numbers, u = 2^-24.

*Right.* Any tool that sums in float32, in any order, ends within e of v before it rounds to the dtype T:

    e = c u (|W| + sum_k |a_k s_k| |B_k row| |A_k column|)         c = sum of ranks + 2 adapters + 4

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1; row and column norms bound the sum
of absolute products by Cauchy-Schwarz). So y is right if round_T(v - e) <= y <= round_T(v + e).

*Quick.* Our own float32 sum v' obeys the same bound, so v - e <= v' <= v + e and, rounding being monotone,
round_T(v') lies in the interval: an element equal to round_T(v') is right without float64. Only the others
are computed in float64 and judged by the interval itself.

*Sums.* With E = y - v', everything a least-squares fit on the deltas needs is B^T B, A A^T and B^T E A^T
(each R x R, R the sum of ranks): <E, B_k A_k> = tr(B_k^T E A_k^T). The same sums for the ideally rounded
merge, round_T(v) - v, differ only where y is not round_T(v).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.errors import BadTensorFileError
from engine.merge.verify.deltas import Delta
from engine.merge.verify.rounding import FORMATS, Array, Float32Array, Float64Array, fast_bits, round_to
from engine.weights.tensorfile import ITEM_SIZE, TensorInfo, read_bytes

UNIT = 2.0**-24
BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: a block's buffers stay in the cache
_DENSE_SHARE = 0.02  # above this share of unresolved elements a whole block is done in float64
_GATHER = 1 << 15  # elements resolved at once


@dataclass
class TensorStats:
    """What one touched tensor holds. Sums are float64; E is the merge minus the float32 sum asked for."""

    name: str
    deltas: tuple[Delta, ...]
    asked: Float64Array  # (K,) weight of each delta
    dtype: str
    elements: int = 0
    wrong: int = 0
    unchanged: int = 0
    ideal_unchanged: int = 0
    not_finite: int = 0
    first_wrong: tuple[int, int, float, float, float] | None = None  # row, column, found, lowest, highest
    left_gram: Float64Array = field(default_factory=lambda: np.zeros((0, 0)))  # B^T B
    right_gram: Float64Array = field(default_factory=lambda: np.zeros((0, 0)))  # A A^T
    found: Float64Array = field(default_factory=lambda: np.zeros((0, 0)))  # B^T E A^T
    ideal: Float64Array = field(default_factory=lambda: np.zeros((0, 0)))  # the same, ideally rounded
    found_square: float = 0.0  # ||E||^2
    ideal_square: float = 0.0

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(delta.label for delta in self.deltas)

    @property
    def spans(self) -> list[slice]:
        """Where each delta's ranks lie in the R x R sums."""
        ends = np.cumsum([delta.rank for delta in self.deltas])
        return [slice(int(end) - delta.rank, int(end)) for end, delta in zip(ends, self.deltas, strict=True)]

    @property
    def untouched_in_fact(self) -> bool:
        """Every element still is the base's."""
        return self.unchanged == self.elements


@dataclass(frozen=True)
class Factors:
    """The concatenated factors of one tensor: left (rows, R), right (R, columns), coefficient per rank."""

    left: Float32Array
    right: Float32Array
    coefficients: Float64Array
    scaled_left: Float32Array
    row_bounds: Float64Array  # (rows, K): |a_k s_k| times the norm of each row of B_k
    column_norms: Float64Array  # (K, columns)
    slack: float  # c u

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
        return cls(left, right, coefficients, scaled, row_bounds, column_norms, slack)

    def exact(self, rows: Array, columns: Array) -> Float64Array:
        """sum_k a_k s_k B_k A_k at the given elements, float64."""
        picked = self.left[rows].astype(np.float64) * self.coefficients
        return np.asarray(np.einsum("nr,rn->n", picked, self.right[:, columns].astype(np.float64)))

    def bound(self, base: Float64Array, rows: Array, columns: Array) -> Float64Array:
        """e at the given elements."""
        spread = np.einsum("nk,kn->n", self.row_bounds[rows], self.column_norms[:, columns])
        return np.asarray(self.slack * (np.abs(base) + spread))


def measure(
    base: TensorInfo, merged: TensorInfo, deltas: Sequence[Delta], weights: Sequence[float]
) -> TensorStats:
    """Compare a touched tensor with what the weights ask for, block by block.

    Args:
        base, merged: the tensor in both models, same shape, dtypes BF16, F16 or F32.
        deltas: what changes it, one per adapter.
        weights: the weight of each delta (zeros to fit without judging).
    """
    asked = np.asarray(weights, dtype=np.float64)
    factors = Factors.load(deltas, asked)
    stats = TensorStats(base.name, tuple(deltas), asked, merged.dtype)
    left64, right64 = factors.left.astype(np.float64), factors.right.astype(np.float64)
    stats.left_gram, stats.right_gram = left64.T @ left64, right64 @ right64.T
    ranks, columns = factors.right.shape
    found, ideal = np.zeros((ranks, columns)), np.zeros((ranks, ranks))
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, base.rows, step):
        count = min(step, base.rows - first)
        _block(base, merged, factors, stats, first, count, found, ideal)
    stats.found = found @ right64.T
    stats.ideal = stats.found + ideal
    stats.elements = base.elements
    return stats


def _block(
    base: TensorInfo,
    merged: TensorInfo,
    factors: Factors,
    stats: TensorStats,
    first: int,
    count: int,
    found: Float64Array,
    ideal: Float64Array,
) -> None:
    """Add one block of rows to `stats`, to `found` (B^T E, R x columns) and `ideal` (B^T (I - y) A^T)."""
    columns = base.columns
    base_raw, merged_raw = _raw(base, first, count), _raw(merged, first, count)
    base32, merged32 = widen_bits(base_raw, base.dtype), widen_bits(merged_raw, merged.dtype)
    left = factors.left[first : first + count]
    total = factors.scaled_left[first : first + count] @ factors.right
    total += base32.reshape(count, columns)
    expected = fast_bits(total, merged.dtype).reshape(-1)
    different = np.flatnonzero(expected != merged_raw)
    if base.dtype == merged.dtype:
        same = int(np.count_nonzero(base_raw == merged_raw))
        stats.ideal_unchanged += same if not different.size else int(np.count_nonzero(expected == base_raw))
    else:
        plain = fast_bits(base32, merged.dtype)
        same = int(np.count_nonzero(plain == merged_raw))
        stats.ideal_unchanged += int(np.count_nonzero(plain == expected))
    stats.unchanged += same
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.subtract(merged32.reshape(count, columns), total, out=total)
        flat = error.reshape(-1)
        square = float(np.dot(flat, flat))
    if not np.isfinite(square):
        _not_finite(stats, error)
        square = float(np.dot(flat.astype(np.float64), flat.astype(np.float64)))
    found += left.T @ error
    stats.found_square += square
    stats.ideal_square += square
    for start in range(0, different.size, _GATHER):
        _resolve(stats, factors, merged.dtype, first, columns, different[start : start + _GATHER],
                 base32, merged32, ideal)  # fmt: skip


def _resolve(
    stats: TensorStats,
    factors: Factors,
    dtype: str,
    first: int,
    columns: int,
    where: Array,
    base32: Float32Array,
    merged32: Float32Array,
    ideal: Float64Array,
) -> None:
    """Judge the elements at flat positions `where` of a block by the interval, in float64."""
    rows, cols = where // columns + first, where % columns
    base64, merged64 = base32[where].astype(np.float64), merged32[where].astype(np.float64)
    value = base64 + factors.exact(rows, cols)
    bound = factors.bound(base64, rows, cols)
    low, high = round_to(value - bound, dtype), round_to(value + bound, dtype)
    wrong = ~((low <= merged64) & (merged64 <= high) & np.isfinite(merged64))
    stats.wrong += int(np.count_nonzero(wrong))
    if stats.first_wrong is None and wrong.any():
        i = int(np.argmax(wrong))
        stats.first_wrong = (
            int(rows[i]), int(cols[i]), float(merged64[i]), float(low[i]), float(high[i]),
        )  # fmt: skip
    finite = np.isfinite(merged64)
    right = round_to(value, dtype)
    change = np.where(finite, right - merged64, 0.0)
    picked = factors.left[rows].astype(np.float64) * change[:, None]
    ideal += picked.T @ factors.right[:, cols].astype(np.float64).T
    stats.ideal_square += float(
        np.sum(np.where(finite, (right - value) ** 2 - (merged64 - value) ** 2, (right - value) ** 2))
    )


def _not_finite(stats: TensorStats, error: Float32Array) -> None:
    """Elements that are NaN or infinite count apart and leave the sums alone."""
    bad = ~np.isfinite(error)
    stats.not_finite += int(np.count_nonzero(bad))
    error[bad] = 0.0


def _raw(tensor: TensorInfo, first: int, count: int) -> Array:
    """The stored bits of some rows, as a flat array of unsigned integers."""
    size = tensor.columns * ITEM_SIZE[tensor.dtype]
    return np.frombuffer(read_bytes(tensor, first * size, count * size), dtype=FORMATS[tensor.dtype].bits)


def widen_bits(raw: Array, dtype: str) -> Float32Array:
    """Stored bits as float32 values, exact. The verifier's own, not the merge's."""
    if dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.float32)


def same_bytes(base: TensorInfo, merged: TensorInfo) -> int:
    """How many elements of an untouched tensor differ: bit for bit, or after one rounding to another dtype."""
    if base.dtype != merged.dtype and not (base.dtype in FORMATS and merged.dtype in FORMATS):
        raise BadTensorFileError(
            f"{merged.file}: {merged.name} is {merged.dtype}, and {base.dtype} in the base",
            "only BF16, F16 and F32 can be compared across dtypes",
        )
    size, out = ITEM_SIZE[base.dtype], ITEM_SIZE[merged.dtype]
    differing = 0
    for first in range(0, base.elements, 4 * BLOCK_ELEMENTS):
        count = min(4 * BLOCK_ELEMENTS, base.elements - first)
        ours, theirs = (
            read_bytes(base, first * size, count * size),
            read_bytes(merged, first * out, count * out),
        )
        if base.dtype == merged.dtype:
            if ours != theirs:
                a: Any = np.frombuffer(ours, np.uint8).reshape(count, size)
                b: Any = np.frombuffer(theirs, np.uint8).reshape(count, size)
                differing += int(np.count_nonzero((a != b).any(axis=1)))
            continue
        values = widen_bits(np.frombuffer(ours, FORMATS[base.dtype].bits), base.dtype)
        expected = fast_bits(values, merged.dtype)
        differing += int(np.count_nonzero(expected != np.frombuffer(theirs, FORMATS[merged.dtype].bits)))
    return differing
