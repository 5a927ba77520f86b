"""The README's table of commands, made from the parser itself: `python -m tui.commands_doc README.md`.

A test compares the README with this, so the table cannot drift.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tui.cli import build_parser

BEGIN, END = "<!-- commands: python -m tui.commands_doc README.md -->", "<!-- end of commands -->"


def commands_table() -> str:
    """One Markdown row a command: its usage without the common options, and its summary."""
    (subparsers,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    summaries = {action.dest: action.help for action in subparsers._choices_actions}
    rows = [f"| `{_usage(parser)}` | {summaries[name]} |" for name, parser in subparsers.choices.items()]
    return "\n".join(["| command | does |", "|---|---|", *rows])


def _usage(parser: argparse.ArgumentParser) -> str:
    positionals = [a for a in parser._actions if not a.option_strings]
    words = [parser.prog]
    for action in positionals:
        if action.choices:
            word = "|".join(map(str, action.choices))
        else:
            word = str(action.metavar or action.dest).upper()
        many = "..." if action.nargs in ("+", "*") else ""
        word = word + many
        words.append(f"[{word}]" if action.nargs in ("?", "*") else word)
    return " ".join(words).replace("|", "\\|")


def updated(text: str) -> str:
    """`text` with the part between the two markers replaced. Raises ValueError when a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{commands_table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
