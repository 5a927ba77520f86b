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
from engine.merge.plan import Plan, TensorPlan
from engine.merge.rounding import holds_nan, narrow_bf16, widen_into
from engine.merge.stream import BLOCK_ELEMENTS, default_threads, stack_factors
from engine.weights.tensorfile import read_bytes, read_rows

SAMPLED_TENSORS = 12
SAMPLED_ELEMENTS = 1 << 15  # per tensor
LOSS_WORTH_SAYING = 0.02
_PROBE_BYTES = 16_000_000
_FIXED_MEMORY = 60_000_000  # interpreter and numpy

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
    lost = {label: share for label, share in loss["rounding_loss"].items() if share > LOSS_WORTH_SAYING}
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
    """Peak resident bytes, about: the interpreter, each worker's buffers, one tensor's factors."""
    widest = max((tensor.source.columns for tensor in plan.tensors if not tensor.copied), default=1)
    factors = max(
        (
            4 * sum(part.factor.rank for part in tensor.parts) * sum(tensor.source.shape) * 3
            for tensor in plan.changed
        ),
        default=0,
    )
    return _FIXED_MEMORY + workers * 17 * max(BLOCK_ELEMENTS, widest) + factors


def rounding_loss(plan: Plan) -> dict[str, Any]:
    """The sampled forecast described above: expected_weights, rounding_loss, unchanged_share, sampled_elements."""
    labels = [entry.label for entry in plan.recipe.adapters]
    gram, rhs = np.zeros((len(labels), len(labels))), np.zeros(len(labels))
    same = count = 0
    for tensor in _spread(plan.changed, SAMPLED_TENSORS):
        rows = max(1, min(tensor.source.rows, SAMPLED_ELEMENTS // max(1, tensor.source.columns)))
        first = (tensor.source.rows - rows) // 2
        base = read_rows(tensor.source, first, rows).astype(np.float64).ravel()
        deltas = np.zeros((len(labels), base.size))
        for part in tensor.parts:
            a, b = (read_rows(info).astype(np.float64) for info in (part.factor.a, part.factor.b))
            left, right = (a.T, b.T) if part.factor.transposed else (b, a)
            block = left[first : first + rows] @ right
            deltas[labels.index(part.label)] += part.weight * part.factor.scale * block.ravel()
        rounded = _round(base + deltas.sum(axis=0), tensor.target.dtype)
        gram += deltas @ deltas.T
        rhs += deltas @ (rounded - base)
        same += int(np.count_nonzero(rounded == base))
        count += base.size
    kept = _solve(gram, rhs)
    asked = {entry.label: entry.uniform for entry in plan.recipe.adapters}
    shares = dict(zip(labels, kept, strict=True))
    return {
        "expected_weights": {
            label: None if weight is None else round(weight * shares[label], 4)
            for label, weight in asked.items()
        },
        "rounding_loss": {label: round(1 - share, 4) for label, share in shares.items()},
        "unchanged_share": round(same / count, 4) if count else 1.0,
        "sampled_elements": count,
    }


def seconds(plan: Plan, parent: Path, workers: int) -> float | None:
    """Seconds to merge: the slower of computing (measured on one block) and writing (a file without a name)."""
    if not plan.changed:
        per_byte = 0.0
    else:
        tensor = max(plan.changed, key=lambda t: t.source.nbytes)
        per_byte = _compute_time(tensor) / max(1, tensor.source.nbytes)
    changed = sum(tensor.source.nbytes for tensor in plan.changed)
    write = _write_rate(parent)
    if write is None:
        return None
    import hashlib

    probe = bytes(_PROBE_BYTES // 4)
    started = time.perf_counter()
    hashlib.sha256(probe).digest()
    hashing = (time.perf_counter() - started) / len(probe)
    compute = (changed * per_byte + (plan.base.nbytes + plan.bytes_written) * hashing) / max(1, workers - 1)
    return round(max(compute, plan.bytes_written / write), 2)


def _compute_time(tensor: TensorPlan) -> float:
    """Seconds one thread needs for all passes over a tensor except hashing and writing, from its first rows."""
    source = tensor.source
    rows = max(1, min(source.rows, BLOCK_ELEMENTS // max(1, source.columns)))
    b, a = stack_factors(tensor)
    count = rows * source.columns
    values, delta = np.empty(count, np.float32), np.empty((rows, source.columns), np.float32)
    out, low, tie = np.empty(count, np.uint16), np.empty(count, np.uint16), np.empty(count, np.bool_)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        data = memoryview(read_bytes(source, 0, count * source.nbytes // max(1, source.elements)))
        widen_into(data, source.dtype, values)
        np.matmul(b[:rows], a, out=delta)
        np.add(values, delta.ravel(), out=values)
        holds_nan(data, source.dtype)
        narrow_bf16(values, out, low, tie)
        best = min(best, time.perf_counter() - started)
    return best * source.rows / rows


def _write_rate(folder: Path) -> float | None:
    """Bytes a second of durable writing in a folder, tried with a file that never gets a name; None: cannot."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except (OSError, AttributeError):
        return None
    try:
        block = os.urandom(1 << 20) * (_PROBE_BYTES >> 20)
        started = time.perf_counter()
        os.write(descriptor, block)
        os.fdatasync(descriptor)
        return len(block) / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _round(values: Float64, dtype: str) -> Float64:
    """float64 to the nearest `dtype` value, as float64 (bf16 by way of float32: good enough for a forecast)."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float64)
    narrow = values.astype(np.float32)
    if dtype == "BF16":
        bits, low = np.empty(len(narrow), np.uint16), np.empty(len(narrow), np.uint16)
        narrow_bf16(narrow, bits, low, np.empty(len(narrow), np.bool_))
        widen_into(bits.data.cast("B"), "BF16", narrow)
    return narrow.astype(np.float64)


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
    """At most `count` tensors, evenly over the list."""
    if len(tensors) <= count:
        return list(tensors)
    step = len(tensors) / count
    return [tensors[int(i * step)] for i in range(count)]


def _existing_parent(path: Path) -> Path:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return parent
