"""Every number of a run, computed from its rows: values, intervals, floors, paired tests, Holm, items needed.

Cells of one model, template, decoding and task that differ only in their seed are one group: their rows are
summed per prompt, so that resampling prompts keeps the answers of one prompt together. Several runs make one
table; models are compared on the prompts both were asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from engine.atomic import write_json
from engine.errors import BadInputError
from engine.evaluate import comparable, corrections
from engine.evaluate.against import Group, Reference, compared, decoding_name, reference_of, with_holm
from engine.evaluate.halves import halves
from engine.evaluate.rules import rules_sha256
from engine.evaluate.series import Corrections, Series, Spec, series_of
from engine.evaluate.statistics import bootstrap_interval, clopper_pearson, seed_spread
from engine.evaluate.store import TABLE, RunStore
from engine.evaluate.summary import TABLE_VERSION, MetricRow, label_of
from engine.jobs.events import _plain

__all__ = ["Group", "compute", "compute_all", "failures", "group_key", "reference_of", "series_of", "to_rows"]

HALVES = ("all", "dev", "test")


def compute(folder: Path, write: bool = False, half: str = "all", against: str = "") -> list[MetricRow]:
    """All metric rows of the cells of a run that are done; with `write` also kept as table.json."""
    rows = compute_all([folder], half, against)
    if write:
        store = RunStore(folder)
        done = [entry["hash"] for entry in store.cells()["cells"] if store.is_done(entry["hash"])]
        value = {
            "version": TABLE_VERSION,
            "rules": rules_sha256(),
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
            parts = (label_of(spec), spec["task"]["name"], spec["template"], decoding_name(spec))
            found[" · ".join(part for part in parts if part)] = str(entry["failed"])
    return found


def _groups(folder: Path, half: str) -> list[Group]:
    store = RunStore(folder)
    note = store.cells()
    by_hand: Corrections = corrections.load(folder)
    doubts: Mapping[str, str] = note.get("doubts") or {}
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in note["cells"]:
        found.setdefault(group_key(entry["spec"]), []).append(entry)
    groups = []
    for planned in found.values():
        cells = [cell for cell in planned if store.is_done(cell["hash"])]
        frames = [_half(store.frame(cell["hash"]), half) for cell in cells]
        if not frames or not all(len(frame) for frame in frames):
            continue
        spec = cells[0]["spec"]
        doubt = doubts.get(label_of(spec)) or ("" if spec.get("model") else doubts.get("", ""))
        missing = f"{len(cells)} of {len(planned)} seeds" if len(cells) < len(planned) else ""
        warning = "; ".join(part for part in (doubt, missing) if part)
        asked = dict(zip(frames[0]["id"].to_list(), frames[0]["prompt_sha256"].to_list(), strict=True))
        hashes = tuple(cell["hash"] for cell in cells)
        series = tuple(series_of(spec, frames, by_hand))
        groups.append(Group(folder.name, spec, series, len(cells), warning, asked, hashes))
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
        decoding_name(spec),
    )


def to_rows(run: str, groups: Iterable[tuple[Spec, Sequence[Series]]]) -> list[MetricRow]:
    """The rows of the groups of one run."""
    return _rows([Group(run, spec, tuple(series)) for spec, series in groups], "")


def _rows(groups: Sequence[Group], against: str) -> list[MetricRow]:
    """Intervals for every series, and the paired test against the reference model where there is one."""
    reference = Reference(groups, reference_of(groups, against))
    rows, tests = [], []
    for group in groups:
        for series in group.series:
            row, other = _row(group, series), reference.against(group, series)
            rows.append(row if other is None else compared(row, group, series, other))
            tests.append(
                (group.cells or group.run, other[0].cells if other else (), series.task, series.metric)
            )
    return with_holm(rows, tests)


def _row(group: Group, series: Series) -> MetricRow:
    n, scale, spec = len(series.stats), series.scale, group.spec
    value = float(series.combine(series.stats.sum(0, keepdims=True))[0])
    if series.single:
        low, high = clopper_pearson(int(series.stats[:, 0].sum()), n)
        method = "Clopper-Pearson"
    elif series.rate and value in (0.0, 1.0):  # no prompt differs from another: resampling them says nothing
        low, high = clopper_pearson(n if value else 0, n)
        method = "Clopper-Pearson over prompts"
    else:
        low, high = bootstrap_interval(series.stats, series.combine)
        method = "bootstrap over prompts"
    detail = series.detail
    if series.by_seed:
        mean, spread, seeds = seed_spread(series.by_seed)
        said = f"{seeds} seeds, mean {mean:.2f}, sd {spread:.2f}"
        detail = f"{detail}; {said}" if detail else said
    return MetricRow(
        run=group.run, model=group.label, weights=spec["weights"], template=spec["template"],
        decoding=decoding_name(spec), task=series.task, metric=series.metric, value=_finite(value * scale),
        low=_finite(low * scale), high=_finite(high * scale), n=n, floor=series.floor, ceiling=series.ceiling,
        majority=series.majority, method=method, detail=detail, kind=(spec.get("model") or {}).get("kind", "mixture"),
        seeds=group.seeds, warning=group.warning,
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
