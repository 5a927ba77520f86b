"""`medmerge interference`: how much adapters overlap, before they are merged."""

from __future__ import annotations

import argparse
from typing import Any

from engine.errors import BadRecipeError
from engine.jobs import JobSpec
from tui.commands.common import Commands, command_line, existing_path, labelled, run_job, table, workspace_of
from tui.safe_text import plain

MODULES_SHOWN = 12


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "interference",
        "per-module overlap of adapters: cosine, norms, shared subspace, sign conflict",
        description="Compares adapters module by module from their low-rank factors: seconds even for large "
        "models. The base is read by header only, to check that the adapters fit it.",
        examples="  medmerge interference --base B --adapter pt=adapters/pt --adapter sft=adapters/sft",
        job=True,
    )
    parser.add_argument("--base", metavar="DIR", help="check that the adapters fit this base (optional)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="LABEL=DIR", help="an adapter; give two or more"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    adapters: dict[str, str] = {}
    for text in args.adapter:
        label, path, _ = labelled(text)
        if label in adapters:
            raise BadRecipeError(f"two adapters are labelled {label}", "give each its own label")
        adapters[label] = str(existing_path(path, workspace, "adapter"))
    if len(adapters) < 2:
        raise BadRecipeError("interference needs two adapters", "for example: --adapter pt=P --adapter sft=S")
    base = str(existing_path(args.base, workspace, "base")) if args.base else None
    params = {"adapters": adapters, "base": base}
    title = f"interference of {', '.join(adapters)}"
    spec = JobSpec(
        "interference", "engine.merge.job:run_interference", params, title, command_line(args.argv)
    )
    return run_job(args, spec, render)


def render(result: dict[str, Any]) -> str:
    """The overall numbers of each pair, and the modules that overlap most."""
    lines = []
    for pair in result["pairs"]:
        first, second = pair["pair"]
        lines.append(
            f"{plain(first)} and {plain(second)}: cosine {pair['cosine']:.3f} · sign conflict "
            f"{pair['sign_conflict']:.1%} (chance 50%) · shared subspace {pair['subspace_overlap']:.1%} "
            f"(chance {pair['overlap_by_chance']:.1%})"
        )
        lines.append(
            f"  norms {pair['norm'][first]:.3f} and {pair['norm'][second]:.3f} over {pair['modules']} shared modules"
        )
    for label, names in result["only_in"].items():
        lines.append(f"  only in {plain(label)}: {len(names)} modules")
    most = sorted(result["modules"], key=lambda row: -abs(row["cosine"]))[:MODULES_SHOWN]
    several = len(result["pairs"]) > 1
    rows = [
        [
            row["name"] + (f" ({' '.join(row['pair'])})" if several else ""),
            f"{row['cosine']:.3f}",
            f"{row['sign_conflict']:.1%}",
            f"{row['subspace_overlap']:.1%}",
            *(f"{row['norm'][label]:.3f}" for label in row["pair"]),
        ]
        for row in most
    ]
    names = ["norm 1", "norm 2"] if several else [f"norm {label}" for label in result["labels"]]
    lines += ["", table(["most alike", "cosine", "sign conflict", "subspace", *names], rows)]
    return "\n".join(lines)
