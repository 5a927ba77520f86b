"""What a table of results consists of: its lines, its columns, its cells. No output format is known here.

Used by report_formats.py (tables, CSV, Markdown, LaTeX) and report_words.py (sentences, pivot tables).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from engine.evaluate.summary import MetricRow
from tui.safe_text import plain

# Columns of the human table: metric names in the order they are shown, for each kind of task.
SHOWN = (
    "accuracy", "accuracy_norm", "unparsed_rate", "bleu", "chrf", "rougeL", "lf_char_bleu", "reference_perplexity",
    "perplexity", "prompt_strict", "prompt_loose", "instruction_loose", "refusal_rate", "safe_completion_rate",
    "harmful_refusal_rate", "over_refusal_rate", "advice_refusal_rate", "think_rate", "untagged_rate",
)  # fmt: skip


def cleaned(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows with every name, detail and warning on one line and without control characters.

    Those texts come from configs, file names and servers: what prints or writes rows starts with this.
    """

    def clean(row: MetricRow) -> MetricRow:
        texts: dict[str, Any] = {
            name: plain(value) for name in _FIELDS if isinstance(value := getattr(row, name), str)
        }
        weights = {plain(label): value for label, value in row.weights.items()}
        return replace(row, weights=weights, **texts)

    return [clean(row) for row in rows]


_FIELDS = tuple(field.name for field in fields(MetricRow))


class Line(NamedTuple):
    """What a line of a table is about. template and decoding are "" where they have no meaning."""

    run: str
    model: str
    template: str = ""
    decoding: str = ""


def lines_of(rows: Sequence[MetricRow]) -> dict[Line, list[MetricRow]]:
    """The rows of each line: one line per model, template and decoding.

    Likelihoods know no decoding (and multiple choice no template): they stand on every line of their model that
    they do not contradict, or on a line of their own when nothing was generated.
    """
    settings = [Line(row.run, row.model, row.template, row.decoding) for row in rows if row.decoding]
    settings = settings or [Line(row.run, row.model, row.template) for row in rows if row.template]
    settings = settings or [Line(row.run, row.model) for row in rows]
    return {
        line: [
            row
            for row in rows
            if (row.run, row.model) == (line.run, line.model)
            and row.template in ("", line.template)
            and row.decoding in ("", line.decoding)
        ]
        for line in dict.fromkeys(settings)
    }


def heading(metric: str, rows: Sequence[MetricRow]) -> str:
    """The metric's short name, with chance and majority class where those are the same for all lines."""
    row = next(row for row in rows if row.metric == metric)
    label = row.info.label
    if metric.endswith(("_raw", "_strip")):
        label += " raw" if metric.endswith("_raw") else " by stripping"
    if row.majority is not None and row.floor is not None:
        return f"{label} (chance {row.floor:.1f}, maj {row.majority:.1f})"
    return f"{label} (floor)" if row.floor is not None else label


def cell(row: MetricRow) -> str:
    """`66.4 [63.7 69.0] ≈`; BLEU-like with `(floor)`, `!` at or under it."""
    if row.value is None:
        return "n/a"
    digits = 2 if "perplexity" in row.metric else 1
    text = f"{row.value:.{digits}f}"
    if row.low is not None and row.high is not None:
        text += f" [{row.low:.{digits}f} {row.high:.{digits}f}]"
    if row.floor is not None and row.majority is None:
        text += f" ({row.floor:.{digits}f})"
    if row.at_chance:
        text += " at chance"
    elif row.at_floor:
        text += " !"
    return text + (" ≈" if row.indistinguishable else "") + (" ⚠" if row.warning else "")
