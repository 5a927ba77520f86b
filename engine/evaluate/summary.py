"""The light door to results: rows of the metric table as plain values, for the app, reports and scripts.

Imports nothing heavy; `load_table` reads table.json when it still belongs to the rows, else computes from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown. better: "high", "low" or "" (neither is better in itself)."""

    label: str
    better: str
    percent: bool = False
    says: str = ""


METRICS: dict[str, MetricInfo] = {
    "bleu": MetricInfo("BLEU", "high", says="corpus BLEU-4 (sacreBLEU)"),
    "rouge1": MetricInfo("R-1", "high", says="ROUGE-1 F"),
    "rouge2": MetricInfo("R-2", "high", says="ROUGE-2 F"),
    "rougeL": MetricInfo("R-L", "high", says="ROUGE-L F"),
    "chrf": MetricInfo("chrF", "high", says="chrF2 (sacreBLEU)"),
    "lf_rouge1": MetricInfo("LF R-1", "high", says="LLaMA-Factory's ROUGE-1 (jieba, rouge_chinese)"),
    "lf_rouge2": MetricInfo("LF R-2", "high", says="LLaMA-Factory's ROUGE-2"),
    "lf_rougeL": MetricInfo("LF R-L", "high", says="LLaMA-Factory's ROUGE-L"),
    "lf_char_bleu": MetricInfo("LF char-BLEU", "high", says="LLaMA-Factory's character BLEU-4"),
    "reference_perplexity": MetricInfo("ref ppl", "low", says="perplexity of the reference answers"),
    "reference_logprob": MetricInfo("ref logprob", "high", says="nats per token of the reference answers"),
    "perplexity": MetricInfo("ppl", "low", says="perplexity of held-out text, each passage alone"),
    "accuracy": MetricInfo("accuracy", "high", True, "multiple choice"),
    "accuracy_norm": MetricInfo("acc norm", "high", True, "log-likelihood per character of the option"),
    "refusal_rate": MetricInfo("refuse", "", True, "full or partial refusals"),
    "full_refusal_rate": MetricInfo("full refusal", "", True),
    "safe_completion_rate": MetricInfo("safe completion", "", True, "turned to help for the person instead"),
    "unparsed_rate": MetricInfo("unparsed", "low", True, "answers no letter could be read from"),
    "prompt_strict": MetricInfo("prompts strict", "high", True, "prompts with every instruction followed"),
    "prompt_loose": MetricInfo(
        "prompts loose", "high", True, "the same without markdown, first or last line"
    ),
    "instruction_strict": MetricInfo("instr. strict", "high", True, "instructions followed"),
    "instruction_loose": MetricInfo("instr. loose", "high", True, "instructions followed, loosely read"),
    "partial_refusal_rate": MetricInfo("partial refusal", "", True),
    "compliance_rate": MetricInfo("comply", "", True),
    "harmful_refusal_rate": MetricInfo("refuse harmful", "high", True, "refusals of harmful requests"),
    "over_refusal_rate": MetricInfo("over-refusal", "low", True, "refusals of safe requests"),
    "advice_refusal_rate": MetricInfo("refuse advice", "", True, "refusals of requests for medical advice"),
    "untagged_rate": MetricInfo(
        "reasons untagged", "", True, "reasoning-style openings without a think block"
    ),
    "think_share": MetricInfo("think share", "", False, "percent of the characters inside think blocks"),
    "think_rate": MetricInfo("think", "", True, "answers with a think block"),
    "think_unclosed_rate": MetricInfo("think unclosed", "", True),
    "think_empty_rate": MetricInfo("think empty", "", True),
    "length_stop_rate": MetricInfo("cut", "", True, "answers cut at max_new_tokens"),
    "new_tokens": MetricInfo("tokens", "", says="mean length of an answer"),
}


@dataclass(frozen=True)
class MetricRow:
    """One number of a run, with what one must know to believe it.

    value, low, high, floor, ceiling: percents and BLEU/ROUGE from 0 to 100; perplexity as it is; low and high are the
    95% interval (None where there is none). n: samples. floor: what no skill gets (shuffled references, chance);
    ceiling: the references against themselves. majority: multiple choice, always choosing the commonest answer.
    p: paired test against the model `versus` with the same template and decoding on `pairs` common prompts (None for
    that one itself); p_holm: the same after Holm over the `tests` of this metric of this task; pair_value, pair_other:
    both models' values on those prompts; difference: the first minus the second with its 95% interval; discordant:
    yes/no pairs that differ. least: the smallest difference one test would call significant here (McNemar, percent
    points); needed: items to see the observed difference with 80% power (None: none observed, or beyond reason). kind:
    mixture, gguf or server. warning: why the row must not be compared or believed as it stands. method: the interval's
    and test's name.
    """

    run: str
    model: str
    weights: dict[str, float]
    template: str
    decoding: str
    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    floor: float | None = None
    majority: float | None = None
    p: float | None = None
    versus: str = ""
    least: float | None = None
    method: str = ""
    detail: str = ""
    ceiling: float | None = None
    p_holm: float | None = None
    tests: int = 0
    pairs: int = 0
    pair_value: float | None = None
    pair_other: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    discordant: int | None = None
    needed: int | None = None
    kind: str = "mixture"
    seeds: int = 1
    warning: str = ""

    @property
    def info(self) -> MetricInfo:
        name = self.metric.removesuffix("_raw").removesuffix("_strip")
        return METRICS.get(name, MetricInfo(name, ""))

    @property
    def at_chance(self) -> bool:
        """Multiple choice whose interval holds chance."""
        if not self.metric.startswith("accuracy") or None in (self.low, self.high, self.floor):
            return False
        return self.low <= self.floor <= self.high  # type: ignore[operator]

    @property
    def at_floor(self) -> bool:
        """At or under what unrelated answers get."""
        return self.value is not None and self.floor is not None and self.value <= self.floor

    @property
    def indistinguishable(self) -> bool:
        """The paired test cannot tell it from `versus` (p >= .05, after Holm where several were made)."""
        p = self.p if self.p_holm is None else self.p_holm
        return p is not None and p >= 0.05

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MetricRow:
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})


def model_label(weights: Mapping[str, float]) -> str:
    """`base`, `SFT` (one adapter, whole), `PT30 SFT70` (hundredths), `PT0.125 SFT0.7` where those are not whole."""
    active = {label: value for label, value in weights.items() if value != 0}
    if not active:
        return "base"
    if len(active) == 1 and next(iter(active.values())) == 1:
        return next(iter(active)).upper()
    hundredths = all(math.isclose(v * 100, round(v * 100), abs_tol=1e-9) and v > 0 for v in active.values())
    return " ".join(
        f"{label.upper()}{round(value * 100) if hundredths else f'{value:g}'}"
        for label, value in active.items()
    )


def label_of(spec: Mapping[str, Any]) -> str:
    """The name of a cell's model: a file's or server's own, a mixture's weights, or the base's without adapters."""
    model = spec.get("model")
    if model:
        return str(model["name"])
    if not spec.get("adapters") and not spec["weights"]:
        return str(spec.get("base", {}).get("name") or "base")
    return model_label(spec["weights"])


def load_table(run: Path) -> list[MetricRow]:
    """The metric rows of a run, from table.json if it is of exactly the cells done now and made by the
    rules of now, else from the rows.

    Raises BadInputError when the folder is no run.
    """
    from engine.evaluate import corrections
    from engine.evaluate.rules import rules_sha256
    from engine.evaluate.store import TABLE, RunStore

    store = RunStore(run)
    done = [cell["hash"] for cell in store.cells()["cells"] if store.is_done(cell["hash"])]
    try:
        kept = json.loads((run / TABLE).read_text(encoding="utf-8"))
        same = kept["cells"] == done and kept["version"] == TABLE_VERSION and kept["rules"] == rules_sha256()
        if same and kept.get("corrections") == corrections.stamp(run):
            return [MetricRow.from_dict({**row, "run": run.name}) for row in kept["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    from engine.evaluate.tables import compute

    return compute(run)


TABLE_VERSION = 3


@dataclass(frozen=True)
class CurvePoint:
    """One point of a sweep curve: the weight on the x axis, the value and its interval, the floor there."""

    x: float
    value: float
    low: float | None
    high: float | None
    floor: float | None
    n: int
    model: str


def sweep_curve(
    rows: Iterable[MetricRow], x: str, metric: str, task: str, template: str = "", decoding: str = ""
) -> list[CurvePoint]:
    """The points of one metric over the weight of adapter `x`, by rising weight; mixtures without a value are
    left out. template and decoding choose one setting ("" takes the first found)."""
    chosen = [row for row in rows if row.metric == metric and row.task == task and x in row.weights]
    template = template or next((row.template for row in chosen if row.template), "")
    decoding = decoding or next((row.decoding for row in chosen if row.decoding), "")
    points = [
        CurvePoint(row.weights[x], row.value, row.low, row.high, row.floor, row.n, row.model)
        for row in chosen
        if row.value is not None and row.template in ("", template) and row.decoding in ("", decoding)
    ]
    return sorted(points, key=lambda point: point.x)


def models_of(rows: Sequence[MetricRow]) -> list[str]:
    """Model labels in the order they first appear."""
    return list(dict.fromkeys(row.model for row in rows))
