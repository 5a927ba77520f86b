"""`medmerge report RUN...`: every table computed anew from the rows of one or more runs."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.errors import BadInputError
from engine.evaluate.summary import MetricRow
from engine.workspace import Workspace
from tui.commands.common import Commands, print_json, table, workspace_of

FORMATS = ("table", "csv", "markdown", "latex", "json")
FIELDS = tuple(MetricRow.__dataclass_fields__)


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "report",
        "tables of one or more runs, with intervals and paired tests",
        description="Recomputes every number from the rows on disk: 95% intervals, floors, paired tests against "
        "the SFT-only mixture (else the first one).",
        examples="  medmerge report demo-sweep\n  medmerge report a b --format csv > both.csv",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's name below WORKSPACE/runs, or its folder"
    )
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from engine.evaluate.tables import compute

    workspace = workspace_of(args)
    rows = [row for name in args.runs for row in compute(find_run(name, workspace))]
    if args.json or args.format == "json":
        print_json({"rows": [row.to_dict() for row in rows]})
        return 0
    print({"table": human_table, "csv": csv_text, "markdown": markdown, "latex": latex}[args.format](rows))
    return 0


def find_run(name: str, workspace: Workspace) -> Path:
    """A run by folder or by name. Raises BadInputError for a search, and naming the runs there are."""
    for folder in (workspace.runs / name, Path(name).expanduser()):
        if (folder / "cells.json").is_file():
            return folder.absolute()
        if (folder / "search.json").is_file():
            raise BadInputError(f"{name} is a search, and report reads evaluations", _about_search(folder))
    there = sorted(path.parent.name for path in workspace.runs.glob("*/cells.json"))
    raise BadInputError(
        f"no run {name} in {workspace.runs}",
        f"there are: {', '.join(there)}" if there else "there are none yet",
    )


def _about_search(folder: Path) -> str:
    """Where a search's result is; docs/search.md explains it."""
    if not (folder / "result.json").is_file():
        return f"it has not ended: medmerge search CONFIG --out {folder.name} --resume goes on with it (docs/search.md)"
    return (
        f"its comparison is in {folder / 'result.json'}, and its recipes are {folder / 'uniform.yaml'} and "
        f"{folder / 'layerwise.yaml'}: medmerge eval measures what they make, docs/search.md says how to read it"
    )


# Columns of the human table: metric names in the order they are shown, for each kind of task.
SHOWN = (
    "accuracy", "accuracy_norm", "bleu", "rougeL", "lf_char_bleu", "reference_perplexity", "perplexity", "refusal_rate",
    "safe_completion_rate", "think_rate",
)  # fmt: skip


def human_table(rows: Sequence[MetricRow]) -> str:
    """One table per task: a line per model and setting, a column per metric with [low high]; then the notes."""
    if not rows:
        return "nothing measured yet"
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        parts.append(_task_table(task, [row for row in rows if row.task == task and row.metric in SHOWN]))
    return "\n\n".join([part for part in parts if part] + [notes(rows)])


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


def _task_table(task: str, rows: Sequence[MetricRow]) -> str:
    metrics = [name for name in SHOWN if any(row.metric == name for row in rows)]
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


def heading(metric: str, rows: Sequence[MetricRow]) -> str:
    """The metric's short name, with chance and majority class where those are the same for all lines."""
    row = next(row for row in rows if row.metric == metric)
    if row.majority is not None and row.floor is not None:
        return f"{row.info.label} (chance {row.floor:.1f}, maj {row.majority:.1f})"
    return f"{row.info.label} (floor)" if row.floor is not None else row.info.label


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
    return text + (" ≈" if row.indistinguishable else "")


def notes(rows: Sequence[MetricRow]) -> str:
    """What the marks mean, the tests behind them, and what one must not compare."""
    lines = ["[low high] 95% interval: Clopper-Pearson for shares, bootstrap over prompts for the rest."]
    if any(row.indistinguishable for row in rows):
        versus = " / ".join(sorted({row.versus for row in rows if row.versus}))
        lines.append(
            f"≈  not distinguishable from {versus} by the paired test (McNemar or paired bootstrap, p >= .05)."
        )
    if any(row.floor is not None and row.majority is None for row in rows):
        lines.append("(floor)  the same answers against shuffled references; !  at or under it.")
    for row in rows:
        if row.metric == "accuracy" and row.indistinguishable:
            would = (
                f"{row.least:.1f} points would be"
                if row.least is not None
                else "no split of so few pairs would be"
            )
            lines.append(
                f"   {row.task}: {row.model} against {row.versus}: p = {row.p:.2g}, n = {row.n}; {would} seen."
            )
    templates = sorted({row.template for row in rows if row.template})
    if len(templates) > 1:
        lines.append(f"Prompts differ between templates ({', '.join(templates)}): compare within one.")
    details = dict.fromkeys(f"{row.info.label}: {row.detail}" for row in rows if row.metric in SHOWN[2:5])
    return "\n".join([*lines, *details])


def csv_text(rows: Sequence[MetricRow]) -> str:
    """All fields of all rows; weights as LABEL=VALUE pairs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for row in rows:
        values = row.to_dict()
        values["weights"] = " ".join(f"{k}={v:g}" for k, v in row.weights.items())
        writer.writerow(["" if values[name] is None else values[name] for name in FIELDS])
    return out.getvalue().rstrip("\n")


def markdown(rows: Sequence[MetricRow]) -> str:
    """One pipe table: a line per model and setting, a column per task and metric."""
    head, body = _wide(rows)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, body)])


def latex(rows: Sequence[MetricRow]) -> str:
    """A tabular environment with the same columns."""
    head, body = _wide(rows)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_tex(text) for text in cells) + r" \\"

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
        ]
    )


_TEX = str.maketrans(
    {
        **{char: "\\" + char for char in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "≈": r"$\approx$",
    }
)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def _wide(rows: Sequence[MetricRow]) -> tuple[list[str], list[list[str]]]:
    """Head and body of one table over all tasks."""
    shown = [row for row in rows if row.metric in SHOWN]
    columns = list(dict.fromkeys((row.task, row.metric) for row in shown))
    head = [*Line._fields] + [
        f"{task} {heading(metric, [row for row in shown if row.task == task])}" for task, metric in columns
    ]
    body = []
    for line, found in lines_of(shown).items():
        values = {(row.task, row.metric): cell(row) for row in found}
        body.append([*line] + [values.get(column, "") for column in columns])
    return head, body
