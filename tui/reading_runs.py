"""Reads what training runs left on disk: settings, curves, verdict of the audit. Runs in threads.

`curve.jsonl` in a run folder is the truth for its curve: one JSON object a line with a step and numbers. A run from
before that file has the curve that its adapter's `training.json` keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.workspace import Workspace
from tui.foreign import measured, number, read_json_object
from tui.snapshots import Points, TrainRun

RUN_FILE, CURVE_FILE, MANIFEST = "train.json", "curve.jsonl", "training.json"
MAX_CURVE_BYTES = 128_000_000


class RunReader:
    """Reads the runs of a workspace; what has not changed since the last time is not read again."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[object, TrainRun]] = {}

    def read(self, workspace: Workspace) -> tuple[TrainRun, ...]:
        """All training runs, and adapters with a curve whose run is not here; newest first."""
        found: dict[Path, TrainRun] = {}
        for folder in _folders(workspace.places("runs")):
            if (folder / RUN_FILE).is_file():
                found[folder] = self._read(folder, self._adapter_of(folder), read_run)
        taken = {run.adapter for run in found.values()}
        for folder in _folders(workspace.places("adapters")):
            if str(folder) not in taken and (folder / MANIFEST).is_file():
                run = self._read(folder, None, read_adapter)
                if run.curves:
                    found[folder] = run
        self._kept = {folder: kept for folder, kept in self._kept.items() if folder in found}
        return tuple(sorted(found.values(), key=lambda run: (-run.created, run.path)))

    def _adapter_of(self, folder: Path) -> Path | None:
        """Where the run's adapter goes, as far as it was read before (for the stamp only)."""
        kept = self._kept.get(folder)
        output = kept[1].config.get("output") if kept else None
        return Path(str(output)) if output else None

    def _read(self, folder: Path, adapter: Path | None, read: Any) -> TrainRun:
        stamp = _stamp(folder, adapter)
        kept = self._kept.get(folder)
        if kept and kept[0] == stamp:
            return kept[1]
        run: TrainRun = read(folder)
        output = run.config.get("output")
        self._kept[folder] = (
            _stamp(folder, Path(str(output)) if output and adapter is None else adapter),
            run,
        )
        return run


def _folders(places: Iterable[Path]) -> list[Path]:
    return [
        entry for place in places if place.is_dir() for entry in sorted(place.iterdir()) if entry.is_dir()
    ]


def _stamp(folder: Path, adapter: Path | None) -> object:
    """Changes when anything read of a run does."""
    paths = [folder / RUN_FILE, folder / CURVE_FILE, folder / MANIFEST, folder / "checkpoints"]
    if adapter is not None:
        paths.append(adapter / MANIFEST)
    return tuple(_changed(path) for path in paths)


def _changed(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_run(folder: Path) -> TrainRun:
    """A run folder: train.json, curve.jsonl, whether it has a checkpoint, and its adapter if that is there."""
    note = read_json_object(folder / RUN_FILE)
    config = _object(note.get("config"))
    output = Path(str(config.get("output") or ""))
    manifest = read_json_object(output / MANIFEST) if config.get("output") else {}
    finished = _modified(output / MANIFEST) if manifest else 0.0
    curves = read_curve(folder / CURVE_FILE) or curves_of(manifest.get("curve"))
    steps = number(note.get("steps")) or number(manifest.get("steps")) or number(config.get("max_steps")) or 0
    return TrainRun(
        str(folder),
        folder.name,
        kind=_kind(config.get("kind")),
        created=_created(note) or _modified(folder / RUN_FILE),
        config=config,
        curves=curves,
        audit=_object(note.get("audit")) or _object(manifest.get("audit")),
        adapter=str(output) if manifest else "",
        finished=finished,
        steps=int(steps),
        resumable=_has_checkpoint(folder / "checkpoints"),
    )


def read_adapter(folder: Path) -> TrainRun:
    """An adapter that carries the curve it was trained with."""
    manifest = read_json_object(folder / MANIFEST)
    when = _modified(folder / MANIFEST)
    return TrainRun(
        str(folder),
        folder.name,
        kind=_kind(manifest.get("kind")),
        created=when,
        config=_object(manifest.get("settings")),
        curves=curves_of(manifest.get("curve")),
        audit=_object(manifest.get("audit")),
        adapter=str(folder),
        finished=when,
        steps=int(number(manifest.get("steps")) or 0),
    )


def read_curve(path: Path) -> dict[str, Points]:
    """The series of a curve file by name; {} when there is none. A torn or broken line is passed over."""
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_CURVE_BYTES).split(b"\n")
    except OSError:
        return {}
    lines.pop()  # what follows the last newline is nothing, or was not written to its end
    return curves_of([_parsed(line) for line in lines])


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def curves_of(entries: Any) -> dict[str, Points]:
    """(step, value) by series from [{step, loss, ...}]. An earlier step than the one before starts that part over: a
    run went on from a checkpoint before the point where it had stopped."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in entries if isinstance(entries, list) else ():
        step = number(entry.get("step")) if isinstance(entry, dict) else None
        if step is None:
            continue
        for name, value in entry.items():
            found = measured(value)
            if name == "step" or found is None:
                continue
            points = series.setdefault(str(name), [])
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, found))
    return {name: tuple(points) for name, points in series.items()}


def _has_checkpoint(folder: Path) -> bool:
    from training.checkpoints import newest

    return newest(folder, required=False) is not None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _kind(value: Any) -> str:
    return value if value in ("pt", "sft") else ""


def _created(note: dict[str, Any]) -> float:
    """When the run says it was started: Unix seconds or an ISO time; 0 when it does not."""
    value = note.get("started")
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return 0.0
    return number(value) or 0.0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
