"""`medmerge merge`: merges adapters into a base, writes the manifest, verifies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.jobs import JobSpec
from tui.commands.common import (
    Commands,
    add_strict_base,
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
      --adapter sft=adapters/demo-sft:0.7 --out merges/pt03-sft07 --gguf q8_0
  medmerge merge --base BASE --adapter pt=PT:1 --adapter sft=SFT:1 --method ties --density 0.4 --out OUT
  medmerge merge --model clinical=A --model instruct=B --method slerp --t 0.5 --out OUT
  medmerge merge --base BASE --adapter pt=PT:0.3 --adapter sft=SFT:0.7 --kind adapter --rank 32 --out OUT
  medmerge merge mergekit.yaml --out OUT          a mergekit config, where both have the method"""

DESCRIPTION = """\
Merge LoRA adapters into a base, or full checkpoints:  W_merged = W_base + sum of weight * delta  for linear
(the default), and slerp, ties, dare_linear, dare_ties, soup; docs/merging.md has the formulas. Everything is
summed in float32 and rounded once. The result is written beside its name, verified, and only then named; one
that fails its verification is kept as NAME.rejected (exit code 1). A merge that was interrupted goes on where it
stopped when the same command is run again."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "merge",
        "merge adapters or models, with manifest and verification",
        DESCRIPTION,
        EXAMPLES,
        job=True,
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the verification (the manifest says so)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE",
        help="where the products and sums are done: cpu (default) or cuda; the result satisfies the same check",
    )  # fmt: skip
    add_strict_base(parser)
    parser.set_defaults(run=run)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """A recipe as a file or as flags; shared with `medmerge plan`."""
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe (or mergekit config) in YAML; or use the flags below",
    )
    inputs = parser.add_argument_group("what is merged")
    inputs.add_argument("--base", metavar="DIR", help="the base model's folder")
    inputs.add_argument(
        "--adapter", metavar="LABEL=DIR:WEIGHT", action="append", default=[], help="an adapter and its weight"
    )
    inputs.add_argument(
        "--model", metavar="LABEL=DIR[:WEIGHT]", action="append", default=[],
        help="a full checkpoint instead of adapters (weight 1 unless given)",
    )  # fmt: skip
    inputs.add_argument(
        "--vocabulary", metavar="CHOICE",
        help="models whose tokens differ: error (default), intersection (merge by token), keep_first",
    )  # fmt: skip
    method = parser.add_argument_group("how")
    method.add_argument(
        "--method", metavar="METHOD",
        help="linear (default), task_arithmetic, slerp, ties, dare_linear, dare_ties, soup",
    )  # fmt: skip
    method.add_argument(
        "--t", type=float, metavar="T", help="slerp: 0 is the first, 1 the second (default .5)"
    )
    method.add_argument(
        "--density", type=float, metavar="P", help="ties, dare: the share that is kept (default .5)"
    )
    method.add_argument(
        "--lambda", dest="lam", type=float, metavar="L", help="scales the whole merged change"
    )
    method.add_argument("--seed", type=int, metavar="N", help="dare: of its random masks (default 0)")
    method.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None,
        help="divide by the sum of weights (default: ties, soup, linear of models)",
    )  # fmt: skip
    method.add_argument(
        "--rescale", action=argparse.BooleanOptionalAction, default=None,
        help="dare: divide what is kept by the density (default yes)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="the new folder (or FILE.gguf with --kind gguf)")
    output.add_argument("--dtype", metavar="DTYPE", help="bfloat16, float16 or float32; default: the base's")
    output.add_argument("--kind", metavar="KIND", help="checkpoint (default), adapter, or gguf alone")
    output.add_argument(
        "--rank", type=int, metavar="R", help="adapter: truncate to this rank (default: exact)"
    )
    output.add_argument(
        "--gguf",
        metavar="TYPE",
        action="append",
        default=[],
        help="GGUF of this type as well, e.g. q4_k_m; repeatable",
    )


def recipe_of(args: argparse.Namespace, default_out: str | None = None) -> dict[str, Any]:
    """The recipe asked for, checked, as a document with absolute paths.

    Raises BadRecipeError for a recipe file and flags together, or flags that are missing or make no sense.
    """
    from engine.merge.recipe import parse

    workspace = workspace_of(args)
    places = [Path.cwd(), workspace.root]
    if args.recipe:
        return parse(_from_file(args, workspace.root, default_out), args.recipe, places).to_dict()
    out = args.out or default_out
    needed = [("--out", out)]
    if not args.model:
        needed = [("--base", args.base), ("--adapter", args.adapter), *needed]
    for flag, value in needed:
        if not value:
            raise BadRecipeError(
                f"{flag} is missing",
                "give a recipe file; or --base, --adapter LABEL=DIR:WEIGHT and --out; or --model twice and --out",
            )
    document: dict[str, Any] = {"base": args.base} if args.base else {}
    document |= {"method": args.method or "linear"}
    document |= (
        {"adapters": _entries(args.adapter, "adapter", args.method != "slerp")} if args.adapter else {}
    )
    document |= {"models": _entries(args.model, "model", False)} if args.model else {}
    document |= {"vocabulary": args.vocabulary} if args.vocabulary else {}
    given = {
        "t": args.t, "density": args.density, "lambda": args.lam, "seed": args.seed, "normalize": args.normalize,
        "rescale": args.rescale,
    }  # fmt: skip
    if parameters := {name: value for name, value in given.items() if value is not None}:
        document["parameters"] = parameters
    document["output"] = {"path": out, **_output(args)}
    return parse(document, "command line", places).to_dict()


def _output(args: argparse.Namespace) -> dict[str, Any]:
    given = {"dtype": args.dtype, "kind": args.kind, "rank": args.rank, "gguf": args.gguf}
    return {name: value for name, value in given.items() if value is not None and value != []}


def _from_file(args: argparse.Namespace, root: Path, default_out: str | None) -> dict[str, Any]:
    """A recipe or mergekit file with the output's flags put over it."""
    flags = {
        "--base": args.base, "--adapter": args.adapter, "--model": args.model, "--method": args.method, "--t": args.t,
        "--density": args.density, "--lambda": args.lam, "--seed": args.seed, "--vocabulary": args.vocabulary,
        "--normalize": args.normalize, "--rescale": args.rescale,
    }  # fmt: skip
    for flag, value in flags.items():
        if value is not None and value != []:
            raise BadRecipeError(
                f"a recipe file and {flag} together", "put it into the recipe, or give only flags"
            )
    document = recipe_from_file(Path(args.recipe), root, args.out or default_out)
    document["output"] |= _output(args)
    return document


def recipe_from_file(path: Path, root: Path, out: str | None) -> dict[str, Any]:
    """A recipe or mergekit config as a recipe document; `out`, where given, is its output path.

    Raises BadRecipeError: neither, or a mergekit config without `out`.
    """
    from engine.merge.document import read_yaml
    from engine.merge.mergekit import from_mergekit, is_mergekit
    from engine.merge.recipe import parse

    raw, places = read_yaml(path), [path.absolute().parent, root]
    if not is_mergekit(raw):
        document = parse(raw, str(path), places).to_dict()
        document["output"] |= {"path": out} if out else {}
        return document
    imported = from_mergekit(raw, str(path), places)
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    if out is None:
        raise BadRecipeError("--out is missing", "a mergekit config does not say where its output goes")
    return {**imported.recipe, "output": {**imported.recipe.get("output", {}), "path": out}}


def _entries(flags: list[str], kind: str, needs_weight: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in flags:
        label, path, weight = labelled(text, f"--{kind}")
        if weight is None and needs_weight:
            raise BadRecipeError(
                f"--{kind} {text} has no weight", "write LABEL=DIR:WEIGHT, e.g. pt=adapters/pt:0.3"
            )
        if label in found:
            raise BadRecipeError(f"two {kind}s are labelled {label}", "give each its own label")
        found[label] = {"path": path, **({} if weight is None else {"weight": weight})}
    return found


def run(args: argparse.Namespace) -> int:
    from engine.atomic import refuse_existing

    recipe = recipe_of(args)
    refuse_existing(Path(recipe["output"]["path"]))
    how = {"verify": not args.no_verify, "device": args.device, "strict_base": args.strict_base}
    spec = JobSpec(
        kind="merge",
        target="engine.merge.job:run_merge",
        params={"recipe": recipe, **how},
        title=f"merge {mixture(recipe)} into {Path(recipe['output']['path']).name}",
        command=command_line(args.argv),
    )
    return run_job(args, spec, render)


def mixture(recipe: dict[str, Any]) -> str:
    """The entries and weights of a recipe in one line: `pt 0.3 + sft 0.7`, `slerp(a, b)`, `ties(pt 1 + sft 1)`."""
    listed = recipe.get("adapters") or recipe.get("models") or {}
    method = recipe.get("method", "linear")
    if method == "slerp":
        return f"slerp({', '.join(listed)})"
    terms = " + ".join(
        f"{label} {entry['weight']:g}" if isinstance(entry["weight"], int | float) else f"{label} (by tensor)"
        for label, entry in listed.items()
    )
    return terms if method in ("linear", "task_arithmetic") else f"{method}({terms})"


def render(result: dict[str, Any]) -> str:
    verdict, lines = result["verdict"], []
    if verdict is None:
        lines.append("not verified (--no-verify); check it with: medmerge verify")
    else:
        lines.append(f"{verdict['verdict']}: {verdict['message']}")
        lines += weights_lines(verdict)
    if combined := result.get("combined"):
        lost = (
            "exact"
            if not combined["error"]
            else f"{100 * combined['error']:.2f}% of its size is lost to the rank"
        )
        lines.append(f"one adapter of rank {combined['rank']}, {lost}")
    for file in result.get("ggufs") or []:
        said = file["verdict"]["verdict"] if file["verdict"] else "not verified"
        lines.append(f"{file['type']:<8} {amount(file['bytes'], 'B'):>9}  {said}  {file['out']}")
    if result.get("resumed_bytes"):
        lines.append(f"{amount(result['resumed_bytes'], 'B')} were there from an earlier run")
    lines.append(f"{amount(result['bytes_written'], 'B')} in {duration(result['seconds'])}")
    lines.append(result["out"])
    return "\n".join(lines)


def weights_lines(verdict: dict[str, Any]) -> list[str]:
    """asked, expected and found weights, a line per adapter."""
    asked = verdict.get("asked") or {}
    if not verdict.get("effective_weights"):
        return []
    expected = verdict.get("expected_weights") or {}
    found = verdict.get("effective_weights") or {}
    return [
        f"  {label:<8} asked {_number(asked.get(label))}  expected after rounding {_number(expected.get(label))}"
        f"  found {_number(found.get(label))}"
        for label in asked
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
