"""The streaming merge: row blocks are read, summed in float32, rounded once and written at their final offset.

    out = round(W + sum_i (w_i * s_i * B_i) @ A_i)       W (rows, columns) of one block; B_i (rows, r_i)

All adapters' factors of a tensor are stacked, so a block costs one matrix product however many adapters there
are. Blocks go to worker threads in file order (numpy and hashlib release the GIL); each worker owns its
buffers, so memory does not grow with the model. Both SHA-256, of the bytes read and of those written, are
taken on the way, in order: what the manifest names is what was merged.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.atomic import NO_SPACE
from engine.errors import BadAdapterError, BadModelError, BadTensorFileError, NoSpaceError
from engine.jobs.events import EventWriter
from engine.merge.plan import Part, Plan, ShardPlan, TensorPlan
from engine.merge.rounding import (
    LARGEST,
    Float32,
    holds_nan,
    narrow_bf16,
    surely_finite,
    widen_into,
)
from engine.weights.tensorfile import ITEM_SIZE, read_rows

BLOCK_ELEMENTS = 1 << 18  # 256 Ki elements: 1 MiB of float32, stays in cache through all passes


@dataclass(frozen=True)
class FileHashes:
    """SHA-256 of one shard as it was read and as it was written."""

    name: str
    source: str
    target: str


@dataclass(frozen=True)
class _Block:
    """Rows `first : first + rows` of one tensor, or for copied data a byte range of it (rows of 1 byte)."""

    index: int
    tensor: TensorPlan
    first: int
    rows: int

    @property
    def elements(self) -> int:
        return self.rows * self.tensor.source.columns


class _Stopped(Exception):
    """Another worker failed, or the job was cancelled."""


@dataclass
class _InOrder:
    """A SHA-256 fed by several threads in block order: each waits for its turn."""

    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    turn: int = 0
    stopped: bool = False
    ready: threading.Condition = field(default_factory=threading.Condition)

    def update(self, index: int, data: memoryview | bytes) -> None:
        with self.ready:
            while self.turn != index and not self.stopped:
                self.ready.wait()
            if self.stopped:
                raise _Stopped
        self.digest.update(data)  # only the thread whose turn it is gets here
        with self.ready:
            self.turn = index + 1
            self.ready.notify_all()

    def stop(self) -> None:
        with self.ready:
            self.stopped = True
            self.ready.notify_all()


def stream_merge(
    plan: Plan, folder: Path, events: EventWriter, threads: int | None = None
) -> list[FileHashes]:
    """Write every shard of the plan into `folder`; returns the hashes of what was read and written.

    Args:
        plan: from `make_plan`; offsets, factors and weights are its.
        folder: an existing folder of our own (`.partial`).
        events: progress in bytes written, phase "merge".
        threads: workers; by default one more than the processors this process may use, as some wait their turn.

    Raises:
        BadModelError: NaN or infinity in the base. BadAdapterError: the sum overflows the output dtype.
        NoSpaceError: the disk filled up (space for each file is reserved before it is written).
    """
    workers = threads or default_threads()
    progress = _Progress(events, plan.bytes_written)
    return [_merge_shard(shard, folder, workers, progress) for shard in plan.shards]


def default_threads() -> int:
    return len(os.sched_getaffinity(0)) + 1


@dataclass
class _Progress:
    """Bytes written so far, over all threads."""

    events: EventWriter
    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int, message: str) -> None:
        with self.lock:
            self.done += count
            self.events.progress(self.done, self.total, unit="B", message=message, phase="merge")


def _merge_shard(shard: ShardPlan, folder: Path, workers: int, progress: _Progress) -> FileHashes:
    source_hash, target_hash = _InOrder(), _InOrder()
    source_hash.digest.update(shard.source.header)
    target_hash.digest.update(shard.header)
    path = folder / shard.name
    try:
        with shard.source.path.open("rb", buffering=0) as source, path.open("xb", buffering=0) as target:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            if shard.size:
                os.posix_fallocate(target.fileno(), 0, shard.size)
            _write_all(target.fileno(), memoryview(shard.header), 0)
            progress.add(len(shard.header), shard.name)
            work = _ShardWork(shard, source.fileno(), target.fileno(), source_hash, target_hash, progress)
            work.run(workers)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpaceError(
                f"no room for {path} ({shard.size / 1e9:.2f} GB): {error.strerror}",
                "free some space, or choose another disk for the output",
            ) from error
        raise
    return FileHashes(shard.name, source_hash.digest.hexdigest(), target_hash.digest.hexdigest())


class _ShardWork:
    """The blocks of one shard and the workers that take them in order."""

    def __init__(
        self,
        shard: ShardPlan,
        source: int,
        target: int,
        source_hash: _InOrder,
        target_hash: _InOrder,
        progress: _Progress,
    ) -> None:
        self._source, self._target = source, target
        self._source_hash, self._target_hash = source_hash, target_hash
        self._progress = progress
        self._blocks = _blocks(shard)
        self._lock = threading.Lock()
        self._factors: tuple[str, Float32, Float32] | None = None
        self._largest = max((t.source.columns for t in shard.tensors if not t.copied), default=1)

    def run(self, workers: int) -> None:
        """Work until no block is left; on the first error every worker stops and that error is raised."""
        with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
            futures = [pool.submit(self._work) for _ in range(workers)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # a signal may end the wait, too
                if not all(future.done() for future in futures) or any(f.exception() for f in done):
                    self._stop()
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
            raise error

    def _stop(self) -> None:
        with self._lock:
            self._blocks = iter(())
        self._source_hash.stop()
        self._target_hash.stop()

    def _next(self) -> tuple[_Block, Float32, Float32] | None:
        """The next block with its tensor's stacked factors (empty for copied data)."""
        with self._lock:
            block = next(self._blocks, None)
            if block is None:
                return None
            name = block.tensor.source.name
            if self._factors is None or self._factors[0] != name:
                self._factors = (name, *stack_factors(block.tensor))
            return block, self._factors[1], self._factors[2]

    def _work(self) -> None:
        buffers = _Buffers(max(BLOCK_ELEMENTS, self._largest))
        while (taken := self._next()) is not None:
            block, b, a = taken
            with np.errstate(all="ignore"):  # what is not finite is found and named below
                if block.tensor.copied:
                    self._copy(block, buffers)
                else:
                    self._merge(block, b, a, buffers)

    def _copy(self, block: _Block, buffers: _Buffers) -> None:
        tensor = block.tensor
        data = buffers.raw[: block.rows]
        _read_all(self._source, data, tensor.source.start + block.first, tensor.source.file)
        if holds_nan(data, tensor.source.dtype):
            raise _nan_in_base(tensor)
        self._finish(block, data, data, tensor.target.start + block.first)

    def _merge(self, block: _Block, b: Float32, a: Float32, buffers: _Buffers) -> None:
        tensor, count, columns = block.tensor, block.elements, block.tensor.source.columns
        data = buffers.raw[: count * ITEM_SIZE[tensor.source.dtype]]
        offset = block.first * columns * ITEM_SIZE[tensor.source.dtype]
        _read_all(self._source, data, tensor.source.start + offset, tensor.source.file)
        values = buffers.values[:count]
        widen_into(data, tensor.source.dtype, values)
        if tensor.parts:
            delta = buffers.delta[:count]
            np.matmul(b[block.first : block.first + block.rows], a, out=delta.reshape(block.rows, columns))
            np.add(values, delta, out=values)
        if not surely_finite(values, tensor.target.dtype):
            _look_closer(tensor, data, values)
        out = buffers.narrow(values, tensor.target.dtype)
        offset = block.first * columns * ITEM_SIZE[tensor.target.dtype]
        self._finish(block, data, out, tensor.target.start + offset)

    def _finish(self, block: _Block, data: memoryview, out: memoryview, offset: int) -> None:
        """Write a block and take both hashes; other workers compute meanwhile, so the turns cost no time."""
        _write_all(self._target, out, offset)
        self._source_hash.update(block.index, data)
        self._target_hash.update(block.index, out)
        self._progress.add(len(out), block.tensor.target.name)


class _Buffers:
    """One worker's memory, used for every block."""

    def __init__(self, elements: int) -> None:
        self.raw = memoryview(bytearray(elements * 4))
        self.values = np.empty(elements, np.float32)
        self.delta = np.empty(elements, np.float32)
        self._low = np.empty(elements, np.uint16)
        self._out = np.empty(elements, np.uint16)
        self._tie = np.empty(elements, np.bool_)

    def narrow(self, values: Float32, dtype: str) -> memoryview:
        """The values rounded once to `dtype`, as bytes. Destroys `values`."""
        count = len(values)
        if dtype == "F32":
            return values.data.cast("B")
        if dtype == "F16":
            half: npt.NDArray[np.float16] = self._out[:count].view(np.float16)
            np.copyto(half, values, casting="same_kind")
            return self._out[:count].data.cast("B")
        narrow_bf16(values, self._out[:count], self._low[:count], self._tie[:count])
        return self._out[:count].data.cast("B")


def stack_factors(tensor: TensorPlan) -> tuple[Float32, Float32]:
    """(rows, R) and (R, columns) whose product is the tensor's whole delta; R = 0 when nothing is added.

    weight * scale goes into the left factor in float64 and is rounded once to float32.
    """
    if not tensor.parts:
        return np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    left, right = zip(*(_oriented(part, tensor) for part in tensor.parts), strict=True)
    return np.ascontiguousarray(np.hstack(left)), np.ascontiguousarray(np.vstack(right))


def _oriented(part: Part, tensor: TensorPlan) -> tuple[Float32, Float32]:
    a, b = read_rows(part.factor.a), read_rows(part.factor.b)
    left, right = (a.T, b.T) if part.factor.transposed else (b, a)
    scaled = left.astype(np.float64) * (part.weight * part.factor.scale)
    if np.abs(scaled).max(initial=0.0) > LARGEST["F32"]:
        raise BadAdapterError(
            f"{part.factor.b.file}: weight {part.weight} makes {tensor.source.name} overflow"
        )
    return scaled.astype(np.float32), right


def _blocks(shard: ShardPlan) -> Iterator[_Block]:
    index = 0
    for tensor in shard.tensors:
        if tensor.copied:
            rows, step = tensor.source.nbytes, BLOCK_ELEMENTS * 4
        else:
            rows, step = tensor.source.rows, max(1, BLOCK_ELEMENTS // max(1, tensor.source.columns))
        for first in range(0, rows, step):
            yield _Block(index, tensor, first, min(step, rows - first))
            index += 1


def _look_closer(tensor: TensorPlan, data: memoryview, values: Float32) -> None:
    """Raise what is wrong with a block that may not be finite in the output dtype; return if nothing is."""
    before = np.empty_like(values)
    widen_into(data, tensor.source.dtype, before)
    finite = np.isfinite(before)
    if np.isnan(before).any() or (tensor.parts and not finite.all()):
        raise _nan_in_base(
            tensor
        )  # infinity alone is let through where nothing is added: masks are made of it
    dtype = tensor.target.dtype
    # halfway to the next power of two beyond the largest value is where rounding reaches infinity
    limit = {"F16": 65520.0, "BF16": 3.3961775292304957e38, "F32": np.inf}[dtype]
    worst = float(np.abs(values[finite]).max(initial=0.0))
    if not worst < limit:
        raise BadAdapterError(
            f"{tensor.target.name}: the merged weights reach {worst:.4g}, more than {dtype} can hold "
            f"({LARGEST[dtype]:.4g})",
            "choose --dtype bfloat16 or float32, or smaller weights",
        )


def _nan_in_base(tensor: TensorPlan) -> BadModelError:
    return BadModelError(
        f"{tensor.source.file}: {tensor.source.name} holds NaN or infinity",
        "this checkpoint is broken: get it again",
    )


def _read_all(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(data):
        count = os.preadv(descriptor, [data[done:]], offset + done)
        if count == 0:
            raise BadTensorFileError(
                f"{path} became shorter while it was read", "is something writing to it?"
            )
        done += count


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
