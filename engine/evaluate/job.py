"""The evaluation job: every cell of a config measured on one loaded model, rows kept as they come.

Target `engine.evaluate.job:run` with params {"config": resolved config, "out": run folder, "mode": "eval" |
"sweep", "resume": bool, "executor": "local" | "ray", "ray_address"}. Stopping it at any point loses at most the
batch it is in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import template_check
from engine.evaluate import local
from engine.evaluate.backends.client import key_of
from engine.evaluate.bench import Bench, stamps_of
from engine.evaluate.cells import Cell, Identity, plan_cells
from engine.evaluate.choice import shuffled
from engine.evaluate.config import EvalConfig, Server, Task, parse_config
from engine.evaluate.data import Sample, read_data
from engine.evaluate.recorder import Recorder
from engine.evaluate.store import RunStore
from engine.gguf.trained import choose_for, trained_in
from engine.jobs.events import EventWriter
from engine.template_check import of_adapter
from engine.weights import Adapter, Checkpoint
from engine.weights.identity import base_warnings, compare_bases

ADVICE = "templates: [{name}]"  # how a config chooses one


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Measure everything the config asks for; returns the table.

    Result: {"run": folder, "rows": metric rows, "cells": how many, "reused": taken from other runs, "failed": {cell:
    reason}, "trained_on": {label: {name, sha256, same}} of adapters that name the hash of their base, "warnings":
    sentences, "seconds": wall time, "exit_code": 0, or 3 when a cell failed}. With `strict_base` another base than an
    adapter's own is refused.
    """
    started = time.monotonic()
    mode = str(params.get("mode", "sweep"))
    config = parse_config(params["config"], "config", mode=mode)
    store = RunStore(Path(params["out"]))
    samples = {task.name: samples_of(task, events) for task in config.tasks}
    for server in config.servers:
        key_of(server.key_env)  # a key that is missing is told before anything is measured
    stamps = stamps_of(config)
    base = Checkpoint.open(config.base) if config.base else None
    adapters = {label: Adapter.open(path) for label, path in config.adapters.items()}
    warnings = warn_about_templates(config, adapters, events)
    bases: dict[str, Any] = {}
    if base is not None:
        for adapter in adapters.values():
            adapter.match(base)
    identity = _identify(config, base, adapters, events)
    if base is not None:
        bases, others = compare_with_base(adapters, base, events, bool(params.get("strict_base", False)))
        warnings += others
    doubtful = doubts_about(config, base, identity)
    for words in doubtful.values():
        events.warning(words)
    warnings += list(doubtful.values())
    cells = plan_cells(config, identity)
    with store.writing(config.to_dict(), bool(params.get("resume", False))):
        recorder = Recorder(store, samples, cells, events, mode, stamps, warnings, doubtful)
        recorder.write_cells()
        reused = _reuse(store, cells, events)
        _measure(config, recorder, params, events)
        recorder.write_cells()
        from engine.evaluate.tables import compute

        rows = [row.to_dict() for row in compute(store.folder, write=True)]
        for row in rows:
            events.row(**row)
    titles = {cell.hash: cell.title for cell in cells}
    return {
        "run": str(store.folder),
        "rows": rows,
        "cells": len(cells),
        "reused": reused,
        "failed": {titles[key]: reason for key, reason in recorder.failed.items()},
        "trained_on": bases,
        "warnings": warnings,
        "seconds": round(time.monotonic() - started, 1),
        "exit_code": 3 if recorder.failed else 0,
    }


def samples_of(task: Task, events: EventWriter | None = None) -> list[Sample]:
    """The samples of a task as they are asked: read, checked, and their options shuffled where it says so."""
    data = read_data(task)
    for note in data.notes if events else ():
        events.log(f"{task.name}: {note}")  # type: ignore[union-attr]
    samples = data.samples
    return samples if task.shuffle is None else [shuffled(sample, task.shuffle) for sample in samples]


def _measure(config: EvalConfig, recorder: Recorder, params: Mapping[str, Any], events: EventWriter) -> None:
    """Measure what is not done, here or on a Ray cluster."""
    cells = recorder.todo()
    if params.get("executor") == "ray":
        from engine.evaluate import ray_executor

        workers = int(params.get("workers") or 0)
        ray_executor.measure(config, recorder, cells, str(params.get("ray_address") or ""), workers)
        return
    bench = Bench(config, events.log)
    try:
        local.measure(bench, recorder, cells)
    finally:
        bench.close()


def doubts_about(config: EvalConfig, base: Checkpoint | None, identity: Identity) -> dict[str, str]:
    """What verification left against the models, by label ("" for the base and all its mixtures)."""
    from engine.evaluate.trust import doubts

    found = {"": "; ".join(doubts(base.folder, base.sha256))} if base is not None else {}
    for file in config.gguf:
        found[file.name] = "; ".join(doubts(file.path, {file.path.name: identity.gguf[file.name]}))
    return {label: words for label, words in found.items() if words}


def warn_about_templates(
    config: EvalConfig, adapters: Mapping[str, Adapter], events: EventWriter
) -> list[str]:
    """Say when an adapter, or one inside the base, was trained with another chat template than one used here, or
    with an unknown one. Returns what was said."""
    asked = any(
        task.kind in ("generation", "probes", "instructions") or task.scoring == "generated"
        for task in config.tasks
    )
    if not asked:
        return []
    models: list[tuple[Path, list[template_check.Trained]]] = []
    if config.base is not None:
        trained = [of_adapter(label, adapter) for label, adapter in adapters.items()]
        models.append((config.base, trained + trained_in(config.base)))
    models += [(file.path, trained_in(file.path)) for file in config.gguf]
    said = [
        words
        for model, trained in models
        for template in config.templates
        for words in template_check.warnings(trained, choose_for(template, model), ADVICE)
    ]
    said = list(dict.fromkeys(said))
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
    config: EvalConfig, base: Checkpoint | None, adapters: Mapping[str, Adapter], events: EventWriter
) -> Identity:
    if base is None:
        return Identity.of(None, {}, "", "", "", config.gguf)
    from engine.evaluate.live import pick_compute, pick_device

    device = pick_device(config.device)
    compute = pick_compute(config.compute, config.dtype, device)
    if compute != config.dtype:
        events.log(f"weights are rounded to {config.dtype} and multiplied in {compute}")
    events.log(f"hashing {base.name} ({base.nbytes / 1e9:.2f} GB)")
    return Identity.of(base, adapters, config.dtype, compute, device.type, config.gguf)


def _reuse(store: RunStore, cells: Sequence[Cell], events: EventWriter) -> int:
    """Take done cells with equal hashes from the runs beside this one."""
    reused = 0
    for cell in cells:
        if not store.is_done(cell.hash) and not isinstance(cell.model, Server):
            source = store.take_from_siblings(cell)
            if source:
                reused += 1
                events.log(f"{cell.title}: rows taken from run {source.name} (same hash {cell.hash})")
    return reused
