"""What else a merge could be when the method is not linear in the weights: other parameters, methods, rounding.

Each hypothesis is a task of its own, computed in float64 on some rows of the wrong tensors and compared with the
merge. TIES' thresholds come from the whole tensor's histogram (to 8 bits, so that no further pass is needed): a
true hypothesis then misses a few elements in a thousand, a wrong one far more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from engine.merge.verify.asked import LINEAR
from engine.merge.verify.bits import Rows, raw_rows, read_block, widen_bits
from engine.merge.verify.dense import blocks_of
from engine.merge.verify.draws import Draws
from engine.merge.verify.formulas import Block, Elect, Elements, Formula, Linear, Slerp, Task
from engine.merge.verify.rounding import Array, Float64Array, round_to
from engine.merge.verify.stats import TensorStats
from engine.merge.verify.terms import Loaded
from engine.merge.verify.threshold import Sizes
from engine.merge.verify.verdict import Finding

TENSORS = 6  # looked at
ELEMENTS = 12_000  # of each, in three places
ENOUGH = 0.97  # share of the elements a true hypothesis gives
HOPELESS = 0.8  # it gives more than this in every place looked at
DENSITIES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.05, 0.01)
SEEDS = (0, 1, 42, 123, 1234)
FLOAT32_COSINE = 1e-4  # what summing tens of millions of elements in float32 may do to a cosine


@dataclass(frozen=True)
class Hypothesis:
    """What may have been done, and the task that would have asked for it; `early` rounds the sum of deltas too."""

    finding: Finding
    task: Task
    early: bool = False


def other_ways(task: Task) -> Iterator[Hypothesis]:
    """Everything worth trying for one tensor, most telling first."""
    if task.method != "slerp":
        yield from _other_weights(task)
    yield _other(
        "linear merge", "a linear merge was made", replace(task, method="task_arithmetic", normalize=False)
    )
    if task.method == "slerp":
        turned = f"t {1 - task.t:g}"
        yield Hypothesis(
            Finding("swapped", turned, f"the ends were exchanged ({turned})"), replace(task, t=1 - task.t)
        )
        for t in (0.5, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.7, 0.75, 0.8, 0.9, 0.0, 1.0):
            yield _other(f"t {t:g}", f"another t was used ({t:g})", replace(task, t=t))
        line = replace(task, method="task_arithmetic", lam=1.0, normalize=False)
        line = replace(line, weights=np.array([1 - task.t, task.t]) * task.weights)
        yield _other("straight line", "the ends were joined by a straight line, not an arc", line)
    else:
        yield from _other_parameters(task)
    yield Hypothesis(
        Finding("delta_rounded_first", "all deltas", "the sum of deltas was rounded before it was added"),
        task,
        early=True,
    )


def _other(detail: str, message: str, task: Task) -> Hypothesis:
    return Hypothesis(Finding("other_weights", detail, message), task)


def _other_weights(task: Task) -> Iterator[Hypothesis]:
    labels, weights = [term.label for term in task.terms], task.weights
    for order in itertools.permutations(range(len(labels))) if 1 < len(labels) <= 4 else ():
        if order != tuple(range(len(labels))):
            moved = ", ".join(
                f"{labels[i]} got the weight of {labels[j]}" for i, j in enumerate(order) if i != j
            )
            yield Hypothesis(
                Finding("swapped", moved, f"the weights were swapped: {moved}"),
                replace(task, weights=weights[list(order)]),
            )
    for i, label in enumerate(labels) if len(labels) > 1 else ():
        without = weights.copy()
        without[i] = 0.0
        yield Hypothesis(
            Finding("missing", label, f"{label} is not in the merge"), replace(task, weights=without)
        )
    yield Hypothesis(
        Finding("weight_squared", "", "the weights were applied twice"),
        replace(task, weights=weights * np.abs(weights)),
    )
    for factor in (0.5, 2.0, 1.001, 0.999, 10.0, 0.1, -1.0):
        yield Hypothesis(
            Finding(
                "scaled_by", f"{factor:g}", f"the adapters were applied at {factor:g} x the weights asked"
            ),
            replace(task, lam=task.lam * factor),
        )


def _other_parameters(task: Task) -> Iterator[Hypothesis]:
    for method in ("ties", "dare_linear", "dare_ties"):
        if method != task.method:
            for normalize in (method == "ties", method != "ties"):
                yield _other(
                    method, f"the method was {method}", replace(task, method=method, normalize=normalize)
                )
    if task.method != "dare_linear":
        other = not task.normalize
        text = f"normalize {str(other).lower()}"
        yield _other(text, f"merged with {text}", replace(task, normalize=other))
    if task.method != "ties":
        text = f"rescale {str(not task.rescale).lower()}"
        yield _other(text, f"merged with {text}", replace(task, rescale=not task.rescale))
        for seed in SEEDS:
            if seed != task.seed:
                yield _other(f"seed {seed}", f"another seed was used ({seed})", replace(task, seed=seed))
    for density in DENSITIES:
        densities = np.full(len(task.terms), density)
        if not np.allclose(densities, task.densities):
            yield _other(
                f"density {density:g}",
                f"another density was used ({density:g})",
                replace(task, densities=densities),
            )
    if task.lam != 1.0:
        yield _other("lambda 1", "lambda was left out", replace(task, lam=1.0))


@dataclass
class _Rows:
    """Some rows of one tensor, ready for any task on the same terms."""

    task: Task
    loaded: Sequence[Loaded]
    blocks: list[tuple[Block, Elements, Float64Array]]  # and what the merge holds there
    sizes: Sizes | None
    arc: Slerp | None

    def share(self, hypothesis: Hypothesis, whole: bool = False) -> float:
        """The share of elements the hypothesis gives; unless `whole` of the first places only, if it cannot be true."""
        hits = total = 0
        for block, at, found in self.blocks:
            block.kept = []
            formula = self._formula(hypothesis.task)
            formula.wanted(block)  # draws its masks
            way = next(formula.ways(block, at))
            value, bound = way.value, way.bound
            if hypothesis.early:
                value = at.base + round_to(value - at.base, self.task.merged.dtype)
            low = round_to(value - bound, self.task.merged.dtype)
            high = round_to(value + bound, self.task.merged.dtype)
            hits += int(np.count_nonzero((low <= found) & (found <= high)))
            total += found.size
            if hits < HOPELESS * total and not whole:
                break
        return hits / max(1, total)

    def _formula(self, task: Task) -> Formula:
        if task.method in LINEAR:
            return Linear(task)
        if self.arc is not None:
            return self.arc.at(task)
        if task.method == "ties":
            assert self.sizes is not None
            return Elect(task, self.loaded, self.sizes.nearly(task.densities.tolist()))
        draws = [Draws(task.seed, term.label, task.name) for term in task.terms]
        return Linear(task, draws) if task.method == "dare_linear" else Elect(task, self.loaded, None, draws)


def _rows(task: Task, stats: TensorStats) -> _Rows:
    loaded = [term.load(task.base) for term in task.terms]
    columns, rows = max(1, task.base.columns), task.base.rows
    count = min(rows, max(1, ELEMENTS // 3 // columns))
    starts = {0, max(0, rows // 2 - count // 2), rows - count}
    if stats.first_wrong is not None and stats.first_wrong[0] < rows:
        starts.add(min(stats.first_wrong[0], rows - count))
    blocks = []
    for first in sorted(starts):
        base = Rows.of(read_block(task.base, first, count))
        block = Block(first * columns, base, [term.block(first, base) for term in loaded])
        found = widen_bits(raw_rows(task.merged, first, count), task.merged.dtype).astype(np.float64)
        everywhere: Array = np.arange(block.base.size)
        blocks.append((block, Elements.of(block, everywhere, [t.roundings for t in loaded]), found))
    sizes = None
    if task.method not in ("slerp", *LINEAR):
        sizes = Sizes(
            lambda: ((block.base.source, block.sources) for block in blocks_of(task, loaded)), len(loaded)
        )
    arc = Slerp(task, loaded, lambda: blocks_of(task, loaded)) if task.method == "slerp" else None
    return _Rows(task, loaded, blocks, sizes, arc)


def float32_angle(tasks: Sequence[Task]) -> Finding | None:
    """Whether a slerp's angle was summed in float32: every element is right for a cosine that is nearly the true one.

    Few elements tell (those that lie near a half), so tensors are read whole, as many as are looked at anyway.
    """
    for task in tasks[:TENSORS]:
        loaded = [term.load(task.base) for term in task.terms]
        arc = Slerp(task, loaded, partial(blocks_of, task, loaded)).loose(FLOAT32_COSINE)
        if arc is None or not all(_right(arc, task, loaded, first) for first in _starts(task)):
            return None
    return Finding(
        "low_precision_sums",
        "the angle",
        "the angle was summed in float32, which over so many elements moves it a little (as mergekit's slerp does)",
    )


def _step(task: Task) -> int:
    return max(1, ELEMENTS * 16 // max(1, task.base.columns))


def _starts(task: Task) -> range:
    return range(0, task.base.rows, _step(task))


def _right(formula: Formula, task: Task, loaded: Sequence[Loaded], first: int) -> bool:
    """Whether every element of some rows lies within the formula's bound."""
    count = min(_step(task), task.base.rows - first)
    base = Rows.read(task.base, first, count)
    block = Block(first * task.base.columns, base, [term.block(first, base) for term in loaded])
    found = widen_bits(raw_rows(task.merged, first, count), task.merged.dtype).astype(np.float64)
    at = Elements.of(block, np.arange(block.base.size), [term.roundings for term in loaded])
    way = next(formula.ways(block, at))
    low = round_to(way.value - way.bound, task.merged.dtype)
    high = round_to(way.value + way.bound, task.merged.dtype)
    return bool(np.all((low <= found) & (found <= high)))


def best_explanation(
    wrong: Sequence[tuple[Task, TensorStats]],
) -> tuple[Finding, list[str]] | None:
    """The hypothesis that gives most of the wrong tensors, and which of those looked at it does not give.

    None when no hypothesis gives any of them clearly better than what was asked.
    """
    step = max(1, len(wrong) // TENSORS)
    looked = [_rows(task, stats) for task, stats in wrong[::step][:TENSORS]]
    by_finding: dict[tuple[str, str], tuple[Finding, list[float]]] = {}
    asked = [rows.share(Hypothesis(Finding("ok"), rows.task), whole=True) for rows in looked]
    for number, rows in enumerate(looked):
        for hypothesis in other_ways(rows.task):
            key = (hypothesis.finding.code, hypothesis.finding.detail)
            shares = by_finding.setdefault(key, (hypothesis.finding, [0.0] * len(looked)))[1]
            shares[number] = max(shares[number], rows.share(hypothesis))
    good = {
        key: [
            share >= ENOUGH and 1 - share <= 0.25 * (1 - own)
            for share, own in zip(shares, asked, strict=True)
        ]
        for key, (_, shares) in by_finding.items()
    }
    if not good:
        return None
    best = max(good, key=lambda key: (sum(good[key]), round(sum(by_finding[key][1]), 3)))
    if not any(good[best]):
        return None
    left = [rows.task.name for rows, ok in zip(looked, good[best], strict=True) if not ok]
    return by_finding[best][0], left
