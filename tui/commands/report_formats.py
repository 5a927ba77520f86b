"""Rows of results as a table for people, as CSV, Markdown and LaTeX.

Called by `medmerge report`, `eval` and `sweep`, and by the app's exports.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from engine.evaluate.summary import MetricRow
from tui.commands.common import table
from tui.commands.report_table import SHOWN, Line, cell, cleaned, heading, lines_of
from tui.commands.report_words import notes, warning_lines

FIELDS = tuple(MetricRow.__dataclass_fields__)


def human_table(rows: Sequence[MetricRow], every: bool = False) -> str:
    """One table per task: a line per model and setting, a column per metric with [low high]; then the notes.

    every: all metrics, not only those of SHOWN.
    """
    if not rows:
        return "nothing measured yet"
    rows = cleaned(rows)
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        parts.append(
            _task_table(task, [row for row in rows if row.task == task and (every or row.metric in SHOWN)])
        )
    return "\n\n".join([part for part in parts if part] + [notes(rows, SHOWN)])


def _task_table(task: str, rows: Sequence[MetricRow]) -> str:
    there = dict.fromkeys(row.metric for row in rows)
    metrics = [name for name in SHOWN if name in there] + [name for name in there if name not in SHOWN]
    quiet = {"untagged_rate", "unparsed_rate"}  # columns that only say something when something happened
    if all(name in ("think_rate", *quiet) for name in metrics):
        quiet.add("think_rate")
    metrics = [
        name for name in metrics if name not in quiet or any(r.value for r in rows if r.metric == name)
    ]
    if not metrics:
        return ""
    lines = lines_of(rows)
    # Columns that say the same (or nothing) on every line are left out.
    names = [
        name for name in Line._fields if name == "model" or len({getattr(line, name) for line in lines}) > 1
    ]
    body = []
    for line, found in lines.items():
        values = {row.metric: cell(row) for row in found}
        body.append([getattr(line, name) for name in names] + [values.get(metric, "") for metric in metrics])
    same = [getattr(next(iter(lines)), name) for name in ("template", "decoding") if name not in names]
    counts = sorted({row.n for row in rows})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    about = ", ".join(
        [
            n,
            *(
                f"{name} {value}"
                for name, value in zip(("template", "decoding"), same, strict=False)
                if value
            ),
        ]
    )
    return f"{task} ({about})\n{table(names + [heading(metric, rows) for metric in metrics], body)}"


def csv_text(rows: Sequence[MetricRow]) -> str:
    """All fields of all rows; weights as LABEL=VALUE pairs.

    Text that a spreadsheet would run as a formula gets an apostrophe before it; numbers stay as they are.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for row in cleaned(rows):
        values = row.to_dict()
        values["weights"] = " ".join(f"{k}={v:g}" for k, v in row.weights.items())
        writer.writerow([_csv(values[name]) for name in FIELDS])
    return out.getvalue().rstrip("\n")


_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # full-width ones count too


def _csv(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.lstrip().startswith(_FORMULA) else value
    return "" if value is None else value


def markdown(rows: Sequence[MetricRow], every: bool = False) -> str:
    """One pipe table: a line per model and setting, a column per task and metric (of SHOWN, or all). Warnings follow
    as a list."""
    rows = _shown(rows, every)
    head, body = _wide(rows)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.translate(_MARKDOWN) for text in cells) + " |"

    warned = [f"- {text.translate(_MARKDOWN)}" for text in warning_lines(rows)]
    return "\n".join(
        [line(head), line(["---"] * len(head)), *map(line, body), *([""] if warned else []), *warned]
    )


_MARKDOWN = str.maketrans({char: "\\" + char for char in "\\|<`"})


def latex(rows: Sequence[MetricRow], every: bool = False) -> str:
    """A tabular environment with the same columns; warnings follow as comments."""
    rows = _shown(rows, every)
    head, body = _wide(rows)

    def line(cells: Sequence[str]) -> str:
        text = " & ".join(_tex(text) for text in cells) + r" \\"
        return "{}" + text if text.startswith(("[", "*")) else text  # an option of the line break before it

    columns = "l" * len(head)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            line(head),
            r"\hline",
            *map(line, body),
            r"\hline",
            r"\end{tabular}",
            *(f"% {text}" for text in warning_lines(rows)),
        ]
    )


_TEX = str.maketrans(
    {
        **{char: "\\" + char for char in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "≈": r"$\approx$",
        "⚠": r"$\triangle$",
        "†": r"\dag{}",
        "±": r"$\pm$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "×": r"$\times$",
        "→": r"$\rightarrow$",
        "·": r"$\cdot$",
        "–": "--",
        "—": "---",
        "…": r"\dots{}",
        "\ufffd": "?",  # where a control character was
    }
)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def _shown(rows: Sequence[MetricRow], every: bool) -> list[MetricRow]:
    return [row for row in cleaned(rows) if every or row.metric in SHOWN]


def _wide(shown: Sequence[MetricRow]) -> tuple[list[str], list[list[str]]]:
    """Head and body of one table over all tasks."""
    columns = list(dict.fromkeys((row.task, row.metric) for row in shown))
    head = [*Line._fields] + [
        f"{task} {heading(metric, [row for row in shown if row.task == task])}" for task, metric in columns
    ]
    body = []
    for line, found in lines_of(shown).items():
        values = {(row.task, row.metric): cell(row) for row in found}
        body.append([*line] + [values.get(column, "") for column in columns])
    return head, body
