"""The sweep as pictures: curves over the PT weight, and a grid of cells where both weights vary. Pure functions.

Used by the evaluate screen; imports the plot (numpy) only when curves are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from textual.color import Color
from textual.content import Content

from tui.metrics import number
from tui.safe_text import plain
from tui.text import cut, weight

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow
    from tui.widgets.plot import Series

PLOTS = ("scores", "perplexity", "refusals")  # panels, in the order they get room


@dataclass(frozen=True)
class Curves:
    """One panel: a title, its series and the limits of y (None: made for the values)."""

    title: str
    series: tuple[Series, ...]
    limits: tuple[float, float] | None = None

    @property
    def span(self) -> tuple[float, float]:
        """The x axis: 0 to 1 from the first point on, so that it rests while points come in."""
        xs = [x for one in self.series for x, _ in one.points]
        return min(0.0, *xs), max(1.0, *xs)


def curves_of(
    rows: Sequence[MetricRow], template: str = "", decoding: str = "", tasks: Mapping[str, str] | None = None
) -> dict[str, Curves]:
    """The panels that the rows fill: scores (BLEU and accuracy with their floor and chance: the paper's Figure 3),
    perplexity, refusals. Of one template and decoding ("" takes the first), and of the task that `tasks` names for a
    metric, else the first one.

    Empty with fewer than two mixtures that differ in the PT weight.
    """
    if len({row.weights.get("pt") for row in rows if "pt" in row.weights}) < 2:
        return {}
    found = {
        "scores": _scores(rows, template, decoding, tasks or {}),
        "perplexity": _perplexity(rows, template, decoding, tasks or {}),
        "refusals": _refusals(rows, template, decoding),
    }
    return {name: curves for name, curves in found.items() if curves is not None}


def _task(rows: Sequence[MetricRow], metric: str, tasks: Mapping[str, str]) -> str:
    there = [row.task for row in rows if row.metric == metric and row.value is not None]
    wanted = tasks.get(metric, "")
    return wanted if wanted in there else (there[0] if there else "")


def _line(
    rows: Sequence[MetricRow],
    metric: str,
    task: str,
    name: str,
    style: str,
    setting: tuple[str, str],
    floor: str,
) -> list[Series]:
    """A metric with its band, and its floor as a dotted line."""
    from engine.evaluate.summary import sweep_curve
    from tui.widgets.plot import Series

    points = sweep_curve(rows, "pt", metric, task, *setting)
    if not points:
        return []
    band = tuple(
        (point.x, point.low, point.high)
        for point in points
        if point.low is not None and point.high is not None
    )
    values = tuple((point.x, point.value) for point in points)
    series = [Series(name, values, style, marker="●", band=band)]
    under = tuple((point.x, point.floor) for point in points if point.floor is not None)
    if under and floor:
        series.append(Series(floor, under, style, dotted=True))
    return series


def _scores(
    rows: Sequence[MetricRow], template: str, decoding: str, tasks: Mapping[str, str]
) -> Curves | None:
    overlap, choice = _task(rows, "bleu", tasks), _task(rows, "accuracy", tasks)
    setting = (template, decoding)
    series = _line(rows, "bleu", overlap, "BLEU", "sft", setting, "floor") if overlap else []
    if choice:
        series += _line(rows, "accuracy", choice, "accuracy", "primary", setting, "chance")
    if not series:
        return None
    highest = max(y for one in series for _, y in one.points)
    highest = max([highest, *(high for one in series for _, _, high in one.band)])
    top = next(step for step in (5, 10, 20, 30, 40, 50, 60, 80, 100, 1e9) if highest <= step)
    under = [one for one in series if one.dotted]
    names = ", ".join(one.name for one in under)
    above = [one for one in series if not one.dotted]
    under = [replace(one, name=names, named=number == 0) for number, one in enumerate(under)]
    return Curves("Scores", (*above, *under), (0.0, float(top)))


def _perplexity(
    rows: Sequence[MetricRow], template: str, decoding: str, tasks: Mapping[str, str]
) -> Curves | None:
    metric = "perplexity" if _task(rows, "perplexity", tasks) else "reference_perplexity"
    task = _task(rows, metric, tasks)
    series = _line(rows, metric, task, task, "pt", (template, decoding), "") if task else []
    name = "Perplexity" if metric == "perplexity" else "Perplexity of references"
    return Curves(name, tuple(series)) if series else None


def _refusals(rows: Sequence[MetricRow], template: str, decoding: str) -> Curves | None:

    series: list[Series] = []
    asked = [
        ("harmful_refusal_rate", "harmful", "error"), ("over_refusal_rate", "safe", "success"),
        ("advice_refusal_rate", "advice", "warning"),
    ]  # fmt: skip
    for metric, name, style in asked:
        task = _task(rows, metric, {})
        if task:
            series += _line(rows, metric, task, name, style, (template, decoding), "")
    if not series:
        tasks = list(dict.fromkeys(row.task for row in rows if row.metric == "refusal_rate"))
        for task, style in zip(tasks, ("error", "warning", "primary", "pt", "success"), strict=False):
            name = task.rpartition("/")[2]
            series += _line(rows, "refusal_rate", task, name, style, (template, decoding), "")
    return Curves("Refusals, %", tuple(series), (0.0, 100.0)) if series else None


# ---- both weights vary --------------------------------------------------------------------------------------


def is_grid(rows: Sequence[MetricRow]) -> bool:
    """Whether the mixtures vary in both weights at once: some PT weight with several SFT weights, and the reverse."""
    pairs = {(row.weights["pt"], row.weights["sft"]) for row in rows if {"pt", "sft"} <= row.weights.keys()}
    across, down = {pt for pt, _ in pairs}, {sft for _, sft in pairs}
    return len(across) > 1 and len(down) > 1 and len(pairs) > max(len(across), len(down)) + 1


def heat(rows: Sequence[MetricRow], like: MetricRow, variables: Mapping[str, str], width: int) -> Content:
    """One number of every mixture as a table: PT across, SFT down, coloured from the worst to the best value."""
    cells = {
        (row.weights["pt"], row.weights["sft"]): row
        for row in rows
        if {"pt", "sft"} <= row.weights.keys()
        and (row.metric, row.task, row.template, row.decoding)
        == (like.metric, like.task, like.template, like.decoding)
    }
    across, down = sorted({pt for pt, _ in cells}), sorted({sft for _, sft in cells}, reverse=True)
    values = [row.value for row in cells.values() if row.value is not None]
    if not values:
        return Content("")
    low, high = min(values), max(values)
    title = Content.assemble(
        (plain(f"{like.info.label} on {like.task}"), "bold"), (plain(_setting(like)), "$faint"),
        ("   PT", "bold $pt"), (" across", "$faint"), ("   SFT", "bold $sft"), (" down   ", "$faint"),
        (f"{number(like, low)} to {number(like, high)}", "$faint"),
    )  # fmt: skip
    room = max(6, min(12, (width - 8) // max(1, len(across))))
    head = Content(" " * 7) + Content("").join(
        Content.styled(f"{weight(pt):^{room}}", "$pt") for pt in across
    )
    lines = [title, Content(""), head]
    ground, full = Color.parse(variables["panel"]), Color.parse(variables["primary"])
    for sft in down:
        line = Content.styled(f"{weight(sft):>6} ", "$sft")
        for pt in across:
            row = cells.get((pt, sft))
            if row is None or row.value is None:
                line += Content.styled(f"{'·':^{room}}", "$faint")
                continue
            share = (row.value - low) / (high - low) if high > low else 0.5
            share = 1 - share if row.info.better == "low" else share
            colour = ground.blend(full, 0.75 * share)
            text = number(row, row.value) + ("!" if row.at_floor or row.at_chance else "")
            line += Content.styled(
                f"{cut(text, room):^{room}}", f"{colour.get_contrast_text(1.0).hex6} on {colour.hex6}"
            )
        lines.append(line)
    return Content("\n").join(lines)


def _setting(row: MetricRow) -> str:
    parts = [part for part in (row.template, row.decoding) if part]
    return f"   {' '.join(parts)}" if parts else ""
