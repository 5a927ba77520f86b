"""What a plan will cost and what its rounding will lose, from small samples; nothing is written to keep.

Rounding loss: for sampled rows of changed tensors, v = W + sum_i w_i dW_i in float64 is rounded once to the
output dtype, and D = round(v) - W is fitted by least squares to the weighted deltas w_i dW_i. The coefficient
of each is the share of that adapter that survives (1 when nothing is lost): `expected_weights` is asked times
that share. This is the plan's forecast; the verification computes the same over every element.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.jobs.events import EventWriter
from engine.merge.blocks import Block, Buffers
from engine.merge.files import OpenFiles
from engine.merge.finite import too_large
from engine.merge.kernel.plain import narrow, widen
from engine.merge.layout import TensorPlan
from engine.merge.plan import Plan
from engine.merge.recipe import LINEAR
from engine.merge.schedule import block_elements, blocks_of
from engine.merge.stream import default_threads
from engine.merge.terms import load
from engine.merge.work import Work
from engine.weights.changes import ExpertFactor, Experts, LoraFactor
from engine.weights.stacked import LIMIT as STACKED_LIMIT
from engine.weights.tensorfile import ITEM_SIZE

SAMPLED_TENSORS = 36
GOLDEN = (5**0.5 - 1) / 2
SAMPLED_ELEMENTS = 1 << 15  # per tensor
LOSS_WORTH_SAYING = 0.02
_PROBE_BYTES = 1 << 26
_FIXED_MEMORY = 55_000_000  # interpreter and numpy
_FIXED_SECONDS = 0.3  # to start a process

Float64 = npt.NDArray[np.float64]


def forecast(plan: Plan, events: EventWriter, threads: int | None = None) -> dict[str, Any]:
    """Disk, memory, seconds and rounding loss of a plan, as JSON.

    Keys: free_bytes, fits (bool), memory_bytes, seconds (merging, without verification; None when the disk
    cannot be tried), expected_weights ({label: number}, None for labels with several weights), rounding_loss
    ({label: share lost, 0 to 1}), unchanged_share (of the changed tensors' elements), sampled_elements, advice.
    """
    workers = threads or default_threads()
    parent = _existing_parent(plan.recipe.output)
    free = shutil.disk_usage(parent).free
    loss = rounding_loss(plan)
    advice = []
    shares = loss["rounding_loss"] or {}
    lost = {label: share for label, share in shares.items() if share > LOSS_WORTH_SAYING}
    if lost and plan.dtype != "float32":
        told = ", ".join(f"{share:.0%} of {label}" for label, share in lost.items())
        finer = "float16 or float32" if plan.dtype == "bfloat16" else "float32"
        advice.append(f"{plan.dtype} will round away about {told}; {finer} (--dtype) keeps it")
    if free < plan.bytes_written:
        advice.append(
            f"{plan.bytes_written / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free in {parent}"
        )
    for line in advice:
        events.warning(line)
    return {
        "free_bytes": free,
        "fits": free >= plan.bytes_written,
        "memory_bytes": memory(plan, workers),
        "seconds": seconds(plan, parent, workers),
        **loss,
        "advice": advice,
    }


def memory(plan: Plan, workers: int) -> int:
    """Peak resident bytes, about: the interpreter, each worker's buffers, the factors of four tensors.

    Stacked factors of experts stay in memory as well, up to a limit (engine/weights/stacked.py).
    """
    widest = max((tensor.source.columns for tensor in plan.tensors if not tensor.copied), default=1)
    linear = plan.recipe.method in LINEAR
    entries = 0 if linear else len(plan.recipe.entries) + 1
    ranks = max((_ranks(tensor) * sum(tensor.source.shape[-2:]) for tensor in plan.changed), default=0)
    factors = 4 * 4 * ranks * (2 if linear else 3)
    return (
        _FIXED_MEMORY
        + workers * (12 + 4 * entries) * max(block_elements(), widest)
        + factors
        + _stacked(plan)
    )


def _stacked(plan: Plan) -> int:
    changes = [part.change for tensor in plan.changed for part in tensor.parts]
    sizes = {(c.b.file, c.b.name): c.b.nbytes for c in changes if isinstance(c, ExpertFactor | Experts)}
    largest = max(sizes.values(), default=0)
    return min(sum(sizes.values()), max(STACKED_LIMIT, largest) + largest)  # one is read beside those kept


def _ranks(tensor: TensorPlan) -> int:
    low = [part.change for part in tensor.parts if isinstance(part.change, LoraFactor | Experts)]
    return sum(change.rank * (change.experts if isinstance(change, Experts) else 1) for change in low)


def rounding_loss(plan: Plan) -> dict[str, Any]:
    """The sampled forecast described above: expected_weights, rounding_loss, unchanged_share, sampled_elements.

    The first two are None where the method is not linear in the weights. Raises BadAdapterError where a sampled
    number is larger than the output's dtype can hold, as the merge would.
    """
    labels = [entry.label for entry in plan.recipe.entries]
    if plan.recipe.method not in LINEAR:
        return {
            "expected_weights": None,
            "rounding_loss": None,
            "unchanged_share": None,
            "sampled_elements": 0,
        }
    gram, rhs = np.zeros((len(labels), len(labels))), np.zeros(len(labels))
    same = total = 0.0
    count = 0
    with OpenFiles() as files:
        for tensor in _spread(plan.changed, SAMPLED_TENSORS):
            block, data = _middle(tensor, files)
            base = widen(data, tensor.source.dtype, block.elements).astype(np.float64)
            deltas = np.zeros((len(labels), base.size))
            for part in tensor.parts:
                own = np.empty(block.elements, np.float32)
                load(part, tensor, files, alone=True).delta(block, data, own)
                deltas[labels.index(part.label)] += part.weight * own.astype(np.float64)
            exact = tensor.base_weight * base + deltas.sum(axis=0)
            rounded = _round(exact, tensor.target.dtype)
            if not np.isfinite(rounded).all() and np.isfinite(exact).all():
                raise too_large(tensor, float(np.abs(exact).max()))
            whole = tensor.source.elements / base.size  # the sample speaks for its whole tensor
            gram += whole * (deltas @ deltas.T)
            rhs += whole * (deltas @ (rounded - tensor.base_weight * base))
            same += whole * int(np.count_nonzero(rounded == base))
            total += tensor.source.elements
            count += base.size
    shares = dict(zip(labels, _solve(gram, rhs), strict=True))
    asked = {entry.label: entry.uniform for entry in plan.recipe.entries}
    return {
        "expected_weights": {
            label: None if weight is None else round(weight * shares[label], 4)
            for label, weight in asked.items()
        },
        "rounding_loss": {label: round(1 - share, 4) for label, share in shares.items()},
        "unchanged_share": round(same / total, 4) if total else 1.0,
        "sampled_elements": count,
    }


def _middle(tensor: TensorPlan, files: OpenFiles) -> tuple[Block, Any]:
    """Some rows from the middle of a tensor, within one expert, and their bytes."""
    source = tensor.source
    group = source.shape[1] if len(source.shape) == 3 else source.rows
    rows = max(1, min(group, SAMPLED_ELEMENTS // max(1, source.columns)))
    block = Block(0, (group - rows) // 2, rows, source.columns)
    size = source.columns * ITEM_SIZE[source.dtype]
    data = np.empty(rows * size, np.uint8)
    files.read(source, block.first * size, data)
    return block, data


def seconds(plan: Plan, parent: Path, workers: int) -> float | None:
    """Seconds to merge: the slower of the processors' work (tried on blocks of one tensor) and the disk's."""
    tried = _try_writing(parent)
    if tried is None:
        return None
    copying, durable = tried
    per_byte = 0.0
    if plan.changed:
        with OpenFiles() as files:
            per_byte = _compute_time(max(plan.changed, key=lambda t: t.source.nbytes), plan, files)
    changed = sum(tensor.source.nbytes for tensor in plan.changed)
    hashed = plan.bytes_read + plan.bytes_written
    work = changed * per_byte + hashed * _hash_time() + plan.bytes_written * copying
    cores = max(1, min(workers, len(os.sched_getaffinity(0))))
    return round(_FIXED_SECONDS + max(work / cores, plan.bytes_written * durable), 2)


def _hash_time() -> float:
    """Seconds to hash one byte."""
    import hashlib

    probe = bytes(_PROBE_BYTES // 16)
    started = time.perf_counter()
    hashlib.sha256(probe).digest()
    return (time.perf_counter() - started) / len(probe)


def _compute_time(tensor: TensorPlan, plan: Plan, files: OpenFiles) -> float:
    """Seconds of one thread for each byte of a changed tensor, all passes, without hashing and writing."""
    blocks = [block for block in blocks_of(tensor) if block.first < tensor.source.rows][:4]
    size = ITEM_SIZE[tensor.source.dtype]
    buffers = Buffers(max(block.elements for block in blocks), len(plan.recipe.entries))
    best = float("inf")
    for _ in range(2):
        work = Work(tensor, plan.recipe, files, len(blocks))
        work.load()
        started = time.perf_counter()
        for stage in range(work.stages + 1):
            for block in blocks:
                data = buffers.raw[: block.elements * size]
                files.read(tensor.source, block.first * block.columns * size, data)
                if stage < work.stages:
                    work.gather(stage + 1, block, data, buffers)
                else:
                    work.merge(block, data, buffers.out, buffers)
        best = min(best, time.perf_counter() - started)
    return best / sum(block.elements * size for block in blocks)


def _try_writing(folder: Path) -> tuple[float, float] | None:
    """Seconds for a byte to be handed to the system, and to be on the disk, by a file that never gets a name.

    None where the folder cannot be written, or has no such files.
    """
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except (OSError, AttributeError):
        return None
    try:
        block = os.urandom(1 << 20)
        started = time.perf_counter()
        for _ in range(_PROBE_BYTES >> 20):
            os.write(descriptor, block)
        handed = time.perf_counter() - started
        os.fdatasync(descriptor)
        return handed / _PROBE_BYTES, (time.perf_counter() - started) / _PROBE_BYTES
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _round(values: Float64, dtype: str) -> Float64:
    """float64 to the nearest `dtype` value, as float64 (by way of float32: good enough for a forecast)."""
    out = np.empty(4 * values.size, np.uint8)
    narrow(values.astype(np.float32), dtype, out)
    return widen(out, dtype, values.size).astype(np.float64)


def _solve(gram: Float64, rhs: Float64) -> list[float]:
    """Least squares for the adapters that change anything; 1.0 (nothing lost) for those that do not."""
    kept = [1.0] * len(rhs)
    used = [i for i in range(len(rhs)) if gram[i, i] > 0]
    if used:
        solution = np.linalg.lstsq(gram[np.ix_(used, used)], rhs[used], rcond=None)[0]
        for i, value in zip(used, solution, strict=True):
            kept[i] = float(value)
    return kept


def _spread(tensors: Sequence[TensorPlan], count: int) -> list[TensorPlan]:
    """At most `count` tensors, all over the list: steps of the golden ratio, which fall in with no period.

    Equal steps would meet the same few kinds of module in every layer: names repeat from layer to layer.
    """
    if len(tensors) <= count:
        return list(tensors)
    places = {int((i + 0.5) * GOLDEN % 1.0 * len(tensors)) for i in range(count)}
    return [tensors[place] for place in sorted(places)]


def _existing_parent(path: Path) -> Path:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return parent
