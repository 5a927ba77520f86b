"""`medmerge train pt CONFIG`, `medmerge train sft CONFIG`, `medmerge train --resume RUN`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from engine.atomic import refuse_existing
from engine.errors import BadInputError
from engine.jobs import JobSpec
from training import config as settings
from training.job import saved_config
from tui.commands.common import Commands, command_line, existing_path, run_job, workspace_of

EXAMPLES = """\
  medmerge train pt pt.yaml --detach
  medmerge train sft sft.yaml --preset demo-sft --set learning_rate=3e-4
  medmerge train --resume runs/my-pt"""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "train",
        "trains a PT or SFT adapter",
        "Trains a LoRA adapter on plain text (pt) or on conversations (sft) and saves it with its manifest.",
        EXAMPLES,
        job=True,
    )
    parser.add_argument("kind", nargs="?", choices=settings.KINDS, help="pt: plain text; sft: conversations")
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file (base, data, output, settings)"
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run from its last checkpoint"
    )
    parser.add_argument("--preset", choices=tuple(settings.PRESETS), help="settings to start from")
    parser.add_argument("--out", metavar="DIR", help="adapter folder, instead of the config's output")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting (repeatable)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    if args.resume:
        if args.kind or args.config:
            raise BadInputError("--resume takes no kind and no config", "the run's own settings are used")
        run_folder = existing_path(args.resume, workspace, "run")
        config = saved_config(run_folder)
        params: dict[str, Any] = {"run": str(run_folder), "resume": True}
    else:
        if not args.kind or not args.config:
            raise BadInputError(
                "say what to train: medmerge train pt CONFIG, or sft CONFIG", "or --resume RUN"
            )
        overrides = overrides_of(args.set)
        overrides |= {
            "kind": args.kind,
            "preset": args.preset,
            "output": args.out and str(Path(args.out).absolute()),
        }
        config = settings.read(existing_path(args.config, workspace, "config"), workspace.root, **overrides)
        run_folder = workspace.runs / Path(config.output).name
        refuse_existing(run_folder)
        params = {"config": dataclasses.asdict(config), "run": str(run_folder)}
    refuse_existing(Path(config.output))
    spec = JobSpec(
        kind="train",
        target="training.job:run",
        params=params,
        title=f"train {config.kind} → {Path(config.output).name}",
        command=command_line(args.argv),
    )
    return run_job(args, spec, render)


def overrides_of(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE with the value read as YAML (numbers, true, lists)."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise BadInputError(f"--set {pair!r} is not KEY=VALUE", "for example --set epochs=2")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInputError(f"--set {pair!r}: the value is not readable") from error
    return found


def render(result: dict[str, Any]) -> str:
    tokens = result["tokens"]
    lines = [
        f"adapter   {result['adapter']}",
        f"steps     {result['steps']} in {result['seconds']:.0f} s",
        f"tokens    {tokens['processed']:,} processed, {tokens['trained']:,} trained",
    ]
    if result.get("eval_loss") is not None:
        lines.append(f"held-out loss  {result['first_eval_loss']:.3f} → {result['eval_loss']:.3f}")
    return "\n".join(lines)
