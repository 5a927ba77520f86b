"""Every number of a run, computed from its rows: values, intervals, floors, paired tests.

Cells of one mixture, template, decoding and task that differ only in their seed are one group: their rows are
summed per prompt, so that resampling prompts keeps the answers of one prompt together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from engine.atomic import write_json
from engine.evaluate.metrics import Measured, floors, overlap
from engine.evaluate.refusals import label_answer
from engine.evaluate.statistics import (
    Combine,
    FloatArray,
    bootstrap_interval,
    clopper_pearson,
    least_significant,
    mcnemar_exact,
    paired_bootstrap,
    perplexity,
    ratio,
)
from engine.evaluate.store import TABLE, RunStore
from engine.evaluate.summary import TABLE_VERSION, MetricRow, model_label
from engine.jobs.events import _plain

Spec = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One metric of one group before intervals: per-prompt statistics, aligned by `ids`.

    rate: a share of yes/no outcomes, stats are (yes, asked) and values are shown times 100.
    """

    task: str
    metric: str
    ids: tuple[str, ...]
    stats: FloatArray
    combine: Combine
    rate: bool = False
    floor: float | None = None
    majority: float | None = None
    detail: str = ""

    @property
    def scale(self) -> float:
        return 100.0 if self.rate else 1.0

    @property
    def single(self) -> bool:
        """One yes/no answer per prompt: exact binomial intervals and McNemar hold."""
        return self.rate and bool((self.stats[:, 1] == 1).all())


def compute(folder: Path, write: bool = False) -> list[MetricRow]:
    """All metric rows of the cells that are done, mixture by mixture; with `write` also kept as table.json."""
    store = RunStore(folder)
    entries = [entry for entry in store.cells()["cells"] if store.is_done(entry["hash"])]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(group_key(entry["spec"]), []).append(entry)
    by_group = [
        (cells[0]["spec"], series_of(cells[0]["spec"], [store.frame(cell["hash"]) for cell in cells]))
        for cells in groups.values()
    ]
    rows = to_rows(folder.name, by_group)
    if write:
        value = {
            "version": TABLE_VERSION,
            "cells": [e["hash"] for e in entries],
            "rows": [r.to_dict() for r in rows],
        }
        write_json(folder / TABLE, _plain(value))
    return rows


def group_key(spec: Spec) -> tuple[str, ...]:
    """What cells must share to be one row of the table: everything but the seed."""
    decoding = spec["decoding"] or {}
    return (
        str(spec["weights"]),
        spec["task"]["name"],
        spec["kind"],
        spec["template"],
        decoding.get("name", ""),
    )


def series_of(spec: Spec, frames: Sequence[pl.DataFrame]) -> list[Series]:
    """The metrics of one group; one frame per seed."""
    task, kind = spec["task"]["name"], spec["kind"]
    if kind == "generation":
        return [
            *_overlap_series(task, frames),
            *_text_series(task, pl.concat(frames, how="diagonal_relaxed")),
        ]
    if kind == "probes":
        return _probe_series(task, pl.concat(frames, how="diagonal_relaxed"))
    frame = frames[0]
    if kind == "multiple_choice":
        return _choice_series(task, frame)
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


def _overlap_series(task: str, frames: Sequence[pl.DataFrame]) -> list[Series]:
    """Overlap metrics think-stripped and raw (computed once where the two texts are the same)."""
    found = _overlap_of(task, frames, "text")
    if all((frame["text"] == frame["raw"].str.strip_chars()).all() for frame in frames):
        raw = found
    else:
        raw = _overlap_of(task, frames, "raw")
    return found + [replace(series, metric=f"{series.metric}_raw") for series in raw]


def _overlap_of(task: str, frames: Sequence[pl.DataFrame], column: str) -> list[Series]:
    """Overlap metrics of one text column; statistics are summed over seeds, floors averaged."""
    sums: dict[str, FloatArray] = {}
    floor: dict[str, float] = {}
    kept: dict[str, Measured] = {}
    for frame in frames:
        frame = frame.sort("id")
        outputs = [text.strip() for text in frame[column].to_list()]
        references = frame["reference"].to_list()
        for name, value in floors(outputs, references).items():
            floor[name] = floor.get(name, 0.0) + value / len(frames)
        for measured in overlap(outputs, references):
            kept[measured.name] = measured
            sums[measured.name] = sums.get(measured.name, 0.0) + measured.stats
    ids = tuple(sorted(frames[0]["id"].to_list()))
    return [
        Series(task, name, ids, sums[name], of.combine, floor=floor.get(name), detail=of.detail)
        for name, of in kept.items()
    ]


def _per_prompt(frame: pl.DataFrame, value: pl.Expr) -> tuple[tuple[str, ...], FloatArray]:
    """(ids, stats): sum of `value` and number of rows per prompt, by id."""
    grouped = (
        frame.group_by("id").agg(value.cast(pl.Float64).sum().alias("yes"), pl.len().alias("of")).sort("id")
    )
    stats = grouped.select(pl.col("yes"), pl.col("of").cast(pl.Float64)).to_numpy()
    return tuple(grouped["id"].to_list()), stats


def _rate(task: str, metric: str, frame: pl.DataFrame, yes: pl.Expr, detail: str = "", **more: Any) -> Series:
    ids, stats = _per_prompt(frame, yes)
    return Series(task, metric, ids, stats, ratio, rate=True, detail=detail, **more)


def _text_series(task: str, frame: pl.DataFrame) -> list[Series]:
    ids, lengths = _per_prompt(frame, pl.col("new_tokens"))
    return [
        _rate(task, "think_rate", frame, pl.col("think") != "none"),
        _rate(task, "think_unclosed_rate", frame, pl.col("think") == "unclosed"),
        _rate(task, "think_empty_rate", frame, pl.col("think") == "empty"),
        _rate(task, "length_stop_rate", frame, pl.col("finish") == "length"),
        Series(task, "new_tokens", ids, lengths, ratio),
    ]


def _probe_series(task: str, frame: pl.DataFrame) -> list[Series]:
    labels = pl.Series("label", [label_answer(text) for text in frame["text"].to_list()], dtype=pl.String)
    frame = frame.with_columns(labels)
    found = []
    for category in dict.fromkeys(frame["category"].to_list()):
        part = frame.filter(pl.col("category") == category)
        counts = Counter(part["label"].to_list())
        detail = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
        name = f"{task}/{category}"
        found += [
            _rate(name, "refusal_rate", part, pl.col("label").is_in(["refusal", "partial"]), detail),
            _rate(name, "full_refusal_rate", part, pl.col("label") == "refusal", detail),
            _rate(name, "safe_completion_rate", part, pl.col("label") == "safe_completion", detail),
        ]
    return found + _text_series(task, frame)


def _choice_series(task: str, frame: pl.DataFrame) -> list[Series]:
    answers = frame["answer"].to_list()
    options = frame["options"].list.len()
    chance = 100 * float((1 / options).mean())  # type: ignore[arg-type]
    majority = 100 * max(Counter(answers).values()) / len(answers)
    scoring = frame["scoring"][0]
    detail = f"log-likelihood of {scoring}, lm-evaluation-harness prompt, no chat template"
    found = [
        _rate(
            task,
            "accuracy",
            frame,
            pl.col("chosen") == pl.col("answer"),
            detail,
            floor=chance,
            majority=majority,
        )
    ]
    if scoring == "options":
        right = pl.col("chosen_norm") == pl.col("answer")
        found.append(_rate(task, "accuracy_norm", frame, right, detail, floor=chance, majority=majority))
    return found


def to_rows(run: str, groups: Iterable[tuple[Spec, list[Series]]]) -> list[MetricRow]:
    """Intervals for every series, and the paired test against the reference mixture where there is one."""
    groups = list(groups)
    reference = reference_mixture([spec["weights"] for spec, _ in groups])
    others = {
        (spec["template"], _decoding(spec), series.task, series.metric): series
        for spec, all_series in groups
        for series in all_series
        if spec["weights"] == reference
    }
    rows = []
    for spec, all_series in groups:
        for series in all_series:
            other = others.get((spec["template"], _decoding(spec), series.task, series.metric))
            tested = None if spec["weights"] == reference else other
            rows.append(_row(run, spec, series, tested, model_label(reference or {})))
    return rows


def reference_mixture(mixtures: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """What the others are compared with: SFT alone (weight 1), else the first mixture; None for a single one."""
    if len({str(mixture) for mixture in mixtures}) < 2:
        return None
    sft_only = [m for m in mixtures if m.get("sft") == 1 and not any(v for k, v in m.items() if k != "sft")]
    return (sft_only or list(mixtures))[0]


def _decoding(spec: Spec) -> str:
    return (spec["decoding"] or {}).get("name", "")


def _row(run: str, spec: Spec, series: Series, other: Series | None, versus: str) -> MetricRow:
    n = len(series.stats)
    value = float(series.combine(series.stats.sum(0, keepdims=True))[0])
    if series.single:
        low, high = clopper_pearson(int(series.stats[:, 0].sum()), n)
        method = "Clopper-Pearson"
    else:
        low, high = bootstrap_interval(series.stats, series.combine)
        method = "bootstrap over prompts"
    p, least = None, None
    if other is not None:
        first, second = align(series, other)
        if series.single and other.single:
            only_first = int(((first[:, 0] == 1) & (second[:, 0] == 0)).sum())
            only_second = int(((first[:, 0] == 0) & (second[:, 0] == 1)).sum())
            p = mcnemar_exact(only_first, only_second)
            gap = least_significant(only_first + only_second, len(first))
            least = None if gap is None else 100 * gap
            method += f", McNemar ({only_first + only_second} discordant)"
        elif len(first):
            p = paired_bootstrap(first, second, series.combine).p
            method += ", paired bootstrap"
    scale = series.scale
    return MetricRow(
        run=run,
        model=model_label(spec["weights"]),
        weights=spec["weights"],
        template=spec["template"],
        decoding=_decoding(spec),
        task=series.task,
        metric=series.metric,
        value=_finite(value * scale),
        low=_finite(low * scale),
        high=_finite(high * scale),
        n=n,
        floor=series.floor,
        majority=series.majority,
        p=p,
        versus=versus if p is not None else "",
        least=least,
        method=method,
        detail=series.detail,
    )


def align(first: Series, second: Series) -> tuple[FloatArray, FloatArray]:
    """The statistics of the prompts both have, in one order."""
    place = {sample: n for n, sample in enumerate(second.ids)}
    pairs = [(n, place[sample]) for n, sample in enumerate(first.ids) if sample in place]
    left, right = [n for n, _ in pairs], [n for _, n in pairs]
    return first.stats[left], second.stats[right]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
