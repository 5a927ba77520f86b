"""`medmerge plan`: what a merge would read, write, cost and lose to rounding, before anything is written."""

from __future__ import annotations

import argparse
import re
from typing import Any

from engine.jobs import JobSpec
from tui.commands.common import Commands, amount, command_line, duration, run_job, table
from tui.commands.merge import add_recipe_options, mixture, recipe_of

DESCRIPTION = """\
Resolve a recipe tensor by tensor and say what the merge would read and write, the memory and seconds it
needs, and how much of each adapter rounding to the output's dtype will lose. Nothing is written."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "plan",
        "what a merge would do and cost, before it does",
        DESCRIPTION,
        "  medmerge plan recipe.yaml\n  medmerge plan --base BASE --adapter pt=PT:0.3 --adapter sft=SFT:0.7 --out OUT",
    )
    add_recipe_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = recipe_of(args, default_out="merge")
    spec = JobSpec(
        kind="plan",
        target="engine.merge.job:run_plan",
        params={"recipe": recipe},
        title=f"plan {mixture(recipe)}",
        command=command_line(args.argv),
    )
    return run_job(args, spec, render)


def render(result: dict[str, Any]) -> str:
    kind = result["recipe"]["output"].get("kind", "checkpoint")
    others = [f"{amount(size, 'B')} of {name}" for name, size in result["outputs"].items()]
    whole = kind == "checkpoint"  # seconds and rounding loss are forecast for a checkpoint only
    first = [f"{amount(result['bytes_written'], 'B')} in {result['shards']} file(s)"] if whole else []
    lines = [
        f"{mixture(result['recipe'])} on {result['base']['name']}, {result['dtype']}",
        f"  writes   {', '.join([*first, *others])} to {result['output']}"
        f" ({amount(result['free_bytes'], 'B')} free)",
        f"  reads    {amount(result['bytes_read'], 'B')}",
        f"  changes  {result['tensors_changed']} tensors, copies {result['tensors_copied']}",
        f"  memory   about {amount(result['memory_bytes'], 'B')}",
    ]
    if result["seconds"] is not None and whole:
        lines.append(f"  takes    about {duration(result['seconds'])}, and verification after it")
    listed = result["recipe"].get("adapters") or result["recipe"]["models"]
    lost, expected = (
        result[key] if whole and result[key] else {} for key in ("rounding_loss", "expected_weights")
    )
    rows = []
    for label, own in (result["adapters"] | result["models"]).items():
        asked = listed[label]["weight"]
        found = expected.get(label)
        rows.append(
            [
                label,
                f"{asked:g}" if isinstance(asked, int | float) else "by tensor",
                "-" if found is None else f"{found:.4f}",
                f"{100 * lost[label]:.1f}%" if label in lost else "-",
                str(own.get("rank", "-")),
                str(own["tensors"]),
            ]
        )
    kind = "adapter" if result["adapters"] else "model"
    lines += ["", table([kind, "asked", "expected", "lost to rounding", "rank", "tensors"], rows)]
    if resolved := by_tensor(result):
        lines += ["", resolved]
    if result["unchanged_share"] is not None and whole:
        lines.append(
            f"{100 * result['unchanged_share']:.0f}% of the changed tensors' elements keep their value"
        )
    return "\n".join(lines)


def by_tensor(result: dict[str, Any]) -> str:
    """Layers against module kinds, where a number differs or was asked by selector; empty where none was."""
    labels = list(result["adapters"] | result["models"])
    asked = _asked(result["recipe"])
    several = [
        key
        for key in ("weight", "density", "t")
        if _differs(result["tensors"], key, labels) or any(isinstance(own, dict | list) for own in asked[key])
    ]
    if not several:
        return ""
    by_layer: dict[str, dict[tuple[str, ...], list[str]]] = {}  # layer -> numbers -> modules
    everything: dict[str, set[str]] = {}  # "self_attn" -> its modules, over all layers
    for tensor in result["tensors"]:
        layer = re.search(r"\.(\d+)\.", tensor["name"])
        name = tensor["name"].removesuffix(".weight")
        module = name[layer.end() :] if layer else name
        everything.setdefault(module.partition(".")[0], set()).add(module)
        own = by_layer.setdefault(layer[1] if layer else "", {})
        own.setdefault(tuple(_numbers(tensor, several, labels)), []).append(module)
    rows: dict[tuple[str, ...], list[str]] = {}
    for number, groups in sorted(by_layer.items(), key=lambda item: int(item[0] or -1)):
        for numbers, modules in groups.items():
            rows.setdefault((_together(modules, everything), *numbers), []).append(number)
    headers = [
        "layers",
        "tensors",
        *(f"{key} {label}".strip() for key in several for label in _columns(key, labels)),
    ]
    return table(headers, [[spans(numbers), *key] for key, numbers in rows.items()])


def _asked(recipe: dict[str, Any]) -> dict[str, list[Any]]:
    """Every weight, density and t the recipe gives: a number, a gradient, or either by selector."""
    entries = [*(recipe.get("adapters") or recipe.get("models") or {}).values()]
    everywhere = recipe.get("parameters") or {}
    return {
        "weight": [entry.get("weight") for entry in entries],
        "density": [*(entry.get("density") for entry in entries), everywhere.get("density")],
        "t": [everywhere.get("t")],
    }


def _together(modules: list[str], everything: dict[str, set[str]]) -> str:
    """Module names in short: `self_attn.*` where all of them are there."""
    found = []
    for first in dict.fromkeys(module.partition(".")[0] for module in modules):
        own = [module for module in modules if module.partition(".")[0] == first]
        found += [f"{first}.*"] if len(own) > 1 and set(own) == everything[first] else own
    return ", ".join(found)


def _columns(key: str, labels: list[str]) -> list[str]:
    return [""] if key == "t" else labels


def _numbers(tensor: dict[str, Any], keys: list[str], labels: list[str]) -> list[str]:
    found = []
    for key in keys:
        values = (
            [tensor.get("t")] if key == "t" else [tensor["parts"].get(label, {}).get(key) for label in labels]
        )
        found += ["-" if value is None else f"{value:.4g}" for value in values]
    return found


def _differs(tensors: list[dict[str, Any]], key: str, labels: list[str]) -> bool:
    """Whether an entry's number is not the same everywhere (entries that leave a tensor alone do not count)."""
    if key == "t":
        return len({tensor["t"] for tensor in tensors if "t" in tensor}) > 1
    return any(
        len({tensor["parts"][label].get(key) for tensor in tensors if label in tensor["parts"]}) > 1
        for label in labels
    )


def spans(numbers: list[str]) -> str:
    """Layer numbers as ranges: 0-3, 6."""
    found: list[list[int]] = []
    for number in sorted(int(text) for text in numbers if text):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)
