"""`medmerge eval CONFIG`: one mixture, measured. `medmerge sweep` shares its options and its run."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from engine.evaluate.config import EvalConfig, load_config
from engine.evaluate.summary import MetricRow
from engine.jobs import JobSpec
from engine.workspace import Workspace
from tui.commands.common import (
    Commands,
    add_strict_base,
    command_line,
    existing_path,
    run_job,
    workspace_of,
)
from tui.commands.report import human_table
from tui.safe_text import plain


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "eval",
        "evaluate one mixture of adapters",
        description="Measures one mixture without exporting it: overlap with references (with floors), "
        "log-likelihood, multiple choice, refusals, think traces. Every row is kept below WORKSPACE/runs.",
        examples="  medmerge eval config.yaml\n  medmerge eval config.yaml --limit 20 --out quick --detach",
        job=True,
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """CONFIG, --out, --limit, --resume, --strict-base: the same for eval, sweep and search."""
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML: base, adapters, weights, tasks (docs/evaluation.md)"
    )
    parser.add_argument(
        "--out", metavar="NAME", help="name of the run below WORKSPACE/runs (default: the config's)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only N samples of each task, spread over its file"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run of that name where it stopped"
    )
    add_strict_base(parser)


def run(args: argparse.Namespace) -> int:
    return start(args, "eval")


def start(args: argparse.Namespace, mode: str, more: dict[str, Any] | None = None) -> int:
    """Check the config here, so that mistakes show at once, then start the job. more: further params of the job."""
    workspace = workspace_of(args)
    path = existing_path(args.config, workspace, "config")
    config = load_config(path, workspace.root, mode).limited(args.limit)
    out = run_folder(workspace, args.out or path.stem, named=bool(args.out), resume=args.resume)
    params = {"config": config.to_dict(), "out": str(out), "mode": mode, "resume": args.resume}
    params["strict_base"] = args.strict_base
    params |= more or {}
    title = f"{mode} {out.name}: {models_in(config)}, " + ", ".join(task.name for task in config.tasks)
    spec = JobSpec(mode, "engine.evaluate.job:run", params, title, command_line(args.argv))
    return run_job(args, spec, render)


def models_in(config: EvalConfig) -> str:
    """`5 mixtures, 2 GGUF files`."""
    counts = {
        "mixture": len(config.weights) if config.base is not None else 0,
        "GGUF file": len(config.gguf),
        "server": len(config.servers),
    }
    return ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def run_folder(workspace: Workspace, name: str, named: bool, resume: bool) -> Path:
    """The run's folder. A name that was given must be free (unless resumed); one that was not gets a number.

    Raises BadInputError for a name that is no plain folder name, or a run to resume that is not there.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise BadInputError(
            f"{name!r} is no name for a run", "letters, digits, and any of . _ + - after the first"
        )
    folder = workspace.runs / name
    if resume:
        if not folder.is_dir():
            raise BadInputError(f"there is no run {folder} to resume", "name it with --out")
        return folder
    if folder.exists() and named:
        raise BadInputError(
            f"{folder} is already there", "choose another --out, or continue it with --resume"
        )
    number = 2
    while folder.exists():
        folder = workspace.runs / f"{name}-{number}"
        number += 1
    return folder


def render(result: dict[str, Any]) -> str:
    rows = [MetricRow.from_dict(row) for row in result["rows"]]
    reused = f", {result['reused']} of them from other runs" if result["reused"] else ""
    print(
        plain(f"{result['cells']} cells{reused}, {result['seconds']:.0f} s · rows in {result['run']}"),
        file=sys.stderr,
    )
    for cell, reason in (result.get("failed") or {}).items():
        print(plain(f"not measured: {cell}: {reason} (--resume tries again)"), file=sys.stderr)
    return human_table(rows)
