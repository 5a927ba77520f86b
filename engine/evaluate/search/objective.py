"""What a search maximises, measured on the loaded model. Needs torch; only the job imports this.

    generation        sum log P(reference token | prompt, tokens before) / number of reference tokens
    perplexity        the same of the tokens of held-out texts
    multiple_choice   mean log of P(right option) / sum over options of P(option)

All in nats, of float32 log-softmax; higher is better. Prompts, tokens and batches are those of an evaluation
(engine/evaluate/execute.py), made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engine.evaluate.cells import Cell
from engine.evaluate.data import Sample
from engine.evaluate.execute import CellWork
from engine.evaluate.live import LiveModel
from engine.evaluate.search.config import SearchConfig
from engine.evaluate.search.space import TensorWeights

Row = dict[str, Any]


class Objective:
    """One half of the samples on one live model."""

    def __init__(self, live: LiveModel, config: SearchConfig, samples: Sequence[Sample]) -> None:
        task, evaluation = config.task, config.evaluation
        kind = "references" if task.kind == "generation" else task.kind
        template = evaluation.templates[0] if kind == "references" else ""
        cell = Cell(kind, task, {}, template, None, None, {"batch_size": evaluation.batch_size})
        self.live, self.samples = live, samples
        self._work = CellWork(live, cell, samples)

    def measure(self, weights: TensorWeights) -> list[Row]:
        """One row per sample in their order: id, sum, count; for multiple choice `right`, too."""
        if self.live.weights != weights:
            self.live.set_weights(weights)
        rows: dict[str, Row] = {}
        for batch in self._work.batches:
            for found in self._work.run(batch):
                rows[found["id"]] = self._row(found)
        return [rows[sample.id] for sample in self.samples]

    @staticmethod
    def _row(found: Row) -> Row:
        if "logprobs" not in found:
            return {"id": found["id"], "sum": found["logprob"], "count": found["tokens"]}
        scores, answer = found["logprobs"], found["answer"]
        top = max(scores)
        whole = top + math.log(sum(math.exp(score - top) for score in scores))
        return {
            "id": found["id"],
            "sum": scores[answer] - whole,
            "count": 1,
            "right": found["chosen"] == answer,
        }


def mean(rows: Sequence[Row]) -> float:
    """sum / count over all rows; NaN without anything counted."""
    count = sum(row["count"] for row in rows)
    return float(sum(row["sum"] for row in rows) / count) if count else math.nan
