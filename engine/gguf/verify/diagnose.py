"""Why elements of a GGUF are wrong: known mistakes tried on a sample, then what the fit says.

A weight that is off by a hundredth of a quantisation step puts a hundredth of the elements beyond their bound, so
even coarse types tell most recipes apart element by element; the fit alone would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

import numpy as np

from engine.gguf.verify import fit as fits
from engine.gguf.verify.asked import Float64Array
from engine.gguf.verify.measure import TensorStats
from engine.gguf.verify.sample import ROUTES, Piece, draw
from engine.merge.verify.files import shortened
from engine.merge.verify.verdict import Finding

LEFT = 0.1  # share of the wrong elements that a true explanation may leave
FEW = 8  # wrong elements in a tensor's sample below which nothing can be tried
UNIT = {"BF16": 2.0**-7, "F16": 2.0**-10}  # one step of a checkpoint's dtype, relative, at most
OTHER = 2e-4  # weights off by less are not called other weights


Weighting = Callable[[Float64Array, tuple[str, ...]], Float64Array]


@dataclass(frozen=True)
class Mistake:
    """Weights that a wrong file may have been made with; `weights` maps a tensor's asked ones and labels to them."""

    finding: Finding
    weights: Weighting


def explain(stats: Sequence[TensorStats], labels: tuple[str, ...]) -> list[Finding]:
    """Findings for the touched tensors with wrong elements; `stats` are all touched tensors."""
    wrong = [tensor for tensor in stats if tensor.wrong or tensor.not_finite]
    pieces = draw([tensor.pair for tensor in wrong])
    asked = [
        min(_count(piece, tensor.weights, route) for route in ROUTES)
        for piece, tensor in zip(pieces, wrong, strict=True)
    ]
    findings: list[Finding] = []
    left = [i for i in range(len(wrong)) if asked[i] >= FEW]
    weak = [i for i in range(len(wrong)) if asked[i] < FEW]  # they follow whatever explains the others
    tried = list(_mistakes(wrong, labels))
    while left:
        best: tuple[list[int], Mistake | None, str] = ([], None, "")
        for mistake, route in product(tried, ROUTES):
            counts = {i: _count(pieces[i], _weights(mistake, wrong[i]), route) for i in left}
            taken = [i for i in left if counts[i] <= LEFT * asked[i]]
            if len(taken) > len(best[0]):
                best = (taken, mistake, route)
            if len(taken) == len(left):
                break
        taken, found, route = best
        if found is None:
            break
        taken += [i for i in weak if _count(pieces[i], _weights(found, wrong[i]), route) <= LEFT * asked[i]]
        findings.append(_named(found, route, [wrong[i] for i in taken], stats))
        left, weak = ([i for i in some if i not in taken] for some in (left, weak))
    rest = [wrong[i] for i in left + weak]
    return findings + (_unexplained(rest, stats, labels) if rest else [])


def _weights(mistake: Mistake, tensor: TensorStats) -> Float64Array:
    return mistake.weights(tensor.weights, tensor.pair.labels)


def _count(piece: Piece, weights: Float64Array, route: str, spread: float = 0.0) -> int:
    return int(np.count_nonzero(piece.wrong(weights, route, spread)))


def _mistakes(wrong: Sequence[TensorStats], labels: tuple[str, ...]) -> Iterator[Mistake]:
    """The mistakes worth trying, the plainest first: of equals the first is believed."""
    yield Mistake(
        Finding("base_unchanged", "", "nothing was applied: this is the base"), partial(_times, 0.0)
    )
    for a, b in combinations(labels, 2):
        words = f"the weights of {a} and {b} are exchanged"
        yield Mistake(Finding("swapped", f"{a} {b}", words), partial(_exchanged, a, b))
    words = "each weight was applied twice, to A and to B: the squares are inside"
    yield Mistake(Finding("weight_squared", "", words), _squared)
    for label in labels if len(labels) > 1 else ():
        yield Mistake(Finding("missing", label, f"{label} is not inside"), partial(_without, label))
    found = fits.fit(wrong, labels)
    size = float(found.asked @ found.asked)
    factor = float(found.implied @ found.asked) / size if size else 0.0
    for x in dict.fromkeys([2.0, 0.5, *(round(factor, digits) for digits in (1, 2, 3))]):
        if x not in (0.0, 1.0):
            words = f"all weights are {x:g} times those asked"
            yield Mistake(Finding("scaled_by", f"{x:g}", words), partial(_times, x))
    for digits in (1, 2, 3):
        weights = dict(zip(labels, np.round(found.implied, digits).tolist(), strict=True))
        words = ", ".join(f"{label} {weight:g}" for label, weight in weights.items())
        yield Mistake(
            Finding("other_weights", words, f"the weights inside are {words}"), partial(_given, weights)
        )


def _times(factor: float, asked: Float64Array, own: tuple[str, ...]) -> Float64Array:
    return factor * asked


def _squared(asked: Float64Array, own: tuple[str, ...]) -> Float64Array:
    return asked * np.abs(asked)


def _without(label: str, asked: Float64Array, own: tuple[str, ...]) -> Float64Array:
    return np.where([name == label for name in own], 0.0, asked)


def _given(weights: Mapping[str, float], asked: Float64Array, own: tuple[str, ...]) -> Float64Array:
    return np.array([weights[label] for label in own])


def _exchanged(a: str, b: str, asked: Float64Array, own: tuple[str, ...]) -> Float64Array:
    if a not in own or b not in own:
        return asked
    result = asked.copy()
    result[own.index(a)], result[own.index(b)] = asked[own.index(b)], asked[own.index(a)]
    return result


def _named(
    mistake: Mistake, route: str, tensors: Sequence[TensorStats], stats: Sequence[TensorStats]
) -> Finding:
    """The mistake's finding; where tensors that it would concern are clearly right, it was made in part."""
    finding = mistake.finding
    right = [
        tensor
        for tensor in stats
        if not tensor.wrong and not np.allclose(_weights(mistake, tensor), tensor.weights)
    ]
    pieces = draw([tensor.pair for tensor in right])
    # deltas far below the type's steps fit the mistake as well: such a tensor says nothing
    if all(
        _count(piece, _weights(mistake, tensor), route) < FEW
        for piece, tensor in zip(pieces, right, strict=True)
    ):
        return finding
    modules = shortened([tensor.pair.source.name.removesuffix(".weight") for tensor in tensors])
    if finding.code in ("base_unchanged", "missing"):
        words = f"without {finding.detail}" if finding.detail else "unchanged, as in the base"
        return Finding("partly_applied", modules, f"{len(tensors)} modules are {words}: {modules}")
    return Finding(finding.code, finding.detail, f"{finding.message}, in {len(tensors)} modules: {modules}")


def _unexplained(
    tensors: Sequence[TensorStats], stats: Sequence[TensorStats], labels: tuple[str, ...]
) -> list[Finding]:
    """What can be said of tensors no mistake explains."""
    own = fits.fit(tensors, labels)
    present = np.isfinite(own.error)
    shifted = present & (np.abs(own.found - own.expected) > np.maximum(OTHER, 5 * own.shift_error))
    found = ", ".join(
        f"{label} {w:.4f} ± {e:.4f}" for label, w, e in zip(labels, own.implied, own.error, strict=True)
    )
    names = shortened([tensor.pair.stored.name for tensor in tensors])
    square, ideal = (sum(getattr(t, key) for t in tensors) for key in ("square", "ideal_square"))
    if not shifted.any() and _explained_by_spread(tensors):
        return [
            Finding(
                "low_precision_sums",
                names,
                f"the weights are those asked ({found}), and sums were rounded more than once on the way, in {names}",
            )
        ]
    if own.residual > 1.05 * own.floor + 1e-4 and square > 1.1 * ideal:
        return [
            Finding(
                "unknown_delta",
                f"residual {own.residual:.3f}",
                f"something else is in {len(tensors)} tensors: the adapters leave {own.residual:.3f} of the change "
                f"unexplained, where the format leaves {own.floor:.3f} ({names})",
            )
        ]
    if shifted.any():
        return [Finding("other_weights", found, f"the weights inside are {found}")]
    wrong = sum(tensor.wrong for tensor in tensors)
    return [
        Finding("unexpected_change", names, f"{wrong:,} elements are beyond the format's bound in {names}")
    ]


def _explained_by_spread(tensors: Sequence[TensorStats]) -> bool:
    """Whether one more step of a 16-bit dtype around the asked values explains the wrong elements."""
    pieces = draw([tensor.pair for tensor in tensors])
    both = list(zip(pieces, tensors, strict=True))
    before = sum(_count(piece, tensor.weights, "") for piece, tensor in both)
    after = min(
        sum(_count(piece, tensor.weights, route, step) for piece, tensor in both)
        for route, step in UNIT.items()
    )
    return before >= FEW and after <= 1e-2 * before
