"""The streaming merge: row blocks are read, merged in float32, rounded once and written at their final offset.

Blocks go to worker threads in file order (the kernel, numpy and hashlib release the interpreter's lock); each
worker owns its buffers, so memory does not grow with the model. What a tensor needs before its first block (its
factors, and for slerp and TIES a pass over all of it) is done while the tensors before it are written: the
schedule is a diagonal, so nobody waits. Both SHA-256 of a shard, of the bytes read and of those written, are
taken on the way, in order: what the manifest names is what was merged. A journal notes what is on disk for good,
and a merge that was killed goes on from there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.atomic import NO_SPACE
from engine.errors import BadModelError, NoSpaceError
from engine.jobs.events import EventWriter
from engine.merge.blocks import Buffers
from engine.merge.files import OpenFiles, read_all, write_all
from engine.merge.finite import LIMIT, look_closer, refuse_nan
from engine.merge.journal import FileHashes, Journal
from engine.merge.kernel import kernel
from engine.merge.layout import ShardPlan
from engine.merge.plan import Plan
from engine.merge.schedule import COPY_BYTES, Task, block_elements, output_tasks, schedule
from engine.weights.tensorfile import file_sha256

_AHEAD = 8 << 20  # bytes after which the disk is told to begin


@dataclass(frozen=True)
class Streamed:
    """What was written, and what was read beside the reference's shards."""

    shards: list[FileHashes]
    others: dict[Path, str]  # SHA-256 of the other models' files
    resumed_bytes: int  # that an earlier, killed run had written


class _Stopped(Exception):
    """Another worker failed, or the job was cancelled."""


@dataclass
class _InOrder:
    """A SHA-256 fed by several threads in block order: each waits for its turn."""

    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    turn: int = 0
    stopped: bool = False
    ready: threading.Condition = field(default_factory=threading.Condition)

    def update(self, index: int, data: memoryview | None, copy: bool = False) -> hashlib._Hash | None:
        """Feed block `index` (None: nothing, only pass the turn on); with `copy` the state just after it."""
        with self.ready:
            while self.turn != index and not self.stopped:
                self.ready.wait()
            if self.stopped:
                raise _Stopped
        if data is not None:
            self.digest.update(data)  # only the thread whose turn it is gets here
        state = self.digest.copy() if copy else None
        with self.ready:
            self.turn = index + 1
            self.ready.notify_all()
        return state

    def stop(self) -> None:
        with self.ready:
            self.stopped = True
            self.ready.notify_all()


def stream_merge(
    plan: Plan,
    folder: Path,
    events: EventWriter,
    threads: int | None = None,
    journal: Journal | None = None,
) -> Streamed:
    """Write every shard of the plan into `folder`; returns the hashes of what was read and written.

    Args:
        plan: from `make_plan`; offsets, changes and weights are its.
        folder: an existing folder of our own (`.partial`).
        events: progress in bytes written, phase "merge".
        threads: workers; by default as many as the processors this process may use, and two at least.
        journal: of this folder; what it knows is not done again.

    Raises:
        BadModelError: NaN or infinity in a model. BadAdapterError: the sum overflows the output dtype.
        NoSpaceError: the disk filled up (space for each file is reserved before it is written).
    """
    workers = threads or default_threads()
    progress = _Progress(events, plan.bytes_written)
    others = sorted({s.path for m in plan.inputs.models.values() if m is not plan.base for s in m.shards})
    stamps = {path: path.stat().st_mtime_ns for path in others}
    hashes = []
    with OpenFiles() as files, ThreadPoolExecutor(2, thread_name_prefix="finish") as aside:
        hashing = {path: aside.submit(file_sha256, path) for path in others}
        finishing: list[Future[None]] = []
        for shard in plan.shards:
            known = journal.finished(shard.name) if journal else None
            if known is not None:
                progress.resume(shard.size, shard.name)
            else:
                known = _merge_shard(plan, shard, folder, workers, progress, files, journal)
                if journal:
                    finishing.append(aside.submit(journal.finish, known))
            hashes.append(known)
        for future in finishing:
            future.result()
        found = {path: future.result() for path, future in hashing.items()}
    for path, stamp in stamps.items():
        if path.stat().st_mtime_ns != stamp:
            raise BadModelError(f"{path} was changed while it was merged", "is something writing to it?")
    return Streamed(hashes, found, progress.resumed)


def default_threads() -> int:
    return max(2, len(os.sched_getaffinity(0)))


@dataclass
class _Progress:
    """Bytes written so far, over all threads."""

    events: EventWriter
    total: int
    done: int = 0
    resumed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int, message: str) -> None:
        with self.lock:
            self.done += count
            self.events.progress(self.done, self.total, unit="B", message=message, phase="merge")

    def resume(self, count: int, message: str) -> None:
        self.resumed += count
        self.add(count, message)


def _merge_shard(
    plan: Plan,
    shard: ShardPlan,
    folder: Path,
    workers: int,
    progress: _Progress,
    files: OpenFiles,
    journal: Journal | None,
) -> FileHashes:
    path = folder / shard.name
    done, digest = journal.resume(shard.name) if journal else (0, hashlib.sha256())
    try:
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if done else os.O_CREAT | os.O_EXCL)
        target = os.open(path, flags, 0o644)
        try:
            work = _ShardWork(plan, shard, files, target, progress, journal)
            work.start(done, digest)
            work.run(workers)
        finally:
            os.close(target)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpaceError(
                f"no room for {path} ({shard.size / 1e9:.2f} GB): {error.strerror}",
                "free some space, or choose another disk for the output",
            ) from error
        raise
    return FileHashes(shard.name, work.source_hash.digest.hexdigest(), work.target_hash.digest.hexdigest())


def _reserve(descriptor: int, size: int) -> None:
    """Make room for the whole file, where the file system can; else it fills as it is written."""
    if not size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


class _ShardWork:
    """The blocks of one shard and the workers that take them in order."""

    def __init__(
        self,
        plan: Plan,
        shard: ShardPlan,
        files: OpenFiles,
        target: int,
        progress: _Progress,
        journal: Journal | None,
    ) -> None:
        self._plan, self._shard, self._files, self._target = plan, shard, files, target
        self._source = files.descriptor(shard.source.path)
        self._progress, self._journal = progress, journal
        self.source_hash, self.target_hash = _InOrder(), _InOrder()
        self._tasks: Iterator[Task] = iter(())
        self._lock, self._stopped = threading.Lock(), threading.Event()
        widest = max((t.source.columns for t in shard.tensors if not t.copied), default=1)
        self._elements = max(block_elements(), widest)

    def start(self, done: int, digest: hashlib._Hash) -> None:
        """Lay out the file, or go on behind the `done` bytes an earlier run left (`digest` is theirs)."""
        skip, read = self._skipped(done)
        if skip:
            self.target_hash.digest = digest
            self._progress.resume(done, self._shard.name)
        else:
            os.ftruncate(self._target, 0)
            _reserve(self._target, self._shard.size)
            write_all(self._target, self._shard.header, 0)
            self.target_hash.digest.update(self._shard.header)
            self._progress.add(len(self._shard.header), self._shard.name)
        self.source_hash.digest.update(self._shard.source.header)
        self._hash_source(len(self._shard.source.header), read)
        self.source_hash.turn = self.target_hash.turn = skip
        self._tasks = schedule(self._plan, self._shard, self._files, skip)

    def _skipped(self, done: int) -> tuple[int, int]:
        """How many blocks end at or before `done`, and where the source bytes they were made of end."""
        read = len(self._shard.source.header)
        for task in output_tasks(self._shard):
            start, size = task.span(target=True)
            if done and start + size == done and task.hashed:
                offset, length = task.span(target=False)
                return task.index + 1, offset + length
            if start + size > done:
                break
        return 0, read

    def _hash_source(self, first: int, end: int) -> None:
        """Feed the source's hash with what an earlier run has merged already."""
        buffer = bytearray(4 << 20)
        while first < end:
            piece = memoryview(buffer)[: min(len(buffer), end - first)]
            read_all(self._source, piece, first, self._shard.source.path)
            self.source_hash.digest.update(piece)
            first += len(piece)

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
            self._tasks = iter(())
        self._stopped.set()
        self.source_hash.stop()
        self.target_hash.stop()

    def _work(self) -> None:
        buffers = Buffers(self._elements, len(self._plan.recipe.entries), COPY_BYTES)
        while True:
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            try:
                self._do(task, buffers)
            except BaseException:
                self._stop()
                raise

    def _do(self, task: Task, buffers: Buffers) -> None:
        if task.block is None:
            assert task.work is not None
            task.work.load()
            return
        offset, length = task.span(target=False)
        data = buffers.raw[:length]
        beyond = not task.tensor.copied and task.block.first >= task.tensor.source.rows
        if not beyond:
            read_all(self._source, data.data, offset, task.tensor.source.file)
        if task.work is None:
            refuse_nan(task.tensor, data)
            self._finish(task, data.data, data.data)
            return
        if task.stage:
            task.work.wait(task.stage, self._stopped)
            task.work.gather(task.stage, task.block, data, buffers)
            return
        task.work.wait(task.work.stages + 1, self._stopped)
        if self._stopped.is_set():
            raise _Stopped
        out = buffers.out[: task.span(target=True)[1]]
        with np.errstate(all="ignore"):  # what is not finite is found and named below
            largest = task.work.merge(task.block, data, out, buffers)
        if not largest < LIMIT[task.tensor.target.dtype]:
            look_closer(task.tensor, task.block, data, largest)
        self._finish(task, data.data, out.data)

    def _finish(self, task: Task, data: memoryview, out: memoryview) -> None:
        """Write a block and take both hashes; other workers compute meanwhile, so the turns cost no time."""
        offset, length = task.span(target=True)
        write_all(self._target, out, offset)
        if offset // _AHEAD != (offset + length) // _AHEAD:
            begin = max(0, (offset // _AHEAD - 1) * _AHEAD)
            kernel().start_writing(self._target, begin, 2 * _AHEAD)
        self.source_hash.update(task.index, data if task.hashed else None)
        state = self.target_hash.update(task.index, out, copy=self._journal is not None)
        if self._journal is not None and task.hashed:
            self._journal.note(self._shard.name, offset + length, state)
        self._progress.add(len(out), task.tensor.target.name)
