"""Why elements of a GGUF are wrong: known mistakes tried on a sample, then what the fit says.

A weight that is off by a hundredth of a quantisation step puts a hundredth of the elements beyond their bound, so
even coarse types tell most recipes apart element by element; the fit alone would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from engine.gguf.verify import fit as fits
from engine.gguf.verify.asked import Float64Array
from engine.gguf.verify.measure import TensorStats
from engine.gguf.verify.sample import ROUTES, Piece, draw
from engine.merge.verify.verdict import Finding
from engine.merge.verify.files import shortened

LEFT = 0.1  # share of the wrong elements that a true explanation may leave
FEW = 8  # wrong elements in a tensor's sample below which nothing can be tried
UNIT = {"BF16": 2.0**-7, "F16": 2.0**-10}  # one step of a checkpoint's dtype, relative, at most
OTHER = 2e-4  # weights off by less are not called other weights


@dataclass(frozen=True)
class Mistake:
    """Weights that a wrong file may have been made with; `weights` maps a tensor's asked ones to them."""

    finding: Finding
    weights: Callable[[Float64Array, tuple[str, ...]], Float64Array]


def explain(stats: Sequence[TensorStats], labels: tuple[str, ...]) -> list[Finding]:
    """Findings for the touched tensors with wrong elements; `stats` are all touched tensors."""
    wrong = [tensor for tensor in stats if tensor.wrong or tensor.not_finite]
    pieces = draw([tensor.pair for tensor in wrong])
    asked = [_count(piece, tensor.weights, "") for piece, tensor in zip(pieces, wrong, strict=True)]
    for i, (piece, tensor) in enumerate(zip(pieces, wrong, strict=True)):
        asked[i] = min(asked[i], *(_count(piece, tensor.weights, route) for route in ROUTES[1:]))
    findings: list[Finding] = []
    left = [i for i in range(len(wrong)) if asked[i] >= FEW]
    rest = [tensor for i, tensor in enumerate(wrong) if asked[i] < FEW]
    tried = list(_mistakes(wrong, labels))
    while left:
        best: tuple[list[int], Mistake | None] = ([], None)
        for mistake in tried:
            for route in ROUTES:
                taken = [
                    i
                    for i in left
                    if _count(pieces[i], mistake.weights(wrong[i].weights, wrong[i].pair.labels), route)
                    <= LEFT * asked[i]
                ]
                if len(taken) > len(best[0]):
                    best = (taken, mistake)
        if best[1] is None:
            break
        findings.append(_named(best[1], [wrong[i] for i in best[0]], stats))
        left = [i for i in left if i not in best[0]]
    rest = [wrong[i] for i in left] + rest
    return findings + (_unexplained(rest, stats, labels) if rest else [])


def _count(piece: Piece, weights: Float64Array, route: str, spread: float = 0.0) -> int:
    return int(np.count_nonzero(piece.wrong(weights, route, spread)))


def _mistakes(wrong: Sequence[TensorStats], labels: tuple[str, ...]) -> Iterator[Mistake]:
    """The mistakes worth trying, the plainest first: of equals the first is believed."""
    yield Mistake(
        Finding("base_unchanged", "", "nothing was applied: this is the base"),
        lambda asked, own: np.zeros_like(asked),
    )
    for a, b in combinations(labels, 2):
        yield Mistake(
            Finding("swapped", f"{a} {b}", f"the weights of {a} and {b} are exchanged"),
            lambda asked, own, a=a, b=b: _exchanged(asked, own, a, b),
        )
    yield Mistake(
        Finding("weight_squared", "", "each weight was applied twice, to A and to B: the squares are inside"),
        lambda asked, own: asked * np.abs(asked),
    )
    for label in labels if len(labels) > 1 else ():
        yield Mistake(
            Finding("missing", label, f"{label} is not inside"),
            lambda asked, own, label=label: np.where([name == label for name in own], 0.0, asked),
        )
    found = fits.fit(wrong, labels)
    size = float(found.asked @ found.asked)
    factor = float(found.implied @ found.asked) / size if size else 0.0
    for x in dict.fromkeys([2.0, 0.5, *(round(factor, digits) for digits in (1, 2, 3))]):
        if x not in (0.0, 1.0):
            yield Mistake(
                Finding("scaled_by", f"{x:g}", f"all weights are {x:g} times those asked"),
                lambda asked, own, x=x: x * asked,
            )
    for digits in (1, 2, 3):
        weights = dict(zip(labels, np.round(found.implied, digits), strict=True))
        words = ", ".join(f"{label} {weight:g}" for label, weight in weights.items())
        yield Mistake(
            Finding("other_weights", words, f"the weights inside are {words}"),
            lambda asked, own, weights=weights: np.array([weights[label] for label in own]),
        )


def _exchanged(asked: Float64Array, own: tuple[str, ...], a: str, b: str) -> Float64Array:
    if a not in own or b not in own:
        return asked
    result = asked.copy()
    result[own.index(a)], result[own.index(b)] = asked[own.index(b)], asked[own.index(a)]
    return result


def _named(mistake: Mistake, tensors: Sequence[TensorStats], stats: Sequence[TensorStats]) -> Finding:
    """The mistake's finding; where other tensors that it would concern are right, it was made in part."""
    finding = mistake.finding
    concerned = [
        tensor
        for tensor in stats
        if not np.allclose(mistake.weights(tensor.weights, tensor.pair.labels), tensor.weights)
    ]
    if len(tensors) == len(concerned) or not any(not tensor.wrong for tensor in concerned):
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
    for piece, tensor in zip(pieces, tensors, strict=True):
        before = _count(piece, tensor.weights, "")
        if min(_count(piece, tensor.weights, route, step) for route, step in UNIT.items()) > 1e-3 * before:
            return False
    return True
