"""The evaluation job: every cell of a config measured on one loaded model, rows kept as they come.

Target `engine.evaluate.job:run` with params {"config": resolved config, "out": run folder, "mode": "eval" |
"sweep", "resume": bool}. Stopping it at any point loses at most the batch it is in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import template_check
from engine.errors import BadRecipeError
from engine.evaluate.cells import Cell, Identity, plan_cells
from engine.evaluate.config import EvalConfig, parse_config
from engine.evaluate.data import Sample, read_samples
from engine.evaluate.store import RunStore
from engine.gguf.trained import trained_in
from engine.jobs.events import EventWriter
from engine.template_check import of_adapter
from engine.weights import Adapter, Checkpoint
from engine.weights.identity import base_warnings, compare_bases

ADVICE = "templates: [{name}]"  # how a config chooses one


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Measure everything the config asks for; returns the table.

    Result: {"run": folder, "rows": metric rows, "cells": how many, "reused": taken from other runs, "trained_on":
    {label: {name, sha256, same}} of adapters that name the hash of their base, "warnings": sentences,
    "seconds": wall time, "exit_code": 0}. With `strict_base` another base than an adapter's own is refused.
    """
    started = time.monotonic()
    mode = str(params.get("mode", "sweep"))
    config = parse_config(params["config"], "config", mode=mode)
    store = RunStore(Path(params["out"]))
    samples = {task.name: read_samples(task.data, task.kind, task.limit) for task in config.tasks}
    base = Checkpoint.open(config.base)
    adapters = {label: Adapter.open(path) for label, path in config.adapters.items()}
    for adapter in adapters.values():
        adapter.match(base)
    warnings = warn_about_templates(config, adapters, events)
    identity = _identify(config, base, adapters, events)
    bases, others = compare_with_base(adapters, base, events, bool(params.get("strict_base", False)))
    cells = plan_cells(config, identity)
    with store.writing(config.to_dict(), bool(params.get("resume", False))):
        store.write_cells(mode, cells)
        reused = _reuse(store, cells, events)
        _measure(_Session(config, base, adapters, store, samples, cells, events))
        store.write_cells(mode, cells)
        from engine.evaluate.tables import compute

        rows = [row.to_dict() for row in compute(store.folder, write=True)]
        for row in rows:
            events.row(**row)
    return {
        "run": str(store.folder),
        "rows": rows,
        "cells": len(cells),
        "reused": reused,
        "trained_on": bases,
        "warnings": [*warnings, *others],
        "seconds": round(time.monotonic() - started, 1),
        "exit_code": 0,
    }


def warn_about_templates(
    config: EvalConfig, adapters: Mapping[str, Adapter], events: EventWriter
) -> list[str]:
    """Say when an adapter, or one inside the base, was trained with another chat template than one used here, or
    with an unknown one. Returns what was said."""
    if not any(task.kind in ("generation", "probes") for task in config.tasks):
        return []
    trained = [of_adapter(label, adapter) for label, adapter in adapters.items()] + trained_in(config.base)
    said = [
        words
        for template in config.templates
        for words in template_check.warnings(trained, template_check.choose(template, config.base), ADVICE)
    ]
    if len(config.templates) > 1:
        said.append("numbers from different templates are different prompts: compare within one template")
    for words in said:
        events.warning(words)
    return said


def compare_with_base(
    adapters: Mapping[str, Adapter], base: Checkpoint, events: EventWriter, strict: bool
) -> tuple[dict[str, Any], list[str]]:
    """The bases the adapters were trained on against this one, whose hashes are known by now: (trained_on, warnings).

    Raises BadModelError where `strict` and one is another, or cannot be told.
    """
    compared = compare_bases(adapters, base, base.sha256)
    said = base_warnings(compared, strict)
    for words in said:
        events.warning(words)
    return {label: found.to_dict() for label, found in compared.items()}, said


def _identify(
    config: EvalConfig, base: Checkpoint, adapters: Mapping[str, Adapter], events: EventWriter
) -> Identity:
    from engine.evaluate.live import pick_compute, pick_device

    device = pick_device(config.device)
    compute = pick_compute(config.compute, config.dtype, device)
    if compute != config.dtype:
        events.log(f"weights are rounded to {config.dtype} and multiplied in {compute}")
    events.log(f"hashing {base.name} ({base.nbytes / 1e9:.2f} GB)")
    return Identity.of(base, adapters, config.dtype, compute, device.type)


def _reuse(store: RunStore, cells: Sequence[Cell], events: EventWriter) -> int:
    """Take done cells with equal hashes from the runs beside this one."""
    reused = 0
    for cell in cells:
        if not store.is_done(cell.hash):
            source = store.take_from_siblings(cell)
            if source:
                reused += 1
                events.log(f"{cell.title}: rows taken from run {source.name} (same hash {cell.hash})")
    return reused


class _Session:
    """What one job holds while it measures. The model is loaded when the first cell needs it."""

    def __init__(
        self,
        config: EvalConfig,
        base: Checkpoint,
        adapters: Mapping[str, Adapter],
        store: RunStore,
        samples: Mapping[str, Sequence[Sample]],
        cells: Sequence[Cell],
        events: EventWriter,
    ) -> None:
        self.config, self.base, self.adapters = config, base, adapters
        self.store, self.samples, self.cells, self.events = store, samples, cells, events
        self.total = sum(len(samples[cell.task.name]) for cell in cells)
        self.done = 0
        self._live: Any = None

    def live(self, weights: Mapping[str, float]) -> Any:
        """The model with this mixture in it."""
        from engine.evaluate.live import LiveModel

        if self._live is None:
            self.events.log(f"loading {self.base.name}")
            started = time.monotonic()
            self._live = LiveModel(
                self.base, self.adapters, self.config.dtype, self.config.compute, self.config.device
            )
            self.events.log(f"loaded in {time.monotonic() - started:.1f} s on {self._live.device}")
        if self._live.weights != dict(weights):
            self._live.set_weights(weights)
        return self._live

    def advance(self, count: int, cell: Cell) -> None:
        self.done += count
        self.events.progress(self.done, self.total, unit="samples", message=cell.title, phase="evaluate")


def _measure(session: _Session) -> None:
    from engine.evaluate.tables import group_key, series_of, to_rows

    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in session.cells:
        samples = session.samples[cell.task.name]
        if session.store.is_done(cell.hash):
            session.advance(len(samples), cell)
        else:
            _run_cell(session, cell, samples)
        group = groups.setdefault(group_key(cell.spec), [])
        group.append(cell)
        frames = [session.store.frame(member.hash) for member in group]
        for row in to_rows(session.store.folder.name, [(cell.spec, series_of(cell.spec, frames))]):
            session.events.row(**row.to_dict())


def _run_cell(session: _Session, cell: Cell, samples: Sequence[Sample]) -> None:
    """Measure the batches of a cell that are not wholly done, then seal it."""
    from engine.evaluate.execute import CellWork, sha256

    started, tokens = time.monotonic(), 0
    work = CellWork(session.live(cell.weights), cell, samples)
    kept = {row["id"] for row in session.store.kept_rows(cell)}
    for batch in work.batches:
        if not all(samples[i].id in kept for i in batch):
            rows = [row for row in work.run(batch) if row["id"] not in kept]
            session.store.append(cell, rows, {sha256(work.prompts[i]): work.prompts[i] for i in batch})
            tokens += sum(int(row.get("new_tokens") or row.get("tokens") or 0) for row in rows)
        session.advance(len(batch), cell)
    if {row["id"] for row in session.store.kept_rows(cell)} != {sample.id for sample in samples}:
        raise BadRecipeError(
            f"{session.store.folder}: the rows kept of cell {cell.hash} are of other samples",
            "delete that cell",
        )
    session.store.seal(cell, [sample.id for sample in samples])
    seconds = time.monotonic() - started
    rate = f", {tokens / seconds:.0f} tokens/s" if tokens else ""
    session.events.log(f"{cell.title}: {len(samples)} samples in {seconds:.1f} s{rate}")
