"""`medmerge verify`: is a merge what was asked, and which weights are really in it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.jobs import JobSpec
from engine.workspace import Workspace
from tui.commands.common import Commands, command_line, existing_path, labelled, run_job, table, workspace_of
from tui.commands.merge import recipe_from_file
from tui.safe_text import plain

MODULES_SHOWN = 8


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "verify",
        "is a merge what was asked, and which weights are really in it",
        description="Reads a merged folder or a GGUF file back and compares every element with what the weights "
        "ask for, a GGUF's within the bound of its types. Exit code 0: every element is right; 1: it is not what "
        "was asked, and the findings say how; 4: it could not tell. A folder alone is held against its own "
        "medmerge.json, whatever the method, or against --recipe. Adapters or models without weights: it answers "
        "what is in there. A GGUF with --base alone is compared with that checkpoint.",
        examples=(
            "  medmerge verify merges/m\n"
            "  medmerge verify merges/m --base B --adapter pt=adapters/pt:0.3 --adapter sft=adapters/sft:0.7\n"
            "  medmerge verify merges/m --base B --adapter pt=adapters/pt --adapter sft=adapters/sft\n"
            "  medmerge verify merges/m --model a=models/A --model b=models/B\n"
            "  medmerge verify merges/m --recipe mergekit.yaml\n"
            "  medmerge verify m.gguf --base B --adapter pt=adapters/pt:0.3 --adapter sft=adapters/sft:0.7\n"
            "  medmerge verify m.gguf --base merges/m\n"
            "  medmerge verify merges/m --manifest"
        ),
        job=True,
    )
    parser.add_argument(
        "merged", metavar="DIR_OR_GGUF", help="the merged model folder or GGUF file, made by any tool"
    )
    parser.add_argument("--base", metavar="DIR", help="the base model folder")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="LABEL=DIR[:WEIGHT]",
        help="an adapter and the weight asked of it; give all weights, or none to ask what is in there",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="LABEL=DIR[:WEIGHT]",
        help="a full model instead: base + sum of weight * (model - base), or without --base their weighted mean",
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="a recipe or mergekit config that says what was asked, by any method"
    )
    parser.add_argument(
        "--manifest",
        action="store_true",
        help="only hash every file again and compare with medmerge.json (of a GGUF: FILE.gguf.json)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    merged = existing_path(args.merged, workspace, "merge")
    if merged.is_file() and not args.manifest:
        return _run_gguf(args, merged)
    params: dict[str, Any] = {"merged": str(merged), "manifest": bool(args.manifest)}
    alone = not args.base and not args.adapter and not args.model  # then its own manifest says what was asked
    if args.recipe:
        if not alone or args.manifest:
            raise BadRecipeError(
                "--recipe says all that is asked", "leave --base, --adapter, --model and --manifest out"
            )
        params["recipe"] = recipe_from_file(Path(args.recipe), workspace.root, str(merged) + ".asked")
    elif not args.manifest and not alone:
        params |= _question(args)
    title = f"{'hashes of' if args.manifest else 'verify'} {merged.name}"
    spec = JobSpec("verify", "engine.merge.job:run_verify", params, title, command_line(args.argv))
    return run_job(args, spec, render_manifest if args.manifest else render)


def _run_gguf(args: argparse.Namespace, file: Path) -> int:
    params = {"file": str(file), **_question(args, adapters_needed=False)}
    spec = JobSpec(
        "verify", "engine.gguf.job:run_verify", params, f"verify {file.name}", command_line(args.argv)
    )
    return run_job(args, spec, render_gguf)


def _question(args: argparse.Namespace, adapters_needed: bool = True) -> dict[str, Any]:
    """base, adapters and weights (None when none was given)."""
    if args.model:
        if args.adapter or not adapters_needed:
            raise BadRecipeError("--model stands for itself: no --adapter, and no GGUF, goes with it")
        models, weights = _labelled(args.model, "--model", "model", workspace_of(args))
        base = {"base": str(existing_path(args.base, workspace_of(args), "base"))} if args.base else {}
        return {**base, "models": models, "weights": weights}
    if not args.base and not adapters_needed:
        raise BadRecipeError(
            "verifying a GGUF needs --base",
            "the base, with --adapter for each adapter; or alone, the checkpoint the file was made from",
        )
    if not args.base or (adapters_needed and not args.adapter):
        raise BadRecipeError(
            "verify needs --base and at least one --adapter",
            "for example: --base bases/B --adapter pt=adapters/pt:0.3 --adapter sft=adapters/sft:0.7",
        )
    workspace = workspace_of(args)
    adapters, weights = _labelled(args.adapter, "--adapter", "adapter", workspace)
    return {
        "base": str(existing_path(args.base, workspace, "base")), "adapters": adapters, "weights": weights,
    }  # fmt: skip


def _labelled(
    texts: Sequence[str], flag: str, what: str, workspace: Workspace
) -> tuple[dict[str, str], dict[str, float] | None]:
    """Paths and weights by label; None where no weight was given."""
    paths: dict[str, str] = {}
    weights: dict[str, float] = {}
    for text in texts:
        label, path, weight = labelled(text, flag)
        if label in paths:
            raise BadRecipeError(f"two {what}s are labelled {label}", "give each its own label")
        paths[label] = str(existing_path(path, workspace, what))
        if weight is not None:
            weights[label] = weight
    if weights and len(weights) != len(paths):
        missing = ", ".join(label for label in paths if label not in weights)
        raise BadRecipeError(
            f"{missing} has no weight and others have", f"give every {what} a weight, or none of them"
        )
    return paths, weights or None


def render(result: dict[str, Any]) -> str:
    """A verdict for people: the sentence, the three marks per adapter, what does not fit."""
    mark = "✓" if result["ok"] else "?" if result["exit_code"] == 4 else "✗"
    lines = [f"{mark} {plain(str(result['message']))}", ""]
    residual = ""
    if result["effective_weights"]:  # methods that are not linear have none
        lines += [_weights_table(result), ""]
        floor = _number(result["rounding_floor"])
        residual = f"residual {_number(result['residual'])}, where rounding leaves {floor} · "
    lines.append(
        f"{residual}{result['elements_differing']:,} of {result['elements_checked']:,} elements differ"
        f" · {result['unchanged_share']:.1%} are still the base's ({plain(str(result['dtype']))})"
    )
    if not result["ok"]:
        lines += _findings(result) + _worst(result["per_module"])
    lines += [f"note: {plain(warning)}" for warning in result["warnings"]]
    lines += _loss(result)
    return "\n".join(lines)


def render_gguf(result: dict[str, Any]) -> str:
    """The verdict on a GGUF: the sentence, weights with their standard error, types, findings."""
    mark = "✓" if result["ok"] else "?" if result["exit_code"] == 4 else "✗"
    lines = [f"{mark} {plain(str(result['message']))}", ""]
    form = result["format"]
    if result["effective_weights"]:
        lines += [_weights_table(result, result["standard_error"]), ""]
        lines.append(
            f"residual {_number(result['residual'])}, where the format leaves {_number(result['rounding_floor'])}"
        )
    types = ", ".join(f"{count} {plain(str(kind))}" for kind, count in form["types"].items())
    lines.append(
        f"tensors: {types} · {result['elements_differing']:,} of {result['elements_checked']:,} elements beyond "
        "their bound"
    )
    if form["reproduced_share"] is not None:
        lines.append(
            f"{form['reproduced_share']:.2%} of {form['blocks_compared']:,} blocks are what llama.cpp makes of the "
            f"asked values · {form['clipped_share'] or 0:.3%} of the elements lie outside of their block's range"
        )
    if not result["ok"]:
        lines += _findings(result) + _worst(result["per_module"])
    lines += [f"note: {plain(str(warning))}" for warning in result["warnings"]]
    return "\n".join([*lines, *_lost(result)])


def _lost(result: dict[str, Any]) -> list[str]:
    """A word on what the types leave of the weights, where it is more than 2% of one."""
    asked, loss = result["asked"] or result["guessed_weights"] or {}, result["rounding_loss"] or {}
    shares = {label: loss[label] / asked[label] for label in asked if asked[label] and loss.get(label)}
    if not result["ok"] or not any(abs(share) > 0.02 for share in shares.values()):
        return []
    words = ", ".join(f"{label} {share:.0%}" for label, share in shares.items())
    return [f"note: these types are too coarse for part of the deltas and lose of them: {words}"]


def _findings(result: dict[str, Any]) -> list[str]:
    lines = ["", "findings"]
    for finding in result["findings"]:
        detail = f" {_short(plain(finding['detail']))}" if finding["detail"] else ""
        lines.append(f"  {finding['code']}{detail}")
        if finding["message"] != result["message"]:
            lines.append(f"      {plain(finding['message'])}")
    return lines


def _weights_table(result: dict[str, Any], errors: dict[str, float | None] | None = None) -> str:
    expected, found = result["expected_weights"] or {}, result["effective_weights"] or {}
    asked, guessed = result["asked"] or {}, result.get("guessed_weights") or {}
    rows = []
    for label in found:
        first = asked.get(label, guessed.get(label))
        row = [label, "" if first is None else f"{first:g}", f"{expected[label]:.4f}", f"{found[label]:.4f}"]
        if errors is not None:
            row.append("unknown" if errors[label] is None else f"{errors[label]:.4f}")
        rows.append(row)
    headers = ["adapter", "asked" if asked else "likely", "expected", "found"]
    return table([*headers, "±"] if errors is not None else headers, rows)


def _worst(modules: list[dict[str, Any]]) -> list[str]:
    """The modules with the largest share of wrong elements."""
    bad = sorted((m for m in modules if m["differing"]), key=lambda m: -m["differing"] / m["elements"])
    if not bad:
        return []
    rows = [
        [
            module["name"],
            f"{module['differing'] / module['elements']:.2%}",
            " / ".join(f"{w:.3f}" for w in (module["found"] or {}).values()) or "-",
            "-" if module["residual"] is None else f"{module['residual']:.3f}",
        ]
        for module in bad[:MODULES_SHOWN]
    ]
    more = [f"  and {len(bad) - MODULES_SHOWN} more modules"] if len(bad) > MODULES_SHOWN else []
    text = table(["module", "differ", "found", "residual"], rows)
    return ["", *(f"  {line}" for line in text.splitlines()), *more]


def _loss(result: dict[str, Any]) -> list[str]:
    """A word on rounding loss where it is more than 2% of a weight."""
    asked, loss = result["asked"] or {}, result["rounding_loss"] or {}
    lost = [label for label in asked if asked[label] and abs(loss.get(label, 0) / asked[label]) > 0.02]
    if not lost or not result["ok"]:
        return []
    words = ", ".join(f"{label} {loss[label] / asked[label]:.0%}" for label in lost)
    return [
        f"note: {result['dtype']} is too coarse for part of these deltas and loses {words}; "
        "float16 or float32 keep more"
    ]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def render_manifest(result: dict[str, Any]) -> str:
    """What hashing every file again found."""
    lines = [
        f"{'✓' if result['ok'] else '?' if result['exit_code'] == 4 else '✗'} {plain(str(result['message']))}"
    ]
    for key, words in (
        ("changed", "changed"),
        ("missing", "missing"),
        ("extra", "not in the manifest"),
        ("inputs_changed", "input changed"),
        ("inputs_missing", "input no longer there"),
        ("unreadable", "cannot be read"),
        ("links", "lies outside the folder (followed)"),
    ):
        lines += [f"  {words}: {plain(str(Path(name)))}" for name in result.get(key, [])]
    return "\n".join(lines)
