"""`medmerge merge`: merges adapters into a base, writes the manifest, verifies."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.jobs import JobSpec
from tui.commands.common import (
    Commands,
    amount,
    command_line,
    duration,
    labelled,
    run_job,
    workspace_of,
)

EXAMPLES = """\
  medmerge merge recipe.yaml
  medmerge merge --base bases/smollm2-135m-instruct --adapter pt=adapters/demo-pt:0.3 \\
      --adapter sft=adapters/demo-sft:0.7 --method linear --out merges/pt03-sft07"""

DESCRIPTION = """\
Merge LoRA adapters into a base:  W_merged = W_base + sum of weight * scale * B @ A,
summed in float32 and rounded once. The result is written beside its name, verified, and only then named;
one that fails its verification is kept as NAME.rejected (exit code 1)."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "merge", "merge adapters into a base, with manifest and verification", DESCRIPTION, EXAMPLES, job=True
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the verification (the manifest says so)"
    )
    parser.set_defaults(run=run)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """A recipe as a file or as flags; shared with `medmerge plan`."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a recipe in YAML; or use the flags below"
    )
    parser.add_argument("--base", metavar="DIR", help="the base model's folder")
    parser.add_argument(
        "--adapter", metavar="LABEL=DIR:WEIGHT", action="append", default=[], help="an adapter and its weight"
    )
    parser.add_argument(
        "--method", metavar="METHOD", help="linear (default) or task_arithmetic: the same sum"
    )
    parser.add_argument("--out", metavar="DIR", help="the new folder")
    parser.add_argument("--dtype", metavar="DTYPE", help="bfloat16, float16 or float32; default: the base's")


def recipe_of(args: argparse.Namespace, default_out: str | None = None) -> dict[str, Any]:
    """The recipe asked for, checked, as a document with absolute paths.

    Raises BadRecipeError for a recipe file and flags together, or flags that are missing or make no sense.
    """
    from engine.merge.recipe import parse, read_recipe

    workspace = workspace_of(args)
    given = [
        flag
        for flag, value in (("--base", args.base), ("--adapter", args.adapter), ("--method", args.method))
        if value
    ]
    if args.recipe:
        if given:
            raise BadRecipeError(
                f"a recipe file and {given[0]} together", "put it into the recipe, or give only flags"
            )
        document = read_recipe(Path(args.recipe), [workspace.root]).to_dict()
        if args.out:
            document["output"]["path"] = args.out
        if args.dtype:
            document["output"]["dtype"] = args.dtype
        return parse(document, args.recipe, [Path.cwd(), workspace.root]).to_dict()
    out = args.out or default_out
    for flag, value in (("--base", args.base), ("--adapter", args.adapter), ("--out", out)):
        if not value:
            raise BadRecipeError(
                f"{flag} is missing", "give a recipe file, or --base, --adapter LABEL=DIR:WEIGHT and --out"
            )
    document = {
        "base": args.base,
        "method": args.method or "linear",
        "adapters": _adapters(args.adapter),
        "output": {"path": out, "dtype": args.dtype},
    }
    return parse(document, "command line", [Path.cwd(), workspace.root]).to_dict()


def _adapters(flags: list[str]) -> dict[str, Any]:
    adapters: dict[str, Any] = {}
    for text in flags:
        label, path, weight = labelled(text)
        if weight is None:
            raise BadRecipeError(
                f"--adapter {text} has no weight", "write LABEL=DIR:WEIGHT, e.g. pt=adapters/pt:0.3"
            )
        if label in adapters:
            raise BadRecipeError(f"two adapters are labelled {label}", "give each its own label")
        adapters[label] = {"path": path, "weight": weight}
    return adapters


def run(args: argparse.Namespace) -> int:
    from engine.atomic import refuse_existing

    recipe = recipe_of(args)
    refuse_existing(Path(recipe["output"]["path"]))
    spec = JobSpec(
        kind="merge",
        target="engine.merge.job:run_merge",
        params={"recipe": recipe, "verify": not args.no_verify},
        title=f"merge {mixture(recipe)} into {Path(recipe['output']['path']).name}",
        command=command_line(args.argv),
    )
    return run_job(args, spec, render)


def mixture(recipe: dict[str, Any]) -> str:
    """The adapters and weights of a recipe in one line: `pt 0.3 + sft 0.7`."""
    return " + ".join(
        f"{label} {entry['weight']:g}" if not isinstance(entry["weight"], dict) else f"{label} (by tensor)"
        for label, entry in recipe["adapters"].items()
    )


def render(result: dict[str, Any]) -> str:
    verdict, lines = result["verdict"], []
    if verdict is None:
        lines.append("not verified (--no-verify); check it with: medmerge verify")
    else:
        lines.append(f"{verdict['verdict']}: {verdict['message']}")
        lines += weights_lines(verdict)
    lines.append(f"{amount(result['bytes_written'], 'B')} in {duration(result['seconds'])}")
    lines.append(result["out"])
    return "\n".join(lines)


def weights_lines(verdict: dict[str, Any]) -> list[str]:
    """asked, expected and found weights, a line per adapter."""
    asked = verdict.get("asked") or {}
    expected = verdict.get("expected_weights") or {}
    found = verdict.get("effective_weights") or {}
    return [
        f"  {label:<8} asked {_number(asked.get(label))}  expected after rounding {_number(expected.get(label))}"
        f"  found {_number(found.get(label))}"
        for label in asked
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
