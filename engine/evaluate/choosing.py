"""Choose a model on the dev half, report it on the test half: the number shown was not picked for being high.

Used by `medmerge report --choose TASK:METRIC`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BadInputError
from engine.evaluate.summary import MetricRow
from engine.evaluate.tables import compute_all


@dataclass(frozen=True)
class Chosen:
    """dev: the winner's row on the dev half; test: its row on the test half; rows: the whole test table, compared
    with `against`. optimism: dev value minus test value (how much choosing flattered it)."""

    dev: MetricRow
    test: MetricRow
    candidates: int
    rows: list[MetricRow]

    @property
    def optimism(self) -> float:
        return float(self.dev.value or 0) - float(self.test.value or 0)


def choose(folders: Sequence[Path], task: str, metric: str, against: str = "") -> Chosen:
    """The best model and setting of `metric` on `task` by the dev half, and the table of the test half.

    Raises BadInputError: the metric is not there, or has no better end (rates such as think_rate), or a half holds
    nothing. Of equals the first of the table is taken.
    """
    dev = [row for row in compute_all(folders, "dev", against) if (row.task, row.metric) == (task, metric)]
    if not dev:
        there = sorted({f"{row.task}:{row.metric}" for row in compute_all(folders) if row.info.better})
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
        raise BadInputError(f"the test half of {task} holds nothing", "it has too few samples to be halved")
    return Chosen(best, test, len(measured), rows)
