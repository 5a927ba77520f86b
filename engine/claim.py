"""One writer per result: the lock beside a `.partial`, and who holds it.

The lock is the hidden file `.NAME.lock` beside `NAME`. Where the file system has flock, holding the flock is
holding the claim: the kernel drops it when the holder dies, however it dies. Where it has not (some network
file systems), creating the file exclusively is the claim, and its content (pid, start time, host) tells a dead
holder from a living one. The file exists only while a claim is held, or after its holder was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BadInputError, NoSpaceError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota, file size limit
_NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)
_RECORD = 512  # bytes of a lock file's content
_READ_TRIES = 50  # a holder writes its name within microseconds of taking the lock; we look for half a second
_READ_PAUSE = 0.01


@dataclass(frozen=True)
class Owner:
    """Who holds a claim: process id, when that process started, on which machine, and since when (Unix s)."""

    pid: int
    start: float
    host: str
    since: float

    @classmethod
    def me(cls) -> Owner:
        return cls(os.getpid(), start_time(os.getpid()), platform.node(), time.time())

    @classmethod
    def parse(cls, text: bytes) -> Owner | None:
        """The owner a lock file names, None when it names none (yet)."""
        try:
            raw = json.loads(text)
            return cls(int(raw["pid"]), float(raw["start"]), str(raw["host"]), float(raw["since"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def encode(self) -> bytes:
        """Always the same length, so that one write replaces one owner by another with no moment between."""
        return json.dumps(self.__dict__).encode()[: _RECORD - 1].ljust(_RECORD - 1) + b"\n"

    @property
    def alive(self) -> bool:
        """Whether that process still runs. On another machine nobody can tell: then it counts as alive."""
        return self.host != platform.node() or is_alive(self.pid, self.start)

    def __str__(self) -> str:
        where = "" if self.host == platform.node() else f" on {self.host}"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid}{where} since {since}"


def start_time(pid: int) -> float:
    """When a living process started (Unix seconds), 0.0 if there is none: pid and start name a process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0


def is_alive(pid: int, start: float) -> bool:
    """Whether the process that started at `start` still runs under `pid` (a reused pid has another start)."""
    return start > 0 and abs(start_time(pid) - start) < 1.0


def lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold the right to write `path` for the length of the block. Nobody waits: one wins, the others are told.

    Yields whether a former holder died while it held the claim (so what lies at `path` is its leftover).

    Raises:
        BadInputError: another process holds it (says which, and since when), or the folder cannot be written.
        NoSpaceError: not even the lock fits on the disk.
    """
    lock = lock_path(path)
    try:
        descriptor, left_over = _acquire(lock, path)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpaceError(
                f"no space left in {path.parent}", "free some space, or choose another disk for the output"
            ) from error
        raise BadInputError(
            f"cannot write in {path.parent}: {error.strerror}", "choose an output folder you can write to"
        ) from error
    try:
        yield left_over
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # while still held, so that nobody takes a name that is about to go
        os.close(descriptor)


def remove_dead_lock(path: Path) -> None:
    """Remove the lock of a holder that was killed after `path` had got its own name. A living one's stays."""
    if lock_path(path).exists() and not path.exists():  # beside a leftover the lock says whose it is
        with contextlib.suppress(BadInputError, NoSpaceError), claim(path):
            pass


def _acquire(lock: Path, path: Path) -> tuple[int, bool]:
    """(descriptor of the held lock file, whether it names a former holder)."""
    me = Owner.me().encode()  # beforehand: the lock is without a name for as short as can be
    while True:
        descriptor, created = _open(lock)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _held(path, _read_owner(descriptor)) from None
                if error.errno not in _NO_FLOCK:
                    raise
                left_over = not created and _take_from_dead(lock, path, descriptor)
                if not created and not left_over:
                    os.close(descriptor)
                    continue
            else:
                if not _still_there(descriptor, lock):  # its holder finished between our open and our flock
                    os.close(descriptor)
                    continue
                left_over = not created and os.fstat(descriptor).st_size > 0
            try:
                _write(descriptor, me)
            except OSError:
                if (
                    not left_over
                ):  # a dead holder's lock stays: it says that what lies at `path` is a leftover
                    lock.unlink(missing_ok=True)
                raise
            return descriptor, left_over
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _open(lock: Path) -> tuple[int, bool]:
    """The lock file and whether we made it."""
    while True:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileExistsError):
            return os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(lock, flags), False


def _still_there(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _take_from_dead(lock: Path, path: Path, descriptor: int) -> bool:
    """Without flock: whether the lock is now ours because its owner is dead (False: it vanished, look again).

    Two who find the same dead owner must not both win, so taking over happens under a second exclusive file,
    held for microseconds, inside which the owner is read again.
    """
    guard = lock.with_name(lock.name + ".takeover")
    owner = _read_owner(descriptor)
    if not _still_there(descriptor, lock):
        return False
    if owner is None or owner.alive:
        raise _held(path, owner, lock)
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        raise _held(path, None, guard) from None
    try:
        if not _still_there(descriptor, lock) or _read_owner(descriptor) != owner:
            return False
        _write(descriptor, Owner.me().encode())
        return True
    finally:
        guard.unlink(missing_ok=True)


def _read_owner(descriptor: int) -> Owner | None:
    for _ in range(_READ_TRIES):
        owner = Owner.parse(os.pread(descriptor, 4096, 0))
        if owner is not None:
            return owner
        time.sleep(_READ_PAUSE)
    return None


def _write(descriptor: int, data: bytes) -> None:
    os.pwrite(descriptor, data, 0)
    os.fsync(descriptor)


def _held(path: Path, owner: Owner | None, remove: Path | None = None) -> BadInputError:
    hint = "wait for it, or cancel that job first"
    if remove is not None:
        hint += f"; if no such process is left, remove {remove}"
    return BadInputError(f"{path} is being written by {owner or 'another process'}", hint)
