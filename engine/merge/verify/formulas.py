"""What each method asks of one tensor, from the papers' formulas: in float32 by blocks, in float64 by elements.

W base, d_k deltas, w_k weights, l lambda; all element by element unless it says otherwise.

    linear, soup       c W + sum a_k d_k        a_k = l w_k, or w_k / sum w (soup: Wortsman 2022, arXiv 2203.05482)
    slerp              sin((1-t) h)/sin(h) P + sin(t h)/sin(h) Q, P = W + w_1 d_1, Q = W + w_2 d_2, h their angle
                       over the whole tensor; (1-t) P + t Q where |cos h| > 0.9995 (as mergekit)
    ties               trim each d_k, elect a sign, merge what agrees (Yadav 2023, arXiv 2306.01708, section 4)
    dare_*             drop each d_k at random, rescale, then add, or elect (Yu 2023, arXiv 2311.03099, section 3)

`ways` yields the values an element may have, each with the bound e of what float32 may do to it. The first is the
plain result. Others follow only where a decision (a threshold, a sign) hangs on a number within its own error.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine.merge.verify.asked import LINEAR
from engine.merge.verify.bits import Rows
from engine.merge.verify.comparison import Election, Wanted
from engine.merge.verify.draws import Draws
from engine.merge.verify.quick import Source, dots
from engine.merge.verify.rounding import Array, Float64Array
from engine.merge.verify.stats import UNIT
from engine.merge.verify.terms import Loaded, Part, Term
from engine.merge.verify.threshold import Sizes
from engine.weights.tensorfile import TensorInfo

STRAIGHT = 0.9995  # |cos| above which slerp is a straight line
NO_WEIGHT = 1e-8  # a sum of weights smaller than this divides by 1


@dataclass(frozen=True)
class Task:
    """What was asked of one tensor. `weights` and `densities` go with `terms`; `total` sums all entries' weights."""

    name: str
    base: TensorInfo
    merged: TensorInfo
    terms: tuple[Term, ...]
    weights: Float64Array
    densities: Float64Array
    method: str = "linear"
    t: float = 0.5
    lam: float = 1.0
    normalize: bool = False
    rescale: bool = True
    seed: int = 0
    total: float = 1.0
    of_models: bool = False

    @property
    def coefficients(self) -> Float64Array:
        """a_k of the linear methods: the weights after lambda and normalisation."""
        scale = self.lam
        if self.normalize and abs(self.total) >= NO_WEIGHT:
            scale /= self.total
        return self.weights * scale

    @property
    def base_share(self) -> float:
        """c: 1, but for a sum of models that is not normalised."""
        whole = self.of_models and self.method in ("linear", "soup") and not self.normalize
        return self.total if whole else 1.0


@dataclass
class Block:
    """Some rows: the base's own, every term's change, and what the formula keeps for itself."""

    start: int  # flat position of the first element in the tensor
    base: Rows
    parts: Sequence[Part]
    kept: list[Array] = field(default_factory=list)

    @property
    def sources(self) -> list[Source]:
        return [part.source for part in self.parts]


Blocks = Callable[[], Iterator[Block]]  # the whole tensor, block by block, as often as it is called


@dataclass(frozen=True)
class Elements:
    """Single elements of a block in float64: `errors` bound what float32 may do to each delta."""

    where: Array
    base: Float64Array
    deltas: Float64Array  # (K, n)
    errors: Float64Array  # (K, n)

    @classmethod
    def of(cls, block: Block, where: Array, roundings: Sequence[int]) -> Elements:
        pairs = [part.exact(where) for part in block.parts]
        shape = (len(pairs), where.size)
        return cls(
            where,
            block.base.at(where),
            np.array([delta for delta, _ in pairs]).reshape(shape),
            np.array([n * UNIT * size for n, (_, size) in zip(roundings, pairs, strict=True)]).reshape(shape),
        )


@dataclass(frozen=True)
class Way:
    """A value, its bound, and the elements for which it is one."""

    value: Float64Array
    bound: Float64Array
    possible: Array | bool = True


class Formula(Protocol):
    def wanted(self, block: Block) -> Wanted:
        """What the loops compute of a block in float32."""
        ...

    def ways(self, block: Block, at: Elements) -> Iterator[Way]: ...


def _bound(at: Elements, coefficients: Float64Array, base_share: float, deltas: Float64Array) -> Float64Array:
    """e of base_share W + sum a_k d_k: sums in any order, of W and d_k or of whole models, and the deltas' own."""
    strengths = np.abs(coefficients)
    size = (abs(base_share) + strengths.sum(axis=0)) * np.abs(at.base) + (strengths * np.abs(deltas)).sum(
        axis=0
    )
    return np.asarray((len(at.deltas) + 8) * UNIT * size + (strengths * at.errors).sum(axis=0))


class Linear:
    """c W + sum a_k d_k, after dropping elements where `draws` are given."""

    def __init__(self, task: Task, draws: Sequence[Draws] = ()) -> None:
        self.task, self.draws = task, draws
        self.coefficients = task.coefficients
        if draws and task.rescale:
            self.coefficients = self.coefficients / np.where(task.densities > 0, task.densities, 1.0)

    def wanted(self, block: Block) -> Wanted:
        _drop(block, self.draws, self.task)
        return Wanted(self.coefficients, self.task.base_share - 1.0, block.kept)

    def ways(self, block: Block, at: Elements) -> Iterator[Way]:
        deltas = at.deltas
        if self.draws:
            deltas = deltas * np.array([kept[at.where] for kept in block.kept])
        a = self.coefficients[:, None]
        value = self.task.base_share * at.base + (a * deltas).sum(axis=0)
        yield Way(value, _bound(at, a, self.task.base_share, deltas))


class NewRows:
    """Rows of new tokens, which the base does not have: the weighted mean of the entries that bring them."""

    def __init__(self, task: Task, present: Sequence[int]) -> None:
        chosen = np.zeros(len(task.terms))
        chosen[list(present)] = task.weights[list(present)]
        total = float(chosen.sum())
        self.shares = chosen / (total if abs(total) >= NO_WEIGHT else 1.0)

    def wanted(self, block: Block) -> Wanted:
        return Wanted(self.shares)  # W is 0 there

    def ways(self, block: Block, at: Elements) -> Iterator[Way]:
        shares = self.shares[:, None]
        yield Way((shares * at.deltas).sum(axis=0), _bound(at, shares, 0.0, at.deltas))


class Slerp:
    """Two passes: the angle of the whole tensors, then the arc between them."""

    def __init__(self, task: Task, loaded: Sequence[Loaded], blocks: Blocks) -> None:
        self.task = task
        self.w = task.weights
        sums = np.zeros(3)
        for block in blocks():
            one, two = block.sources
            sums += dots(block.base.source, one, two, float(self.w[0]), float(self.w[1]))
        self.norms = math.sqrt(sums[1]) * math.sqrt(sums[2])
        dot = float(sums[0])
        self.cosine = dot / self.norms if self.norms else 1.0
        # float32 moves P and Q by a few roundings of each element, so the cosine by as many
        slack = (max((term.roundings for term in loaded), default=1) + 6) * UNIT
        cosines = {min(max(self.cosine + shift, -1.0), 1.0) for shift in (-slack, slack)}
        plain = self._shares(self.cosine)
        others = [self._shares(cosine) for cosine in sorted(cosines)]
        self.choices = [plain]
        kinds = {plain[2]: plain}
        for other in others:
            if other[2] not in kinds:
                kinds[other[2]] = other
                self.choices.append(other)
        self.spread = max(
            (abs(s[i] - plain[i]) for s in others if s[2] == plain[2] for i in (0, 1)), default=0.0
        )

    def _ends(self, base: Any, deltas: Any) -> tuple[Any, Any]:
        one, two = (base.dtype.type(weight) for weight in self.w)
        return base + one * deltas[0], base + two * deltas[1]

    def _shares(self, cosine: float) -> tuple[float, float, bool]:
        """Coefficients of P and Q, and whether they are those of the straight line."""
        t = self.task.t
        if not self.norms or abs(cosine) > STRAIGHT:
            return 1 - t, t, True
        angle = math.acos(cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle), False

    def at(self, task: Task) -> Formula:
        """The same tensors at another t, along the same arc; a straight line for the linear methods."""
        if task.method in LINEAR:
            return Linear(task)
        other = copy.copy(self)
        other.task, other.w = task, task.weights
        other.choices = [other._shares(self.cosine)]
        return other

    def loose(self, shift: float) -> Slerp | None:
        """The same with a cosine known to `shift` only; None for a straight line, which has no angle."""
        one, two, straight = self.choices[0]
        if straight:
            return None
        other = copy.copy(self)
        other.choices = self.choices[:1]
        cosines = (max(self.cosine - shift, -STRAIGHT), min(self.cosine + shift, STRAIGHT))
        shares = [self._shares(cosine) for cosine in cosines]
        other.spread = max(self.spread, *(max(abs(s[0] - one), abs(s[1] - two)) for s in shares))
        return other

    def wanted(self, block: Block) -> Wanted:
        one, two, _ = self.choices[0]
        return Wanted(np.array([one, two]) * self.w, one + two - 1.0)

    def ways(self, block: Block, at: Elements) -> Iterator[Way]:
        p, q = self._ends(at.base, at.deltas)
        size = np.abs(at.base) + (np.abs(self.w)[:, None] * np.abs(at.deltas)).sum(axis=0)
        own = (np.abs(self.w)[:, None] * at.errors).sum(axis=0)
        for one, two, _ in self.choices:
            bound = (abs(one) + abs(two)) * (8 * UNIT * size + own) + self.spread * (np.abs(p) + np.abs(q))
            yield Way(one * p + two * q, bound)


class Elect:
    """Trim or drop, elect the sign of the weighted sum, and add (or average) the entries that agree with it."""

    def __init__(
        self,
        task: Task,
        loaded: Sequence[Loaded],
        thresholds: Sequence[float] | None,
        draws: Sequence[Draws] = (),
    ) -> None:
        self.task, self.draws = task, draws
        self.thresholds = thresholds
        self.slack = np.array([term.roundings * UNIT * term.largest for term in loaded])
        self.weights = task.weights
        if draws and task.rescale:
            self.weights = self.weights / np.where(task.densities > 0, task.densities, 1.0)

    def wanted(self, block: Block) -> Wanted:
        task = self.task
        _drop(block, self.draws, task)
        limits = self.thresholds or [0.0] * len(block.parts)
        election = Election(task.weights, limits, task.normalize, task.lam)
        return Wanted(self.weights, 0.0, block.kept, election)

    def ways(self, block: Block, at: Elements) -> Iterator[Way]:
        w, own = self.weights[:, None], self.task.weights[:, None]
        kept, close = self._kept(block, at)
        values = w * at.deltas
        up = (values * kept).sum(axis=0) >= 0
        yield self._way(at, own, values, kept & (np.where(up, values, -values) > 0))
        surely, perhaps = kept & ~close, kept | close
        doubt = np.abs(w) * at.errors + 2 * UNIT * np.abs(values)
        total = (values * surely).sum(axis=0)
        error = ((doubt + len(values) * UNIT * np.abs(values)) * perhaps).sum(axis=0)
        error += (np.abs(values) * close).sum(axis=0)
        open_sign = (np.abs(total) <= error) & (error > 0)
        for positive in (True, False):
            signed = values if positive else -values
            certain = surely & (signed > doubt)
            undecided = perhaps & (signed > -doubt) & ~certain
            if not (undecided.any() or open_sign.any()):
                continue
            for chosen in itertools.product((False, True), repeat=len(values)):
                picked = np.array(chosen)[:, None]
                fits = (open_sign | (up == positive)) & ~(picked & ~undecided).any(axis=0)
                if fits.any():
                    yield self._way(at, own, values, certain | picked, fits)

    def _kept(self, block: Block, at: Elements) -> tuple[Array, Array]:
        """Which deltas stay, and whose size is so near the threshold that they may stay or go."""
        if self.thresholds is None:
            kept = np.array([mask[at.where] for mask in block.kept])
            return kept, np.zeros_like(kept)
        limits = np.array(self.thresholds, dtype=np.float64)[:, None]
        sizes = np.abs(at.deltas.astype(np.float32)).astype(np.float64)
        slack = np.where(self.slack[:, None] > 0, at.errors + self.slack[:, None], 0.0)
        finite = np.where(np.isfinite(limits), limits, 0.0)
        close = (np.abs(sizes - finite) <= slack) & (slack > 0) & (finite > 0)
        return sizes >= limits, close

    def _way(
        self,
        at: Elements,
        own: Float64Array,
        values: Float64Array,
        agree: Array,
        possible: Array | bool = True,
    ) -> Way:
        divisor = np.ones(at.base.size)
        if self.task.normalize:
            divisor = (own * agree).sum(axis=0)
            divisor = np.where(np.abs(divisor) < NO_WEIGHT, 1.0, divisor)
        shares = self.task.lam * self.weights[:, None] * agree / divisor
        value = at.base + self.task.lam * (values * agree).sum(axis=0) / divisor
        return Way(value, _bound(at, shares, 1.0, at.deltas), possible)


def _drop(block: Block, draws: Sequence[Draws], task: Task) -> None:
    """Fill `block.kept` once."""
    if draws and not block.kept:
        block.kept = [
            one.kept(block.start, block.base.size, density)
            for one, density in zip(draws, task.densities.tolist(), strict=True)
        ]


def make_formula(task: Task, loaded: Sequence[Loaded], blocks: Blocks) -> Formula:
    """The task's formula; reads the tensor first where it needs a number of the whole of it."""
    if task.method == "slerp":
        return Slerp(task, loaded, blocks)
    if task.method == "ties":
        sizes = Sizes(lambda: ((block.base.source, block.sources) for block in blocks()), len(loaded))
        thresholds = sizes.thresholds(task.densities.tolist())
        return Elect(task, loaded, thresholds)
    if task.method.startswith("dare"):
        draws = [Draws(task.seed, term.label, task.name) for term in task.terms]
        return Linear(task, draws) if task.method == "dare_linear" else Elect(task, loaded, None, draws)
    return Linear(task)
