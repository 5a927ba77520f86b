"""`medmerge train pt|sft CONFIG`, with a preview, few-shot curves and resuming."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from engine.atomic import refuse_existing
from engine.errors import BadInputError
from engine.jobs import JobSpec
from training import config as settings
from training.job import saved_config
from tui.commands.common import Commands, command_line, existing_path, run_job, table, workspace_of

DESCRIPTION = """\
Trains a LoRA adapter on plain text (pt) or on conversations (sft) and saves it with its manifest.

CONFIG is a YAML file of ours (base, data, output, settings) or of LLaMA-Factory; flags override it, and with --base,
--data and --out none is needed. Data: text, JSON lines, JSON, CSV, Parquet, xlsx; alpaca, ShareGPT or OpenAI layout.
The data are audited against --test files first, and leaking data are refused unless on_leak says otherwise.
A run that was cancelled or killed goes on with --resume, and ends as if it had not been interrupted."""

EXAMPLES = """\
  medmerge train sft --base bases/b --data data/qa.jsonl --test data/medqa.jsonl --out adapters/my-sft --preview
  medmerge train pt pt.yaml --preset paper-pt --detach
  medmerge train sft sft.yaml --set learning_rate=3e-4 --set on_leak=drop
  medmerge train sft sft.yaml --shots 64,256 --seeds 5      # a table: loss after 64 and after 256 samples
  medmerge train --resume runs/my-pt"""


def add_parser(commands: Commands) -> None:
    parser = commands.add("train", "trains a PT or SFT adapter", DESCRIPTION, EXAMPLES, job=True)
    parser.add_argument("kind", nargs="?", choices=settings.KINDS, help="pt: plain text; sft: conversations")
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file (base, data, output, settings)"
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run from its last checkpoint"
    )
    parser.add_argument("--preset", choices=tuple(settings.PRESETS), help="settings to start from")
    parser.add_argument("--base", metavar="DIR", help="the base model's folder")
    parser.add_argument("--data", nargs="+", action="extend", metavar="FILE", help="training data")
    parser.add_argument(
        "--test", nargs="+", action="extend", metavar="FILE", help="test sets to audit against"
    )
    parser.add_argument(
        "--template", metavar="NAME", help="chat template of an sft run; default the model's own"
    )
    parser.add_argument("--out", metavar="DIR", help="adapter folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting (repeatable)"
    )
    parser.add_argument(
        "--preview",
        nargs="?",
        type=int,
        const=3,
        metavar="N",
        help="show the first N samples (3) as the model will see them, trained tokens marked; trains nothing",
    )
    parser.add_argument(
        "--shots",
        metavar="N,N",
        help="a few-shot curve: train on so many samples, once for each number and seed",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="runs for each number of --shots (5)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    if args.resume:
        return _resume(args)
    if not args.kind or not (args.config or (args.base and args.data and args.out)):
        raise BadInputError(
            "say what to train: medmerge train pt CONFIG, or sft CONFIG",
            "or --base, --data and --out without a config, or --resume RUN; medmerge train --help has examples",
        )
    overrides = overrides_of(args.set)
    here = {
        "kind": args.kind,
        "preset": args.preset,
        "template": args.template,
        "base": args.base and str(existing_path(args.base, workspace, "base")),
        "data": args.data and [str(existing_path(name, workspace, "data file")) for name in args.data],
        "tests": args.test and [str(existing_path(name, workspace, "test file")) for name in args.test],
        "output": args.out and str(Path(args.out).absolute()),
    }
    overrides |= {key: value for key, value in here.items() if value}
    path = existing_path(args.config, workspace, "config") if args.config else None
    config = settings.read(path, workspace.root, **overrides)
    if args.preview is not None:
        return _preview(args, config)
    name = Path(config.output).name
    run_folder = workspace.runs / name
    if not args.shots:
        refuse_existing(Path(config.output))
    if run_folder.exists() and any(run_folder.iterdir()):
        raise BadInputError(
            f"{run_folder} holds a run already",
            f"continue it with: medmerge train --resume {run_folder}; or choose another --out",
        )
    params: dict[str, Any] = {"config": dataclasses.asdict(config), "run": str(run_folder)}
    if args.shots:
        params |= {"shots": _numbers(args.shots), "seeds": args.seeds}
        spec = JobSpec(
            kind="train",
            target="training.fewshot:run",
            params=params,
            title=f"few-shot curve {name}: {args.shots} x {args.seeds} seeds",
            command=command_line(args.argv),
        )
        return run_job(args, spec, render_shots)
    return run_job(args, _spec(params, f"train {config.kind} → {name}", args), render)


def _spec(params: dict[str, Any], title: str, args: argparse.Namespace) -> JobSpec:
    return JobSpec(
        kind="train", target="training.job:run", params=params, title=title, command=command_line(args.argv)
    )


def _resume(args: argparse.Namespace) -> int:
    flags = ("kind", "config", "set", "shots", "base", "data", "test", "out", "template", "preset")
    if any(getattr(args, name) for name in flags) or args.preview is not None:
        raise BadInputError("--resume takes no kind, config or settings", "the run's own settings are used")
    run_folder = existing_path(args.resume, workspace_of(args), "run")
    config = saved_config(run_folder)
    params: dict[str, Any] = {"run": str(run_folder), "resume": True, "config": dataclasses.asdict(config)}
    if (run_folder / "plan.json").is_file():
        spec = dataclasses.replace(
            _spec(params, f"resume few-shot curve {run_folder.name}", args), target="training.fewshot:run"
        )
        return run_job(args, spec, render_shots)
    refuse_existing(Path(config.output))
    return run_job(args, _spec(params, f"resume {run_folder.name}", args), render)


def _preview(args: argparse.Namespace, config: settings.TrainConfig) -> int:
    from tui.commands.train_preview import render_preview

    spec = JobSpec(
        kind="preview",
        target="training.preview:run",
        params={"config": dataclasses.asdict(config), "samples": args.preview},
        title=f"preview of {', '.join(Path(name).name for name in config.files)}",
        command=command_line(args.argv),
    )
    width = shutil.get_terminal_size().columns
    return run_job(args, spec, lambda result: render_preview(result, color=sys.stdout.isatty(), width=width))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInputError(
            f"--shots {text!r} is not a list of numbers", "for example --shots 64,256"
        ) from error


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
    """A finished run in a few lines."""
    tokens = result["tokens"]
    lines = [
        f"adapter   {result['adapter']}",
        f"steps     {result['steps']} in {result['seconds']:.0f} s",
        f"tokens    {tokens['processed']:,} processed, {tokens['trained']:,} trained",
    ]
    if result.get("eval_loss") is not None:
        lines.append(
            f"held out  loss {result['first_eval_loss']:.3f} → {result['eval_loss']:.3f}, "
            f"perplexity {result['eval_perplexity']:.2f} ({result['packing']})"
        )
    return "\n".join(lines)


def render_shots(result: dict[str, Any]) -> str:
    """The table of a few-shot curve: one line a number of shots."""

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            str(line["shots"]),
            str(line["n"]),
            number(line["mean"]),
            f"[{line['low']:.3f}, {line['high']:.3f}]" if line["low"] is not None else "",
            number(line.get("perplexity"), 2),
        ]
        for line in result["table"]
    ]
    before = next((row["before"] for row in result["rows"] if row["before"] is not None), None)
    if before is not None:
        rows.insert(0, ["0", "", number(before), "", ""])
    text = table(["shots", "seeds", "held-out loss", "95% over seeds", "perplexity"], rows)
    return f"{text}\n{len(result['rows'])} adapters; all numbers: {Path(result['run']) / 'fewshot.json'}"
