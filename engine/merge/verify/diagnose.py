"""From measurements to findings: what is wrong with a merge, said in words.

The order of reasoning: files and names first; then, for the tensors with wrong elements, those left
unchanged; then the hypotheses of `replay` tried bit by bit; then what the fit leaves unexplained. Whatever no
hypothesis explains is still reported, as `unknown_delta` or `unexpected_change`: nothing wrong passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.merge.verify import fit as fits
from engine.merge.verify.files import Structure, shortened
from engine.merge.verify.fit import Fit
from engine.merge.verify.guess import Guess
from engine.merge.verify.measure import TensorStats
from engine.merge.verify.replay import Rounding, Weighting, roundings, weightings
from engine.merge.verify.sample import Sample, draw
from engine.merge.verify.verdict import Finding, Verdict, Weights
from engine.weights.checkpoint import Checkpoint

TOLERANCE = 1e-3  # found may differ from expected by this much at most
RELATIVE_TOLERANCE = 2e-4  # or by this share of the weight, where the fit is that sharp
MATCH = 0.998  # share of sampled elements a true hypothesis explains (float32 ties are the rest)
WORTH = 0.9  # share of a thin sample a hypothesis must explain in some tensor to be looked at closely
SURE = 0.9999  # share of sampled elements that guessed weights must explain to be believed
COLLINEAR = 1e-6  # 1 - |cosine| under which two deltas cannot be told apart at all
NEARLY = 1e-2  # and under which the fit's error decides
UNCLEAR = 5e-3  # standard error of a weight above which nearly collinear deltas are not told apart

# Findings in the order of how much they explain; the first one is the verdict.
ORDER = (
    "base_unchanged", "swapped", "weight_squared", "missing", "partly_applied", "scaled_by", "other_weights",
    "cross_terms", "unknown_delta", "sequential_rounding", "delta_rounded_first", "low_precision_sums",
    "unexpected_change", "stale_files", "not_identifiable", "not_checkable",
)  # fmt: skip


# Findings about how much of each adapter is inside: their message gives the weights found.
WEIGHT_CODES = (
    "base_unchanged", "swapped", "weight_squared", "missing", "partly_applied", "scaled_by", "other_weights",
    "cross_terms",
)  # fmt: skip


@dataclass
class Evidence:
    """Everything that was measured. `changed` counts differing elements of tensors no adapter touches."""

    base: Checkpoint
    merged: Checkpoint
    labels: tuple[str, ...]
    stats: list[TensorStats]
    structure: Structure
    changed: dict[str, int]
    asked: Weights | None
    guess: Guess | None
    touched: tuple[str, ...]


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
        findings += _wrong_elements(evidence, wrong, whole)
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


def _wrong_elements(evidence: Evidence, wrong: list[TensorStats], whole: Fit) -> list[Finding]:
    """Explain the tensors that hold wrong elements."""
    effective = [t for t in evidence.stats if t.ideal_unchanged < t.elements]  # a right merge changes these
    unchanged = [t for t in wrong if t.untouched_in_fact]
    if unchanged and len(unchanged) == len(effective):
        return [Finding("base_unchanged", "", "nothing was applied: every weight is still the base's")]
    findings = []
    if unchanged:
        findings.append(_partly(unchanged, "were left as they are in the base"))
    rest = [tensor for tensor in wrong if not tensor.untouched_in_fact]
    if not rest:
        return findings
    sample = draw(rest, evidence.base, evidence.merged, evidence.labels)
    explained, unexplained = _replay(evidence, sample, rest)
    findings += explained
    if unexplained:
        findings += _unexplained(evidence, unexplained, whole)
    return findings


def _partly(tensors: Sequence[TensorStats], words: str) -> Finding:
    names = [tensor.name.removesuffix(".weight") for tensor in tensors]
    return Finding(
        "partly_applied", shortened(names, 40), f"{len(names)} modules {words}: {shortened(names)}"
    )


def _replay(
    evidence: Evidence, sample: Sample, rest: list[TensorStats]
) -> tuple[list[Finding], list[TensorStats]]:
    """Findings for the tensors a hypothesis explains bit by bit, and the tensors none does.

    Weights first with correct rounding, then early roundings of the most likely weights. A hypothesis
    explains a tensor when it matches MATCH of its sampled elements and misses at most a tenth of what the
    asked weights miss there.
    """
    counts = np.bincount(sample.owner, minlength=len(rest))
    thin = sample.where(sample.thin)
    thin_counts = np.maximum(np.bincount(thin.owner, minlength=len(rest)), 1)
    ways, matches, scores = [], [], []
    for way in weightings(sample):
        hit = thin.fits(way.weights[:, sample.thin])
        match = np.bincount(thin.owner, hit, len(rest)) / thin_counts
        if way.finding is None or match.max() > WORTH:
            match = np.bincount(sample.owner, sample.fits(way.weights), len(rest)) / counts
        ways.append(way)
        matches.append(match)
        scores.append(float(hit.mean()))
    asked = matches[0]
    open_ = list(range(len(rest)))
    findings: list[Finding] = []
    while open_:
        best = max(range(1, len(ways)), key=lambda i: _explained(matches[i], asked, open_).sum(), default=0)
        taken = [n for n, good in zip(open_, _explained(matches[best], asked, open_), strict=True) if good]
        if not best or not taken:
            break
        findings += _weighting_findings(evidence, ways[best], [rest[n] for n in taken])
        open_ = [n for n in open_ if n not in taken]
    if open_ and sample.dtype != "F32":
        likely = sorted(range(len(ways)), key=lambda i: -scores[i])[:4]
        chosen = [ways[i] for i in dict.fromkeys([0, *likely])]
        early, open_ = _rounded(evidence, sample, chosen, asked, open_, rest)
        findings += early
    return findings, [rest[n] for n in open_]


def _explained(match: Any, asked: Any, where: list[int]) -> Any:
    return (match[where] >= MATCH) & ((1 - match[where]) <= 0.1 * (1 - asked[where]))


def _rounded(
    evidence: Evidence,
    sample: Sample,
    ways: list[Weighting],
    asked: Any,
    open_: list[int],
    rest: list[TensorStats],
) -> tuple[list[Finding], list[int]]:
    """The weighting and early rounding that explain most of the open tensors, and what is still open."""
    keep = np.isin(sample.owner, open_)
    part = sample.where(keep)
    thin = part.where(part.thin)
    scored: list[tuple[float, int, Weighting, Rounding]] = []
    for rounding in roundings(part):
        for way in ways:
            weights = way.weights[:, keep]
            hit = thin.equals(rounding.replay(thin, weights[:, part.thin]))
            scored.append((float(np.mean(hit)), -len(scored), way, rounding))
    _, _, way, rounding = max(scored)  # the first of equals
    hit = part.equals(rounding.replay(part, way.weights[:, keep]))
    match = np.bincount(part.owner, hit, len(rest)) / np.maximum(
        np.bincount(part.owner, minlength=len(rest)), 1
    )
    taken = [n for n, good in zip(open_, _explained(match, asked, open_), strict=True) if good]
    if not taken:
        return [], open_
    findings = [rounding.finding]
    if way.finding is not None:
        findings += _weighting_findings(evidence, way, [rest[n] for n in taken])
    return findings, [n for n in open_ if n not in taken]


def _weighting_findings(evidence: Evidence, way: Weighting, tensors: list[TensorStats]) -> list[Finding]:
    """The finding for a weighting; when other tensors it would concern are right, it was applied in part."""
    assert way.finding is not None
    concerned = [
        t
        for t in evidence.stats
        if any(d.label in way.labels for d in t.deltas) and t.ideal_unchanged < t.elements
    ]
    names = {tensor.name for tensor in tensors}
    others = [t for t in concerned if t.name not in names and not t.wrong]
    if not others:
        return [way.finding]
    if way.finding.code == "missing":
        return [_partly(tensors, f"were merged without {way.finding.detail}")]
    if way.finding.code == "base_unchanged":
        return [_partly(tensors, "were left as they are in the base")]
    modules = shortened([t.name.removesuffix(".weight") for t in tensors])
    return [
        Finding(
            way.finding.code,
            way.finding.detail,
            f"{way.finding.message}, in {len(tensors)} modules: {modules}",
        )
    ]


def _unexplained(evidence: Evidence, tensors: list[TensorStats], whole: Fit) -> list[Finding]:
    """What the fit says about tensors no hypothesis explains."""
    labels = evidence.labels
    own = fits.fit(tensors, labels)
    if evidence.guess is not None and evidence.guess.fits < SURE and own.residual <= 1.05 * own.floor + 1e-6:
        about = ", ".join(f"{label} {w:.4f}" for label, w in zip(labels, own.found, strict=True))
        return [
            Finding(
                "not_identifiable",
                about,
                f"the adapters explain all of the change ({about}), but at weights that are no round numbers, so "
                "single elements cannot be judged; give the weights that were asked for",
            )
        ]
    wrong, elements = sum(t.wrong for t in tensors), sum(t.elements for t in tensors)
    shifted = np.abs(own.found - own.expected) > np.maximum(TOLERANCE, 6 * own.error)
    if wrong <= max(64, 1e-3 * elements) and not shifted.any() and own.residual <= 1.5 * own.floor + 1e-6:
        return [_few(tensors, wrong)]
    cross = fits.fit_cross(tensors, labels)
    if cross is not None and cross.residual < 0.5 * own.residual and cross.residual < 2 * own.floor + 0.02:
        pairs = ", ".join(f"B of {k} with A of {m}: {x:.3f}" for (k, m), x in cross.strengths.items())
        return [
            Finding(
                "cross_terms",
                pairs,
                "A and B were combined separately, so parts of different adapters were multiplied "
                f"({pairs}); PEFT's combination_type='linear' does this",
            )
        ]
    ranks = _ranks(tensors, labels)
    if ranks:
        return ranks
    findings = []
    explained = own.residual <= 1.1 * own.floor + 1e-4
    if not explained:
        findings.append(
            Finding(
                "unknown_delta",
                f"residual {own.residual:.3f}",
                f"something else is in {len(tensors)} modules: the adapters leave {own.residual:.3f} of the change "
                f"unexplained, where rounding leaves {own.floor:.3f}",
            )
        )
    everywhere = len(tensors) == len(evidence.stats)
    for i, label in enumerate(labels):
        gone = abs(own.found[i]) <= max(0.05 * abs(own.expected[i]), 4 * own.error[i])
        if gone and everywhere and abs(own.expected[i]) > 8 * own.error[i] and whole.norms[i] > 0:
            findings.append(Finding("missing", label, f"{label} is not in the merge"))
    if not findings:
        found = ", ".join(f"{label} {w:.3f}" for label, w in zip(labels, own.found, strict=True))
        code = "other_weights" if shifted.any() else "unexpected_change"
        names = shortened([t.name for t in tensors])
        detail = found if shifted.any() else names
        findings.append(
            Finding(
                code,
                detail,
                f"{wrong:,} elements of {names} are not what any known way of merging gives ({found})",
            )
        )
    return findings


def _few(tensors: Sequence[TensorStats], wrong: int) -> Finding:
    first = tensors[0]
    assert first.first_wrong is not None
    row, column, found, low, high = first.first_wrong
    should = f"{low:.9g}" if low == high else f"{low:.9g} to {high:.9g}"
    names = shortened([tensor.name for tensor in tensors])
    plural = "element is" if wrong == 1 else "elements are"
    return Finding(
        "unexpected_change",
        names,
        f"{wrong:,} {plural} not what was asked, in {names}; the first is [{row}, {column}] of {first.name}: "
        f"{found:.9g}, and {should} is right",
    )


def _ranks(tensors: Sequence[TensorStats], labels: Sequence[str]) -> list[Finding]:
    """Adapters of which some ranks are missing: their rank-1 pieces fit to 0 and the others to what was asked."""
    gone: dict[str, list[float]] = {label: [] for label in labels}
    rank: dict[str, int] = {}
    for tensor in tensors:
        pieces = fits.rank_weights(tensor)
        for delta, span, asked in zip(tensor.deltas, tensor.spans, tensor.asked, strict=True):
            if asked:
                gone[delta.label].append(float(np.mean(np.abs(pieces[span] / asked) < 0.3)))
                rank[delta.label] = delta.rank
    findings = []
    for label, shares in gone.items():
        if shares and 0.02 < (share := float(np.median(shares))) < 0.98:
            findings.append(
                Finding(
                    "partly_applied",
                    label,
                    f"only {round((1 - share) * rank[label])} of {rank[label]} ranks of {label} were applied",
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
        if (
            finding
            and finding.code in ("base_unchanged", "swapped", "missing")
            and sample.fits(way.weights).all()
        ):
            return [
                Finding(
                    "not_identifiable",
                    finding.detail or "base",
                    f"{evidence.merged.dtype} is too coarse for these deltas: the same bits would be there if "
                    f"{finding.message}",
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
