"""One tensor of a merge, measured by dense deltas: any method, any kind of change, adapters or models.

The same two questions as measure.py, which stays the quick way for linear merges of plain LoRA. An element that
equals our own float32 result, rounded, is right; the others are judged in float64 by the values and bounds of
formulas.py. For methods that are linear in the weights the sums of a least-squares fit are dot products with the
dense deltas, <E, d_k> and <d_k, d_l>, E = merge - what was asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.merge.verify.asked import LINEAR
from engine.merge.verify.bits import BLOCK_ELEMENTS, raw_rows, widen_bits
from engine.merge.verify.formulas import Block, Elements, Formula, NewRows, Task, make_formula
from engine.merge.verify.quick import Compared, combine, compare, linear, rounded
from engine.merge.verify.rounding import Array, Float32Array, Float64Array, round_to
from engine.merge.verify.stats import TensorStats
from engine.merge.verify.terms import Loaded, Part
from engine.merge.verify.whole import Absent

_JUDGED = 1 << 14  # elements judged at once


def measure_dense(task: Task, judge: bool = True) -> TensorStats:
    """Compare one tensor of the merge with what was asked, block by block.

    Args:
        task: the tensor in base and merge (dtypes BF16, F16 or F32) and what was asked of it.
        judge: whether to judge elements; without it only the sums of the merge itself are taken.
    """
    loaded = [term.load(task.base) for term in task.terms]
    formula = make_formula(task, loaded, lambda: blocks_of(task, loaded))
    count = len(loaded)
    linear = task.method in LINEAR
    stats = TensorStats(
        task.name,
        task.terms,
        task.coefficients,
        task.merged.dtype,
        linear=linear,
        base_share=task.base_share,
        elements=task.merged.elements,
        gram=np.zeros((count, count)),
        found=np.zeros(count),
        ideal=np.zeros(count),
    )
    roundings = [term.roundings for term in loaded]
    columns = max(1, task.merged.columns)
    for block in blocks_of(task, loaded):
        rows = block.base.size // columns
        raw = raw_rows(task.merged, block.start // columns, rows)
        _measure_block(stats, task, formula, roundings, block, raw, judge)
    for formula, block in new_rows(task, loaded):
        raw = raw_rows(task.merged, block.start // columns, block.base.size // columns)
        _measure_block(stats, task, formula, roundings, block, raw, judge, new=True)
    return stats


def blocks_of(task: Task, loaded: Sequence[Loaded]) -> Iterator[Block]:
    """The base's rows from the first to the last, in blocks that fit the processor's cache."""
    rows, columns = task.base.rows, max(1, task.base.columns)
    step = max(1, BLOCK_ELEMENTS // columns)
    for first in range(0, rows, step):
        bits = raw_rows(task.base, first, min(step, rows - first))
        base = widen_bits(bits, task.base.dtype).reshape(-1, columns)
        yield Block(first * columns, base.reshape(-1), [t.block(first, base) for t in loaded], bits=bits)


def new_rows(task: Task, loaded: Sequence[Loaded]) -> Iterator[tuple[NewRows, Block]]:
    """Rows that the merge has and the base has not, one by one (there are few), with who brings each."""
    columns = task.base.columns
    base = np.zeros((1, columns), np.float32)
    for row in range(task.base.rows, task.merged.rows):
        there = [k for k, term in enumerate(task.terms) if term.shape[0] > row]
        parts: list[Part] = [
            term.block(row, base) if k in there else Absent(base) for k, term in enumerate(loaded)
        ]
        yield NewRows(task, there), Block(row * columns, base.reshape(-1), parts)


def _measure_block(
    stats: TensorStats,
    task: Task,
    formula: Formula,
    roundings: Sequence[int],
    block: Block,
    raw: Array,
    judge: bool,
    new: bool = False,
) -> None:
    """Add one block to `stats`. `new`: rows the base has not, which say nothing about weights."""
    compared = _linear(stats, task, block, raw) if stats.linear and not new else None
    ready = compared is not None
    if compared is None:
        compared = _compare(stats, task.base.dtype, block, raw, formula.value32(block))
    merged = block.base
    if compared.unequal or (stats.linear and not ready):
        merged = widen_bits(raw, stats.dtype)
    stats.unchanged += compared.unchanged
    stats.ideal_unchanged += compared.ideal_unchanged
    error = compared.error
    with np.errstate(invalid="ignore", over="ignore"):
        if (
            stats.linear and not new and not ready
        ):  # what float32 would lose of a small delta beside a large W stays
            error = merged - block.base
            if stats.base_share != 1.0:
                error -= np.float32(stats.base_share - 1.0) * block.base
            for a, delta in zip(stats.asked, block.deltas, strict=True):
                error -= np.float32(a) * delta
        square = float(np.dot(error, error))
    if not np.isfinite(square):
        bad = ~np.isfinite(error)
        stats.not_finite += int(np.count_nonzero(bad))
        error[bad] = 0.0
        square = float(np.sum(np.square(error, dtype=np.float64)))
    stats.found_square += square
    stats.ideal_square += square
    if stats.linear and not new:
        _add_sums(stats, block, error)
    if not judge or not compared.unequal:
        return
    where = np.flatnonzero(compared.differs)
    for start in range(0, where.size, _JUDGED):
        _judge(stats, task, formula, roundings, block, merged, error, where[start : start + _JUDGED])


def _linear(stats: TensorStats, task: Task, block: Block, raw: Array) -> Compared | None:
    """The comparison and E in one pass, where base and merge are BF16 and the loops are compiled."""
    if block.bits is None or not task.base.dtype == stats.dtype == "BF16":
        return None
    change = combine(block.base, 0.0, block.deltas, stats.asked)
    return linear(block.bits, raw, change, stats.base_share - 1.0, np.empty_like(change))


def _compare(stats: TensorStats, base_dtype: str, block: Block, raw: Array, wanted: Float32Array) -> Compared:
    """Which elements are not `wanted` rounded to the merge's dtype."""
    if block.bits is not None and base_dtype == stats.dtype == "BF16":
        quick = compare(block.bits, raw, wanted)
        if quick is not None:
            return quick
    expected, kept = rounded(wanted, stats.dtype), rounded(block.base, stats.dtype)
    differs = expected != raw
    with np.errstate(invalid="ignore", over="ignore"):
        error = widen_bits(raw, stats.dtype) - wanted
    return Compared(
        error,
        differs,
        int(np.count_nonzero(differs)),
        int(np.count_nonzero(kept == raw)),
        int(np.count_nonzero(kept == expected)),
    )


def _add_sums(stats: TensorStats, block: Block, error: Float32Array) -> None:
    for k, delta in enumerate(block.deltas):
        against = float(np.dot(error, delta))
        stats.found[k] += against
        stats.ideal[k] += against
        for m in range(k + 1):
            product = float(np.dot(delta, block.deltas[m]))
            stats.gram[k, m] += product
            if m != k:
                stats.gram[m, k] += product


def _judge(
    stats: TensorStats,
    task: Task,
    formula: Formula,
    roundings: Sequence[int],
    block: Block,
    merged: Float32Array,
    error: Float32Array,
    where: Array,
) -> None:
    """Judge the elements at flat positions `where` in float64, and move the ideal sums to the right values."""
    at = Elements.of(block, where, roundings)
    found = merged[where].astype(np.float64)
    finite = np.isfinite(found)
    plain = next(formula.ways(block, at))
    right = round_to(plain.value, stats.dtype)
    change = np.where(finite, right - found, 0.0)
    before = error[where].astype(np.float64)
    stats.ideal_square += float(np.sum((before + change) ** 2 - before**2))
    if stats.linear and not isinstance(formula, NewRows):
        stats.ideal += at.deltas @ change
    low, high = _interval(plain.value, plain.bound, stats.dtype)
    wrong = np.flatnonzero(~((low <= found) & (found <= high) & finite))
    if not wrong.size:
        return
    rest = Elements(where[wrong], at.base[wrong], at.deltas[:, wrong], at.errors[:, wrong])
    bad = np.ones(wrong.size, dtype=bool)
    for way in formula.ways(block, rest):
        lower, upper = _interval(way.value, way.bound, stats.dtype)
        bad &= ~((lower <= found[wrong]) & (found[wrong] <= upper) & way.possible & finite[wrong])
    stats.wrong += int(np.count_nonzero(bad))
    if stats.first_wrong is None and bad.any():
        first = int(wrong[np.argmax(bad)])
        position = block.start + int(where[first])
        stats.first_wrong = (
            *divmod(position, task.merged.columns),
            float(found[first]),
            float(low[first]),
            float(high[first]),
        )


def _interval(value: Float64Array, bound: Float64Array, dtype: str) -> tuple[Float64Array, Float64Array]:
    return round_to(value - bound, dtype), round_to(value + bound, dtype)
