"""The journal of a merge in its `.partial` folder: what is on disk for good, so that a killed merge goes on.

`.journal.jsonl` is appended to and fsynced line by line:

    {"format": "medmerge.journal/1", "fingerprint": SHA-256}                what is being made, from what
    {"shard": NAME, "done_bytes": N, "sha256": HEX}                         bytes 0..N are on the disk
    {"shard": NAME, "finished": true, "source_sha256": HEX, "target_sha256": HEX, "size": N, "mtime_ns": N}

Nothing in it is believed without looking: a torn last line is dropped, a prefix is read back and its hash
compared before a merge builds on it, a finished shard must have its size and modification time still.
`engine.merge.stream` writes it; `engine.atomic.new_folder(resume=True)` keeps the folder it lies in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from engine import __version__
from engine.atomic import JOURNAL, fsync_path

FORMAT = "medmerge.journal/1"
NOTE_BYTES = 256 << 20  # a line about this often: at most so much is computed again after a kill
_READ_BYTES = 4 << 20
_MOST_HEADER = 100 << 20  # the safetensors format's own limit


@dataclass(frozen=True)
class FileHashes:
    """SHA-256 of one shard as it was read and as it was written."""

    name: str
    source: str
    target: str


def fingerprint(
    document: Mapping[str, Any], inputs: Iterable[Path], program: Mapping[str, str] | None = None
) -> str:
    """SHA-256 that two runs share only if the second may go on where the first stopped.

    Args:
        document: the recipe with absolute paths (`Recipe.to_dict()`).
        inputs: every file the merge reads: shards, adapters, configs. Each counts by path, size, modification
            time in ns and, for safetensors, the bytes of its header.
        program: what else decides the bits, e.g. {"kernel": "compiled, AVX2"}; the versions of this program and
            of numpy and the kind of machine always count.
    """
    digest = hashlib.sha256()
    made_by = {"version": __version__, "numpy": np.__version__, "machine": platform.machine()}
    said = {"recipe": document, "program": {**made_by, **(program or {})}}
    digest.update(json.dumps(said, sort_keys=True).encode())
    for path in sorted(set(inputs)):
        found = path.stat()
        digest.update(f"\n{path}\n{found.st_size} {found.st_mtime_ns} ".encode("utf-8", "surrogateescape"))
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = min(int.from_bytes(file.read(8), "little"), _MOST_HEADER)
                digest.update(hashlib.sha256(file.read(length)).digest())
    return digest.hexdigest()


@dataclass
class _Shard:
    """What the journal says of one shard."""

    done: int = 0
    sha256: str = ""
    hashes: FileHashes | None = None
    size: int = 0
    mtime_ns: int = 0


@dataclass
class Journal:
    """Open from `start` to `close`; a context manager. `note` may be called from several threads."""

    folder: Path
    every: int
    _descriptor: int
    _shards: dict[str, _Shard] = field(default_factory=dict)
    _end: int = 0  # bytes of the file that are whole lines
    _noted: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(cls, partial: Path, fingerprint: str, every: int | None = None) -> Journal:
        """Go on with the journal in `partial`, or begin one there.

        With the same fingerprint the shards it knows stay and every other file is removed (they are made again
        in no time); with another one, or without a journal that can be read, the folder is emptied.
        `every`: bytes of a shard between two notes (`NOTE_BYTES`).
        """
        path = partial / JOURNAL
        shards, end = _read(path, fingerprint)
        for entry in partial.iterdir():
            if end and entry.name == JOURNAL:
                continue
            if entry.name in shards and entry.is_file() and not entry.is_symlink():
                continue
            _remove(entry)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        journal = cls(partial, NOTE_BYTES if every is None else every, descriptor, shards, end)
        os.ftruncate(descriptor, end)
        if not end:
            journal._append({"format": FORMAT, "fingerprint": fingerprint})
            fsync_path(partial)
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def finished(self, shard: str) -> FileHashes | None:
        """The hashes of a shard that is whole on disk and was not touched since; None: it must be written."""
        known = self._shards.get(shard)
        if known is None or known.hashes is None:
            return None
        try:
            found = (self.folder / shard).stat(follow_symlinks=False)
        except OSError:
            return None
        same = (found.st_size, found.st_mtime_ns) == (known.size, known.mtime_ns)
        return known.hashes if same else None

    def prefix(self, shard: str) -> int:
        """Bytes from the start of the shard's file that are right on disk (0: begin anew)."""
        return self.resume(shard)[0]

    def resume(self, shard: str) -> tuple[int, hashlib._Hash]:
        """(prefix, the SHA-256 fed with these bytes, to be continued). Reads the prefix back and compares.

        A file that cannot be gone on with is removed, and the prefix is 0. Later notes count from the prefix.
        """
        digest, known = hashlib.sha256(), self._shards.get(shard, _Shard())
        left = known.done
        with contextlib.suppress(OSError), (self.folder / shard).open("rb", buffering=0) as file:
            while left and (data := file.read(min(left, _READ_BYTES))):
                digest.update(data)
                left -= len(data)
        good = known.done > 0 and left == 0 and known.sha256 in ("", digest.hexdigest())
        done = known.done if good else 0
        with self._lock:
            self._noted[shard] = done
        if not good:
            (self.folder / shard).unlink(missing_ok=True)
        return (done, digest) if good else (0, hashlib.sha256())

    def note(self, shard: str, done: int, digest: hashlib._Hash | None = None) -> bool:
        """Say that bytes 0..`done` of the shard's file are written; call it as often as you like.

        Once in `every` bytes it makes them durable (fdatasync) and appends a line; then it returns True.
        `digest` is the SHA-256 of exactly these bytes, if the caller has it: a resumed merge compares.
        """
        if done - self._noted.get(shard, 0) < self.every or not self._lock.acquire(blocking=False):
            return False
        try:
            if done - self._noted.get(shard, 0) < self.every or self._descriptor < 0:
                return False
            sha256 = digest.hexdigest() if digest is not None else ""
            self._noted[shard] = done
            _fdatasync(self.folder / shard)
            self._append({"shard": shard, "done_bytes": done, "sha256": sha256})
            return True
        finally:
            self._lock.release()

    def finish(self, hashes: FileHashes) -> None:
        """Make a whole shard durable and note its hashes."""
        path = self.folder / hashes.name
        fsync_path(path)
        found = path.stat()
        with self._lock:
            self._append(
                {
                    "shard": hashes.name,
                    "finished": True,
                    "source_sha256": hashes.source,
                    "target_sha256": hashes.target,
                    "size": found.st_size,
                    "mtime_ns": found.st_mtime_ns,
                }
            )

    def _append(self, line: dict[str, Any]) -> None:
        """One durable line. Where it finds no room the journal ends there: the merge matters more than it."""
        if self._descriptor < 0:
            return
        data = json.dumps(line).encode() + b"\n"
        try:
            if os.pwrite(self._descriptor, data, self._end) != len(data):
                raise OSError
            os.fdatasync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            os.close(self._descriptor)
            self._descriptor = -1
            return
        self._end += len(data)


def _read(path: Path, fingerprint: str) -> tuple[dict[str, _Shard], int]:
    """What a journal with this fingerprint says, and how many of its bytes are whole lines (0: begin anew)."""
    try:
        with path.open("rb") as file:
            lines = file.read().splitlines(keepends=True) if not path.is_symlink() else []
    except OSError:
        return {}, 0
    shards: dict[str, _Shard] = {}
    end = 0
    for number, line in enumerate(lines):
        try:
            if not line.endswith(b"\n"):
                break
            raw = json.loads(line)
            if number == 0:
                if (raw["format"], raw["fingerprint"]) != (FORMAT, fingerprint):
                    return {}, 0
            else:
                name, shard = _shard(raw)
                shards[name] = shard
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # torn or damaged: what stands before it is still good
        end += len(line)
    return shards, end


def _shard(raw: dict[str, Any]) -> tuple[str, _Shard]:
    name = raw["shard"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError
    if raw.get("finished"):
        hashes = FileHashes(name, str(raw["source_sha256"]), str(raw["target_sha256"]))
        return name, _Shard(hashes=hashes, size=int(raw["size"]), mtime_ns=int(raw["mtime_ns"]))
    return name, _Shard(done=max(0, int(raw["done_bytes"])), sha256=str(raw["sha256"]))


def _fdatasync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
