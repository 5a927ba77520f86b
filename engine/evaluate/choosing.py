"""Choose a model on the dev half, report it on the test half: the number shown was not picked for being high.

Used by `medmerge report --choose TASK:METRIC`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from engine.evaluate.store import RunStore
from engine.evaluate.summary import MetricRow
from engine.evaluate.tables import compute_all


@dataclass(frozen=True)
class Chosen:
    """dev: the winner's row on the dev half; test: its row on the test half; rows: the whole test table, compared
    with `against`. candidates were measured in so many runs; unlike: how they differ beside model and setting
    ("": in nothing). optimism: dev value minus test value (how much choosing flattered it)."""

    dev: MetricRow
    test: MetricRow
    candidates: int
    rows: list[MetricRow]
    runs: int = 1
    unlike: str = ""

    @property
    def optimism(self) -> float:
        return float(self.dev.value or 0) - float(self.test.value or 0)


def choose(folders: Sequence[Path], task: str, metric: str, against: str = "") -> Chosen:
    """The best model and setting of `metric` on `task` by the dev half, and the table of the test half.

    Raises BadInputError: nothing is measured, the metric is not there, or has no better end (rates such as
    think_rate), or a half holds nothing. Of equals the first of the table is taken.
    """
    must_hold_something(folders)
    _check_halves(folders, task)
    dev = [row for row in compute_all(folders, "dev", against) if (row.task, row.metric) == (task, metric)]
    if not dev:
        there = sorted({f"{row.task}:{row.metric}" for row in compute_all(folders) if row.info.better})
        if f"{task}:{metric}" in there:
            raise BadInputError(
                f"the dev half of {task} holds nothing", "it has too few samples to be halved"
            )
        raise BadInputError(f"no {task}:{metric} in these runs", f"there are: {', '.join(there)}")
    better = dev[0].info.better
    if not better:
        raise BadInputError(
            f"neither more nor less of {metric} is better in itself", "choose by another metric"
        )
    sign = 1 if better == "high" else -1
    measured = [row for row in dev if row.value is not None]
    if not measured:
        raise BadInputError(f"{task}:{metric} has no value on the dev half")
    best = max(measured, key=lambda row: sign * float(row.value or 0))
    rows = compute_all(folders, "test", against)

    def same(row: MetricRow) -> tuple[str, ...]:
        return row.run, row.model, row.template, row.decoding, row.task, row.metric

    test = next((row for row in rows if same(row) == same(best)), None)
    if test is None:
        if any((row.task, row.metric) == (task, metric) for row in rows):
            raise BadInputError(
                f"{best.model} of {best.run} is the best of the dev half of {task}, and its test half was not measured",
                "measure the same models on both halves",
            )
        raise BadInputError(f"the test half of {task} holds nothing", "it has too few samples to be halved")
    return Chosen(best, test, len(measured), rows, len({row.run for row in measured}), _unlike(measured))


def must_hold_something(folders: Sequence[Path]) -> None:
    """Raises BadInputError when no cell of these runs is done."""
    if not any(_specs(folder) for folder in folders):
        names = ", ".join(folder.name for folder in folders)
        raise BadInputError(
            f"nothing is measured yet in {names}",
            "medmerge eval or sweep with --out RUN --resume goes on with it",
        )


def _specs(folder: Path) -> list[Mapping[str, Any]]:
    """What the cells are that are done."""
    store = RunStore(folder)
    return [entry["spec"] for entry in store.cells()["cells"] if store.is_done(entry["hash"])]


def _check_halves(folders: Sequence[Path], task: str) -> None:
    """Raises BadInputError when the config took one half of the task's samples everywhere: there is no other."""
    halves = set()
    for spec in (spec for folder in folders for spec in _specs(folder)):
        name = str(spec["task"]["name"])
        if task == name or task.startswith(f"{name}/"):  # a category of a probe set
            halves.add(spec["task"].get("half") or "all")
    if len(halves) == 1 and halves != {"all"}:
        raise BadInputError(
            f"task {task} was measured on its {halves.pop()} half only, and choosing needs both",
            "measure it with half: all, or add a run of the other half",
        )


def _unlike(candidates: Sequence[MetricRow]) -> str:
    """In what candidates differ that should be the same for all: numbers of samples, and what warnings say."""
    counts = sorted({row.n for row in candidates})
    said = [f"n from {counts[0]} to {counts[-1]} on the dev half"] if len(counts) > 1 else []
    if len({row.warning for row in candidates}) > 1:
        for row in candidates:
            where = f"{row.model} of {row.run}" if row.run != candidates[0].run else row.model
            said += [f"{where}: {row.warning}"] if row.warning else []
    return "; ".join(dict.fromkeys(said))
