"""`medmerge plan`: what a merge would read, write, cost and lose to rounding, before anything is written."""

from __future__ import annotations

import argparse
from typing import Any

from engine.jobs import JobSpec
from tui.commands.common import Commands, amount, command_line, duration, run_job, table
from tui.commands.merge import add_recipe_options, mixture, recipe_of

DESCRIPTION = """\
Resolve a recipe tensor by tensor and say what the merge would read and write, the memory and seconds it
needs, and how much of each adapter rounding to the output's dtype will lose. Nothing is written."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "plan",
        "what a merge would do and cost, before it does",
        DESCRIPTION,
        "  medmerge plan recipe.yaml\n  medmerge plan --base BASE --adapter pt=PT:0.3 --adapter sft=SFT:0.7 --out OUT",
    )
    add_recipe_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = recipe_of(args, default_out="merge")
    spec = JobSpec(
        kind="plan",
        target="engine.merge.job:run_plan",
        params={"recipe": recipe},
        title=f"plan {mixture(recipe)}",
        command=command_line(args.argv),
    )
    return run_job(args, spec, render)


def render(result: dict[str, Any]) -> str:
    lines = [
        f"{mixture(result['recipe'])} on {result['base']['name']}, {result['dtype']}",
        f"  writes   {amount(result['bytes_written'], 'B')} in {result['shards']} file(s) to {result['output']}"
        f" ({amount(result['free_bytes'], 'B')} free)",
        f"  reads    {amount(result['bytes_read'], 'B')}",
        f"  changes  {result['tensors_changed']} tensors, copies {result['tensors_copied']}",
        f"  memory   about {amount(result['memory_bytes'], 'B')}",
    ]
    if result["seconds"] is not None:
        lines.append(f"  takes    about {duration(result['seconds'])}, and verification after it")
    rows = []
    for label, adapter in result["adapters"].items():
        asked = result["recipe"]["adapters"][label]["weight"]
        expected = result["expected_weights"][label]
        rows.append(
            [
                label,
                "by tensor" if isinstance(asked, dict) else f"{asked:g}",
                "-" if expected is None else f"{expected:.4f}",
                f"{100 * result['rounding_loss'][label]:.1f}%",
                str(adapter["rank"]),
                str(adapter["tensors"]),
            ]
        )
    headers = ["adapter", "asked", "expected", "lost to rounding", "rank", "tensors"]
    lines += ["", table(headers, rows)]
    for label, adapter in result["adapters"].items():
        if list(adapter["selectors"]) != ["default"]:
            lines.append(f"  {label}: " + ", ".join(f"{s} ({n})" for s, n in adapter["selectors"].items()))
    lines.append(f"{100 * result['unchanged_share']:.0f}% of the changed tensors' elements keep their value")
    return "\n".join(lines)
