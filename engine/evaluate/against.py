"""One model of a table against the others: which one, on which prompts, by which test, after Holm.

`tables.py` calls this. Two lines are paired where both were asked the same samples of the same data in the same words
(equal hash of the prompt as sent), under one template and decoding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.errors import BadInputError
from engine.evaluate import comparable
from engine.evaluate.series import Series, Spec
from engine.evaluate.statistics import (
    FloatArray,
    holm,
    items_needed,
    least_significant,
    mcnemar_difference,
    mcnemar_exact,
    mcnemar_needed,
    paired_bootstrap,
)
from engine.evaluate.summary import MetricRow, label_of

Identity = tuple[str, str, str]  # label, hash of the base or file, hashes of the adapters
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Group:
    """One line of the table before its numbers: a run's cells that differ only in their seed.

    asked: the hash of the prompt as sent, by sample id. cells: the hashes of its cells.
    """

    run: str
    spec: Spec
    series: tuple[Series, ...]
    seeds: int = 1
    warning: str = ""
    asked: Mapping[str, str] = field(default_factory=dict)
    cells: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return label_of(self.spec)

    @property
    def identity(self) -> Identity:
        """What the model is, so that two folders of one name are two models."""
        base = str((self.spec.get("base") or {}).get("sha256", ""))
        return self.label, base, json.dumps(self.spec.get("adapters") or {}, sort_keys=True)

    @property
    def setting(self) -> tuple[str, str]:
        return self.spec["template"], decoding_name(self.spec)


def decoding_name(spec: Spec) -> str:
    return str((spec["decoding"] or {}).get("name", ""))


def reference_of(groups: Sequence[Group], against: str = "") -> Identity | None:
    """The model the others are compared with; None when there is only one.

    Raises BadInputError when `against` is no label of these.
    """
    models = list(dict.fromkeys(group.identity for group in groups))
    if against:
        named = [model for model in models if model[0] == against]
        if not named:
            labels = dict.fromkeys(model[0] for model in models)
            raise BadInputError(f"no model here is called {against!r}", f"there are: {', '.join(labels)}")
        return named[0]
    if len(models) < 2:
        return None
    mixtures = [group for group in groups if not group.spec.get("model")]
    sft_only = [group.identity for group in mixtures if _only_sft(group.spec["weights"])]
    return (sft_only or [group.identity for group in mixtures] or models)[0]


def _only_sft(weights: Mapping[str, float]) -> bool:
    return weights.get("sft") == 1 and not any(value for label, value in weights.items() if label != "sft")


class Reference:
    """The series of the reference model, found for every other line; its own run is preferred."""

    def __init__(self, groups: Sequence[Group], identity: Identity | None) -> None:
        self.identity = identity
        self._found: dict[Key, tuple[Group, Series]] = {}
        for group in groups:
            if group.identity == identity:
                for series in group.series:
                    key = (*group.setting, series.task, series.metric)
                    self._found.setdefault((group.run, *key), (group, series))
                    self._found.setdefault(("", *key), (group, series))

    def against(self, group: Group, series: Series) -> tuple[Group, Series] | None:
        """What this series is tested against, or None: the reference itself, or other samples or words."""
        if self.identity is None or group.identity == self.identity:
            return None
        key = (*group.setting, series.task, series.metric)
        other = self._found.get((group.run, *key)) or self._found.get(("", *key))
        return other if other and comparable.same_items(group.spec, other[0].spec) else None


def compared(row: MetricRow, group: Group, series: Series, other: tuple[Group, Series]) -> MetricRow:
    """The row with the paired test, on the prompts both were asked; as it is where there are none in common."""
    reference, theirs = other
    first, second = align(series, theirs, group.asked, reference.asked)
    n, scale = len(first), series.scale
    if not n:
        return row
    versus = reference.label if reference.label != group.label else f"{reference.label} ({reference.run})"
    mine, his = (_finite(scale * _value(series, stats)) for stats in (first, second))
    row = replace(row, versus=versus, pairs=n, pair_value=mine, pair_other=his)
    if series.single and theirs.single:
        only_first = int(((first[:, 0] == 1) & (second[:, 0] == 0)).sum())
        only_second = int(((first[:, 0] == 0) & (second[:, 0] == 1)).sum())
        discordant = only_first + only_second
        gap = least_significant(discordant, n)
        low, high = mcnemar_difference(only_first, only_second, n)
        return replace(
            row, p=mcnemar_exact(only_first, only_second), discordant=discordant,
            least=None if gap is None else 100 * gap, needed=mcnemar_needed(only_first, only_second, n),
            difference=100 * (only_first - only_second) / n, difference_low=100 * low, difference_high=100 * high,
            method=f"{row.method}, McNemar ({discordant} discordant)",
        )  # fmt: skip
    found = paired_bootstrap(first, second, series.combine)
    if not math.isfinite(found.difference) or not math.isfinite(found.p):
        return replace(row, versus="", pairs=0, pair_value=None, pair_other=None)
    return replace(
        row, p=found.p, difference=_finite(scale * found.difference),
        difference_low=_finite(scale * found.low), difference_high=_finite(scale * found.high),
        needed=items_needed(found.difference, found.error, found.n), method=f"{row.method}, paired randomisation",
    )  # fmt: skip


def with_holm(rows: Sequence[MetricRow], tests: Sequence[Key]) -> list[MetricRow]:
    """Holm's correction over all tests of one metric of one task: the models and settings of a sweep.

    tests: what each row's test is of (the cells on both sides); the same test in two runs counts once.
    """
    families: dict[tuple[str, str], dict[Key, list[int]]] = {}
    for n, (row, key) in enumerate(zip(rows, tests, strict=True)):
        if row.p is not None:
            families.setdefault((row.task, row.metric), {}).setdefault(key, []).append(n)
    found = list(rows)
    for members in families.values():
        adjusted = holm([float(rows[same[0]].p or 0.0) for same in members.values()])
        for same, p in zip(members.values(), adjusted, strict=True):
            for n in same:
                found[n] = replace(found[n], p_holm=p, tests=len(members))
    return found


def align(
    first: Series,
    second: Series,
    asked_first: Mapping[str, str] | None = None,
    asked_second: Mapping[str, str] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """The statistics of the samples both have, asked in the same words, in one order."""
    mine, theirs = asked_first or {}, asked_second or {}
    place = {sample: n for n, sample in enumerate(second.ids)}
    pairs = [
        (n, place[sample])
        for n, sample in enumerate(first.ids)
        if sample in place and mine.get(sample, "") == theirs.get(sample, "")
    ]
    left, right = [n for n, _ in pairs], [n for _, n in pairs]
    empty = np.zeros((0, first.stats.shape[1]))
    return (first.stats[left], second.stats[right]) if pairs else (empty, empty)


def _value(series: Series, stats: FloatArray) -> float:
    return float(series.combine(stats.sum(0, keepdims=True))[0])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
