"""`medmerge sweep CONFIG`: a grid of mixtures x templates x decoding, on one loaded model or on a Ray cluster."""

from __future__ import annotations

import argparse
import importlib.util

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
        "  medmerge sweep sweep.yaml --out alpha --resume\n"
        "  medmerge sweep sweep.yaml --executor ray      # every GPU of this machine, or --workers N",
        job=True,
    )
    add_run_options(parser)
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where cells run: in one process here, or in workers of a Ray cluster (same cells, same results)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        default="",
        help="the cluster, or auto; without it Ray starts on this machine and ends with the run",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="Ray workers (default: one per GPU, without GPUs one per 8 cores)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.executor == "local":
        for name in ("ray_address", "workers"):
            if getattr(args, name):
                raise BadInputError(f"--{name.replace('_', '-')} is for --executor ray", "add --executor ray")
        return start(args, "sweep")
    if args.workers is not None and args.workers < 1:
        raise BadInputError(f"--workers must be at least 1, and is {args.workers}")
    if importlib.util.find_spec("ray") is None:
        raise BadInputError("--executor ray needs ray, which is not here", "pip install 'medmerge-tui[ray]'")
    more = {"executor": "ray", "ray_address": args.ray_address, "workers": args.workers or 0}
    return start(args, "sweep", more)
