"""Opens the app on a workspace. Called by `tui.cli.main_app` with its parsed arguments."""

from __future__ import annotations

import argparse
import os
import sys

from engine.errors import BadInputError
from engine.workspace import Workspace


def start(args: argparse.Namespace) -> int:
    """Run the app until the person quits; returns the exit code.

    With `--demo` the demo workspace is made first, in the plain terminal, when it has no base yet: that
    takes minutes and says what it does. Raises BadInputError when there is no terminal to draw on.
    """
    workspace = Workspace.find(args.workspace)
    if args.demo and not any(workspace.bases.glob("*/config.json")):
        code = _make_demo(args, workspace)
        if code:
            return code
    if not (sys.stdin.isatty() and (sys.stderr.isatty() or sys.stdout.isatty())):
        raise BadInputError(
            "the app needs a terminal", "in scripts use the commands: medmerge --help lists them"
        )
    if os.environ.get("TERM", "") in ("", "dumb"):
        raise BadInputError(
            f"TERM is {os.environ.get('TERM', 'not set')!r}", "set it, e.g. TERM=xterm-256color"
        )
    workspace.create()
    from tui.app import MedmergeApp
    from tui.backend import LocalBackend

    app = MedmergeApp(LocalBackend(workspace.root))
    app.run()
    live = [job for job in app.jobs if not job.final]
    if live:
        count = f"{len(live)} job{'s go' if len(live) > 1 else ' goes'} on"
        print(f"{count} without the app; see: medmerge jobs --workspace {workspace.root}", file=sys.stderr)
    return app.return_code or 0


def _make_demo(args: argparse.Namespace, workspace: Workspace) -> int:
    from engine.jobs import JobSpec
    from tui.actions import demo
    from tui.commands.common import run_job

    action = demo(workspace.root)
    spec = JobSpec(action.kind, action.target, action.params, action.title, action.command)
    print(f"Making the demo workspace in {workspace.root}", file=sys.stderr)
    plain_run = argparse.Namespace(workspace=str(workspace.root), json=False, detach=False)
    return run_job(plain_run, spec, render=lambda result: "The demo is ready.")
