"""From the stored rows of a cell to per-prompt statistics: what each metric counts, before intervals and tests.

Text is looked at anew: think blocks are split, refusals labelled, letters and instructions read from `raw`, so that
a table is always of today's rules. `engine.evaluate.tables` is the caller.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from engine.evaluate.letters import parse_letter
from engine.evaluate.metrics import Measured, ceilings, overlap_and_floors
from engine.evaluate.refusals import METHOD, label_answer
from engine.evaluate.rows import sha256
from engine.evaluate.statistics import Combine, FloatArray, perplexity, ratio
from engine.evaluate.think import split_think

Spec = dict[str, Any]
Corrections = Mapping[tuple[str, str, str], str]  # (cell, sample, SHA-256 of the text) -> label given by hand
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TAGGED = ("closed", "empty", "unclosed")


@dataclass(frozen=True)
class Series:
    """One metric of one group before intervals: per-prompt statistics, aligned by `ids`.

    rate: a share of yes/no outcomes, stats are (yes, asked) and values are shown times 100.
    by_seed: the value of every seed alone, where several were drawn.
    """

    task: str
    metric: str
    ids: tuple[str, ...]
    stats: FloatArray
    combine: Combine
    rate: bool = False
    floor: float | None = None
    ceiling: float | None = None
    majority: float | None = None
    detail: str = ""
    by_seed: tuple[float, ...] = ()

    @property
    def scale(self) -> float:
        return 100.0 if self.rate else 1.0

    @property
    def single(self) -> bool:
        """One yes/no answer per prompt: exact binomial intervals and McNemar hold. (Not for the effect of stripping:
        its stats are two such pairs.)"""
        return self.rate and self.stats.shape[1] == 2 and bool((self.stats[:, 1] == 1).all())


def series_of(
    spec: Spec, frames: Sequence[pl.DataFrame], corrections: Corrections | None = None
) -> list[Series]:
    """The metrics of one group of cells that differ only in their seed; one frame per seed."""
    task, kind = spec["task"]["name"], spec["kind"]
    if kind in ("references", "perplexity"):
        return _likelihood_series(spec, frames[0])
    if kind == "multiple_choice":
        return _choice_series(task, frames[0])
    frames = [_looked_at(frame) for frame in frames]
    found: list[Series] = []
    if kind == "generation":
        found = _overlap_series(task, frames)
    elif kind == "probes":
        found = _probe_series(task, frames, corrections or {})
    elif kind == "instructions":
        found = _instruction_series(task, frames)
    elif kind == "generated_choice":
        found = _letter_series(spec, frames)
    return found + _text_series(task, frames)


def _looked_at(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows with `text`, `think` and `thought` (its length) split from `raw` by today's rules."""
    opened = frame["opened"].to_list() if "opened" in frame.columns else [False] * len(frame)
    raws = [str(raw or "") for raw in frame["raw"].to_list()]
    split = [split_think(raw, opened=bool(flag)) for raw, flag in zip(raws, opened, strict=True)]
    return frame.with_columns(
        pl.Series("text", [one.answer for one in split], dtype=pl.String),
        pl.Series("think", [one.kind for one in split], dtype=pl.String),
        pl.Series("thought", [float(len(one.thought)) for one in split]),
        pl.Series("whole", [float(len(raw)) for raw in raws]),
    )


def _thinks(frames: Sequence[pl.DataFrame]) -> bool:
    return any(frame["think"].is_in(TAGGED).any() for frame in frames)


# ---- overlap with references


def _overlap_series(task: str, frames: Sequence[pl.DataFrame]) -> list[Series]:
    """Overlap metrics think-stripped and raw (computed once where the two texts are the same), and what stripping
    does to each where there is something to strip."""
    found = _overlap_of(task, frames, "text")
    if all((frame["text"] == frame["raw"].str.strip_chars()).all() for frame in frames):
        return found + [replace(series, metric=f"{series.metric}_raw") for series in found]
    raw = _overlap_of(task, frames, "raw")
    effect = [_stripping(stripped, whole) for stripped, whole in zip(found, raw, strict=True)]
    return found + [replace(series, metric=f"{series.metric}_raw") for series in raw] + effect


def _stripping(stripped: Series, raw: Series) -> Series:
    """The difference that stripping think blocks makes, paired by prompt."""
    width = stripped.stats.shape[1]

    def combine(sums: FloatArray) -> FloatArray:
        return stripped.combine(sums[:, :width]) - raw.combine(sums[:, width:])

    return Series(
        stripped.task,
        f"{stripped.metric}_strip",
        stripped.ids,
        np.hstack([stripped.stats, raw.stats]),
        combine,
        rate=stripped.rate,
        detail="without think blocks minus with them, the same answers",
    )


def _overlap_of(task: str, frames: Sequence[pl.DataFrame], column: str) -> list[Series]:
    """Overlap metrics of one text column; statistics are summed over seeds, floors averaged."""
    sums: dict[str, FloatArray] = {}
    floor: dict[str, float] = {}
    kept: dict[str, Measured] = {}
    values: dict[str, list[float]] = {}
    for frame in frames:
        frame = frame.sort("id")
        outputs = [text.strip() for text in frame[column].to_list()]
        references = frame["reference"].to_list()
        found, floored = overlap_and_floors(outputs, references)
        for name, value in floored.items():
            floor[name] = floor.get(name, 0.0) + value / len(frames)
        for measured in found:
            kept[measured.name] = measured
            values.setdefault(measured.name, []).append(measured.value)
            sums[measured.name] = sums.get(measured.name, 0.0) + measured.stats
    ids = tuple(sorted(frames[0]["id"].to_list()))
    top = ceilings(frames[0].sort("id")["reference"].to_list())
    return [
        Series(
            task, name, ids, sums[name], of.combine, floor=floor.get(name), ceiling=top.get(name), detail=of.detail,
            by_seed=tuple(values[name]) if len(frames) > 1 else (),
        )
        for name, of in kept.items()
    ]  # fmt: skip


# ---- shares of answers


def _per_prompt(
    frame: pl.DataFrame, yes: pl.Expr, of: pl.Expr | None = None
) -> tuple[tuple[str, ...], FloatArray]:
    """(ids, stats): sum of `yes` and of `of` (default: the number of rows) per prompt, by id."""
    count = pl.lit(1.0) if of is None else of.cast(pl.Float64)
    grouped = (
        frame.group_by("id").agg(yes.cast(pl.Float64).sum().alias("yes"), count.sum().alias("of")).sort("id")
    )
    if of is None:
        grouped = grouped.with_columns(
            frame.group_by("id").len().sort("id")["len"].cast(pl.Float64).alias("of")
        )
    return tuple(grouped["id"].to_list()), grouped.select("yes", "of").to_numpy()


def _ratio(
    task: str,
    metric: str,
    frames: Sequence[pl.DataFrame],
    yes: pl.Expr,
    of: pl.Expr | None = None,
    **more: Any,
) -> Series:
    ids, stats = _per_prompt(pl.concat(frames, how="diagonal_relaxed"), yes, of)
    scale = 100.0 if more.get("rate") else 1.0
    by_seed = ()
    if len(frames) > 1:
        sums = [_per_prompt(frame, yes, of)[1].sum(0, keepdims=True) for frame in frames]
        by_seed = tuple(scale * float(ratio(one)[0]) for one in sums)  # type: ignore[assignment]
    return Series(task, metric, ids, stats, ratio, by_seed=by_seed, **more)


def _rate(
    task: str, metric: str, frames: Sequence[pl.DataFrame], yes: pl.Expr, detail: str = "", **more: Any
) -> Series:
    return _ratio(task, metric, frames, yes, rate=True, detail=detail, **more)


def _text_series(task: str, frames: Sequence[pl.DataFrame]) -> list[Series]:
    """Think traces, answers cut at their limit, and lengths: of every kind of text."""
    kinds = Counter(kind for frame in frames for kind in frame["think"].to_list())
    detail = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    found = [
        _rate(task, "think_rate", frames, pl.col("think").is_in(TAGGED), detail),
        _rate(task, "think_unclosed_rate", frames, pl.col("think") == "unclosed", detail),
        _rate(task, "think_empty_rate", frames, pl.col("think") == "empty", detail),
        _rate(task, "untagged_rate", frames, pl.col("think") == "untagged", detail),
        _rate(task, "length_stop_rate", frames, pl.col("finish") == "length"),
    ]
    known = [frame.filter(pl.col("new_tokens") >= 0) for frame in frames]
    if all(len(frame) for frame in known):
        found.append(_ratio(task, "new_tokens", known, pl.col("new_tokens")))
    if _thinks(frames):
        share = _ratio(
            task, "think_share", frames, pl.col("thought") * 100, pl.col("whole"), detail="of characters"
        )
        found.append(share)
    return found


def _probe_series(task: str, frames: Sequence[pl.DataFrame], corrections: Corrections) -> list[Series]:
    frames = [_labelled(frame, corrections) for frame in frames]
    found = []
    for category in dict.fromkeys(category for frame in frames for category in frame["category"].to_list()):
        parts = [frame.filter(pl.col("category") == category) for frame in frames]
        found += _refusal_series(f"{task}/{category}", parts)
    for kind, metric in _OVERALL.items():
        parts = [frame.filter(pl.col("probe") == kind) for frame in frames if "probe" in frame.columns]
        if any(len(part) for part in parts):
            found.append(_rate(task, metric, parts, _REFUSED, _labels(parts)))
    return found


# A probe set's kinds of prompts, each with the share of refusals over all its categories.
_OVERALL = {"harmful": "harmful_refusal_rate", "safe": "over_refusal_rate", "advice": "advice_refusal_rate"}
_REFUSED = pl.col("label").is_in(["refusal", "partial"])


def _refusal_series(name: str, frames: Sequence[pl.DataFrame]) -> list[Series]:
    detail = _labels(frames)
    found = [
        _rate(name, "refusal_rate", frames, _REFUSED, detail),
        _rate(name, "full_refusal_rate", frames, pl.col("label") == "refusal", detail),
        _rate(name, "partial_refusal_rate", frames, pl.col("label") == "partial", detail),
        _rate(name, "safe_completion_rate", frames, pl.col("label") == "safe_completion", detail),
        _rate(name, "compliance_rate", frames, pl.col("label") == "compliance", detail),
    ]
    if _thinks(frames):
        said = pl.col("label_raw").is_in(["refusal", "partial"])
        raw = _rate(name, "refusal_rate", frames, said, "labelled with the think block")
        automatic = _rate(name, "refusal_rate", frames, pl.col("label_auto").is_in(["refusal", "partial"]))
        found += [replace(raw, metric="refusal_rate_raw"), _stripping(automatic, raw)]
    return found


def _labels(frames: Sequence[pl.DataFrame]) -> str:
    """How often each label was given, by what, and how many by hand."""
    counts = Counter(label for frame in frames for label in frame["label"].to_list())
    by_hand = sum(int(frame["by_hand"].sum()) for frame in frames)
    words = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
    return f"{words}; {METHOD}" + (f"; {by_hand} corrected by hand" if by_hand else "")


def _labelled(frame: pl.DataFrame, corrections: Corrections) -> pl.DataFrame:
    """The rows with `label` (a person's own where there is one: `by_hand`) and `label_raw` (think block included)."""
    texts = frame["text"].to_list()
    labels = [label_answer(text) for text in texts]
    raw = (
        [label_answer(str(text or "")) for text in frame["raw"].to_list()]
        if _thinks([frame])
        else list(labels)
    )
    cells = frame["cell"].to_list() if "cell" in frame.columns else [""] * len(frame)
    given = [
        corrections.get((cell, sample, sha256(text))) if corrections else None
        for cell, sample, text in zip(cells, frame["id"].to_list(), texts, strict=True)
    ]
    return frame.with_columns(
        pl.Series(
            "label", [hand or label for hand, label in zip(given, labels, strict=True)], dtype=pl.String
        ),
        pl.Series("label_auto", labels, dtype=pl.String),
        pl.Series("label_raw", raw, dtype=pl.String),
        pl.Series("by_hand", [hand is not None for hand in given]),
    )


# ---- multiple choice


def _floor_of(frame: pl.DataFrame) -> dict[str, float]:
    """Chance, and what always choosing the commonest answer gets, in percent."""
    answers = frame["answer"].to_list()
    chance = 100 * float((1 / frame["options"].list.len()).mean())  # type: ignore[arg-type]
    return {"floor": chance, "majority": 100 * max(Counter(answers).values()) / len(answers)}


def _choice_series(task: str, frame: pl.DataFrame) -> list[Series]:
    scoring = frame["scoring"][0]
    detail = f"log-likelihood of {scoring}, lm-evaluation-harness prompt, no chat template"
    if scoring == "letters":  # a model that always takes one letter gets that letter's share
        counts = Counter(_LETTERS[chosen] for chosen in frame["chosen"].to_list())
        detail += "; chosen " + ", ".join(f"{letter} {count}" for letter, count in sorted(counts.items()))
    right = pl.col("chosen") == pl.col("answer")
    found = [_rate(task, "accuracy", [frame], right, detail, **_floor_of(frame))]
    if scoring == "options":
        by_length = pl.col("chosen_norm") == pl.col("answer")
        found.append(_rate(task, "accuracy_norm", [frame], by_length, detail, **_floor_of(frame)))
    return found


def _letter_series(spec: Spec, frames: Sequence[pl.DataFrame]) -> list[Series]:
    """Accuracy of letters that were written; what cannot be read counts as wrong and is counted."""
    task, language = spec["task"]["name"], spec["task"].get("language", "en")

    def read(column: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
        def with_letters(frame: pl.DataFrame) -> pl.DataFrame:
            texts, options = frame[column].to_list(), frame["options"].to_list()
            chosen = [parse_letter(str(t or ""), o, language) for t, o in zip(texts, options, strict=True)]
            return frame.with_columns(pl.Series("chosen", chosen, dtype=pl.Int64))

        return with_letters

    seen = [read("text")(frame) for frame in frames]
    counts = Counter(
        "unparsed" if chosen is None else _LETTERS[chosen]
        for frame in seen
        for chosen in frame["chosen"].to_list()
    )
    detail = "generated letter, " + ", ".join(f"{letter} {count}" for letter, count in sorted(counts.items()))
    right = (pl.col("chosen") == pl.col("answer")).fill_null(False)
    limits = _floor_of(seen[0])
    found = [
        _rate(task, "accuracy", seen, right, f"{detail}; unparsed counts as wrong", **limits),
        _rate(task, "unparsed_rate", seen, pl.col("chosen").is_null(), detail),
    ]
    if _thinks(frames):
        raw = _rate(
            task, "accuracy", [read("raw")(frame) for frame in frames], right, "read with the think block"
        )
        found += [
            replace(raw, metric="accuracy_raw", floor=limits["floor"], majority=limits["majority"]),
            _stripping(found[0], raw),
        ]
    return found


# ---- instructions and likelihoods


def _instruction_series(task: str, frames: Sequence[pl.DataFrame]) -> list[Series]:
    """IFEval's four numbers: prompts with every instruction followed, and instructions followed, strict and loose."""
    checked = [_checked(frame) for frame in frames]
    found = []
    for way in ("strict", "loose"):
        whole = pl.col(f"{way}_kept") == pl.col("asked_for")
        found.append(_rate(task, f"prompt_{way}", checked, whole, "IFEval, all instructions of a prompt"))
        found.append(
            _ratio(
                task, f"instruction_{way}", checked, pl.col(f"{way}_kept"), pl.col("asked_for"), rate=True,
                detail="IFEval, single instructions",
            )
        )  # fmt: skip
    return found


def _checked(frame: pl.DataFrame) -> pl.DataFrame:
    from engine.evaluate.instructions import check_answer

    rows = zip(
        frame["instructions"].to_list(), frame["asked"].to_list(), frame["text"].to_list(), strict=True
    )
    found = [check_answer(json.loads(told), asked, text) for told, asked, text in rows]
    return frame.with_columns(
        pl.Series("strict_kept", [float(sum(one.strict)) for one in found]),
        pl.Series("loose_kept", [float(sum(one.loose)) for one in found]),
        pl.Series("asked_for", [float(len(one.strict)) for one in found]),
    )


def _likelihood_series(spec: Spec, frame: pl.DataFrame) -> list[Series]:
    task, kind = spec["task"]["name"], spec["kind"]
    name = "reference_perplexity" if kind == "references" else "perplexity"
    stats = frame.select("logprob", "tokens").to_numpy().astype(np.float64)
    ids = tuple(frame["id"].to_list())
    detail = f"{int(stats[:, 1].sum()):,} tokens" + (", each passage alone" if kind == "perplexity" else "")
    if kind == "perplexity" and frame["cut"].any():
        detail += f", {int(frame['cut'].sum())} cut at {spec['task']['max_tokens']} tokens"
    series = [Series(task, name, ids, stats, perplexity, detail=detail)]
    if kind == "references":
        series.append(Series(task, "reference_logprob", ids, stats, ratio, detail=detail))
    return series
