"""What a report says in words: notes under the tables, comparisons as sentences, one metric as a pivot table."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import BadInputError
from engine.evaluate.summary import MetricRow
from engine.evaluate.wording import Compared, comparison
from tui.commands.common import table
from tui.commands.report_table import cell, cleaned
from tui.safe_text import plain


def notes(rows: Sequence[MetricRow], shown: Sequence[str]) -> str:
    """What the marks mean, the tests behind them, and what one must not compare."""
    lines = ["[low high] 95% interval: Clopper-Pearson for shares, bootstrap over prompts for the rest."]
    versus = " / ".join(sorted({row.versus for row in rows if row.versus}))
    if any(row.indistinguishable for row in rows):
        lines.append(
            f"≈  not distinguishable from {versus} by the paired test (McNemar or paired randomisation, p >= .05 after "
            "Holm over the models and settings of a metric)."
        )
    if any(row.floor is not None and row.majority is None for row in rows):
        lines.append("(floor)  the same answers against shuffled references; !  at or under it.")
    tops = {
        (row.task, row.info.label): row.ceiling
        for row in rows
        if row.ceiling is not None and row.metric in shown
    }
    low = [
        f"{label} {top:.1f} on {task}"
        for (task, label), top in tops.items()
        if top is not None and top < 99.95
    ]
    if low:
        lines.append(f"ceiling (references against themselves) under 100: {', '.join(low)}.")
    lines += [
        f"   {sentence}." for sentence in sentences(rows, ("accuracy",)) if "not distinguishable" in sentence
    ]
    templates = sorted({row.template for row in rows if row.template})
    if len(templates) > 1:
        lines.append(f"Prompts differ between templates ({', '.join(templates)}): compare within one.")
    lines += [f"⚠  {text}" for text in warning_lines(rows)]
    details = dict.fromkeys(
        f"{row.info.label}: {row.detail}"
        for row in rows
        if row.metric in ("bleu", "chrf", "rougeL", "lf_char_bleu") and row.detail and row.seeds == 1
    )
    return "\n".join([*lines, *details])


def warning_lines(rows: Sequence[MetricRow]) -> list[str]:
    """Every warning once, with the models it is about."""
    found = []
    for warning in dict.fromkeys(row.warning for row in rows if row.warning):
        models = ", ".join(dict.fromkeys(row.model for row in rows if row.warning == warning))
        found.append(f"{models}: {warning}.")
    return found


def sentences(rows: Sequence[MetricRow], metrics: Sequence[str] = ()) -> list[str]:
    """Every paired comparison of these metrics (all without) in a sentence."""
    found = []
    values = {_place(row, row.model): row for row in rows}
    for row in rows:
        value, other = row.pair_value, row.pair_other  # on the prompts both were asked, as the difference is
        if value is None or other is None:
            beside = values.get(_place(row, row.versus)) or next(
                (o for o in rows if o.model == row.versus and _place(o, "")[1:] == _place(row, "")[1:]), None
            )
            value, other = row.value, beside.value if beside else None
        wanted = not metrics or row.metric in metrics
        if not wanted or row.p is None or value is None or other is None or row.difference is None:
            continue
        setting = " ".join(part for part in (row.template, row.decoding) if part)
        found.append(
            comparison(
                Compared(
                    first=row.model, second=row.versus, task=row.task,
                    metric=row.info.label + (f", {setting}" if setting else ""), value=value,
                    other=other, difference=row.difference, low=row.difference_low,
                    high=row.difference_high, p=row.p, p_holm=row.p_holm if row.tests > 1 else None, n=row.pairs,
                    discordant=row.discordant, needed=row.needed, least=row.least,
                    unit="points" if row.info.percent or row.floor is not None else "",
                    digits=2 if "perplexity" in row.metric or "logprob" in row.metric else 1,
                )
            )
        )  # fmt: skip
    return found


def _place(row: MetricRow, model: str) -> tuple[str, ...]:
    return row.run, row.template, row.decoding, row.task, row.metric, model


def comparisons(rows: Sequence[MetricRow], metrics: Sequence[str]) -> str:
    """All sentences in the order of the table; metrics that were the same for every pair are named at the end."""
    if not rows:
        return "nothing measured yet"
    rows = cleaned(rows)
    compared = [row for row in rows if row.p is not None and (not metrics or row.metric in metrics)]
    moved = {(row.task, row.metric) for row in compared if row.difference or row.discordant}
    found = [f"{line}." for line in sentences([r for r in rows if (r.task, r.metric) in moved], metrics)]
    still = dict.fromkeys(
        f"{row.info.label} on {row.task} {row.value:.0f}"
        for row in compared
        if (row.task, row.metric) not in moved and row.value is not None
    )
    if still:
        found.append(f"no difference at all was observed: {', '.join(still)}.")
    return "\n".join(found) or "nothing to compare: one model, or no prompts in common"


def pivot(rows: Sequence[MetricRow], task: str, metric: str) -> str:
    """One metric: a line per model, a column per template and decoding, each cell with its interval.

    Raises BadInputError naming what there is.
    """
    rows = cleaned(rows)
    task, metric = plain(task), plain(metric)
    found = [row for row in rows if (row.task, row.metric) == (task, metric)]
    if not found:
        there = sorted({f"{row.task}:{row.metric}" for row in rows})
        hint = f"there are: {', '.join(there)}" if there else "nothing is measured yet"
        raise BadInputError(f"no {task}:{metric} here", hint)
    settings = list(dict.fromkeys((row.template, row.decoding) for row in found))
    models = list(dict.fromkeys((row.run, row.model) for row in found))
    several = len({run for run, _ in models}) > 1
    values = {(row.run, row.model, row.template, row.decoding): cell(row) for row in found}
    head = [
        *(["run"] if several else []),
        "model",
        *(" ".join(filter(None, pair)) or metric for pair in settings),
    ]
    body = [
        [*([run] if several else []), model, *(values.get((run, model, *pair), "") for pair in settings)]
        for run, model in models
    ]
    counts = sorted({row.n for row in found})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{found[0].info.label} on {task} (n = {n})\n{table(head, body)}"
