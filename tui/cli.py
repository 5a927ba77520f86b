"""The `medmerge` command (and `medmerge-tui`, which opens the app). Imports nothing heavy.

Each command is a module in tui/commands with `add_parser(commands)`; this file only puts them together and
turns errors into exit codes: 0 done, 1 the check said no, 2 wrong usage or bad input, 3 failed while running,
4 the check could not tell, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys

from engine import __version__
from engine.errors import MedmergeError
from tui.commands.common import Commands, add_common, print_error, print_json

# In the order of a first visit; the help and the README's table follow it.
COMMANDS = (
    "demo", "adapters", "interference", "plan", "merge", "verify", "gguf", "chat", "audit", "train", "eval",
    "sweep", "search", "report", "tasks", "jobs", "doctor",
)  # fmt: skip

DESCRIPTION = """\
Explore merges of LoRA adapters in language models, and know what a merge really contains.

W_merged = W_base + a_PT * dW_PT + a_SFT * dW_SFT. `medmerge demo` makes a workspace with a real small
model and two trained adapters; `medmerge-tui` opens the app on it."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medmerge", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"medmerge {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands = Commands(subparsers)
    for name in COMMANDS:
        importlib.import_module(f"tui.commands.{name}").add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `medmerge`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a file's name may be no UTF-8: shown (and in JSON) as \udcff
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.command:
        parser.print_help()
        return 2
    args.argv = argv
    try:
        return int(args.run(args) or 0)
    except MedmergeError as error:
        if getattr(args, "json", False):
            print_json({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
        print_error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main_app(argv: list[str] | None = None) -> int:
    """Entry point of `medmerge-tui`: opens the app on a workspace."""
    parser = argparse.ArgumentParser(
        prog="medmerge-tui",
        description="The medmerge app: pick adapters, merge, verify, chat side by side, evaluate, watch jobs.",
        epilog="Keys: 1-7 screens · ? help · ctrl+p commands · q quit (jobs go on). Works in tmux and over SSH.",
    )
    add_common(parser)
    parser.add_argument(
        "--demo", action="store_true", help="make the demo workspace first if it is not there"
    )
    parser.add_argument("--version", action="version", version=f"medmerge {__version__}")
    args = parser.parse_args(argv)
    try:
        from tui.start import start

        return start(args)
    except MedmergeError as error:
        print_error(error.message, error.hint)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
