"""`medmerge audit --train F... --test F...`: leakage of test rows into training data, and repeats within it."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from engine.jobs import JobSpec
from tui.commands.common import Commands, command_line, existing_path, run_job, table, workspace_of
from tui.safe_text import plain

SHOWN = 20
COLUMNS = {
    "near_duplicate": "near",
    "containment_5": "5 words",
    "containment_8": "8 words",
    "containment_13": "13 words",
    "containment_cjk_5": "5 chars",
    "source_id": "id",
}
NARROW = 60  # columns; below it the two texts of an example stand one under the other


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "audit",
        "duplicates and leakage",
        "Looks for test rows in the training data: equal after normalising, nearly equal (true Jaccard > 0.8),\n"
        "contained in a longer text (n-grams of words, of characters in Chinese), or from the same source (PMIDs,\n"
        "question ids); and for repeats within the training data. Exit code 1 when there are leaks.",
        "  medmerge audit --train data/sft_train.jsonl --test data/medqa.jsonl data/medquad_short.jsonl\n"
        "  medmerge audit --train corpus/ --test test.csv --clean corpus-clean --drop-duplicates near",
        job=True,
    )
    formats = "text, JSON lines, JSON, CSV, Parquet, xlsx, .gz, or a folder of them"
    parser.add_argument(
        "--train",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help=f"training data ({formats})",
    )
    parser.add_argument(
        "--test",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="test sets, in the same formats",
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="the column to compare (default: text, else all columns that hold text)",
    )
    parser.add_argument(
        "--id-column",
        action="append",
        default=[],
        metavar="NAME",
        help="a column of source ids besides pmid, question_id and the like: equal ids are leaks; may be repeated",
    )
    parser.add_argument(
        "--clean", metavar="DIR", help="write the training files without the leaking rows into a new folder"
    )
    parser.add_argument(
        "--drop-duplicates",
        choices=("none", "exact", "near"),
        default="none",
        help="with --clean: also leave out rows that repeat an earlier one",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="worker processes (default: 2 for large data)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    params: dict[str, Any] = {
        kind: [str(existing_path(name, workspace, f"{kind} file")) for name in getattr(args, kind)]
        for kind in ("train", "test")
    }
    params |= {
        "column": args.column,
        "id_columns": args.id_column,
        "clean": str(Path(args.clean).expanduser().absolute()) if args.clean else None,
        "drop_duplicates": args.drop_duplicates,
        "workers": args.workers if args.workers is None else max(args.workers, 0),
    }
    spec = JobSpec(
        kind="audit",
        target="training.audit.job:run",
        params=params,
        title=f"audit {', '.join(Path(name).name for name in params['train'])}",
        command=command_line(args.argv),
    )
    return run_job(args, spec, render)


def render(result: dict[str, Any]) -> str:
    """A table of every training and test file, examples side by side, repeats, and what was written."""
    counts = result["counts"]
    lines = [f"{sum(counts['rows'].values()):,} rows in {len(counts['rows'])} files"]
    if result["leaks"]:
        lines.append(
            f"LEAKS: {counts['leaking_train_rows']:,} training rows hold {counts['leaked_test_rows']:,} test rows"
        )
    elif result["pairs"]:
        lines.append("no leaks found")
    if result["pairs"]:
        lines += ["", _pairs(result["pairs"])]
    for example in result.get("examples", ()):
        lines += ["", _example(example)]
    if result["leaks"]:
        lines += ["", f"all {len(result['leaks']):,} pairs, one for each detector: --json"]
    lines += ["", *_notes(result)]
    if cleaned := result.get("cleaned"):
        lines += ["", *_cleaned(cleaned)]
    return "\n".join(lines)


def _pairs(pairs: list[dict[str, Any]]) -> str:
    detectors = [name for name in pairs[0]["detectors"] if any(pair["detectors"][name] for pair in pairs)]
    headers = ["training file", "rows", "test file", "rows", "leaking", "test rows"]
    headers += [COLUMNS.get(name, name) for name in detectors]
    rows = [
        [
            Path(pair["train_file"]).name,
            f"{pair['train_rows']:,}",
            Path(pair["test_file"]).name,
            f"{pair['test_rows']:,}",
            f"{pair['leaking_train_rows']:,}",
            f"{pair['leaked_test_rows']:,}",
            *(f"{pair['detectors'][name]:,}" for name in detectors),
        ]
        for pair in sorted(pairs, key=lambda pair: -pair["leaking_train_rows"])[:SHOWN]
    ]
    text = table(headers, rows)
    return f"{text}\n… and {len(pairs) - SHOWN} more pairs of files" if len(pairs) > SHOWN else text


def _example(example: dict[str, Any]) -> str:
    """Two excerpts side by side; matching words are in bold reverse on a terminal, between « and » elsewhere."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def marked(pieces: list[list[Any]]) -> Text:
        text = Text()
        for piece, match in pieces:
            words = " ".join(plain(str(piece), lines=True).split("\n"))
            text.append(words if colour or not match else f"«{words}»", "bold reverse" if match else "")
        return text

    width = shutil.get_terminal_size((100, 24)).columns
    heads = [
        Text(plain(f"{Path(example[f'{side}_file']).name} row {example[f'{side}_row']}"))
        for side in ("train", "test")
    ]
    if width >= NARROW:
        grid = Table(box=SIMPLE, expand=True, padding=(0, 1), show_edge=False)
        for head in heads:
            grid.add_column(head, ratio=1)
        grid.add_row(marked(example["train"]), marked(example["test"]))
    else:
        grid = Table(box=None, show_header=False, expand=True, padding=0)
        for head, side in zip(heads, ("train", "test"), strict=True):
            grid.add_row(head)
            grid.add_row(marked(example[side]))
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    console.print(Text(f"{example['detector']} {example['score']:.2f}"))
    console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _notes(result: dict[str, Any]) -> list[str]:
    counts = result["counts"]
    repeats = len(result["duplicates"])
    by_kind = ", ".join(f"{name} {count:,}" for name, count in counts["duplicates"].items())
    lines = [f"{repeats:,} repeated training rows ({by_kind})" if repeats else "no repeats"]
    if counts.get("phrases"):
        lines.append(
            f"{counts['phrases']:,} test rows are phrases that many training rows hold in part (not leaks; see --json)"
        )
    if counts.get("templates"):
        lines.append(
            f"{counts['templates']:,} texts that many rows of a test file share were not compared alone"
        )
    if counts.get("textless"):
        rows = sum(counts["textless"].values())
        lines.append(f"{rows:,} training rows hold no text to compare")
    return lines


def _cleaned(cleaned: dict[str, Any]) -> list[str]:
    dropped = cleaned["dropped"]
    lines = [
        f"cleaned: {plain(cleaned['folder'])} ({dropped['leaks']:,} rows dropped as leaks, "
        f"{dropped['duplicates']:,} as repeats; why: dropped.jsonl)"
    ]
    for file in cleaned["files"]:
        note = " (rewritten as JSON lines)" if file["rewritten"] else ""
        lines.append(
            f"  {plain(Path(file['file']).name)}: {file['rows']:,} rows kept, {file['dropped']:,} dropped{note}"
        )
    return lines
