"""`medmerge audit --train F... --test F...`: leakage of test rows into training data, and repeats within it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.jobs import JobSpec
from tui.commands.common import Commands, command_line, existing_path, run_job, table, workspace_of

SHOWN = 20


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "audit",
        "duplicates and leakage",
        "Looks for test rows in the training data: equal after normalising, nearly equal (MinHash, then true\n"
        "Jaccard > 0.8), or contained in a longer text (8- and 13-word n-grams). Exit code 1 when there are any.",
        "  medmerge audit --train data/sft_train.jsonl --test data/medqa.jsonl data/medquad_short.jsonl",
        job=True,
    )
    parser.add_argument(
        "--train", nargs="+", required=True, metavar="FILE", help="training data (JSON lines)"
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="test sets (JSON lines)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    params = {
        kind: [str(existing_path(name, workspace, f"{kind} file")) for name in getattr(args, kind)]
        for kind in ("train", "test")
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
    """Counts per detector and the first findings."""
    counts = result["counts"]
    lines = [f"{sum(counts['rows'].values()):,} rows in {len(counts['rows'])} files"]
    if result["leaks"]:
        lines.append(
            f"LEAKS: {counts['leaking_train_rows']} training rows hold {counts['leaked_test_rows']} test rows "
            f"({_by_detector(counts['leaks'])})"
        )
        rows = [
            [Path(leak["train_file"]).name, str(leak["train_row"]), Path(leak["test_file"]).name,
             str(leak["test_row"]), leak["detector"], f"{leak['score']:.2f}"]
            for leak in result["leaks"][:SHOWN]
        ]  # fmt: skip
        lines.append(table(["train file", "row", "test file", "row", "detector", "score"], rows))
        if len(result["leaks"]) > SHOWN:
            lines.append(f"… and {len(result['leaks']) - SHOWN} more (all of them with --json)")
    else:
        lines.append("no leaks found")
    repeats = len(result["duplicates"])
    lines.append(
        f"{repeats} repeated training rows ({_by_detector(counts['duplicates'])})"
        if repeats
        else "no repeats"
    )
    return "\n".join(lines)


def _by_detector(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
