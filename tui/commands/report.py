"""`medmerge report RUN...`: every table computed anew from the rows of one or more runs."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.errors import BadInputError
from engine.evaluate.summary import MetricRow
from engine.workspace import Workspace
from tui.commands.common import Commands, print_json, table, workspace_of
from tui.commands.report_words import comparisons, notes, pivot

if TYPE_CHECKING:
    from engine.evaluate.choosing import Chosen

FORMATS = ("table", "csv", "markdown", "latex", "json")
FIELDS = tuple(MetricRow.__dataclass_fields__)


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "report",
        "tables of one or more runs, with intervals and paired tests",
        description="Recomputes every number from the rows on disk: 95% intervals, floors and ceilings, paired tests "
        "against one model with Holm's correction over the models compared, and how many samples a difference "
        "would need. Several runs make one table.",
        examples="  medmerge report demo-sweep\n  medmerge report a b --format csv > both.csv\n"
        "  medmerge report demo-sweep --words                     # every comparison as a sentence\n"
        "  medmerge report demo-sweep --choose medqa:accuracy     # choose on the dev half, report the test half\n"
        "  medmerge report demo-sweep --pivot medqa:accuracy      # weights down, templates across\n"
        "  medmerge report checkpoint q8 q4 --against pt30-sft70  # what quantisation costs",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's name below WORKSPACE/runs, or its folder"
    )
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument(
        "--half", choices=("all", "dev", "test"), default="all", help="only this half of the samples"
    )
    parser.add_argument(
        "--against", metavar="MODEL", default="", help="compare with this model (default: SFT alone)"
    )
    parser.add_argument(
        "--choose", metavar="TASK:METRIC", help="take the best model on the dev half, show the test half"
    )
    parser.add_argument(
        "--pivot",
        metavar="TASK:METRIC",
        help="one metric as a table: models down, templates and decodings across",
    )
    parser.add_argument("--words", action="store_true", help="every paired comparison as a sentence")
    parser.add_argument("--all", action="store_true", help="every metric, raw and secondary ones too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from engine.evaluate.choosing import choose
    from engine.evaluate.tables import compute_all, failures

    workspace = workspace_of(args)
    folders = [find_run(name, workspace) for name in dict.fromkeys(args.runs)]
    chosen = choose(folders, *_named(args.choose), args.against) if args.choose else None
    rows = chosen.rows if chosen else compute_all(folders, args.half, args.against)
    failed = {cell: reason for folder in folders for cell, reason in failures(folder).items()}
    if args.json or args.format == "json":
        value: dict[str, object] = {"rows": [row.to_dict() for row in rows], "failed": failed}
        if chosen:
            value["chosen"] = {
                "dev": chosen.dev.to_dict(),
                "test": chosen.test.to_dict(),
                "of": chosen.candidates,
            }
        print_json(value)
        return 0
    for cell, reason in failed.items():
        print(f"not measured: {cell}: {reason}", file=sys.stderr)
    if args.pivot:
        print(pivot(rows, *_named(args.pivot)))
    elif args.words:
        print(comparisons(rows, SHOWN if not args.all else ()))
    elif args.format == "table":
        print(human_table(rows, every=args.all))
    else:
        print(
            csv_text(rows)
            if args.format == "csv"
            else {"markdown": markdown, "latex": latex}[args.format](rows, args.all)
        )
    if chosen:
        print("\n" + _about_choice(chosen))
    return 0


def _named(text: str) -> tuple[str, str]:
    """TASK and METRIC of TASK:METRIC."""
    task, colon, metric = text.rpartition(":")
    if not colon or not task or not metric:
        raise BadInputError(f"{text!r} is not TASK:METRIC", "for example medqa:accuracy")
    return task, metric


def _about_choice(chosen: Chosen) -> str:
    dev, test = chosen.dev, chosen.test
    setting = " ".join(part for part in (dev.template, dev.decoding) if part)
    return (
        f"chosen on the dev half of {dev.task} by {dev.metric}, of {chosen.candidates}: {dev.model} {setting}".rstrip()
        + f"\n  dev {cell(dev)} (n = {dev.n}), test {cell(test)} (n = {test.n}): the test half is the number to quote"
    )


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
    "accuracy", "accuracy_norm", "unparsed_rate", "bleu", "chrf", "rougeL", "lf_char_bleu", "reference_perplexity",
    "perplexity", "prompt_strict", "prompt_loose", "instruction_loose", "refusal_rate", "safe_completion_rate",
    "harmful_refusal_rate", "over_refusal_rate", "advice_refusal_rate", "think_rate", "untagged_rate",
)  # fmt: skip


def human_table(rows: Sequence[MetricRow], every: bool = False) -> str:
    """One table per task: a line per model and setting, a column per metric with [low high]; then the notes.

    every: all metrics, not only those of SHOWN.
    """
    if not rows:
        return "nothing measured yet"
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        parts.append(
            _task_table(task, [row for row in rows if row.task == task and (every or row.metric in SHOWN)])
        )
    return "\n\n".join([part for part in parts if part] + [notes(rows, SHOWN)])


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


def markdown(rows: Sequence[MetricRow], every: bool = False) -> str:
    """One pipe table: a line per model and setting, a column per task and metric (of SHOWN, or all)."""
    head, body = _wide(rows, every)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, body)])


def latex(rows: Sequence[MetricRow], every: bool = False) -> str:
    """A tabular environment with the same columns."""
    head, body = _wide(rows, every)

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


def _wide(rows: Sequence[MetricRow], every: bool = False) -> tuple[list[str], list[list[str]]]:
    """Head and body of one table over all tasks."""
    shown = [row for row in rows if every or row.metric in SHOWN]
    columns = list(dict.fromkeys((row.task, row.metric) for row in shown))
    head = [*Line._fields] + [
        f"{task} {heading(metric, [row for row in shown if row.task == task])}" for task, metric in columns
    ]
    body = []
    for line, found in lines_of(shown).items():
        values = {(row.task, row.metric): cell(row) for row in found}
        body.append([*line] + [values.get(column, "") for column in columns])
    return head, body
