"""`medmerge search CONFIG`: layer-wise weights fitted on a dev half, judged on the held-out half."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from engine.evaluate.search import load_search
from engine.jobs import JobSpec
from tui.commands.common import Commands, command_line, existing_path, run_job, table, workspace_of
from tui.commands.eval import add_run_options, run_folder

DESCRIPTION = """\
Fits one weight per adapter and group of layers by a search that needs no gradients (CMA-ES) on half of the
samples, and compares the result on the other half with the best uniform weights and with the asked ones. The model
is loaded once; nothing is exported. Stop it at any time and go on with --resume."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "search",
        "fit weights per layer on a dev half, compare on the held-out half",
        description=DESCRIPTION,
        examples="  medmerge search data/demo-search.yaml\n  medmerge search search.yaml --out alpha --detach\n"
        "  medmerge search search.yaml --out alpha --resume",
        job=True,
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    path = existing_path(args.config, workspace, "config")
    config = load_search(path, workspace.root).limited(args.limit)
    out = run_folder(workspace, args.out or path.stem, named=bool(args.out), resume=args.resume)
    params = {
        "config": config.to_dict(),
        "out": str(out),
        "merges": str(workspace.merges),
        "resume": args.resume,
        "strict_base": args.strict_base,
    }
    settings = config.settings
    kinds = " x attention and rest" if settings.kinds else ""
    title = (
        f"search {out.name}: {len(config.evaluation.adapters)} adapters x {settings.groups} groups{kinds}, "
        f"{config.task.name}"
    )
    spec = JobSpec("search", "engine.evaluate.search.job:run", params, title, command_line(args.argv))
    return run_job(args, spec, render)


def render(result: dict[str, Any]) -> str:
    """The held-out table, the differences, the weights found, and the sentence."""
    rows = [
        [
            row["name"],
            _number(row["dev"]),
            f"{_number(row['held_out'])} {_interval(row)}",
            *([] if row["accuracy"] is None else [f"{row['accuracy']:.1%}"]),
        ]
        for row in result["candidates"]
    ]
    headers = [
        "weights",
        f"dev (n={result['n_dev']})",
        f"held out (n={result['n_held_out']})",
        "held-out accuracy",
    ]
    headers = headers[: len(rows[0])]
    differences = [
        [
            f"{row['first']} - {row['second']}",
            f"{row['dev_difference']:+.4f}",
            f"{row['difference']:+.4f} {_interval(row, sign='+')}",
            row["verdict"],
        ]
        for row in result["differences"]
    ]
    weights = [
        [row["title"], f"{row['uniform']:.4g}", f"{row['layerwise']:.4g}"] for row in result["dimensions"]
    ]
    print(
        f"{result['evaluations']} mixtures tried, {result['seconds']:.0f} s · rows in {result['run']}",
        file=sys.stderr,
    )
    return "\n".join(
        [
            f"{result['task']}: mean log-likelihood in nats, higher is better; [95% interval]",
            table(headers, rows),
            "",
            table(["difference", "dev", "held out", "says"], differences),
            "",
            table(["weight", "uniform", "layer-wise"], weights),
            "",
            result["message"],
            *(f"{name} recipe: {path}" for name, path in result["recipes"].items()),
        ]
    )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else str(value)


def _interval(row: dict[str, Any], sign: str = "") -> str:
    low, high = row["low"], row["high"]
    if not isinstance(low, float | int) or not isinstance(high, float | int):
        return "[no interval]"
    return f"[{low:{sign}.4f}, {high:{sign}.4f}]"
