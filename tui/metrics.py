"""How evaluation rows become a table and curves: which columns, in which words. Pure functions on MetricRow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from textual.content import Content

from tui.safe_text import plain

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow

View = Literal["metrics", "refusals", "thinking", "everything"]
VIEWS: tuple[View, ...] = ("metrics", "refusals", "thinking", "everything")

# What the first view shows, in this order; refusals and think traces have views of their own.
SHOWN: dict[View, tuple[str, ...]] = {
    "metrics": (
        "bleu", "rougeL", "perplexity", "reference_perplexity", "accuracy", "prompt_strict", "instruction_strict",
        "think_rate",
    ),
    "refusals": (
        "refusal_rate", "safe_completion_rate", "harmful_refusal_rate", "over_refusal_rate", "advice_refusal_rate",
    ),
    "thinking": (
        "think_rate", "think_unclosed_rate", "think_empty_rate", "untagged_rate", "think_share", "new_tokens",
        "length_stop_rate", "bleu_strip", "rougeL_strip", "accuracy_strip", "refusal_rate_strip",
    ),
}  # fmt: skip
FEW = 30  # up to so many samples a rate is shown as k/n
WARNED = "†"


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

    @property
    def words(self) -> str:
        """What a filter looks at."""
        return f"{self.model} {self.template} {self.decoding}".lower()

    @property
    def warned(self) -> bool:
        return any(row.warning for row in self.rows.values())


def columns_of(rows: Sequence[MetricRow], view: View) -> tuple[Column, ...]:
    """The columns of a view in a fixed order, so that they stay where they are while rows come in."""
    found: dict[tuple[str, str], MetricRow] = {}
    for row in rows:
        found.setdefault((row.task, row.metric), row)
    wanted = SHOWN.get(view)
    keys = list(found)
    if wanted is not None:
        keys = [key for key in keys if key[1] in wanted]
        keys.sort(key=lambda key: wanted.index(key[1]))
        if view in ("metrics", "thinking"):
            keys = [key for key in keys if not (key[1] == "think_rate" and "/" in key[0])]
    return tuple(Column(task, metric, _title(found[(task, metric)])) for task, metric in keys)


def _title(row: MetricRow) -> str:
    label = row.info.label
    if row.metric.endswith("_raw"):
        label += " raw"
    elif row.metric.endswith("_strip"):
        label += " by stripping"
    if row.metric.startswith("accuracy") and row.floor is not None:
        majority = f", maj {row.majority:.0f}" if row.majority is not None else ""
        return f"{label} (chance {row.floor:.0f}{majority})"
    if row.floor is not None:
        return f"{label} (floor)"
    return label


def matching(
    columns: Sequence[Column], groups: Sequence[Group], wanted: str
) -> tuple[tuple[Column, ...], list[Group]]:
    """What a filter leaves. Each word narrows the lines when a model or setting has it, else the columns (by task and
    metric); a word that is in neither leaves nothing."""
    kept, left = tuple(columns), list(groups)
    for word in wanted.lower().split():
        lines = [group for group in left if word in group.words]
        if lines:
            left = lines
            continue
        kept = tuple(
            column for column in kept if word in f"{column.task} {column.metric} {column.title}".lower()
        )
        if not kept:
            return (), []
    return kept, left


@dataclass(frozen=True)
class Order:
    """How the lines are sorted: by a column's key, or by rising PT weight (`key` "")."""

    key: str = ""
    descending: bool = False

    def next(self, key: str, better: str) -> Order:
        """Another column: best first. The same one again: the other way round, then by weight."""
        first = better != "low"
        if self.key != key:
            return Order(key, first)
        return Order(key, not first) if self.descending == first else Order()


def ordered(groups: Sequence[Group], order: Order, columns: Sequence[Column]) -> list[Group]:
    """The lines in that order; what has no value comes last, equal ones stay by weight."""
    column = next((column for column in columns if column.key == order.key), None)
    if column is None:
        return list(groups)
    values = {group.key: group.rows.get((column.task, column.metric)) for group in groups}
    known = [group for group in groups if (row := values[group.key]) is not None and row.value is not None]
    sign = -1.0 if order.descending else 1.0
    known.sort(key=lambda group: sign * float(values[group.key].value))  # type: ignore[union-attr, arg-type]
    return known + [group for group in groups if group not in known]


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
    kinds = {row.model: row.kind != "mixture" for row in rows}  # files and servers come after the mixtures
    groups = []
    for model in sorted(
        weights,
        key=lambda name: (kinds[name], weights[name].get("pt", 0.0), weights[name].get("sft", 0.0)),
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


def marks(rows: Sequence[MetricRow]) -> Content:
    """What the marks of these numbers mean, as far as they are there."""
    found = []
    if any(row.low is not None for row in rows):
        found.append("[95% interval]")
    if any(row.floor is not None and not row.metric.startswith("accuracy") for row in rows):
        found.append("(floor) against shuffled references")
    if any(row.at_floor or row.at_chance for row in rows):
        found.append("! at floor or chance")
    alike = sorted({row.versus for row in rows if row.indistinguishable})
    if alike:
        found.append(f"≈ not told from {', '.join(alike)}")
    if any(row.warning for row in rows):
        found.append(f"{WARNED} see its warning")
    if len({row.template for row in rows if row.template}) > 1:
        found.append("compare within one template")
    return Content.styled(plain("   ".join(found)), "$faint")


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
    if row.ceiling is not None and row.ceiling < 99.95:
        parts.append(f"ceiling {number(row, row.ceiling)}")
    line = Content.assemble((plain(f"{row.model}  "), "bold"), plain(" · ".join(parts)))
    second = [info.says] if info.says else []
    if row.p is not None:
        second.append(_tested(row))
    second += [words for words in (row.method, row.detail) if words]
    if row.warning:
        line += Content.styled("\n" + plain(f"{WARNED} {row.warning}"), "$warning")
    return line + Content.styled("\n" + plain(" · ".join(second)), "$faint")


def _tested(row: MetricRow) -> str:
    """The paired test in words, and what it could have seen."""
    told = "not distinguishable from" if row.indistinguishable else "differs from"
    words = f"p = {row.p:.2g}"
    if row.p_holm is not None and row.tests > 1:
        words += f", {row.p_holm:.2g} after Holm over {row.tests} tests"
    alone = " for one test alone" if row.tests > 1 else ""
    if row.least is not None:
        words += f"; {row.least:.1f} points would be significant{alone}"
    if row.indistinguishable and row.needed is not None and row.needed > row.n:
        words += f"; about {row.needed:,} samples would be needed for this difference{alone}"
    return f"{told} {row.versus} ({words})"
