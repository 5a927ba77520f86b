"""verify_merge: one read of the base and of the merge answers both questions.

Called by engine/merge/job.py (after every merge, and for `medmerge verify`). Knows nothing of the code that
merges: the arguments are folders and what was asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from engine.errors import BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.verify.asked import Asked
from engine.merge.verify.bits import same_bytes
from engine.merge.verify.conclude import conclude
from engine.merge.verify.dense import measure_dense
from engine.merge.verify.diagnose import Evidence
from engine.merge.verify.files import Structure, check_folder, compare_tensors
from engine.merge.verify.formulas import Task
from engine.merge.verify.guess import Guess, guess_weights
from engine.merge.verify.measure import measure
from engine.merge.verify.rounding import FORMATS
from engine.merge.verify.stats import TensorStats
from engine.merge.verify.tasks import Models, open_models
from engine.merge.verify.terms import Delta
from engine.merge.verify.verdict import Verdict
from engine.weights.tensorfile import TensorInfo

PerTensor = Mapping[str, Mapping[str, float]]
T = TypeVar("T")


def verify_merge(
    merged: Path,
    base: Path | None,
    adapters: Mapping[str, Path],
    weights: Mapping[str, float] | None,
    events: EventWriter,
    per_tensor_weights: PerTensor | None = None,
    allow_extra_files: Sequence[str] = (),
    threads: int | None = None,
    asked: Asked | None = None,
    known: bool = True,
) -> Verdict:
    """Say whether `merged` is what was asked, and which weights are really in it.

    Either `adapters` and `weights` say it (base + sum_k weights[k] * delta_k), or `asked`, for every other method,
    for full models and for numbers by tensor; `adapters`, `weights` and `per_tensor_weights` are then not looked at.

    Args:
        merged, base: model folders (any shard layout; BF16, F16 or F32 for touched tensors). The base may be None
            for a soup, linear or slerp of models: they are then seen from the first model.
        adapters: PEFT LoRA folders by label.
        weights: what was asked, by label; None to ask what is in there.
        events: progress in bytes.
        per_tensor_weights: weights that differ by tensor, {label: {base tensor name: weight}}; a tensor not
            named has the label's weight in `weights`.
        allow_extra_files: glob patterns of weight files that may lie in the merged folder.
        threads: how many tensors at once; by default the number of processors, 8 at most.
        asked: what was asked, in full.
        known: False where `asked` (a linear method) only says what may be in there, and the weights are to be found.

    Raises:
        BadModelError, BadTensorFileError, BadAdapterError: an input that cannot be read, or an adapter of
            another base.
        BadRecipeError: weights for labels without an adapter, or the other way round; numbers without meaning.
    """
    started = time.monotonic()
    if asked is None:
        known = weights is not None
        _check_labels(adapters, weights, per_tensor_weights)
        asked = Asked.mixture(adapters, weights or {}, per_tensor_weights)
    models = open_models(merged, base, asked)
    structure = compare_tensors(models.base, models.merged, models.terms, asked.models)
    findings, warnings = check_folder(models.base, models.merged, allow_extra_files, structure)
    structure.findings += findings
    structure.warnings += warnings
    threads = threads or min(8, os.cpu_count() or 1)
    changed = _untouched(models, structure, events, threads)
    guess: Guess | None = None
    if not known:
        look = _measure(models, structure, asked, events, threads, "look")
        guess = guess_weights(look, models.base, models.merged, models.labels)
        if models.implied is not None:
            guess = guess.with_rest(models.implied, asked.labels)
        asked = asked.weighted(guess.weights)
    stats = _measure(models, structure, asked, events, threads, "check")
    evidence = Evidence(
        models.base,
        models.merged,
        models.labels,
        stats,
        structure,
        changed,
        asked.weights() if known else None,
        guess,
        tuple(models.terms),
        asked,
        models.implied,
        {
            tensor.name: models.task(tensor.name, structure.pairs[tensor.name], asked)
            for tensor in stats
            if tensor.wrong
        },
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
    if per_tensor and (weights is None or not set(per_tensor) <= set(adapters)):
        raise BadRecipeError("weights by tensor need a weight for every adapter and its label")


def _untouched(models: Models, structure: Structure, events: EventWriter, threads: int) -> dict[str, int]:
    """Untouched tensors that are not the base's, with how many elements differ."""
    pairs = {name: pair for name, pair in structure.pairs.items() if name not in models.terms}
    counts = _each(pairs, lambda name, pair: same_bytes(*pair), events, threads, "untouched")
    return {name: count for name, count in counts.items() if count}


def _measure(
    models: Models, structure: Structure, asked: Asked, events: EventWriter, threads: int, phase: str
) -> list[TensorStats]:
    """Measure every touched tensor against what was asked."""
    pairs = {
        name: pair
        for name, pair in structure.pairs.items()
        if name in models.terms and all(side.dtype in FORMATS for side in pair)
    }
    found = _each(
        pairs,
        lambda name, pair: measure_task(models.task(name, pair, asked), phase == "check"),
        events,
        threads,
        phase,
    )
    return [found[name] for name in pairs]


def measure_task(task: Task, judge: bool = True) -> TensorStats:
    """Measure one tensor in the way that is quickest for what was asked of it."""
    factors = [term for term in task.terms if isinstance(term, Delta)]
    plain = task.method in ("linear", "task_arithmetic", "soup") and len(factors) == len(task.terms)
    if plain and task.base.shape == task.merged.shape and task.base_share == 1.0:
        return measure(task.base, task.merged, factors, task.coefficients.tolist(), judge)
    return measure_dense(task, judge)


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
