"""verify_merge: one read of the base and of the merge answers both questions.

Called by engine/merge/job.py (after every merge, and for `medmerge verify`). Knows nothing of the code that
merges: the arguments are folders and the weights that were asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from engine.errors import BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.verify.conclude import conclude
from engine.merge.verify.deltas import Delta, check_fit, read_deltas
from engine.merge.verify.diagnose import Evidence
from engine.merge.verify.files import Structure, check_folder, compare_tensors
from engine.merge.verify.guess import Guess, guess_weights
from engine.merge.verify.measure import TensorStats, measure, same_bytes
from engine.merge.verify.rounding import FORMATS
from engine.merge.verify.verdict import Verdict
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorInfo

PerTensor = Mapping[str, Mapping[str, float]]
T = TypeVar("T")


@dataclass
class Models:
    """Both models and the adapters, opened by header."""

    base: Checkpoint
    merged: Checkpoint
    deltas: dict[str, list[Delta]] = field(default_factory=dict)  # by base tensor, in label order
    labels: tuple[str, ...] = ()


def verify_merge(
    merged: Path,
    base: Path,
    adapters: Mapping[str, Path],
    weights: Mapping[str, float] | None,
    events: EventWriter,
    per_tensor_weights: PerTensor | None = None,
    allow_extra_files: Sequence[str] = (),
    threads: int | None = None,
) -> Verdict:
    """Say whether `merged` is base + sum_k weights[k] * delta_k, and which weights are really in it.

    Args:
        merged, base: model folders (any shard layout; BF16, F16 or F32 for touched tensors).
        adapters: PEFT LoRA folders by label.
        weights: what was asked, by label; None to ask what is in there.
        events: progress in bytes.
        per_tensor_weights: weights that differ by tensor, {label: {base tensor name: weight}}; a tensor not
            named has the label's weight in `weights`.
        allow_extra_files: glob patterns of weight files that may lie in the merged folder.
        threads: how many tensors at once; by default the number of processors, 8 at most.

    Raises:
        BadModelError, BadTensorFileError, BadAdapterError: an input that cannot be read, or an adapter of
            another base.
        BadRecipeError: weights for labels without an adapter, or the other way round.
    """
    started = time.monotonic()
    _check_labels(adapters, weights, per_tensor_weights)
    models = _open(merged, base, adapters)
    structure = compare_tensors(models.base, models.merged, list(models.deltas))
    findings, warnings = check_folder(models.base, models.merged, allow_extra_files)
    structure.findings += findings
    structure.warnings += warnings
    threads = threads or min(8, os.cpu_count() or 1)
    changed = _untouched(models, structure, events, threads)
    asked = None if weights is None else dict(weights)
    guess: Guess | None = None
    if asked is None:
        guess = guess_weights(
            _measure(models, structure, {}, None, events, threads, "look"),
            models.base,
            models.merged,
            models.labels,
        )
        stats = _measure(models, structure, guess.weights, None, events, threads, "check")
    else:
        stats = _measure(models, structure, asked, per_tensor_weights, events, threads, "check")
    evidence = Evidence(
        models.base,
        models.merged,
        models.labels,
        stats,
        structure,
        changed,
        asked,
        guess,
        tuple(models.deltas),
    )
    return replace(conclude(evidence), seconds=time.monotonic() - started)


def _check_labels(
    adapters: Mapping[str, Path], weights: Mapping[str, float] | None, per_tensor: PerTensor | None
) -> None:
    if not adapters:
        raise BadRecipeError(
            "no adapters to look for", "name them: --adapter pt=PATH:0.3 --adapter sft=PATH:0.7"
        )
    if weights is not None and set(weights) != set(adapters):
        odd = sorted(set(weights) ^ set(adapters))
        raise BadRecipeError(
            f"adapters and weights name different labels: {', '.join(odd)}",
            "give every adapter a weight (LABEL=PATH:WEIGHT), or none of them",
        )
    if weights is not None:
        for label, weight in weights.items():
            if not -1e6 < weight < 1e6:  # also refuses NaN
                raise BadRecipeError(f"the weight of {label} is {weight}, which is not a usable number")
    if per_tensor and (weights is None or not set(per_tensor) <= set(adapters)):
        raise BadRecipeError("weights by tensor need a weight for every adapter and its label")


def _open(merged: Path, base: Path, adapters: Mapping[str, Path]) -> Models:
    models = Models(Checkpoint.open(base), Checkpoint.open(merged))
    for label, folder in adapters.items():
        deltas = read_deltas(label, folder)
        check_fit(deltas, models.base)
        for name, delta in deltas.items():
            models.deltas.setdefault(name, []).append(delta)
    models.labels = tuple(adapters)
    return models


def _untouched(models: Models, structure: Structure, events: EventWriter, threads: int) -> dict[str, int]:
    """Untouched tensors that are not the base's, with how many elements differ."""
    pairs = {name: pair for name, pair in structure.pairs.items() if name not in models.deltas}
    counts = _each(pairs, lambda name, pair: same_bytes(*pair), events, threads, "untouched")
    return {name: count for name, count in counts.items() if count}


def _measure(
    models: Models,
    structure: Structure,
    weights: Mapping[str, float],
    per_tensor: PerTensor | None,
    events: EventWriter,
    threads: int,
    phase: str,
) -> list[TensorStats]:
    """Measure every touched tensor against `weights` (labels it does not name count 0)."""
    pairs = {
        name: pair
        for name, pair in structure.pairs.items()
        if name in models.deltas and all(side.dtype in FORMATS for side in pair)
    }

    def one(name: str, pair: tuple[TensorInfo, TensorInfo]) -> TensorStats:
        deltas = models.deltas[name]
        own = [(per_tensor or {}).get(d.label, {}).get(name, weights.get(d.label, 0.0)) for d in deltas]
        return measure(pair[0], pair[1], deltas, own, judge=phase == "check")

    found = _each(pairs, one, events, threads, phase)
    return [found[name] for name in pairs]


def _each(
    pairs: Mapping[str, tuple[TensorInfo, TensorInfo]],
    work: Callable[[str, tuple[TensorInfo, TensorInfo]], T],
    events: EventWriter,
    threads: int,
    phase: str,
) -> dict[str, T]:
    """Run `work` on every tensor, large ones first, with progress in bytes of the merge."""
    total = sum(pair[1].nbytes for pair in pairs.values())
    lock, done = threading.Lock(), 0

    def one(name: str) -> T:
        nonlocal done
        result = work(name, pairs[name])
        with lock:
            done += pairs[name][1].nbytes
            events.progress(done, total, unit="B", message=name, phase=phase)
        return result

    order = sorted(pairs, key=lambda name: -pairs[name][1].nbytes)
    pool = ThreadPoolExecutor(threads)
    try:
        futures = {name: pool.submit(one, name) for name in order}
        return {name: futures[name].result() for name in pairs}
    finally:
        pool.shutdown(cancel_futures=True)
