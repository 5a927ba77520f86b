"""Turns what the engine finds on disk into the rows that screens show. Runs in threads; imports numpy.

Only headers and small JSON files are read here, except `adapter_detail`, which reads one adapter's weights.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from engine.errors import MedmergeError
from engine.template_check import of_adapter
from engine.weights.adapter import Adapter
from engine.weights.checkpoint import Checkpoint
from engine.weights.discover import FoundAdapter, find_adapters, find_models
from engine.weights.identity import noted_sha256, trained_on
from engine.workspace import Workspace
from tui.foreign import read_json_object
from tui.reading_merges import read_merges
from tui.snapshots import (
    AdapterDetail,
    AdapterRow,
    DataFile,
    GgufRow,
    ModelRow,
    Overview,
    RunRow,
)

MAX_CURVE = 2000
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt", ".md", ".yaml", ".yml")


def read_workspace(workspace: Workspace, base: str) -> Overview:
    """Everything in the workspace, adapters judged against the `base` folder (or alone when it is "")."""
    models = [
        _model(found.path, found.model, found.error) for found in find_models(workspace.places("bases"))
    ]
    chosen = _open_base(base or (models[0].path if len(models) == 1 else ""))
    adapters = [_adapter(found, chosen) for found in find_adapters(workspace.places("adapters"))]
    probe = workspace.root if workspace.root.exists() else Path.home()
    return Overview(
        root=str(workspace.root),
        models=tuple(models),
        adapters=tuple(adapters),
        merges=read_merges(workspace),
        ggufs=tuple(_ggufs(workspace)),
        runs=tuple(_runs(workspace.places("runs"))),
        data=tuple(_data(workspace.places("data"))),
        free=shutil.disk_usage(probe).free,
    )


def _model(path: Path, model: Checkpoint | None, error: MedmergeError | None) -> ModelRow:
    if model is None:
        return ModelRow(str(path), path.name, error=error.message if error else "cannot be read")
    return ModelRow(
        str(path), model.name, model.architecture, model.dtype, model.parameters, model.layers, model.nbytes
    )


def _open_base(path: str) -> Checkpoint | None:
    if not path:
        return None
    try:
        return Checkpoint.open(Path(path))
    except MedmergeError:
        return None  # the base's own row says what is wrong with it


def _adapter(found: FoundAdapter, base: Checkpoint | None) -> AdapterRow:
    adapter = found.adapter
    if adapter is None:
        error = found.error
        return AdapterRow(
            str(found.path),
            found.path.name,
            error=error.message if error else "cannot be read",
            hint=error.hint if error else "",
        )
    misfit = warning = ""
    named = trained_on(adapter.name, adapter, base, noted_sha256(base)) if base is not None else None
    if base is not None:
        try:
            adapter.changes(base)
        except MedmergeError as error:
            misfit = error.message
        if (
            not misfit
            and not (named and named.same)
            and adapter.base_name
            and Path(adapter.base_name).name not in (base.folder.name, base.name)
        ):
            warning = f"its config names another base: {adapter.base_name}"
    return AdapterRow(
        str(found.path),
        adapter.name,
        kind=adapter.kind,
        rank=adapter.rank,
        scales=adapter.scales,
        modules=adapter.modules,
        targets=adapter.targets,
        variants=adapter.variants,
        dtype=adapter.dtype,
        nbytes=adapter.nbytes,
        base_name=adapter.base_name,
        template=adapter.template,
        trained=of_adapter(adapter.name, adapter),
        trained_on=named.name or "a base without a name" if named else "",
        same_base=named.same if named else None,
        misfit=misfit,
        warning=warning,
    )


def adapter_detail(path: Path) -> AdapterDetail:
    """Health, norm by layer and training story of one adapter; reads its weights once."""
    try:
        adapter = Adapter.open(path)
        health = adapter.health()
    except MedmergeError as error:
        return AdapterDetail(str(path), error=error.message)
    return AdapterDetail(
        str(path),
        norms=health.norm_by_layer,
        not_finite=health.not_finite,
        zero_b=health.zero_b,
        facts=_training_facts(adapter.training),
        curve=curve_points(adapter.training.get("curve"), "loss"),
    )


def _training_facts(training: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The manifest's story in a few lines; anything missing or of another shape is left out."""
    facts = []
    settings = training.get("settings")
    if isinstance(settings, dict):
        shown = [
            f"{name} {settings[key]}"
            for key, name in (("epochs", "epochs"), ("learning_rate", "lr"), ("cutoff", "cutoff"))
            if key in settings
        ]
        facts.append(("settings", ", ".join(shown)))
    tokens = training.get("tokens")
    if isinstance(tokens, dict):
        named = [
            f"{tokens[key]:,} {key}" for key in ("processed", "trained") if isinstance(tokens.get(key), int)
        ]
        facts.append(("tokens", ", ".join(named)))
    elif isinstance(tokens, int):
        facts.append(("tokens", f"{tokens:,}"))
    data = training.get("data")
    if isinstance(data, list):
        named = [
            f"{Path(str(entry.get('file', '?'))).name} ({entry.get('rows', '?')} rows)"
            for entry in data
            if isinstance(entry, dict)
        ]
        facts.append(("data", ", ".join(named)))
    audit = training.get("audit")
    if isinstance(audit, dict) and audit:
        facts.append(("audit", audit_words(audit)))
    return tuple((what, value) for what, value in facts if value)


def audit_words(audit: dict[str, Any]) -> str:
    """The leakage audit in words, from its counts."""
    counts = audit.get("counts") if isinstance(audit.get("counts"), dict) else audit
    leaks = counts.get("leaks", counts.get("leaked")) if isinstance(counts, dict) else None
    leaks = len(leaks) if isinstance(leaks, list) else leaks
    if not isinstance(leaks, int):
        return ""
    return "clean, 0 leaks" if leaks == 0 else f"{leaks} leaks"


def curve_points(curve: Any, key: str) -> tuple[tuple[float, float], ...]:
    """(step, value) of the entries of a stored curve that hold a finite `key`."""
    if not isinstance(curve, list):
        return ()
    points = []
    for entry in curve[:MAX_CURVE]:
        if not isinstance(entry, dict):
            continue
        step, value = entry.get("step"), entry.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value):
            points.append((float(step), float(value)))
    return tuple(points)


def _ggufs(workspace: Workspace) -> list[GgufRow]:
    """The files in gguf/, and those that merges wrote beside themselves."""
    places = [place for place in workspace.places("gguf") if place.is_dir()]
    beside = [place for place in workspace.places("merges") if place.is_dir()]
    files = [path for place in places for path in sorted(place.rglob("*.gguf"))]
    files += [path for place in beside for path in sorted(place.glob("*.gguf"))]
    return [
        GgufRow(
            str(path), path.name, path.stat().st_size, "adapter" if "lora" in path.name.lower() else "model"
        )
        for path in files
        if path.is_file()
    ]


def _runs(places: list[Path]) -> list[RunRow]:
    rows = []
    for folder in (
        entry for place in places if place.is_dir() for entry in place.iterdir() if entry.is_dir()
    ):
        created = folder.stat().st_mtime
        if (folder / "train.json").is_file():
            rows.append(RunRow(str(folder), folder.name, "train", created))
        elif (folder / "cells.json").is_file():
            note = read_json_object(folder / "cells.json")
            cells = note.get("cells")
            cells = [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
            there = [(folder / "cells" / f"{cell.get('hash')}.parquet").is_file() for cell in cells]
            failed = sum(
                1 for cell, done in zip(cells, there, strict=True) if cell.get("failed") and not done
            )
            kind = "sweep" if note.get("mode") == "sweep" else "eval"
            rows.append(RunRow(str(folder), folder.name, kind, created, len(cells), sum(there), failed))
    return sorted(rows, key=lambda row: row.created, reverse=True)


def _data(places: list[Path]) -> list[DataFile]:
    """Data sets and configs; hidden files and what cannot be read are left out."""
    files = [path for place in places if place.is_dir() for path in sorted(place.iterdir())]
    rows = []
    for path in files:
        if path.name.startswith(".") or path.suffix.lower() not in DATA_SUFFIXES or not path.is_file():
            continue
        stat = path.stat()
        rows.append(DataFile(str(path), path.name, stat.st_size, stat.st_mtime))
    return rows
