"""A block of a merge against what was asked of it, in float32: compiled (_verify.c), or the same in numpy.

    value = W + more       more = less W + sum a_k d_k, or lambda * the sum of the a_k d_k that are elected
    error E = (y - W) - more       (not y - value: what float32 would lose of a small delta beside a large W stays)

Elements whose value rounds to what the merge holds are right (quick.py says why); the positions of the others come
back, for dense.py to judge. What a fit needs comes with them: E.E, E.d_k and d_k.d_m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.merge.verify.quick import MOST, Source, compiled, kinds_of, pointers, rounded
from engine.merge.verify.rounding import Array, Float32Array, Float64Array, fast_bits

NAMES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Election:
    """d_k counts where |d_k| >= limits[k], where its mask keeps it, and where it agrees with the sign of the sum.

    `own` are the weights that the sum is divided by where `normalize`.
    """

    own: Float64Array
    limits: Sequence[float]
    normalize: bool
    lam: float


@dataclass(frozen=True)
class Wanted:
    """`more` of a block: coefficients a_k, what is missing of the base's own share, masks that drop elements."""

    coefficients: Float64Array
    less: float = 0.0
    kept: Sequence[Array] = ()
    election: Election | None = None

    def more(self, base: Float32Array, deltas: Sequence[Float32Array]) -> Float32Array:
        """In numpy, all flat and float32."""
        parts = []
        for k, (a, delta) in enumerate(zip(self.coefficients, deltas, strict=True)):
            part = delta * np.float32(a)
            if self.election is not None:
                part *= np.abs(delta) >= np.float32(self.election.limits[k])
            if self.kept:
                part *= self.kept[k]
            parts.append(part)
        if self.election is not None:
            return _elected(self.election, parts, base)
        total = base * np.float32(self.less)
        for part in parts:
            total += part
        return total


def _elected(election: Election, parts: Sequence[Float32Array], base: Float32Array) -> Float32Array:
    sign = np.where(np.sum(parts, axis=0) >= 0, np.float32(1), np.float32(-1))
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    for part, weight in zip(parts, election.own, strict=True):
        agrees = part * sign > 0
        total += part * agrees
        divisor += agrees * np.float32(weight)
    if election.normalize:
        total /= np.where(np.abs(divisor) < 1e-8, np.float32(1), divisor)
    return np.asarray(total * np.float32(election.lam))


@dataclass(frozen=True)
class Comparison:
    """What a block holds. `where` are flat positions of elements that differ, `error` is E there."""

    where: Array
    error: Float64Array
    unchanged: int  # elements that are the base's, rounded to the merge's dtype
    ideal_unchanged: int  # and that should be
    square: float  # E.E
    against: Float64Array = field(default_factory=lambda: np.zeros(0))  # (K,): E.d_k
    gram: Float64Array = field(default_factory=lambda: np.zeros((0, 0)))  # (K, K): d_k.d_m
    not_finite: int = 0  # elements of E, left out of the sums


def compare(
    base: Source, merged: Source, sources: Sequence[Source], wanted: Wanted, sums: bool = False
) -> Comparison:
    """Compare a block; `sums` asks for `against` and `gram`."""
    if compiled() is not None and len(sources) <= MOST:
        found = _compiled(base, merged, sources, wanted, sums)
        if np.isfinite(found.square):
            return found
    return _plain(base, merged, sources, wanted, sums)


def _compiled(
    base: Source, merged: Source, sources: Sequence[Source], wanted: Wanted, sums: bool
) -> Comparison:
    size, entries = base.values.size, len(sources)
    numbers, counts = np.zeros(1 + entries + entries * entries), np.zeros(3, np.int64)
    where, errors = np.empty(size, np.int32), np.empty(size, np.float32)
    coefficients, kinds = np.ascontiguousarray(wanted.coefficients, np.float32), kinds_of(sources)
    election, own, limits = wanted.election, None, None
    if election is not None:
        own, limits = (np.ascontiguousarray(x, np.float32) for x in (election.own, election.limits))
    masks = [np.ascontiguousarray(mask) for mask in wanted.kept]
    found = compiled().medverify_compare(
        base.values.ctypes.data, base.kind, merged.values.ctypes.data, merged.kind,
        pointers([source.values for source in sources]), kinds.ctypes.data, pointers(masks) if masks else None,
        entries, size, wanted.less, coefficients.ctypes.data, None if own is None else own.ctypes.data,
        None if limits is None else limits.ctypes.data, bool(election and election.normalize),
        election.lam if election else 1.0, sums, numbers.ctypes.data, counts.ctypes.data, where.ctypes.data,
        errors.ctypes.data,
    )  # fmt: skip
    lower = np.tril(numbers[1 + entries :].reshape(entries, entries))
    return Comparison(
        where[:found].astype(np.int64),
        errors[:found].astype(np.float64),
        int(counts[1]),
        int(counts[2]),
        float(numbers[0]),
        numbers[1 : 1 + entries],
        lower + np.tril(lower, -1).T,
    )


def _plain(base: Source, merged: Source, sources: Sequence[Source], wanted: Wanted, sums: bool) -> Comparison:
    """In numpy; also where the merge holds NaN or infinity."""
    w, y, dtype = base.widened(), merged.widened(), NAMES[merged.kind]
    deltas = [source.delta(w) for source in sources]
    more = wanted.more(w, deltas)
    expected, same = fast_bits(w + more, dtype), rounded(w, dtype)
    stored = merged.values
    where = np.flatnonzero(expected != stored)
    with np.errstate(invalid="ignore", over="ignore"):
        error = (y - w) - more
    bad = ~np.isfinite(error)
    error[bad] = 0.0
    against = np.array([float(np.dot(error, delta)) for delta in deltas] if sums else [])
    gram = [[float(np.dot(one, two)) for two in deltas] for one in deltas] if sums else []
    return Comparison(
        where,
        error[where].astype(np.float64),
        int(np.count_nonzero(same == stored)),
        int(np.count_nonzero(same == expected)),
        float(np.sum(np.square(error, dtype=np.float64))),
        against,
        np.array(gram).reshape(len(against), len(against)),
        int(np.count_nonzero(bad)),
    )
