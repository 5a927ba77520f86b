"""`medmerge report RUN...`: every table computed anew from the rows of one or more runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BadInputError
from engine.workspace import Workspace
from tui.commands.common import Commands, print_json, workspace_of
from tui.commands.report_formats import csv_text, human_table, latex, markdown
from tui.commands.report_table import SHOWN, cell
from tui.commands.report_words import comparisons, pivot
from tui.safe_text import plain

if TYPE_CHECKING:
    from engine.evaluate.choosing import Chosen

__all__ = ["add_parser", "cell", "csv_text", "find_run", "human_table", "latex", "markdown"]

FORMATS = ("table", "csv", "markdown", "latex", "json")


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
    from engine.evaluate.choosing import choose, must_hold_something
    from engine.evaluate.tables import compute_all

    _check_combinations(args)
    folders = find_runs(args.runs, workspace_of(args))
    if args.half != "all" or args.pivot:
        must_hold_something(folders)
    chosen = choose(folders, *_named(args.choose), args.against) if args.choose else None
    rows = chosen.rows if chosen else compute_all(folders, args.half, args.against)
    failed = _failed(folders)
    if args.json or args.format == "json":
        if args.pivot:
            pivot(rows, *_named(args.pivot))  # raises when there is no such metric
            rows = [row for row in rows if (row.task, row.metric) == _named(args.pivot)]
        value: dict[str, object] = {"rows": [row.to_dict() for row in rows], "failed": failed}
        if chosen:
            value["chosen"] = {
                "dev": chosen.dev.to_dict(),
                "test": chosen.test.to_dict(),
                "of": chosen.candidates,
                "unlike": chosen.unlike,
            }
        print_json(value)
        return 0
    for name, reason in failed.items():
        print(plain(f"not measured: {name}: {reason}"), file=sys.stderr)
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
        about = "\n" + plain(_about_choice(chosen), lines=True)
        print(
            about, file=sys.stdout if args.format == "table" else sys.stderr
        )  # a file holds the table alone
    return 0


def _check_combinations(args: argparse.Namespace) -> None:
    """Raises BadInputError for options that contradict each other, before anything is read."""
    if args.pivot and args.words:
        raise BadInputError("--pivot and --words are two ways to print", "take one")
    if args.json and args.format not in ("table", "json"):
        raise BadInputError(f"--json and --format {args.format} are two formats", "take one")
    for option, given in (("--pivot", args.pivot), ("--words", args.words)):
        if given and args.format not in ("table", "json"):
            raise BadInputError(f"{option} is printed as text, not as {args.format}", "leave --format away")
    if args.words and (args.json or args.format == "json"):
        raise BadInputError(
            "--words is text, and JSON was asked for",
            "the rows of --json hold every test: p, p_holm, difference",
        )
    if args.choose and args.half != "all":
        raise BadInputError(
            f"--choose takes the dev half and shows the test half, and --half {args.half} was given",
            "leave --half away",
        )


def _failed(folders: list[Path]) -> dict[str, str]:
    """Cells that were given up: why; with the run's name when there are several."""
    from engine.evaluate.tables import failures

    several = len(folders) > 1
    return {
        f"{folder.name} · {name}" if several else name: reason
        for folder in folders
        for name, reason in failures(folder).items()
    }


def _named(text: str) -> tuple[str, str]:
    """TASK and METRIC of TASK:METRIC."""
    task, colon, metric = text.rpartition(":")
    if not colon or not task or not metric:
        raise BadInputError(f"{text!r} is not TASK:METRIC", "for example medqa:accuracy")
    return task, metric


def _about_choice(chosen: Chosen) -> str:
    dev, test = chosen.dev, chosen.test
    setting = " ".join(part for part in (dev.template, dev.decoding) if part)
    setting += f" in {dev.run}" if chosen.runs > 1 else ""
    unlike = f"\n  but the candidates were not measured alike: {chosen.unlike}" if chosen.unlike else ""
    return (
        f"chosen on the dev half of {dev.task} by {dev.metric}, of {chosen.candidates}: {dev.model} {setting}".rstrip()
        + f"\n  dev {cell(dev)} (n = {dev.n}), test {cell(test)} (n = {test.n}): the test half is the number to quote"
        + unlike
    )


def find_runs(names: Iterable[str], workspace: Workspace) -> list[Path]:
    """The folders of several runs, each once however it is named.

    Raises BadInputError for two runs of one name: lines of a table are told apart by it.
    """
    folders: dict[str, Path] = {}
    for name in names:
        folder = find_run(name, workspace).resolve()
        first = folders.setdefault(folder.name, folder)
        if first != folder:
            raise BadInputError(
                f"two runs are called {folder.name}: {first} and {folder}",
                "a table tells runs apart by the names of their folders: rename one, or copy it under another name",
            )
    return list(folders.values())


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
