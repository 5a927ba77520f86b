"""Why elements are wrong: the tensors left unchanged, then known mistakes replayed bit by bit, then the fit.

Whatever no hypothesis explains is still reported, as `unknown_delta` or `unexpected_change`: nothing wrong
passes for lack of a name. `explain` is called by conclude.py with the tensors that hold wrong elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.merge.verify import fit as fits
from engine.merge.verify.asked import Asked
from engine.merge.verify.files import Structure, shortened
from engine.merge.verify.fit import Fit
from engine.merge.verify.formulas import Task
from engine.merge.verify.guess import Guess
from engine.merge.verify.hypotheses import best_explanation, float32_angle
from engine.merge.verify.replay import Rounding, Weighting, roundings, weightings
from engine.merge.verify.sample import Sample, draw
from engine.merge.verify.stats import TensorStats
from engine.merge.verify.verdict import Finding, Weights
from engine.weights.checkpoint import Checkpoint

CLEAR_SHIFT = 1e-3  # weights off by more than this are not just rounding
MATCH = 0.998  # share of sampled elements a true hypothesis explains (float32 ties are the rest)
WORTH = 0.9  # share of a thin sample a hypothesis must explain in some tensor to be looked at closely
CUT = 0.2  # what truncating to a rank may leave of the error, to be believed
MOST = 0.9  # share of tensors that are cut to the same rank
SURE = 0.9999  # share of sampled elements that guessed weights must explain to be believed


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
    spec: Asked
    implied: str | None = None  # the label whose weight is what the others leave of the whole
    tasks: dict[str, Task] = field(default_factory=dict)  # of the tensors that hold wrong elements


def explain(evidence: Evidence, wrong: list[TensorStats], whole: Fit) -> list[Finding]:
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
    if not evidence.spec.linear:
        return findings + _other_way(evidence, rest)
    sample = draw(rest, evidence.base, evidence.merged, evidence.spec.labels, implied=evidence.implied)
    explained, unexplained = _replay(evidence, sample, rest)
    findings += explained
    if unexplained:
        findings += _unexplained(evidence, unexplained, whole)
    return findings


def _other_way(evidence: Evidence, wrong: list[TensorStats]) -> list[Finding]:
    """Findings for a method that is not linear in the weights: by hypotheses, never by a fit."""
    count, elements = sum(t.wrong for t in wrong), sum(t.elements for t in wrong)
    found = best_explanation([(evidence.tasks[t.name], t) for t in wrong])
    findings = []
    if found is not None:
        finding, left = found
        right = [t for t in evidence.stats if not t.wrong and t.ideal_unchanged < t.elements]
        where = f", in {len(wrong)} modules: {shortened([t.name for t in wrong])}" if right else ""
        findings.append(Finding(finding.code, finding.detail, finding.message + where))
        wrong = [t for t in wrong if t.name in left]
        if not wrong:
            return findings
    if evidence.spec.method == "slerp" and (angle := float32_angle([evidence.tasks[t.name] for t in wrong])):
        return [*findings, angle]
    if count <= max(64, 1e-3 * elements):
        return [*findings, _few(wrong, count)]
    ratio = max(tensor.relative_error for tensor in wrong)
    names = shortened([t.name.removesuffix(".weight") for t in wrong])
    text = f"error {ratio:.3g} x rounding"
    return [
        *findings,
        Finding(
            "unknown_delta",
            text,
            f"something else is in {len(wrong)} modules ({names}): {count:,} elements are not what "
            f"{evidence.spec.method} gives, and no other parameters explain them (up to {ratio:.3g} x the error of "
            "rounding)",
        ),
    ]


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
    weights = [way.weights[:, keep][:, part.thin] for way in ways]
    scored: list[tuple[float, int, Weighting, Rounding]] = []
    for rounding in roundings(part):
        for way, some in zip(ways, weights, strict=True):
            hit = thin.equals(rounding.replay(thin, some))
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
        if any(label in way.labels for label in t.labels) and t.ideal_unchanged < t.elements
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
    shifted = np.abs(own.found - own.expected) > np.maximum(CLEAR_SHIFT, 6 * own.error)
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
    ranks = _cut(tensors) or _ranks(tensors, labels)
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


def _cut(tensors: Sequence[TensorStats]) -> list[Finding]:
    """Sums of deltas that were cut to a lower rank: nearly all tensors lack the same number of directions."""
    found = [fits.cut(t.factors, t.asked) for t in tensors if t.factors is not None]
    cuts = [cut for cut in found if cut is not None and cut.error < CUT]
    if not cuts or len(cuts) < MOST * len(found):
        return []
    (kept, whole), count = Counter((cut.kept, cut.rank) for cut in cuts).most_common(1)[0]
    if count < MOST * len(found):
        return []
    labels = list(
        dict.fromkeys(label for t in tensors for label, w in zip(t.labels, t.asked, strict=True) if w)
    )
    what = f"the sum of {' and '.join(labels)}" if len(labels) > 1 else f"the delta of {labels[0]}"
    return [
        Finding(
            "partly_applied",
            f"rank {kept} of {whole}",
            f"{what} was truncated to rank {kept}, where it has {whole}: its smallest directions are missing (as "
            "from a truncated SVD, which PEFT's combination_type='svd' does unless it is given every rank)",
        )
    ]


def _ranks(tensors: Sequence[TensorStats], labels: Sequence[str]) -> list[Finding]:
    """Adapters of which some ranks are missing: their rank-1 pieces fit to 0 and the others to what was asked."""
    gone: dict[str, list[float]] = {label: [] for label in labels}
    neither: dict[str, list[float]] = {label: [] for label in labels}
    rank: dict[str, int] = {}
    for tensor in tensors:
        factors = tensor.factors
        if factors is None:
            continue
        pieces = fits.rank_weights(factors, tensor.asked)
        for delta, span, asked in zip(factors.deltas, factors.spans, tensor.asked, strict=True):
            if asked:
                share = pieces[span] / asked
                gone[delta.label].append(float(np.mean(np.abs(share) < 0.3)))
                neither[delta.label].append(
                    float(np.mean((np.abs(share) >= 0.3) & (np.abs(share - 1) >= 0.3)))
                )
                rank[delta.label] = delta.rank
    findings = []
    for label, shares in gone.items():
        if not shares or np.median(neither[label]) > 0.25:  # noise: another delta altogether
            continue
        if 0.02 < (share := float(np.median(shares))) < 0.98:
            findings.append(
                Finding(
                    "partly_applied",
                    label,
                    f"only {round((1 - share) * rank[label])} of {rank[label]} ranks of {label} were applied",
                )
            )
    return findings
