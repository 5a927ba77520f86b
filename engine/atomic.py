"""Results appear whole or not at all: write beside the target, fsync, one rename.

Used by everything that writes a result: merges (folders), GGUF files, manifests, job states.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import BadInputError, NoSpaceError, TargetExistsError

PARTIAL = ".partial"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota, file size limit


def fsync_path(path: Path) -> None:
    """fsync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file below `folder` and the folders themselves."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(parent) / name)
        fsync_path(Path(parent))


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically (temporary beside it, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in NO_SPACE:
            raise NoSpaceError(f"no space left while writing {path}", "free some disk space") from error
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def refuse_existing(target: Path) -> None:
    """Raise TargetExistsError when there is anything at `target`."""
    if target.exists() or target.is_symlink():
        raise TargetExistsError(
            f"{target} is already there",
            "results are never overwritten: choose another name or remove it yourself",
        )


def need_space(folder: Path, needed: int, what: str) -> None:
    """Raise NoSpaceError when the file system of `folder` has fewer than `needed` bytes free."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise NoSpaceError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, and {free / 1e9:.2f} GB are free there",
            "free some space or choose another disk for the output",
        )


def partial_path(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A `.partial` folder that becomes `target` when the block ends without error.

    A `.partial` left by a process that died is removed first (its lock is gone); one that a living process
    holds is refused. On error the partial folder is removed, so nothing half-made is left behind.
    The block may rename the folder away itself (a rejected merge); then nothing more happens.
    """
    refuse_existing(target)
    partial = partial_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    claim_partial(partial)
    try:
        yield partial
        if partial.exists():
            (partial / _OWNER).unlink(missing_ok=True)
            sync_tree(partial)
            refuse_existing(target)
            partial.rename(target)
            fsync_path(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in NO_SPACE:
            raise NoSpaceError(
                f"the disk filled up while writing {target}; nothing was kept",
                "free some space and run it again",
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


_OWNER = ".owner.json"


def claim_partial(partial: Path) -> None:
    """Make the partial folder ours: refuse one that a living process owns, remove a dead one's."""
    if partial.exists():
        owner = _owner(partial)
        if owner and _alive(*owner):
            raise BadInputError(
                f"{partial} is being written by process {owner[0]}", "wait for it, or cancel that job first"
            )
        shutil.rmtree(partial)
    partial.mkdir()
    (partial / _OWNER).write_text(json.dumps({"pid": os.getpid(), "start": start_time(os.getpid())}))


def _owner(partial: Path) -> tuple[int, float] | None:
    try:
        raw = json.loads((partial / _OWNER).read_text())
        return int(raw["pid"]), float(raw["start"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def start_time(pid: int) -> float:
    """When a living process started (Unix seconds), 0.0 if there is none: pid and start name a process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0


def _alive(pid: int, start: float) -> bool:
    return start > 0 and abs(start_time(pid) - start) < 1.0
