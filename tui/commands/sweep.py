"""`medmerge sweep CONFIG`: a grid of mixtures x templates x decoding, measured on one loaded model."""

from __future__ import annotations

import argparse

from engine.errors import BadInputError
from tui.commands.common import Commands
from tui.commands.eval import add_run_options, start


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "sweep",
        "evaluate a grid of mixtures",
        description="Measures every mixture x template x decoding x task of the config. The model is loaded once; "
        "each mixture is written in place, nothing is exported. Cells already measured elsewhere are reused.",
        examples="  medmerge sweep data/demo-sweep.yaml\n  medmerge sweep sweep.yaml --out alpha --detach\n"
        "  medmerge sweep sweep.yaml --out alpha --resume",
        job=True,
    )
    add_run_options(parser)
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where cells run (only local in this version)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.executor == "ray":
        raise BadInputError(
            "--executor ray is not in this version", "leave it out: cells run on this machine"
        )
    return start(args, "sweep")
