"""How evaluation rows become a table and curves: which columns, in which words. Pure functions on MetricRow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from textual.content import Content

from tui.safe_text import plain

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow
    from tui.widgets.plot import Series

View = Literal["metrics", "refusals", "everything"]

# What the first view shows, in this order; refusals have a view of their own.
MAIN = ("bleu", "rougeL", "perplexity", "reference_perplexity", "accuracy", "think_rate")
REFUSALS = ("refusal_rate", "safe_completion_rate")
FEW = 30  # up to so many samples a rate is shown as k/n


def rows_of(told: Sequence[Mapping[str, Any]]) -> tuple[MetricRow, ...]:
    """The table as a running job tells it, row by row: a later row replaces an earlier one of the same number."""
    from engine.evaluate.summary import MetricRow

    found: dict[tuple[str, ...], MetricRow] = {}
    for raw in told:
        try:
            row = MetricRow.from_dict(raw)
        except TypeError:
            continue  # a row of another kind
        found[(row.model, row.template, row.decoding, row.task, row.metric)] = row
    return tuple(found.values())


@dataclass(frozen=True)
class Column:
    """One metric of one task. `title` names the metric and what no skill gets."""

    task: str
    metric: str
    title: str

    @property
    def key(self) -> str:
        return f"{self.task}|{self.metric}"


@dataclass
class Group:
    """One line of the table: a mixture under one template and decoding."""

    model: str
    template: str
    decoding: str
    rows: dict[tuple[str, str], MetricRow] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.model}|{self.template}|{self.decoding}"


def columns_of(rows: Sequence[MetricRow], view: View) -> tuple[Column, ...]:
    """The columns of a view in a fixed order, so that they stay where they are while rows come in."""
    found: dict[tuple[str, str], MetricRow] = {}
    for row in rows:
        found.setdefault((row.task, row.metric), row)
    wanted = {"metrics": MAIN, "refusals": REFUSALS}.get(view)
    keys = list(found)
    if wanted is not None:
        keys = [key for key in keys if key[1] in wanted]
        keys.sort(key=lambda key: wanted.index(key[1]))
        if view == "metrics":
            keys = [key for key in keys if not (key[1] == "think_rate" and "/" in key[0])]
    return tuple(Column(task, metric, _title(found[(task, metric)])) for task, metric in keys)


def _title(row: MetricRow) -> str:
    label = row.info.label + (" raw" if row.metric.endswith("_raw") else "")
    if row.metric.startswith("accuracy") and row.floor is not None:
        return f"{label} (chance {row.floor:.0f})"
    if row.floor is not None:
        return f"{label} (floor)"
    return label


def groups_of(rows: Sequence[MetricRow]) -> list[Group]:
    """The lines of the table, by rising PT weight; rows without a setting (likelihoods) join every line of
    their mixture."""
    settings: dict[str, list[tuple[str, str]]] = {}
    weights: dict[str, dict[str, float]] = {}
    for row in rows:
        weights.setdefault(row.model, dict(row.weights))
        pair = (row.template, row.decoding)
        if row.decoding and pair not in settings.setdefault(row.model, []):
            settings[row.model].append(pair)
    groups = []
    for model in sorted(
        weights, key=lambda name: (weights[name].get("pt", 0.0), weights[name].get("sft", 0.0))
    ):
        for template, decoding in settings.get(model) or [("", "")]:
            group = Group(model, template, decoding)
            for row in rows:
                if row.model == model and row.template in ("", template) and row.decoding in ("", decoding):
                    group.rows[(row.task, row.metric)] = row
            groups.append(group)
    return groups


def number(row: MetricRow, value: float) -> str:
    """A value in the digits its metric deserves."""
    if row.metric.endswith("perplexity"):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    if row.metric == "reference_logprob":
        return f"{value:.3f}"
    return f"{value:.1f}"


def cell_text(row: MetricRow | None) -> str:
    """`14.4 [12.1 16.9] (4.7)`, with `≈` not distinguishable, `!` at its floor; a rate of few samples as k/n."""
    if row is None:
        return "·"
    if row.value is None:
        return "–"
    if row.info.percent and row.n <= FEW and not row.metric.startswith("accuracy"):
        return f"{round(row.value * row.n / 100)}/{row.n}" + (" ≈" if row.indistinguishable else "  ")
    text = number(row, row.value)
    if row.low is not None and row.high is not None:
        text += f" [{number(row, row.low)} {number(row, row.high)}]"
    if row.floor is not None and not row.metric.startswith("accuracy"):
        text += f" ({number(row, row.floor)})"
    mark = "!" if row.at_floor or row.at_chance else "≈" if row.indistinguishable else " "
    return f"{text} {mark}"


def cell_words(row: MetricRow) -> Content:
    """One number in a sentence: value, interval, n, floor, test."""
    info = row.info
    if row.value is None:
        return Content.styled(f"{info.label}: not measured", "$faint")
    parts = [f"{info.label} {number(row, row.value)}{'%' if info.percent else ''}"]
    if row.low is not None and row.high is not None:
        parts.append(f"95% interval {number(row, row.low)} to {number(row, row.high)}")
    parts.append(f"n {row.n:,}")
    if row.floor is not None:
        what = "chance" if row.metric.startswith("accuracy") else "floor (shuffled references)"
        parts.append(f"{what} {number(row, row.floor)}")
    if row.majority is not None:
        parts.append(f"majority class {number(row, row.majority)}")
    if row.at_chance:
        parts.append("at chance")
    elif row.at_floor:
        parts.append("at or under its floor")
    line = Content.assemble((plain(f"{row.model}  "), "bold"), plain(" · ".join(parts)))
    second = [info.says] if info.says else []
    if row.p is not None:
        told = "not distinguishable from" if row.indistinguishable else "differs from"
        least = f"; {row.least:.1f} points would be significant" if row.least is not None else ""
        second.append(f"{told} {row.versus} (p = {row.p:.2g}{least})")
    second += [words for words in (row.method, row.detail) if words]
    return line + Content.styled("\n" + plain(" · ".join(second)), "$faint")


def curves_of(rows: Sequence[MetricRow]) -> dict[str, tuple[str, tuple[Series, ...]]]:
    """The sweep plots: overlap (BLEU with its floor) and perplexity of text, over the PT weight.

    Empty with fewer than two mixtures that differ in it.
    """
    if len({row.weights.get("pt") for row in rows if "pt" in row.weights}) < 2:
        return {}
    from engine.evaluate.summary import sweep_curve
    from tui.widgets.plot import Series

    curves: dict[str, tuple[str, tuple[Series, ...]]] = {}
    tasks = {row.metric: row.task for row in reversed(rows) if row.value is not None}
    if "bleu" in tasks:
        points = sweep_curve(rows, "pt", "bleu", tasks["bleu"])
        floor = tuple((point.x, point.floor) for point in points if point.floor is not None)
        value = tuple((point.x, point.value) for point in points)
        curves["overlap"] = (
            f"BLEU on {plain(tasks['bleu'])}",
            (Series("BLEU", value, "sft", marker="●"), Series("floor", floor, "faint")),
        )
    if "perplexity" in tasks:
        points = sweep_curve(rows, "pt", "perplexity", tasks["perplexity"])
        value = tuple((point.x, point.value) for point in points)
        curves["perplexity"] = (
            f"perplexity on {plain(tasks['perplexity'])}",
            (Series("lower is better", value, "pt", marker="●"),),
        )
    return curves
