"""Every number of a run, computed from its rows: values, intervals, floors, paired tests, Holm, items needed.

Cells of one model, template, decoding and task that differ only in their seed are one group: their rows are
summed per prompt, so that resampling prompts keeps the answers of one prompt together. Several runs make one
table; models are compared on the prompts both were asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from engine.atomic import write_json
from engine.errors import BadInputError
from engine.evaluate import comparable, corrections
from engine.evaluate.halves import halves
from engine.evaluate.series import Corrections, Series, Spec, series_of
from engine.evaluate.statistics import (
    FloatArray,
    bootstrap_interval,
    clopper_pearson,
    holm,
    items_needed,
    least_significant,
    mcnemar_difference,
    mcnemar_exact,
    mcnemar_needed,
    paired_bootstrap,
    seed_spread,
)
from engine.evaluate.store import TABLE, RunStore
from engine.evaluate.summary import TABLE_VERSION, MetricRow, label_of
from engine.jobs.events import _plain

__all__ = ["Series", "compute", "compute_all", "failures", "group_key", "series_of", "to_rows"]

HALVES = ("all", "dev", "test")


@dataclass(frozen=True)
class Group:
    """One line of the table before its numbers: a run's cells that differ only in their seed."""

    run: str
    spec: Spec
    series: tuple[Series, ...]
    seeds: int = 1
    warning: str = ""

    @property
    def label(self) -> str:
        return label_of(self.spec)

    @property
    def setting(self) -> tuple[str, str]:
        return self.spec["template"], _decoding(self.spec)


def compute(folder: Path, write: bool = False, half: str = "all", against: str = "") -> list[MetricRow]:
    """All metric rows of the cells of a run that are done; with `write` also kept as table.json."""
    rows = compute_all([folder], half, against)
    if write:
        store = RunStore(folder)
        done = [entry["hash"] for entry in store.cells()["cells"] if store.is_done(entry["hash"])]
        value = {
            "version": TABLE_VERSION,
            "cells": done,
            "corrections": corrections.stamp(folder),
            "rows": [row.to_dict() for row in rows],
        }
        write_json(folder / TABLE, _plain(value))
    return rows


def compute_all(folders: Sequence[Path], half: str = "all", against: str = "") -> list[MetricRow]:
    """The rows of several runs as one table.

    half: only samples of the dev or the test half (engine/evaluate/halves.py). against: label of the model the
    others are compared with ("" chooses: SFT alone, else the first mixture, else the first model).

    Raises BadInputError for a folder that is no run, an unknown `against`, or a half that holds nothing.
    """
    groups = [group for folder in folders for group in _groups(folder, half)]
    if half != "all" and not groups:
        raise BadInputError(f"no sample is in the {half} half")
    warned = comparable.warnings([(group.run, group.spec) for group in groups])
    groups = [
        replace(group, warning="; ".join(part for part in (group.warning, words) if part))
        for group, words in zip(groups, warned, strict=True)
    ]
    return _rows(groups, against)


def failures(folder: Path) -> dict[str, str]:
    """Cells that were given up, by what they are: why."""
    found = {}
    store = RunStore(folder)
    for entry in store.cells()["cells"]:
        if entry.get("failed") and not store.is_done(entry["hash"]):
            spec = entry["spec"]
            parts = (label_of(spec), spec["task"]["name"], spec["template"], _decoding(spec))
            found[" · ".join(part for part in parts if part)] = str(entry["failed"])
    return found


def _groups(folder: Path, half: str) -> list[Group]:
    store = RunStore(folder)
    note = store.cells()
    by_hand: Corrections = corrections.load(folder)
    doubts: Mapping[str, str] = note.get("doubts") or {}
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in note["cells"]:
        if store.is_done(entry["hash"]):
            found.setdefault(group_key(entry["spec"]), []).append(entry)
    groups = []
    for cells in found.values():
        spec = cells[0]["spec"]
        frames = [_half(store.frame(cell["hash"]), half) for cell in cells]
        if all(len(frame) for frame in frames):
            doubt = doubts.get(label_of(spec)) or ("" if spec.get("model") else doubts.get("", ""))
            series = tuple(series_of(spec, frames, by_hand))
            groups.append(Group(folder.name, spec, series, len(cells), doubt))
    return groups


def _half(frame: pl.DataFrame, half: str) -> pl.DataFrame:
    if half == "all":
        return frame
    dev, test = halves(frame["id"].to_list())
    return frame.filter(pl.col("id").is_in(list(dev if half == "dev" else test)))


def group_key(spec: Spec) -> tuple[str, ...]:
    """What cells must share to be one row of the table: everything but the seed."""
    return (
        str(spec.get("model") or spec["weights"]),
        spec["task"]["name"],
        spec["kind"],
        spec["template"],
        _decoding(spec),
    )


def to_rows(run: str, groups: Iterable[tuple[Spec, Sequence[Series]]]) -> list[MetricRow]:
    """The rows of the groups of one run."""
    return _rows([Group(run, spec, tuple(series)) for spec, series in groups], "")


def _rows(groups: Sequence[Group], against: str) -> list[MetricRow]:
    """Intervals for every series, and the paired test against the reference model where there is one."""
    reference = reference_of(groups, against)
    others: dict[tuple[Any, ...], tuple[Group, Series]] = {}
    for group in groups:
        if reference is not None and group.label == reference:
            for series in group.series:
                others.setdefault((group.run, *group.setting, series.task, series.metric), (group, series))
                others.setdefault(("", *group.setting, series.task, series.metric), (group, series))
    rows = []
    for group in groups:
        for series in group.series:
            key = (*group.setting, series.task, series.metric)
            other = others.get((group.run, *key)) or others.get(("", *key))
            tested = (
                other is not None
                and group.label != reference
                and comparable.same_items(group.spec, other[0].spec)
            )
            rows.append(_row(group, series, other[1] if tested and other else None, reference or ""))
    return _with_holm(rows)


def reference_of(groups: Sequence[Group], against: str = "") -> str | None:
    """The label the others are compared with; None when there is only one model.

    Raises BadInputError when `against` is no model of these.
    """
    labels = list(dict.fromkeys(group.label for group in groups))
    if against:
        if against not in labels:
            raise BadInputError(f"no model here is called {against!r}", f"there are: {', '.join(labels)}")
        return against
    if len(labels) < 2:
        return None
    mixtures = [group for group in groups if not group.spec.get("model")]
    sft_only = [group.label for group in mixtures if _only_sft(group.spec["weights"])]
    return (sft_only or [group.label for group in mixtures] or labels)[0]


def _only_sft(weights: Mapping[str, float]) -> bool:
    return weights.get("sft") == 1 and not any(value for label, value in weights.items() if label != "sft")


def _decoding(spec: Spec) -> str:
    return (spec["decoding"] or {}).get("name", "")


def _row(group: Group, series: Series, other: Series | None, versus: str) -> MetricRow:
    n, scale, spec = len(series.stats), series.scale, group.spec
    value = float(series.combine(series.stats.sum(0, keepdims=True))[0])
    if series.single:
        low, high = clopper_pearson(int(series.stats[:, 0].sum()), n)
        method = "Clopper-Pearson"
    else:
        low, high = bootstrap_interval(series.stats, series.combine)
        method = "bootstrap over prompts"
    detail = series.detail
    if series.by_seed:
        mean, spread, seeds = seed_spread(series.by_seed)
        said = f"{seeds} seeds, mean {mean:.2f}, sd {spread:.2f}"
        detail = f"{detail}; {said}" if detail else said
    row = MetricRow(
        run=group.run, model=group.label, weights=spec["weights"], template=spec["template"],
        decoding=_decoding(spec), task=series.task, metric=series.metric, value=_finite(value * scale),
        low=_finite(low * scale), high=_finite(high * scale), n=n, floor=series.floor, ceiling=series.ceiling,
        majority=series.majority, method=method, detail=detail, kind=(spec.get("model") or {}).get("kind", "mixture"),
        seeds=group.seeds, warning=group.warning,
    )  # fmt: skip
    return row if other is None else _compared(row, series, other, versus)


def _compared(row: MetricRow, series: Series, other: Series, versus: str) -> MetricRow:
    """The row with the paired test against another model's series, on the prompts both have."""
    first, second = align(series, other)
    n, scale = len(first), series.scale
    if not n:
        return row
    if series.single and other.single:
        only_first = int(((first[:, 0] == 1) & (second[:, 0] == 0)).sum())
        only_second = int(((first[:, 0] == 0) & (second[:, 0] == 1)).sum())
        discordant = only_first + only_second
        gap = least_significant(discordant, n)
        low, high = mcnemar_difference(only_first, only_second, n)
        return replace(
            row, p=mcnemar_exact(only_first, only_second), versus=versus, discordant=discordant, pairs=n,
            least=None if gap is None else 100 * gap, needed=mcnemar_needed(only_first, only_second, n),
            difference=100 * (only_first - only_second) / n, difference_low=100 * low, difference_high=100 * high,
            method=f"{row.method}, McNemar ({discordant} discordant)",
        )  # fmt: skip
    found = paired_bootstrap(first, second, series.combine)
    return replace(
        row, p=found.p, versus=versus, pairs=n, difference=_finite(scale * found.difference),
        difference_low=_finite(scale * found.low), difference_high=_finite(scale * found.high),
        needed=items_needed(found.difference, found.error, found.n), method=f"{row.method}, paired bootstrap",
    )  # fmt: skip


def _with_holm(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """Holm's correction over all tests of one metric of one task: the models and settings of a sweep."""
    families: dict[tuple[str, str], list[int]] = {}
    for n, row in enumerate(rows):
        if row.p is not None:
            families.setdefault((row.task, row.metric), []).append(n)
    found = list(rows)
    for members in families.values():
        adjusted = holm([float(rows[n].p or 0.0) for n in members])
        for n, p in zip(members, adjusted, strict=True):
            found[n] = replace(found[n], p_holm=p, tests=len(members))
    return found


def align(first: Series, second: Series) -> tuple[FloatArray, FloatArray]:
    """The statistics of the prompts both have, in one order."""
    place = {sample: n for n, sample in enumerate(second.ids)}
    pairs = [(n, place[sample]) for n, sample in enumerate(first.ids) if sample in place]
    left, right = [n for n, _ in pairs], [n for _, n in pairs]
    empty = np.zeros((0, first.stats.shape[1]))
    return (first.stats[left], second.stats[right]) if pairs else (empty, empty)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
