"""One tensor of a merge, measured by dense deltas: any method, any kind of change, adapters or models.

The same two questions as measure.py, which stays the quick way for linear merges of plain LoRA. An element that
equals our own float32 result, rounded, is right (comparison.py); the others are judged in float64 by the values and
bounds of formulas.py. For methods that are linear in the weights the sums of a least-squares fit are dot products
with the dense deltas, <E, d_k> and <d_k, d_l>, E = merge - what was asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.merge.verify.asked import LINEAR
from engine.merge.verify.bits import BLOCK_ELEMENTS, Rows
from engine.merge.verify.comparison import compare
from engine.merge.verify.formulas import Block, Elements, Formula, NewRows, Task, make_formula
from engine.merge.verify.rounding import Array, Float64Array, round_to
from engine.merge.verify.stats import TensorStats
from engine.merge.verify.terms import Loaded, Part
from engine.merge.verify.whole import Absent, Nothing, Whole

_JUDGED = 1 << 14  # elements judged at once
_READ_ELEMENTS = 1 << 18  # where nothing is computed, only read


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
    for block in blocks_of(task, loaded):
        merged = Rows.read(task.merged, block.start // block.base.columns, len(block.base))
        _measure_block(stats, task, formula, roundings, block, merged, judge)
    for formula, block in new_rows(task, loaded):
        merged = Rows.read(task.merged, block.start // block.base.columns, len(block.base))
        _measure_block(stats, task, formula, roundings, block, merged, judge, new=True)
    return stats


def blocks_of(task: Task, loaded: Sequence[Loaded]) -> Iterator[Block]:
    """The base's rows from the first to the last, in blocks that fit the processor's cache."""
    rows, columns = task.base.rows, max(1, task.base.columns)
    read = all(isinstance(term, Whole | Nothing) for term in task.terms)
    step = max(1, (_READ_ELEMENTS if read else BLOCK_ELEMENTS) // columns)
    for first in range(0, rows, step):
        base = Rows.read(task.base, first, min(step, rows - first))
        yield Block(first * columns, base, [term.block(first, base) for term in loaded])


def new_rows(task: Task, loaded: Sequence[Loaded]) -> Iterator[tuple[NewRows, Block]]:
    """Rows that the merge has and the base has not, one by one (there are few), with who brings each."""
    columns = task.base.columns
    base = Rows.of(np.zeros((1, columns), np.float32))
    for row in range(task.base.rows, task.merged.rows):
        there = [k for k, term in enumerate(task.terms) if term.shape[0] > row]
        parts: list[Part] = [
            term.block(row, base) if k in there else Absent(base) for k, term in enumerate(loaded)
        ]
        yield NewRows(task, there), Block(row * columns, base, parts)


def _measure_block(
    stats: TensorStats,
    task: Task,
    formula: Formula,
    roundings: Sequence[int],
    block: Block,
    merged: Rows,
    judge: bool,
    new: bool = False,
) -> None:
    """Add one block to `stats`. `new`: rows the base has not, which say nothing about weights."""
    fitted = stats.linear and not new
    found = compare(block.base.source, merged.source, block.sources, formula.wanted(block), fitted)
    stats.unchanged += found.unchanged
    stats.ideal_unchanged += found.ideal_unchanged
    stats.not_finite += found.not_finite
    stats.found_square += found.square
    stats.ideal_square += found.square
    if fitted:
        stats.found += found.against
        stats.ideal += found.against
        stats.gram += found.gram
    for start in range(0, found.where.size if judge else 0, _JUDGED):
        part = slice(start, start + _JUDGED)
        _judge(stats, task, formula, roundings, block, merged, found.error[part], found.where[part])


def _judge(
    stats: TensorStats,
    task: Task,
    formula: Formula,
    roundings: Sequence[int],
    block: Block,
    merged: Rows,
    error: Float64Array,
    where: Array,
) -> None:
    """Judge the elements at flat positions `where` in float64, and move the ideal sums to the right values.

    `error` is E there.
    """
    at = Elements.of(block, where, roundings)
    found = merged.at(where)
    finite = np.isfinite(found)
    plain = next(formula.ways(block, at))
    right = round_to(plain.value, stats.dtype)
    change = np.where(finite, right - found, 0.0)
    stats.ideal_square += float(np.sum((error + change) ** 2 - error**2))
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
