"""What known mistakes would have written, element by element: weights that were not asked, and early rounding.

A hypothesis is (weights, way of rounding). Each is computed in float64 on a sample and compared bit by bit
with the merge; the right one matches all of it but the few elements where float32 sums fall on the other
side of a tie (1e-5 in bfloat16, up to 1e-3 in float16), the wrong ones miss far more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.merge.verify.rounding import Float64Array, round_to, truncate_to
from engine.merge.verify.sample import Sample
from engine.merge.verify.verdict import Finding

_FACTORS = (0.5, 2.0, 4.0, 8.0, 16.0, 0.25, 0.125, 0.0625, 32.0, 1.001, 0.999, 10.0, 0.1, -1.0)


@dataclass(frozen=True)
class Weighting:
    """Weights that may have been used instead of those asked; `finding` is None for those asked."""

    finding: Finding | None
    weights: Float64Array  # (K, N)
    labels: frozenset[str] = frozenset()  # whose weights differ from what was asked


def weightings(sample: Sample) -> Iterator[Weighting]:
    """The asked weights first, then every mistake worth trying, most telling first."""
    asked = sample.asked
    yield Weighting(None, asked)
    seen = {_key(asked[:, sample.thin])}
    for finding, weights in _mistakes(sample):
        key = _key(weights[:, sample.thin])
        if key in seen:
            continue
        seen.add(key)
        differs = np.any(weights != asked, axis=1)
        labels = frozenset(label for label, d in zip(sample.labels, differs, strict=True) if d)
        yield Weighting(finding, weights, labels)


def _key(weights: Float64Array) -> bytes:
    """Equal for equal weights, whatever sums they come from; adding 0 makes -0.0 the same as 0.0."""
    return (np.round(weights, 12) + 0.0).tobytes()


def _mistakes(sample: Sample) -> Iterator[tuple[Finding, Float64Array]]:
    asked, labels = sample.asked, sample.labels
    k = len(labels)
    yield (
        Finding("base_unchanged", "", "nothing was applied: the weights are the base's"),
        np.zeros_like(asked),
    )
    for order in itertools.permutations(range(k)) if 1 < k <= 4 else ():
        if order != tuple(range(k)):
            moved = ", ".join(
                f"{labels[i]} got the weight of {labels[j]}" for i, j in enumerate(order) if i != j
            )
            yield Finding("swapped", moved, f"the weights were swapped: {moved}"), asked[list(order)]
    for count in range(1, k):
        for gone in itertools.combinations(range(k), count):
            weights = asked.copy()
            weights[list(gone)] = 0.0
            if sample.implied is not None:  # an average of the others
                left = weights.sum(axis=0)
                weights *= sample.whole / np.where(left != 0, left, 1.0)
            names = ", ".join(labels[i] for i in gone)
            yield Finding("missing", names, f"{names} is not in the merge"), weights
    if sample.implied is not None:
        yield from _implied_weights(sample)
        return
    yield (
        Finding("weight_squared", "", "the weights were applied twice"),
        asked * np.abs(asked),
    )
    for factor in dict.fromkeys((*_implied_factors(sample), *_FACTORS)):
        yield scaled_finding(factor), asked * factor
    if k > 1:
        for i, factor in itertools.product(range(k), _FACTORS):
            weights = asked.copy()
            weights[i] *= factor
            text = f"{labels[i]} {factor:g}"
            yield Finding("scaled_by", text, f"{labels[i]} was applied at {factor:g} x its weight"), weights
    yield from _implied_weights(sample)


def scaled_finding(factor: float) -> Finding:
    return Finding("scaled_by", f"{factor:g}", f"the adapters were applied at {factor:g} x the weights asked")


def _implied_factors(sample: Sample) -> list[float]:
    """One factor on everything, from the data: exactly, and to 4, 3 and 2 digits (nearest candidates first)."""
    asked_change = np.sum(sample.asked * sample.deltas, axis=0)
    power = float(asked_change @ asked_change)
    if power == 0:
        return []
    factor = 1.0
    for _ in range(
        8
    ):  # rounding shrinks small deltas: look for the factor whose *rounded* merge fits like this
        ideal = round_to(sample.base + factor * asked_change, sample.dtype)
        factor += float(asked_change @ (sample.merged - ideal)) / power
    return [f for f in (float(f"{factor:.{d}g}") for d in (2, 3, 4, 5)) if 1e-3 < abs(f) < 1e3 and f != 1.0]


def implied_weights(sample: Sample, rounds: int = 12) -> Float64Array:
    """Weights whose ideally rounded merge fits like this merge does, (K,): undoes the rounding loss.

    Iterates a <- a + fit(merge) - fit(round(base + a deltas)); at the true weights both fits are equal.
    """
    target = sample.fit(sample.merged)
    weights = target.copy()
    for _ in range(rounds):
        ideal = round_to(sample.base + weights @ sample.deltas, sample.dtype)
        weights = weights + target - sample.fit(ideal)
    return np.asarray(np.clip(weights, -1e3, 1e3))


def _implied_weights(sample: Sample) -> Iterator[tuple[Finding, Float64Array]]:
    implied = implied_weights(sample)
    for digits in (1, 2, 3):
        rounded = np.round(implied, digits)
        if sample.implied is not None:
            rounded[sample.implied] = 0.0
            rounded[sample.implied] = round(sample.whole - float(rounded.sum()), digits)
        text = ", ".join(f"{label} {w:g}" for label, w in zip(sample.labels, rounded, strict=True))
        weights = np.broadcast_to(rounded[:, None], sample.asked.shape)
        yield (
            Finding("other_weights", text, f"other weights were applied: {text}"),
            np.where(np.any(sample.asked != 0, axis=0), weights, 0.0),
        )


Replay = Callable[[Sample, Float64Array], Float64Array]


@dataclass(frozen=True)
class Rounding:
    """A way of rounding other than once at the end."""

    finding: Finding
    replay: Replay


def roundings(sample: Sample) -> Iterator[Rounding]:
    """Early roundings that merging tools are known for."""
    k = len(sample.labels)
    orders = list(itertools.permutations(range(k))) if k <= 3 else [tuple(range(k))]
    for order in orders:
        names = ", then ".join(sample.labels[i] for i in order)
        if k > 1:
            yield Rounding(
                Finding("sequential_rounding", names, f"rounded after each adapter ({names})"),
                partial(_sequential, order=order),
            )
        for words, coarse in (("", False), (", from A and B rounded first", True)):
            yield Rounding(
                Finding(
                    "delta_rounded_first",
                    "each delta",
                    f"each delta was rounded before it was added, one after the other ({names}{words})",
                ),
                partial(_rounded_deltas, order=order, coarse=coarse),
            )
            yield Rounding(
                Finding(
                    "delta_rounded_first",
                    "each delta before scaling",
                    f"B A was rounded, scaled, rounded and added, one adapter after the other ({names}{words})",
                ),
                partial(_rounded_products, order=order, coarse=coarse),
            )
    yield Rounding(
        Finding("delta_rounded_first", "the sum", "the sum of the deltas was rounded before it was added"),
        lambda s, w: round_to(s.base + round_to(np.sum(w * s.deltas, axis=0), s.dtype), s.dtype),
    )
    yield Rounding(
        Finding("delta_rounded_first", "each delta", "each delta was rounded, then all were added at once"),
        lambda s, w: round_to(s.base + np.sum(round_to(w * s.deltas, s.dtype), axis=0), s.dtype),
    )
    yield Rounding(
        Finding(
            "delta_rounded_first",
            "A and B side by side",
            "B and weight * A of all adapters were rounded side by side, then their product, then the sum "
            "(as PEFT's combination_type='cat' does)",
        ),
        lambda s, w: round_to(s.base + round_to(s.joined, s.dtype), s.dtype),  # for the weights asked
    )
    yield Rounding(
        Finding("low_precision_sums", "sum", "the deltas were weighted and summed in the merge's own dtype"),
        lambda s, w: _low_precision(s, w, round_to(s.deltas, s.dtype)),
    )
    yield Rounding(
        Finding(
            "low_precision_sums",
            "differences of checkpoints",
            "each adapter was merged and rounded, subtracted from the base again, weighted and summed in the "
            "merge's own dtype",
        ),
        lambda s, w: _low_precision(s, w, round_to(round_to(s.base + s.deltas, s.dtype) - s.base, s.dtype)),
    )
    yield Rounding(
        Finding(
            "low_precision_sums",
            "differences of checkpoints, weights rounded",
            "each adapter was merged and rounded, subtracted from the base again, and weights, products and sums "
            "were rounded to the merge's own dtype (as mergekit does)",
        ),
        lambda s, w: _low_precision(
            s, round_to(w, s.dtype), round_to(round_to(s.base + s.deltas, s.dtype) - s.base, s.dtype)
        ),
    )
    yield Rounding(
        Finding(
            "low_precision_sums",
            "differences of checkpoints, float32 sums",
            "each adapter was merged and rounded by itself, and the differences to the base were weighted",
        ),
        lambda s, w: round_to(
            s.base + np.sum(w * (round_to(s.base + s.deltas, s.dtype) - s.base), axis=0), s.dtype
        ),
    )
    yield Rounding(
        Finding(
            "low_precision_sums", "A and B", "A and B were rounded to the merge's dtype before the product"
        ),
        lambda s, w: round_to(s.base + np.sum(w * s.coarse, axis=0), s.dtype),
    )
    yield Rounding(
        Finding("low_precision_sums", "truncated", "sums were cut off instead of rounded to the nearest"),
        lambda s, w: truncate_to(s.base + np.sum(w * s.deltas, axis=0), s.dtype),
    )
    yield Rounding(
        Finding("scaled_by", "2", "the adapters were merged twice, one merge on top of the other"),
        lambda s, w: round_to(
            round_to(s.base + np.sum(w * s.deltas, axis=0), s.dtype) + np.sum(w * s.deltas, axis=0), s.dtype
        ),
    )
    if k > 1:
        yield Rounding(
            Finding("scaled_by", "2", "the adapters were merged twice, rounding after each"),
            partial(_sequential, order=(*range(k), *range(k))),
        )


def _sequential(sample: Sample, weights: Float64Array, order: tuple[int, ...]) -> Float64Array:
    y = sample.base
    for i in order:
        y = round_to(y + weights[i] * sample.deltas[i], sample.dtype)
    return y


def _rounded_deltas(
    sample: Sample, weights: Float64Array, order: tuple[int, ...], coarse: bool
) -> Float64Array:
    y, deltas = sample.base, sample.coarse if coarse else sample.deltas
    for i in order:
        y = round_to(y + round_to(weights[i] * deltas[i], sample.dtype), sample.dtype)
    return y


def _rounded_products(
    sample: Sample, weights: Float64Array, order: tuple[int, ...], coarse: bool
) -> Float64Array:
    """weight * round(delta), rounded, added: `delta = (B @ A) * scale` in the dtype, with the weight in scale.

    Exact for scales that are powers of two, where rounding before and after scaling is the same.
    """
    y, deltas = sample.base, sample.coarse if coarse else sample.deltas
    for i in order:
        product = round_to(deltas[i], sample.dtype)
        y = round_to(y + round_to(weights[i] * product, sample.dtype), sample.dtype)
    return y


def _low_precision(sample: Sample, weights: Float64Array, tasks: Float64Array) -> Float64Array:
    total = np.zeros_like(sample.base)
    for weight, task in zip(weights, tasks, strict=True):
        total = round_to(total + round_to(weight * task, sample.dtype), sample.dtype)
    return round_to(sample.base + total, sample.dtype)
