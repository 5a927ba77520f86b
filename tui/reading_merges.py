"""Merges on disk and what a merge would read and write, as the rows that screens show. Runs in threads.

Reads headers and small JSON files; verdicts and forecasts are made by jobs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import MedmergeError
from engine.weights.adapter import Adapter
from engine.weights.checkpoint import Checkpoint
from engine.weights.discover import find_models
from engine.weights.tensorfile import ITEM_SIZE
from engine.workspace import Workspace
from tui.foreign import number, read_json_object
from tui.results import verdict
from tui.snapshots import MergeRow, PlanView, VerdictView

MANIFEST = "medmerge.json"
REPORT = "verification.json"
_REJECTED = re.compile(r"\.rejected(-\d+)?$")


def read_merges(workspace: Workspace) -> tuple[MergeRow, ...]:
    """Every merge, newest first: checkpoints, merged adapters, and what a verification refused."""
    places = [place for place in workspace.places("merges") if place.is_dir()]
    rows = [merge_row(found.path, found.model, found.error) for found in find_models(places)]
    refused = [path for place in places for path in sorted(place.iterdir()) if _REJECTED.search(path.name)]
    rows += [_refused(path) for path in refused if path.is_dir()]
    rows += [_merged_adapter(path) for path in _merged_adapters(workspace)]
    return tuple(sorted(rows, key=lambda row: row.created, reverse=True))


def _refused(path: Path) -> MergeRow:
    if (path / "adapter_config.json").is_file():
        return _merged_adapter(path)
    try:
        return merge_row(path, Checkpoint.open(path), None)
    except MedmergeError as error:
        return merge_row(path, None, error)


def _merged_adapters(workspace: Workspace) -> Iterator[Path]:
    """Adapters that merges made: they lie among the adapters, and carry a merge's manifest."""
    for place in (*workspace.places("adapters"), *workspace.places("merges")):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if _REJECTED.search(path.name) and place.name == "merges":
                continue  # listed with the refused
            if (path / MANIFEST).is_file() and (path / "adapter_config.json").is_file():
                yield path


def _merged_adapter(path: Path) -> MergeRow:
    try:
        adapter = Adapter.open(path)
    except MedmergeError as error:
        return merge_row(path, None, error, kind="adapter")
    return merge_row(path, None, None, "adapter", adapter.dtype, adapter.nbytes)


def merge_row(
    path: Path,
    model: Checkpoint | None,
    error: MedmergeError | None,
    kind: str = "checkpoint",
    dtype: str = "",
    nbytes: int = 0,
) -> MergeRow:
    """One merge with what its manifest says; a manifest that says nothing usable hides nothing else."""
    note = read_json_object(path / MANIFEST)
    recipe = note.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    entries = recipe.get("adapters") or recipe.get("models")
    entries = entries if isinstance(entries, dict) else {}
    said, parameters = note.get("verification"), note.get("parameters")
    return MergeRow(
        str(path),
        path.name,
        weights=_weights(entries),
        method=str(recipe.get("method") or ""),
        dtype=model.dtype if model else dtype,
        nbytes=model.nbytes if model else nbytes,
        created=path.stat().st_mtime,
        verdict=verdict(said) if isinstance(said, dict) and said.get("done") else None,
        base=str(recipe.get("base") or ""),
        adapters=tuple(
            (str(label), str(entry.get("path")))
            for label, entry in entries.items()
            if isinstance(entry, dict)
        ),
        by_tensor=any(
            isinstance(e, dict) and isinstance(e.get("weight"), dict | list) for e in entries.values()
        ),
        error=error.message if error else "",
        kind=kind,
        rejected=bool(_REJECTED.search(path.name)),
        parameters=tuple((str(k), _short(v)) for k, v in parameters.items())
        if isinstance(parameters, dict)
        else (),
        manifest=bool(recipe),
    )


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else "by tensor"


def _weights(entries: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """(label, weight) of a recipe's entries; the default where selectors give several."""
    found = []
    for label, entry in entries.items():
        value = entry.get("weight") if isinstance(entry, dict) else None
        if isinstance(value, dict):
            value = value.get("default")
        weight = number(value)
        if weight is not None:
            found.append((str(label), weight))
    return tuple(found)


def report(path: Path) -> VerdictView | None:
    """The whole verdict kept beside a merge: verification.json, else what the manifest says; None without one."""
    said = read_json_object(path / REPORT)
    if not said:
        kept = read_json_object(path / MANIFEST).get("verification")
        said = kept if isinstance(kept, dict) and kept.get("done") else {}
    return verdict(said) if said else None


def plan_view(recipe: dict[str, Any]) -> PlanView:
    """A merge's plan from headers only: bytes, tensors, warnings. Raises what `medmerge plan` would say."""
    from engine.merge.plan import make_plan
    from engine.merge.recipe import parse

    plan = make_plan(parse(recipe, "the merge", []))
    probe = plan.recipe.output.parent
    while not probe.exists():
        probe = probe.parent
    read, written = plan.bytes_read, plan.bytes_written
    if plan.recipe.kind == "adapter":  # ranks side by side in float32: as large as all adapters together
        read = sum(adapter.nbytes for adapter in plan.adapters.values())
        written = sum(adapter.nbytes * 4 // ITEM_SIZE[adapter.dtype] for adapter in plan.adapters.values())
    return PlanView(
        read=read,
        written=written,
        memory=0,
        free=shutil.disk_usage(probe).free,
        touched=len(plan.changed),
        copied=sum(1 for tensor in plan.tensors if tensor.copied),
        dtype="float32" if plan.recipe.kind == "adapter" else plan.dtype,
        warnings=plan.warnings,
    )
