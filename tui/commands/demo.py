"""`medmerge demo`: a workspace with a real 135M model, two really trained adapters and small data sets."""

from __future__ import annotations

import argparse
from typing import Any

from engine.jobs import JobSpec
from tui.commands.common import Commands, command_line, run_job, workspace_of


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "demo",
        "makes a workspace with a real 135M model, two trained adapters and small data sets",
        "Makes the demo workspace (about 300 MB). What is there already and whole is kept.",
        "  medmerge demo --workspace medmerge-workspace\n  medmerge-tui --workspace medmerge-workspace",
        job=True,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    spec = JobSpec(
        kind="demo",
        target="training.demo.job:run",
        params={"workspace": str(workspace.root)},
        title=f"demo workspace in {workspace.root.name}",
        command=command_line(args.argv),
    )
    return run_job(args, spec, render)


def render(result: dict[str, Any]) -> str:
    lines = [f"workspace  {result['workspace']}", f"base       {result['base']}"]
    lines += [f"adapter    {label}: {path}" for label, path in result["adapters"].items()]
    lines += [
        f"data       {len(result['data'])} files in data/",
        f"next       medmerge-tui --workspace {result['workspace']}",
        f"           medmerge sweep --workspace {result['workspace']} {result['data']['demo-sweep']}",
    ]
    return "\n".join(lines)
