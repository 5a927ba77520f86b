"""`medmerge adapters`: what adapters are on disk, whether each is usable, and if not, why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from tui.commands.common import Commands, amount, existing_path, print_json, table, workspace_of
from tui.safe_text import plain

DESCRIPTION = """\
Inspect LoRA adapters: kind, rank, scale, targets, size, base, health (NaN, infinity, all-zero B) and hash,
and below the table what each has besides plain low-rank pairs (DoRA, saved modules, ...).
A folder is searched for adapters; unusable ones are listed with the reason. Without PATH: the workspace's."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "adapters",
        "find and inspect adapters: rank, scale, targets, health, hash",
        DESCRIPTION,
        "  medmerge adapters\n  medmerge adapters ~/lora-out --json",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="adapter folders, or folders to search")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from engine.weights.discover import find_adapters

    workspace = workspace_of(args)
    if args.paths:
        places = [existing_path(text, workspace, "adapter path") for text in args.paths]
        for place in places:
            if not place.is_dir():
                raise BadInputError(
                    f"{place} is not a folder", "an adapter is a folder with adapter_config.json"
                )
    else:
        places = [place for place in workspace.places("adapters") if place.is_dir()]
    found = find_adapters(places)
    rows = [describe(one.path, one.adapter, one.error) for one in found]
    if args.json:
        print_json({"adapters": rows})
    elif not rows:
        print("No adapters in " + ", ".join(str(place) for place in places or [workspace.adapters]))
    else:
        print(render(rows))
    return 0


def describe(path: Path, adapter: Any, error: Any) -> dict[str, Any]:
    """One adapter as JSON; an unusable one has `usable` false, and `error` and `hint`."""
    if adapter is None:
        return {
            "name": path.name,
            "path": str(path),
            "usable": False,
            "error": error.message,
            "hint": error.hint,
        }
    health = adapter.health()
    return {
        "name": adapter.name,
        "path": str(path),
        "usable": not health.not_finite,
        "kind": adapter.kind,
        "rank": adapter.rank,
        "scales": list(adapter.scales),
        "targets": list(adapter.targets),
        "modules": adapter.modules,
        "variants": list(adapter.variants),
        "live": adapter.plain,
        "dtype": adapter.dtype,
        "bytes": adapter.nbytes,
        "base": adapter.base_name,
        "template": adapter.template or None,
        "health": {
            "ok": health.ok,
            "not_finite": list(health.not_finite),
            "zero_b": list(health.zero_b),
            "norm_by_layer": [round(norm, 6) for norm in health.norm_by_layer],
        },
        "sha256": adapter.sha256,
        "error": f"{health.not_finite[0]} holds NaN or infinity" if health.not_finite else "",
    }


def render(rows: list[dict[str, Any]]) -> str:
    usable = [row for row in rows if "rank" in row]
    lines = []
    if usable:
        headers = ["adapter", "kind", "rank", "scale", "targets", "dtype", "size", "base", "health", "sha256"]
        cells = [
            [
                row["name"],
                row["kind"] or "?",
                str(row["rank"]),
                _scales(row["scales"]),
                _targets(row["targets"]),
                row["dtype"],
                amount(row["bytes"], "B"),
                Path(row["base"]).name or "?",
                _health(row["health"], row["modules"]),
                row["sha256"][:12],
            ]
            for row in usable
        ]
        lines.append(table(headers, cells))
        lines += [
            f"{plain(row['name'])}: {plain('; '.join(row['variants']))}"
            + ("" if row["live"] else " (a merge applies all of it; live mixtures cannot)")
            for row in usable
            if row["variants"]
        ]
    for row in rows:
        if "rank" not in row:
            lines.append(f"not usable: {plain(row['path'])}\n  {plain(row['error'])}")
            lines += [f"  → {plain(row['hint'])}"] if row["hint"] else []
    return "\n".join(lines)


def _scales(scales: list[float]) -> str:
    return f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g}-{scales[-1]:g}"


def _targets(targets: list[str]) -> str:
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return (
        "all linear" if set(targets) == linear else ",".join(name.removesuffix("_proj") for name in targets)
    )


def _health(health: dict[str, Any], modules: int) -> str:
    if health["not_finite"]:
        return f"{len(health['not_finite'])} tensors not finite"
    if health["zero_b"]:
        return (
            "untrained (B is zero)" if len(health["zero_b"]) >= modules else f"{len(health['zero_b'])} B zero"
        )
    return "ok"
