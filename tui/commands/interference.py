"""`medmerge interference`: how much adapters overlap, before they are merged."""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import sys
from typing import Any

from engine.errors import BadRecipeError
from engine.jobs import JobSpec
from tui.commands.common import Commands, command_line, existing_path, labelled, run_job, table, workspace_of
from tui.safe_text import plain
from tui.strip import cells, largest

MODULES_SHOWN = 12
FORMATS = ("table", "csv", "json")
COLUMNS = (
    "cosine", "norm_ratio", "sign_conflict", "subspace_overlap", "column_overlap", "row_overlap",
    "overlap_by_chance", "column_angle_smallest", "column_angle_median", "row_angle_smallest",
    "row_angle_median", "sign_elements",
)  # fmt: skip


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "interference",
        "per-module overlap of adapters: cosine, norms, angles of their spaces, sign conflict",
        description="Compares adapters module by module from their low-rank factors: seconds even for large "
        "models. The base is read by header only, to check that the adapters fit it.",
        examples="  medmerge interference --base B --adapter pt=adapters/pt --adapter sft=adapters/sft\n"
        "  medmerge interference --adapter pt=adapters/pt --adapter sft=adapters/sft --format csv > modules.csv",
        job=True,
    )
    parser.add_argument("--base", metavar="DIR", help="check that the adapters fit this base (optional)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="LABEL=DIR", help="an adapter; give two or more"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="csv: one row per module and pair (default: table)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    adapters: dict[str, str] = {}
    for text in args.adapter:
        label, path, _ = labelled(text)
        if label in adapters:
            raise BadRecipeError(f"two adapters are labelled {label}", "give each its own label")
        adapters[label] = str(existing_path(path, workspace, "adapter"))
    if len(adapters) < 2:
        raise BadRecipeError("interference needs two adapters", "for example: --adapter pt=P --adapter sft=S")
    base = str(existing_path(args.base, workspace, "base")) if args.base else None
    params = {"adapters": adapters, "base": base}
    title = f"interference of {', '.join(adapters)}"
    spec = JobSpec(
        "interference", "engine.merge.job:run_interference", params, title, command_line(args.argv)
    )
    args.json = args.json or args.format == "json"
    return run_job(args, spec, csv_text if args.format == "csv" else render)


def csv_text(result: dict[str, Any]) -> str:
    """One row per module and pair. Angles in degrees, overlaps and shares from 0 to 1; empty: not defined."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["first", "second", "module", "norm_first", "norm_second", *COLUMNS])
    for row in result["modules"]:
        first, second = row["pair"]
        norms = [row["norm"][first], row["norm"][second]]
        writer.writerow(
            [plain(first), plain(second), plain(row["name"]), *norms, *(row[name] for name in COLUMNS)]
        )
    return out.getvalue().rstrip("\n")


def strip_text(strip: dict[str, Any], width: int, colour: bool) -> str:
    """The cosine of every layer (a column) and kind of module (a line), as blocks; "" without layers."""
    rows, layers = strip["cosine"], strip["layers"]
    top = largest(rows)
    if not layers or top == 0:
        return ""
    names = [plain(kind) for kind in strip["kinds"]]
    edge = max(len(name) for name in names)
    head = f"cosine by layer, {layers[0]} to {layers[-1]}: █ is {top:.2f}"
    if any(value is not None and value < 0 for row in rows for value in row):
        head += ", ░▒▓ below 0"
    lines = [head]
    for name, row in zip(names, rows, strict=True):
        lines.append(f"  {name:<{edge}}  {cells(row, top, max(8, width - edge - 4), colour)}".rstrip())
    return "\n".join(lines)


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def render(result: dict[str, Any]) -> str:
    """The overall numbers of each pair, and the modules that overlap most."""
    lines = []
    for pair in result["pairs"]:
        first, second = pair["pair"]
        lines.append(
            f"{plain(first)} and {plain(second)}: cosine {pair['cosine']:.3f} · sign conflict "
            f"{pair['sign_conflict']:.1%} (chance 50%) · shared subspace {pair['subspace_overlap']:.1%} "
            f"(chance {pair['overlap_by_chance']:.1%})"
        )
        lines.append(
            f"  norms {pair['norm'][first]:.3f} and {pair['norm'][second]:.3f}{_ratio(pair)} over {pair['modules']} "
            "shared modules"
        )
        lines.append(f"  angles: columns {_angles(pair, 'column')} · rows {_angles(pair, 'row')}")
    for strip in result["strips"]:
        drawn = strip_text(strip, shutil.get_terminal_size().columns, _coloured())
        if drawn:
            which = " and ".join(plain(label) for label in strip["pair"])
            lines += ["", f"{which}: {drawn}" if len(result["strips"]) > 1 else drawn]
    for label, names in result["only_in"].items():
        lines.append(f"  only in {plain(label)}: {len(names)} modules")
    for label, variants in result["not_compared"].items():
        lines.append(
            f"  only the low-rank pairs of {plain(label)} are compared; it has {plain(', '.join(variants))}"
        )
    most = sorted(result["modules"], key=lambda row: -abs(row["cosine"]))[:MODULES_SHOWN]
    several = len(result["pairs"]) > 1
    rows = [
        [
            row["name"] + (f" ({' '.join(row['pair'])})" if several else ""),
            f"{row['cosine']:.3f}",
            f"{row['sign_conflict']:.1%}",
            f"{row['subspace_overlap']:.1%}",
            _degrees(row["column_angle_smallest"]),
            _degrees(row["row_angle_smallest"]),
            *(f"{row['norm'][label]:.3f}" for label in row["pair"]),
        ]
        for row in most
    ]
    names = ["norm 1", "norm 2"] if several else [f"norm {label}" for label in result["labels"]]
    lines += [
        "",
        table(["most alike", "cosine", "sign conflict", "subspace", "columns", "rows", *names], rows),
    ]
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    return f" (ratio {row['norm_ratio']:.2f})" if row["norm_ratio"] is not None else ""


def _angles(row: dict[str, Any], space: str) -> str:
    """`12.3° smallest, 80.1° median`."""
    return f"{_degrees(row[f'{space}_angle_smallest'])} smallest, {_degrees(row[f'{space}_angle_median'])} median"


def _degrees(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}°"
