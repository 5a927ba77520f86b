"""`medmerge gguf`: a GGUF file from a checkpoint, an adapter, or a base with adapters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.atomic import refuse_existing
from engine.errors import BadRecipeError
from engine.jobs import JobSpec
from tui.commands.common import (
    Commands,
    add_strict_base,
    amount,
    command_line,
    duration,
    existing_path,
    labelled,
    run_job,
    workspace_of,
)
from tui.safe_text import plain

DESCRIPTION = """\
Write a GGUF file for llama.cpp. SRC is a checkpoint folder (a base or a merge) or an adapter folder (with
--base: a LoRA GGUF). Without SRC, --base and --adapter LABEL=DIR:WEIGHT write the mixture directly; without
weights and --out they prepare a live chat: the base and each adapter as files in the workspace.
Architectures: Llama and Qwen3. Types: f32, f16, bf16, q8_0, and every other llama.cpp type (q4_k_m, ...)."""

EXAMPLES = """\
  medmerge gguf merges/pt03-sft07 --type q4_k_m --out gguf/pt03-sft07-q4_k_m.gguf
  medmerge gguf adapters/demo-pt --base bases/smollm2-135m-instruct --out gguf/pt-lora.gguf
  medmerge gguf --base bases/smollm2-135m-instruct --adapter pt=adapters/demo-pt:0.3 \\
      --adapter sft=adapters/demo-sft:0.7 --type q8_0 --out gguf/mix.gguf
  medmerge gguf --base bases/smollm2-135m-instruct --adapter pt=adapters/demo-pt --adapter sft=adapters/demo-sft"""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "gguf", "a GGUF file from a checkpoint or an adapter", DESCRIPTION, EXAMPLES, job=True
    )
    parser.add_argument("source", metavar="SRC", nargs="?", help="a checkpoint or adapter folder")
    parser.add_argument("--type", metavar="T", help="a llama.cpp type; default f16, an adapter: f32")
    parser.add_argument("--out", metavar="FILE", help="the file to write; it must not exist")
    parser.add_argument("--base", metavar="DIR", help="the base model's folder, for an adapter or a mixture")
    parser.add_argument(
        "--adapter",
        metavar="LABEL=DIR[:WEIGHT]",
        action="append",
        default=[],
        help="an adapter of the mixture",
    )
    parser.add_argument(
        "--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, if not recognised"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the file back and compare it with its source"
    )
    add_strict_base(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    base = str(existing_path(args.base, workspace, "base")) if args.base else ""
    if not args.source and args.adapter and not args.out:
        return run_job(args, live_spec(args, base), render_live)
    if not args.out:
        raise BadRecipeError("--out is missing", "name the file to write, for example --out gguf/model.gguf")
    out = Path(args.out).expanduser()
    if not out.parent.is_dir() and (workspace.root / out).parent.is_dir():
        out = workspace.root / out
    out = out.absolute()
    refuse_existing(out)
    params: dict[str, Any] = {
        "out": str(out), "type": args.type, "base": base, "pre": args.pre, "verify": not args.no_verify,
        "strict_base": args.strict_base,
    }  # fmt: skip
    if args.source:
        if args.adapter:
            raise BadRecipeError("SRC and --adapter together", "give a folder, or --base with --adapter")
        source = existing_path(args.source, workspace, "source")
        params["source"], title = str(source), f"{source.name} as {out.name}"
    else:
        if not base or not args.adapter:
            raise BadRecipeError("nothing to convert", "give SRC, or --base with --adapter LABEL=DIR:WEIGHT")
        params["adapters"] = _adapters(args, weights=True)
        title = f"mixture as {out.name}"
    spec = JobSpec("gguf", "engine.gguf.job:run", params, f"gguf: {title}", command_line(args.argv))
    return run_job(args, spec, render)


def live_spec(args: argparse.Namespace, base: str) -> JobSpec:
    """The job that prepares a live mixture of the command's adapters on `base`."""
    if not base:
        raise BadRecipeError(
            "--base is missing", "adapters are converted for the base they were trained from"
        )
    params = {
        "base": base,
        "adapters": {label: entry["path"] for label, entry in _adapters(args, weights=False).items()},
        "type": args.type or "auto",
        "out": str(workspace_of(args).gguf),
    }
    title = f"prepare {Path(base).name} for live mixing"
    return JobSpec("live", "engine.gguf.job:run_live", params, title, command_line(args.argv))


def _adapters(args: argparse.Namespace, weights: bool) -> dict[str, dict[str, Any]]:
    workspace, found = workspace_of(args), {}
    for text in args.adapter:
        label, path, weight = labelled(text)
        if weights and weight is None:
            raise BadRecipeError(
                f"--adapter {text} has no weight", "write LABEL=DIR:WEIGHT, e.g. pt=adapters/pt:0.3"
            )
        if label in found:
            raise BadRecipeError(f"two adapters are labelled {label}", "give each its own label")
        found[label] = {"path": str(existing_path(path, workspace, f"adapter {label}")), "weight": weight}
    return found


def render(result: dict[str, Any]) -> str:
    text = (
        f"{result['out']}\n{result['type']} {result['kind']}, {amount(result['bytes'], 'B')} in "
        f"{duration(result['seconds'])}, sha256 {result['sha256']}"
    )
    if result["verdict"] is None:
        return text if result["kind"] == "adapter" else f"{text}\nnot verified"
    mark = "✓" if result["exit_code"] == 0 else "?" if result["exit_code"] == 4 else "✗"
    return f"{text}\n{mark} {plain(str(result['verdict']['message']))}"


def render_live(result: dict[str, Any]) -> str:
    lines = [f"base     {result['base']}"]
    lines += [f"{label:<8} {path}" for label, path in result["adapters"].items()]
    words = " ".join(f"--adapter {label}={path}:1" for label, path in result["adapters"].items())
    return "\n".join([*lines, f"talk to it: medmerge chat {result['base']} {words}"])
