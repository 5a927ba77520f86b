"""From measurements to the verdict: files and names first, then wrong elements, then whether a yes means anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.merge.verify import fit as fits
from engine.merge.verify.diagnose import Evidence, explain
from engine.merge.verify.files import shortened
from engine.merge.verify.fit import Fit
from engine.merge.verify.stats import TensorStats
from engine.merge.verify.replay import weightings
from engine.merge.verify.sample import draw
from engine.merge.verify.verdict import Finding, Verdict, Weights

TOLERANCE = 1e-3  # found may differ from expected by this much at most
RELATIVE_TOLERANCE = 2e-4  # or by this share of the weight, where the fit is that sharp
COLLINEAR = 1e-6  # 1 - |cosine| under which two deltas cannot be told apart at all
NEARLY = 1e-2  # and under which the fit's error decides
EVIDENCE = 16  # sampled elements that must speak against another recipe
UNCLEAR = 5e-3  # standard error of a weight above which nearly collinear deltas are not told apart

# Findings in the order of how much they explain; the first one is the verdict.
ORDER = (
    "base_unchanged", "swapped", "weight_squared", "missing", "partly_applied", "scaled_by", "other_weights",
    "cross_terms", "unknown_delta", "sequential_rounding", "delta_rounded_first", "low_precision_sums",
    "unexpected_change", "stale_files", "not_identifiable", "not_checkable",
)  # fmt: skip
# Findings about how much of each adapter is inside: the message then gives the weights found.
WEIGHT_CODES = ORDER[: ORDER.index("unknown_delta")]


def conclude(evidence: Evidence) -> Verdict:
    """The verdict on all evidence."""
    stats, labels = evidence.stats, evidence.labels
    whole = fits.fit(stats, labels)
    wrong = [tensor for tensor in stats if tensor.wrong or tensor.not_finite]
    findings = list(evidence.structure.findings)
    findings += _changed(evidence.changed)
    findings += _unusable(evidence)
    if evidence.guess is not None and not any(evidence.guess.weights.values()) and not wrong:
        findings.append(Finding("base_unchanged", "", "nothing was applied: every weight is the base's"))
    elif wrong:
        findings += explain(evidence, wrong, whole)
    else:
        findings += _shifted(evidence, whole)
        if not any(finding.code not in ("stale_files",) for finding in findings):
            findings += _identifiable(evidence, whole)
    findings = sorted(_distinct(findings), key=lambda finding: ORDER.index(finding.code))
    message = _message(evidence, whole, findings)
    if not findings:
        findings = [Finding("ok", "", message)]
    elements = sum(tensor.elements for tensor in stats)
    differing = sum(tensor.wrong for tensor in stats)
    asked = _named(labels, whole.asked)
    return Verdict(
        findings=tuple(findings),
        message=message,
        asked=evidence.asked,
        expected_weights=_named(labels, whole.expected),
        effective_weights=_named(labels, whole.found),
        rounding_loss={
            label: asked[label] - e for label, e in zip(labels, whole.expected.tolist(), strict=True)
        },
        residual=whole.residual,
        rounding_floor=whole.floor,
        differing_share=differing / elements if elements else 0.0,
        unchanged_share=sum(tensor.unchanged for tensor in stats) / elements if elements else 1.0,
        elements_checked=elements,
        elements_differing=differing,
        tensors_checked=len(evidence.structure.pairs),
        tensors_unexpected=tuple(evidence.structure.unexpected),
        tensors_wrong=tuple(tensor.name for tensor in wrong) + tuple(evidence.changed),
        per_module=tuple(_module(tensor) for tensor in stats),
        cosine=_cosines(labels, whole),
        dtype=evidence.merged.dtype,
        warnings=tuple(evidence.structure.warnings),
        guessed=evidence.guess.weights if evidence.guess else None,
    )


def _named(labels: Sequence[str], values: Any) -> Weights:
    return {label: float(value) for label, value in zip(labels, values, strict=True)}


def _cosines(labels: Sequence[str], whole: Fit) -> dict[str, float]:
    return {
        f"{labels[i]} {labels[j]}": float(whole.cosines[i, j])
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
    }


def _module(tensor: TensorStats) -> dict[str, Any]:
    one = fits.fit([tensor], tensor.labels)
    return {
        "name": tensor.name.removesuffix(".weight"),
        "asked": _named(tensor.labels, tensor.asked),
        "expected": _named(tensor.labels, one.expected),
        "found": _named(tensor.labels, one.found),
        "residual": one.residual,
        "rounding_floor": one.floor,
        "elements": tensor.elements,
        "differing": tensor.wrong,
        "unchanged": tensor.unchanged,
    }


def _distinct(findings: Sequence[Finding]) -> list[Finding]:
    """One finding for each code and detail: the first."""
    return list({(f.code, f.detail): f for f in reversed(findings)}.values())[::-1]


def _changed(changed: dict[str, int]) -> list[Finding]:
    """Tensors that no adapter touches and that still are not the base's."""
    if not changed:
        return []
    names = sorted(changed, key=lambda name: -changed[name])
    words = shortened([f"{name} ({changed[name]:,} elements)" for name in names])
    return [
        Finding("unexpected_change", shortened(names), f"changed though no adapter touches them: {words}")
    ]


def _unusable(evidence: Evidence) -> list[Finding]:
    """Touched tensors that cannot be judged, and NaN or infinity."""
    findings = []
    known = {tensor.name for tensor in evidence.stats}
    left = [name for name in evidence.touched if name in evidence.structure.pairs and name not in known]
    if left:
        kinds = sorted({evidence.merged.tensors[name].dtype for name in left})
        findings.append(
            Finding(
                "not_checkable",
                shortened(left),
                f"dtype {', '.join(kinds)} cannot be judged: {shortened(left)}",
            )
        )
    broken = [tensor for tensor in evidence.stats if tensor.not_finite]
    if broken:
        words = shortened([f"{tensor.name} ({tensor.not_finite:,})" for tensor in broken])
        findings.append(
            Finding(
                "unexpected_change",
                shortened([t.name for t in broken]),
                f"NaN or infinite numbers in {words}",
            )
        )
    return findings


def _shifted(evidence: Evidence, whole: Fit) -> list[Finding]:
    """Every element is inside its interval; the weights found must still be those expected."""
    tolerance = np.minimum(
        TOLERANCE, np.maximum(RELATIVE_TOLERANCE * np.abs(whole.expected), 8 * whole.error)
    )
    off = (np.abs(whole.found - whole.expected) > tolerance) & (whole.norms > 0)
    if (
        not off.any()
        or fits.least_separation(whole.cosines[np.ix_(whole.norms > 0, whole.norms > 0)]) < NEARLY
    ):
        return []
    ratios = whole.found[off] / whole.expected[off]
    text = ", ".join(f"{evidence.labels[i]} {whole.found[i]:.4f}" for i in np.flatnonzero(off))
    if off.all() and np.ptp(ratios) < 2e-4:
        return [
            Finding(
                "scaled_by", f"{ratios.mean():.4g}", f"the adapters were applied at {ratios.mean():.4g} x"
            )
        ]
    return [Finding("other_weights", text, f"other weights were applied: {text}")]


def _identifiable(evidence: Evidence, whole: Fit) -> list[Finding]:
    """Could a merge with other weights have given these very bits? Then a yes would be worth nothing."""
    labels = evidence.labels
    real = whole.norms > 0
    if not real.all():
        names = ", ".join(label for label, r in zip(labels, real, strict=True) if not r)
        return [
            Finding(
                "not_identifiable",
                names,
                f"{names} changes nothing (all zero), so its weight cannot be found",
            )
        ]
    apart = fits.least_separation(whole.cosines)
    if apart < COLLINEAR or (apart < NEARLY and float(whole.error.max()) > UNCLEAR):
        a, b, cosine = fits.most_alike(labels, whole.cosines)
        return [
            Finding(
                "not_identifiable",
                f"{a}, {b}",
                f"the deltas of {a} and {b} point the same way (cosine {cosine:.6f}): only their mixture as a whole "
                "can be found, not their weights",
            )
        ]
    doubtful = np.abs(whole.expected) < 6 * whole.error
    close = len(labels) > 1 and bool(np.ptp(whole.expected) < 6 * whole.error.max())
    if not doubtful.any() and not close:
        return []
    sample = draw(evidence.stats, evidence.base, evidence.merged, labels, 1_000_000)
    for way in weightings(sample):
        finding = way.finding
        if finding is None:
            continue
        if finding.code not in ("base_unchanged", "swapped", "missing"):
            break
        if np.count_nonzero(~sample.fits(way.weights)) < EVIDENCE:
            return [
                Finding(
                    "not_identifiable",
                    finding.detail or "base",
                    f"{evidence.merged.dtype} is too coarse for these deltas: (nearly) the same bits would be there "
                    f"if {finding.message}",
                )
            ]
    return []


def _message(evidence: Evidence, whole: Fit, findings: Sequence[Finding]) -> str:
    """The verdict in one sentence."""
    found = " / ".join(f"{w:.3f}" for w in whole.found)
    names = " / ".join(evidence.labels)
    if evidence.asked is not None:
        asked = " / ".join(f"{evidence.asked[label]:.3f}" for label in evidence.labels)
        if not findings:
            return f"every element is right: {names} merged at {asked}"
        where = f"found {found} where {asked} was asked ({names})"
    else:
        assert evidence.guess is not None
        guess = " / ".join(f"{evidence.guess.weights[label]:g}" for label in evidence.labels)
        if not findings:
            return f"the merge holds {names} at {guess}, and every element is right for these weights"
        where = f"found {found} ({names})"
    first = findings[0]
    if first.code not in WEIGHT_CODES:
        return first.message
    return f"{first.message}: {where}"
