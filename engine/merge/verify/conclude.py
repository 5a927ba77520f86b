"""From measurements to the verdict: files and names first, then wrong elements, then whether a yes means anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.merge.verify import fit as fits
from engine.merge.verify.diagnose import Evidence, explain
from engine.merge.verify.files import shortened
from engine.merge.verify.fit import Fit
from engine.merge.verify.replay import weightings
from engine.merge.verify.sample import draw
from engine.merge.verify.stats import TensorStats
from engine.merge.verify.verdict import Finding, Verdict, Weights

TOLERANCE = 1e-3  # found may differ from expected by this much at most
RELATIVE_TOLERANCE = 2e-4  # or by this share of the weight, where the fit is that sharp
COLLINEAR = 1e-6  # 1 - |cosine| under which two deltas cannot be told apart at all
NEARLY = 1e-2  # and under which the fit's error decides
WORST = 10  # modules listed as the worst
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
    linear = evidence.spec.linear
    whole = fits.fit(stats if linear else [], labels)
    wrong = [tensor for tensor in stats if tensor.wrong or tensor.not_finite]
    findings = list(evidence.structure.findings)
    findings += _changed(evidence.changed)
    findings += _unusable(evidence)
    if evidence.guess is not None and not any(evidence.guess.weights.values()) and not wrong:
        findings.append(Finding("base_unchanged", "", "nothing was applied: every weight is the base's"))
    elif wrong:
        findings += explain(evidence, wrong, whole)
    else:
        findings += _shifted(evidence, whole) if linear else []
        if not any(finding.code not in ("stale_files",) for finding in findings):
            findings += _identifiable(evidence, whole) if linear else _visible(evidence)
    findings = sorted(_distinct(findings), key=lambda finding: ORDER.index(finding.code))
    message = _message(evidence, whole, findings)
    if not findings:
        findings = [Finding("ok", "", message)]
    elements = sum(tensor.elements for tensor in stats)
    differing = sum(tensor.wrong for tensor in stats)
    modules = [_module(tensor) for tensor in stats]
    asked, expected = _weights(evidence, whole.asked), _weights(evidence, whole.expected)
    return Verdict(
        findings=tuple(findings),
        message=message,
        asked=_asked(evidence, whole),
        expected_weights=expected if linear else None,
        effective_weights=_weights(evidence, whole.found) if linear else None,
        rounding_loss={label: asked[label] - expected[label] for label in asked} if linear else None,
        residual=whole.residual if linear else None,
        rounding_floor=whole.floor if linear else None,
        differing_share=differing / elements if elements else 0.0,
        unchanged_share=sum(tensor.unchanged for tensor in stats) / elements if elements else 1.0,
        elements_checked=elements,
        elements_differing=differing,
        tensors_checked=len(evidence.structure.pairs),
        tensors_unexpected=tuple(evidence.structure.unexpected),
        tensors_wrong=tuple(tensor.name for tensor in wrong) + tuple(evidence.changed),
        per_module=tuple(modules),
        worst=tuple(_worst(stats, modules)),
        method=evidence.spec.method,
        cosine=_cosines(labels, whole) if linear else {},
        dtype=evidence.merged.dtype,
        warnings=tuple(evidence.structure.warnings),
        guessed=evidence.guess.weights if evidence.guess else None,
    )


def _named(labels: Sequence[str], values: Any) -> Weights:
    return {label: float(value) for label, value in zip(labels, values, strict=True)}


def _weights(evidence: Evidence, values: Any) -> Weights:
    """By label, in the order asked; the reference model counts what the others leave of the whole."""
    named = _named(evidence.labels, values)
    if evidence.implied is None:
        return named
    whole = evidence.stats[0].base_share if evidence.stats else 1.0
    named[evidence.implied] = whole - sum(named.values())
    return {label: named[label] for label in evidence.spec.labels}


def _cosines(labels: Sequence[str], whole: Fit) -> dict[str, float]:
    return {
        f"{labels[i]} {labels[j]}": float(whole.cosines[i, j])
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
    }


def _asked(evidence: Evidence, whole: Fit) -> Weights | None:
    """What was asked, one number a label: of weights by tensor what they fit to on the whole, as they were applied."""
    spec = evidence.spec
    if evidence.asked is None or not spec.linear or not spec.by_tensor:
        return evidence.asked
    fitted = _weights(evidence, whole.asked)
    if spec.normalizes or spec.lam != 1.0 or evidence.implied is not None:
        return fitted
    return {e.label: fitted[e.label] if e.by_tensor else evidence.asked[e.label] for e in spec.entries}


def _worst(stats: Sequence[TensorStats], modules: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The modules farthest from what was asked: share of wrong elements first, then error against rounding's."""
    order = sorted(
        range(len(stats)),
        key=lambda i: (-stats[i].wrong / max(1, stats[i].elements), -stats[i].relative_error),
    )
    return [modules[i] for i in order[:WORST]]


def _module(tensor: TensorStats) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": tensor.name.removesuffix(".weight"),
        "asked": _named(tensor.labels, tensor.asked),
        "elements": tensor.elements,
        "differing": tensor.wrong,
        "unchanged": tensor.unchanged,
        "error": tensor.relative_error if np.isfinite(tensor.relative_error) else None,
        "expected": None,
        "found": None,
        "residual": None,
        "rounding_floor": None,
    }
    if tensor.linear:
        one = fits.fit([tensor], tensor.labels)
        found |= {
            "expected": _named(tensor.labels, one.expected),
            "found": _named(tensor.labels, one.found),
            "residual": one.residual,
            "rounding_floor": one.floor,
        }
    return found


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


def _visible(evidence: Evidence) -> list[Finding]:
    """A right merge of anything must at least differ from the base."""
    if _nothing_asked(evidence) or any(tensor.ideal_unchanged < tensor.elements for tensor in evidence.stats):
        return []
    return [
        Finding(
            "not_identifiable",
            "base",
            f"{evidence.merged.dtype} is too coarse for these deltas: a right merge has the same bits as the base",
        )
    ]


def _nothing_asked(evidence: Evidence) -> bool:
    """The reference itself was asked for: every other weight is 0, or it is one end of a slerp."""
    spec, names = evidence.spec, [tensor.name for tensor in evidence.stats]
    if spec.method == "slerp":
        return spec.entries[0].path == evidence.base.folder and not any(spec.t_of(name) for name in names)
    others = [entry for entry in spec.entries if entry.label != evidence.implied]
    return not any(entry.weight_of(name) for entry in others for name in names)


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
    if drowned := _visible(evidence):
        return drowned
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
    sample = draw(
        evidence.stats, evidence.base, evidence.merged, evidence.spec.labels, 1_000_000, evidence.implied
    )
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
    names = " / ".join(evidence.spec.labels)
    method = evidence.spec.method
    if not evidence.spec.linear:
        weights = " / ".join(
            "by tensor" if entry.by_tensor else f"{weight:g}"
            for entry, weight in zip(evidence.spec.entries, evidence.spec.weights().values(), strict=True)
        )
        if not findings:
            return f"every element is right: {method} of {names} at weights {weights}"
        return findings[0].message
    found = " / ".join(f"{weight:.3f}" for weight in _weights(evidence, whole.found).values())
    if evidence.asked is not None:
        spec = evidence.spec
        scaled = spec.normalizes or spec.lam != 1.0 or evidence.implied is not None
        weights_asked = (_weights(evidence, whole.asked) if scaled else _asked(evidence, whole)) or {}
        asked = " / ".join(_short(weight) for weight in weights_asked.values())
        if not findings:
            where = "weights by tensor, on the whole " if spec.by_tensor else ""
            return f"every element is right: {names} merged at {where}{asked}"
        where = f"found {found} where {asked} was asked ({names})"
    else:
        assert evidence.guess is not None
        guess = " / ".join(f"{evidence.guess.weights[label]:g}" for label in evidence.spec.labels)
        if not findings:
            return f"the merge holds {names} at {guess}, and every element is right for these weights"
        where = f"found {found} ({names})"
    first = findings[0]
    if first.code not in WEIGHT_CODES:
        return first.message
    return f"{first.message}: {where}"


def _short(weight: float) -> str:
    """Three decimals where they are the weight, else as many as it takes: 0.300, but 0.3001 and 1e-06."""
    text = f"{weight:.3f}"
    return text if abs(float(text) - weight) < 1e-6 * max(1e-6, abs(weight)) else f"{weight:.6g}"
