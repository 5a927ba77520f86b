"""What every command shares: its parser, the two common options, and running a job in the foreground.

A foreground command starts the very child that `--detach` starts and follows its events, so commands import
nothing heavy and behave the same either way. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from engine.jobs import JobSpec, JobStore, JobView, cancel, launch
from engine.jobs.events import Event
from engine.jobs.launch import reap
from engine.workspace import Workspace
from tui.safe_text import plain

POLL_SECONDS = 0.05


class Commands:
    """Adds commands to the parser; each gets `--workspace`, `--json` and a help with examples."""

    def __init__(self, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        self._subparsers = subparsers

    def add(
        self, name: str, summary: str, description: str = "", examples: str = "", job: bool = False
    ) -> argparse.ArgumentParser:
        """One command. `job=True` adds `--detach`. `examples` is shown under the options, as written."""
        parser = self._subparsers.add_parser(
            name,
            help=summary,
            description=description or summary[0].upper() + summary[1:] + ".",
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_common(parser)
        if job:
            parser.add_argument(
                "--detach", action="store_true", help="run as a background job and print its id"
            )
        return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workspace", metavar="DIR", help="workspace folder ($MEDMERGE_WORKSPACE, else ./medmerge-workspace)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout and nothing else there"
    )


def add_strict_base(parser: argparse.ArgumentParser) -> None:
    """--strict-base, of the commands that know the hash of the base they use."""
    parser.add_argument(
        "--strict-base",
        action="store_true",
        help="refuse a base that is not the one an adapter's training.json names by hash (default: a warning)",
    )


def workspace_of(args: argparse.Namespace) -> Workspace:
    return Workspace.find(args.workspace)


def existing_path(text: str, workspace: Workspace, what: str) -> Path:
    """A path as typed, else below the workspace. Raises BadInputError when it is in neither place."""
    typed = Path(text).expanduser()
    for path in (typed, workspace.root / text):
        if path.exists():
            return path.absolute()
    places = dict.fromkeys((str(Path.cwd()), str(workspace.root.absolute())))
    raise BadInputError(f"{what} {text} does not exist", f"looked in {' and '.join(places)}")


def labelled(text: str, what: str = "--adapter") -> tuple[str, str, float | None]:
    """Split `LABEL=PATH` or `LABEL=PATH:WEIGHT`; the weight is what stands after the last colon, if a number."""
    label, equals, rest = text.partition("=")
    if not equals or not label or not rest:
        raise BadInputError(
            f"{what} {text!r} is not LABEL=PATH or LABEL=PATH:WEIGHT", "for example pt=adapters/pt:0.3"
        )
    path, colon, weight = rest.rpartition(":")
    if colon:
        try:
            return label, path, float(weight)
        except ValueError:
            pass
    return label, rest, None


def command_line(argv: list[str]) -> str:
    """The command as a person would type it (for "copy as command")."""
    return shlex.join(["medmerge", *argv])


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def run_job(args: argparse.Namespace, spec: JobSpec, render: Callable[[dict[str, Any]], str]) -> int:
    """Start the job; with --detach print its id, else follow it to its end and print its result.

    `render` turns the result dict into the text for people. Ctrl+c cancels the job (exit 130).
    Returns the job's exit code.
    """
    workspace = workspace_of(args).create()
    job = launch(spec, workspace.jobs)
    if getattr(args, "detach", False):
        if args.json:
            print_json({"job": job.id, "folder": str(job.folder)})
        else:
            print(job.id)
            where = shlex.quote(str(workspace.root))
            print(f"follow it: medmerge jobs follow {job.id} --workspace {where}", file=sys.stderr)
        return 0
    job = follow(job, JobStore(workspace.jobs), cancel_on_interrupt=True)
    return report(job, as_json=args.json, render=render)


def follow(job: JobView, store: JobStore, cancel_on_interrupt: bool) -> JobView:
    """Show a job's events on stderr until it ends. Ctrl+c cancels it, or only stops following."""
    tail, screen = job.tail(), ProgressLine()
    try:
        while True:
            reap()
            job = store.get(job.id)
            for event in tail.poll():
                screen.show(event)
            if job.final:
                for event in tail.poll():
                    screen.show(event)
                screen.end()
                return job
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        screen.end()
        if cancel_on_interrupt:
            print("cancelling …", file=sys.stderr)
            cancel(job)
            return store.get(job.id)
        where = shlex.quote(str(store.folder.parent))
        print(f"the job goes on: medmerge jobs follow {job.id} --workspace {where}", file=sys.stderr)
        raise


def report(job: JobView, as_json: bool, render: Callable[[dict[str, Any]], str]) -> int:
    """Print a finished job's result (stdout) or error (stderr); returns its exit code."""
    if job.state == "done":
        if as_json:
            print_json(job.result)
        else:
            print(render(job.result))
        return job.exit_code or 0
    message = job.error or {"lost": "the job's process is gone (killed, or the machine restarted)"}.get(
        job.state, job.state
    )
    code = 130 if job.state == "cancelled" else job.exit_code or 3
    if as_json:
        print_json({"error": message, "hint": job.hint, "exit_code": code, "job": job.id})
    print_error(message, job.hint)
    return code


def print_error(message: str, hint: str = "") -> None:
    print(f"medmerge: {plain(message, lines=True)}", file=sys.stderr)
    if hint:
        print(f"  → {plain(hint, lines=True)}", file=sys.stderr)


class ProgressLine:
    """Progress on stderr: one line rewritten in place on a terminal, a line every 10 s elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._open = False
        self._last = 0.0

    def show(self, event: Event) -> None:
        data = event.data
        if event.type == "progress":
            self._progress(data)
        elif event.type in ("log", "warning"):
            self.end()
            prefix = "warning: " if event.type == "warning" else ""
            print(prefix + plain(str(data.get("message", ""))), file=sys.stderr)

    def _progress(self, data: dict[str, Any]) -> None:
        text = progress_text(data)
        if self._terminal:
            print(
                f"\r\x1b[2K{text[: os.get_terminal_size(2).columns - 1]}", end="", file=sys.stderr, flush=True
            )
            self._open = True
        elif time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            print(text, file=sys.stderr)

    def end(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False


def progress_text(data: dict[str, Any]) -> str:
    """A progress event in words: `merge 45% · 120/269 MB · 98 MB/s · 2 s left · layer 12`."""
    done, total, unit = data.get("done") or 0, data.get("total"), str(data.get("unit") or "")
    parts = [str(data["phase"])] if data.get("phase") else []
    if total:
        parts.append(f"{100 * done / total:3.0f}%")
        parts.append(
            f"{amount(done, unit)}/{amount(total, unit)}{'' if unit == 'B' else ' ' + unit}".rstrip()
        )
    rate = data.get("rate")
    if rate and rate < 1 and unit != "B":
        parts.append(f"{1 / rate:.{0 if rate < 0.1 else 1}f} s/{unit.removesuffix('s') or 'step'}")
    elif rate:
        parts.append(f"{amount(rate, unit)}{'' if unit == 'B' else ' ' + unit}/s".replace(" /s", "/s"))
    if data.get("eta_s") is not None:
        parts.append(f"{duration(data['eta_s'])} left")
    if data.get("message"):
        parts.append(str(data["message"]))
    return plain(" · ".join(parts))


def amount(value: float, unit: str) -> str:
    """Bytes as kB/MB/GB (powers of ten); other units as a plain number with thousands separated."""
    if unit != "B":
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.{2 if name == 'GB' else 0}f} {name}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in words: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A plain aligned text table; columns of numbers are right-aligned."""
    from rich.cells import cell_len

    cells = [[plain(str(cell)) for cell in row] for row in [headers, *rows]]
    widths = [max(cell_len(row[i]) for row in cells) for i in range(len(headers))]
    numeric = [
        bool(rows) and all(row[i][:1] in "0123456789-+.≈" or not row[i] for row in cells[1:])
        for i in range(len(headers))
    ]

    def line(row: list[str]) -> str:
        padded = []
        for cell, width, right in zip(row, widths, numeric, strict=True):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if right else cell + space)
        return "  ".join(padded).rstrip()

    return "\n".join(line(row) for row in cells)
