"""From measurements to the verdict on a GGUF: the same codes and keys as for a merged folder, and its format's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.gguf.blocks import FLOATS, LAYOUTS
from engine.gguf.reader import GgufFile
from engine.gguf.verify import fit as fits
from engine.gguf.verify.asked import Float64Array, Pairing
from engine.gguf.verify.diagnose import OTHER, explain
from engine.gguf.verify.fit import Fit
from engine.gguf.verify.measure import FAR_SHARE, REPLAY_ROWS, WORSE, TensorStats
from engine.gguf.verify.sample import Piece
from engine.merge.verify.files import shortened
from engine.merge.verify.verdict import Finding, Verdict
from engine.weights import Checkpoint

UNCLEAR = 0.05  # standard error of a weight above which the fit says nothing
SAME = 0.999  # share of untouched blocks that llama.cpp here must reproduce to be the file's own quantiser
SPEAKING = 16  # sampled elements that must speak against a weight that is off by UNCLEAR
ORDER = (
    "base_unchanged", "swapped", "weight_squared", "missing", "partly_applied", "scaled_by", "other_weights",
    "cross_terms", "unknown_delta", "low_precision_sums", "unexpected_change", "not_identifiable",
    "not_checkable",
)  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured."""

    file: GgufFile
    base: Checkpoint
    labels: tuple[str, ...]
    stats: list[TensorStats]
    pairing: Pairing
    pieces: list[Piece]
    route: str
    imatrix: bool
    asked: dict[str, float] | None
    guessed: dict[str, float] | None
    guess_fits: bool
    by_tensor: bool  # weights differ by tensor: what was asked of all is their fit

    @property
    def touched(self) -> list[TensorStats]:
        return [tensor for tensor in self.stats if tensor.pair.deltas]


@dataclass(frozen=True)
class GgufVerdict:
    """A Verdict, how sharp its weights are, and what was found out about the file's format."""

    verdict: Verdict
    standard_error: dict[str, float | None] | None  # None: nothing tells this weight
    format: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.verdict.ok

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code

    def to_json(self) -> dict[str, Any]:
        """The keys of every verdict, and `format` and `standard_error`."""
        return {
            **self.verdict.to_json(),
            "standard_error": self.standard_error,
            "format": self.format,
            "exit_code": self.exit_code,
        }


def conclude(evidence: Evidence, seconds: float) -> GgufVerdict:
    """The verdict on all evidence."""
    touched, labels = evidence.touched, evidence.labels
    whole = fits.fit(touched, labels)
    wrong = [tensor for tensor in touched if tensor.wrong or tensor.not_finite]
    changed = [t for t in evidence.stats if not t.pair.deltas and (t.wrong or t.not_finite)]
    findings = list(evidence.pairing.findings) + _changed(changed)
    if evidence.guessed is not None and not any(evidence.guessed.values()) and not wrong:
        findings.append(Finding("base_unchanged", "", "nothing was applied: this is the base"))
    elif wrong and evidence.guessed is not None and not evidence.guess_fits:
        findings += _no_round_weights(whole, touched)
    elif wrong:
        findings += explain(touched, labels)
    elif labels:
        findings += _shifted(evidence, whole) or _identifiable(evidence, whole)
    findings = sorted(dict.fromkeys(findings), key=lambda finding: ORDER.index(finding.code))
    message = _message(evidence, whole, findings)
    if not findings:
        findings = [Finding("ok", "", message)]
    elements = sum(tensor.judged for tensor in touched)
    differing = sum(tensor.wrong for tensor in touched)
    fitted = _named(labels, whole.found)
    expected = _named(labels, whole.expected)
    verdict = Verdict(
        findings=tuple(findings),
        message=message,
        asked=_asked(evidence, whole) if labels else None,
        expected_weights=expected if labels else None,
        effective_weights=fitted if labels else None,
        rounding_loss=_named(labels, whole.asked - whole.expected) if labels else None,
        residual=whole.residual if labels else None,
        rounding_floor=whole.floor if labels else None,
        differing_share=differing / elements if elements else 0.0,
        unchanged_share=sum(t.like_base for t in touched) / elements if elements else 1.0,
        elements_checked=sum(tensor.judged for tensor in evidence.stats),
        elements_differing=sum(tensor.wrong for tensor in evidence.stats),
        tensors_checked=len(evidence.stats),
        tensors_unexpected=tuple(evidence.pairing.unexpected),
        tensors_wrong=tuple(tensor.pair.stored.name for tensor in wrong + changed),
        per_module=tuple(_module(tensor) for tensor in touched),
        cosine={
            f"{a} {b}": float(whole.cosines[i, j])
            for i, a in enumerate(labels)
            for j, b in enumerate(labels)
            if i < j
        },
        dtype=_main_type(evidence.stats),
        warnings=tuple(evidence.pairing.warnings),
        guessed=evidence.guessed,
        seconds=seconds,
    )
    errors = {
        label: float(e) if np.isfinite(e) else None for label, e in zip(labels, whole.error, strict=True)
    }
    return GgufVerdict(verdict, errors if labels else None, _format(evidence))


def _asked(evidence: Evidence, whole: Fit) -> dict[str, float] | None:
    return _named(whole.labels, whole.asked) if evidence.by_tensor else evidence.asked


def _changed(changed: Sequence[TensorStats]) -> list[Finding]:
    """Tensors no adapter touches that are not the checkpoint's."""
    if not changed:
        return []
    names = [tensor.pair.stored.name for tensor in sorted(changed, key=lambda t: -t.wrong)]
    words = shortened([f"{t.pair.stored.name} ({t.wrong:,} of {t.elements:,})" for t in changed])
    return [
        Finding(
            "unexpected_change",
            shortened(names),
            f"elements beyond the format's bound of the checkpoint's value: {words}",
        )
    ]


def _no_round_weights(whole: Fit, touched: Sequence[TensorStats]) -> list[Finding]:
    found = _words(whole)
    if whole.residual > 1.05 * whole.floor + 1e-4:
        return [
            Finding(
                "unknown_delta",
                f"residual {whole.residual:.3f}",
                f"the adapters leave {whole.residual:.3f} of the change unexplained, where the format leaves "
                f"{whole.floor:.3f}; of them there is {found}",
            )
        ]
    return [
        Finding(
            "not_identifiable",
            found,
            f"the adapters explain all of the change ({found}), but at weights that are no round numbers, so single "
            "elements cannot be judged; give the weights that were asked for",
        )
    ]


def _shifted(evidence: Evidence, whole: Fit) -> list[Finding]:
    """Weights a little off, which coarse types may hide element by element but not in the sum of all.

    Found and expected come from the same rows, so the noise of the format cancels in their difference. That holds
    where llama.cpp here quantises as the file's maker did: the tensors no adapter touches tell.
    """
    plain = [t for t in evidence.stats if not t.pair.deltas and t.pair.stored.type not in FLOATS]
    blocks = sum(tensor.blocks for tensor in plain)
    same = blocks and sum(tensor.same_blocks for tensor in plain) >= SAME * blocks
    off = np.abs(whole.found - whole.expected) > np.maximum(OTHER, 6 * whole.shift_error)
    if evidence.imatrix or not same or not (off & np.isfinite(whole.error)).any():
        return []
    words = ", ".join(
        f"{label} {w:.4f} ± {e:.4f}"
        for label, w, e in zip(whole.labels, whole.implied, whole.shift_error, strict=True)
    )
    return [Finding("other_weights", words, f"the weights inside are {words}, by the fit of all elements")]


def _identifiable(evidence: Evidence, whole: Fit) -> list[Finding]:
    """Whether the yes means anything: other weights must be refused by the fit or by single elements."""
    unclear = [i for i, error in enumerate(whole.error) if not error <= UNCLEAR]
    if not unclear:
        return []
    directions: list[Float64Array] = [np.eye(len(whole.labels))[i] for i in unclear]
    if len(whole.labels) > 1:
        least = np.linalg.eigh(whole.cosines)[1][:, 0]
        directions.append(least / np.abs(least).max())
    open_ = [
        d for d in directions if min(_speaking(evidence, sign * UNCLEAR * d) for sign in (1, -1)) < SPEAKING
    ]
    if not open_:
        return []
    labels = [label for i, label in enumerate(whole.labels) if any(abs(d[i]) > 0.3 for d in open_)]
    return [
        Finding(
            "not_identifiable",
            ", ".join(labels),
            f"weights of {', '.join(labels)} that are off by {UNCLEAR:g} would give this file as well: the deltas are "
            f"too small for {_main_type(evidence.stats)}, or too much alike (the fit finds {_words(whole)})",
        )
    ]


def _speaking(evidence: Evidence, shift: Float64Array) -> int:
    """Sampled elements that weights shifted so do not explain."""
    stats = {tensor.pair.stored.name: tensor for tensor in evidence.stats}
    count = 0
    for piece in evidence.pieces:
        own = stats[piece.pair.stored.name].weights
        moved = own + np.array([shift[evidence.labels.index(label)] for label in piece.pair.labels])
        count += int(np.count_nonzero(piece.wrong(moved, evidence.route)))
        count -= int(np.count_nonzero(piece.wrong(own, evidence.route)))
    return count


def _named(labels: Sequence[str], values: Float64Array) -> dict[str, float]:
    return {label: float(value) for label, value in zip(labels, values, strict=True)}


def _words(whole: Fit) -> str:
    return ", ".join(
        f"{label} {w:.4f} ± {e:.4f}"
        for label, w, e in zip(whole.labels, whole.found, whole.error, strict=True)
    )


def _module(tensor: TensorStats) -> dict[str, Any]:
    labels = tensor.pair.labels
    one = fits.fit([tensor], labels)
    return {
        "name": tensor.pair.source.name.removesuffix(".weight"),
        "type": tensor.pair.stored.type,
        "asked": _named(labels, tensor.weights),
        "expected": _named(labels, one.expected),
        "found": _named(labels, one.found),
        "residual": one.residual,
        "rounding_floor": one.floor,
        "elements": tensor.elements,
        "differing": tensor.wrong,
        "unchanged": tensor.like_base,
    }


def _main_type(stats: Sequence[TensorStats]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in stats:
        sizes[tensor.pair.stored.type] += tensor.elements
    return sizes.most_common(1)[0][0] if sizes else ""


def _format(evidence: Evidence) -> dict[str, Any]:
    stats = evidence.stats
    blocks, elements = sum(t.blocks for t in stats), sum(t.judged for t in stats)
    types = Counter(tensor.pair.stored.type for tensor in stats)
    return {
        "types": dict(types.most_common()),
        "bound": {kind: bound(kind) for kind in types},
        "route": None if any(tensor.wrong for tensor in evidence.touched) else evidence.route or "direct",
        "importance_matrix": evidence.imatrix,
        "blocks_compared": blocks,
        "reproduced_share": sum(t.same_blocks for t in stats) / blocks if blocks else None,
        "clipped_share": sum(t.clipped for t in stats) / elements if elements else None,
        "clipped_far": sum(t.far for t in stats),
        "elements_not_judged": sum(t.elements - t.judged for t in stats),
    }


def bound(kind: str) -> str:
    """The rule elements of this type were judged by, in words."""
    if kind == "F32":
        return "the asked value, within what float32 sums allow"
    if kind in FLOATS:
        return "the asked value rounded once, to nearest even"
    layout = LAYOUTS.get(kind)
    if layout is None:
        return f"the error of each block at most {WORSE} times that of llama.cpp's own quantisation (sampled rows)"
    scale = " plus 2^-11 of the value for the float16 scale" if layout.scale_error else ""
    return (
        f"half a step of the stored block{scale}, or the end of its grid for values beyond it; by more than a step "
        f"only where llama.cpp's own quantisation is as far off (tried on {REPLAY_ROWS} rows a tensor), or for "
        f"{FAR_SHARE:.0%} of a tensor where an importance matrix was used"
    )


def _message(evidence: Evidence, whole: Fit, findings: Sequence[Finding]) -> str:
    if findings:
        return findings[0].message
    kind = _main_type(evidence.stats)
    by_way = f", by way of a {evidence.route} checkpoint" if evidence.route else ""
    if not evidence.labels:
        return f"every tensor is that of {evidence.base.name}, within the bound of its format ({kind})"
    asked = _asked(evidence, whole) or evidence.guessed or {}
    recipe = ", ".join(f"{label} {weight:g}" for label, weight in asked.items())
    return (
        f"every tensor is within its format's bound ({kind}) of the base with {recipe}{by_way}; "
        f"the fit finds {_words(whole)}"
    )
