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

from engine.claim import NO_SPACE, claim, remove_dead_lock, start_time
from engine.errors import BadInputError, MedmergeError, NoSpaceError, TargetExistsError

__all__ = [
    "JOURNAL", "NO_SPACE", "PARTIAL", "fsync_path", "need_space", "new_folder", "partial_path",
    "refuse_existing", "reject", "start_time", "sync_tree", "worth_resuming", "write_json", "write_text",
]  # fmt: skip

PARTIAL = ".partial"
JOURNAL = ".journal.jsonl"  # in a partial: line 1 says what is made, further lines what of it is done
_NO_FSYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP)
_OLD_OWNER = ".owner.json"  # how a partial named its owner before there were locks


def fsync_path(path: Path) -> None:
    """fsync one file or directory (the latter where the file system can: some network ones cannot)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC or not path.is_dir():
            raise
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
    """Replace a JSON file atomically. Names that are no UTF-8 (of files, on Linux) are written as escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def refuse_existing(target: Path) -> None:
    """Raise TargetExistsError when there is anything at `target`. A dead writer's lock beside it is removed."""
    if target.exists() or target.is_symlink():
        remove_dead_lock(partial_path(target))
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
def new_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """A `.partial` folder that becomes `target` when the block ends without error.

    One process at a time writes a target: a second one is refused, and told who the first is. On error the
    partial folder is removed, so nothing half-made is left behind. The block may rename the folder away itself
    (a rejected merge); then nothing more happens.

    With `resume`, a partial whose journal (`JOURNAL`, see engine.merge.journal) holds finished work outlives
    its process: it is handed to the next block that asks with `resume`, and an error that is not the input's
    fault keeps it and says so in its hint. Without, what a dead process left is removed first.

    Raises:
        TargetExistsError: there is something at `target`, before or after.
        BadInputError: another process writes it, or the folder cannot be written, or a `.partial` lies there
            that is not known to be ours.
        NoSpaceError: the disk filled up. MedmergeError: the file system failed in another way.
    """
    refuse_existing(target)
    partial = partial_path(target)
    _make_parent(target)
    with claim(partial) as left_over:
        refuse_existing(target)
        _prepare(partial, left_over, resume)
        try:
            yield partial
            if partial.exists():
                (partial / JOURNAL).unlink(missing_ok=True)
                sync_tree(partial)
                refuse_existing(target)
                partial.rename(target)
                fsync_path(target.parent)
        except OSError as error:
            kept = _keep(partial, resume)
            what = f"what is done is kept in {partial}" if kept else "nothing was kept"
            then = "run it again" + (": it goes on from there" if kept else "")
            if error.errno in NO_SPACE:
                raise NoSpaceError(
                    f"the disk filled up while writing {target}; {what}", f"free some space and {then}"
                ) from error
            raise MedmergeError(
                f"{target} could not be finished: {error}; {what}",
                f"see to that disk or network folder, then {then}",
            ) from error
        except BadInputError:
            _keep(partial, False)
            raise
        except MedmergeError as error:
            if _keep(partial, resume):
                said = f"{error.hint}; " if error.hint else ""
                error.hint = (
                    f"{said}what is done is kept in {partial}: run it again and it goes on from there"
                )
            raise
        except BaseException:
            _keep(partial, resume)
            raise


def reject(partial: Path, target: Path) -> Path:
    """Keep a folder that failed its verification beside the target, under a name that is free."""
    (partial / JOURNAL).unlink(missing_ok=True)
    sync_tree(partial)
    kept = target.with_name(target.name + ".rejected")
    number = 1
    while kept.exists():
        number += 1
        kept = target.with_name(f"{target.name}.rejected-{number}")
    partial.rename(kept)
    return kept


def worth_resuming(partial: Path) -> bool:
    """Whether a partial folder's journal says that something is done: a line beyond the first."""
    try:
        with (partial / JOURNAL).open("rb") as file:
            return sum(line.endswith(b"\n") for _, line in zip(range(2), file, strict=False)) == 2
    except OSError:
        return False


def _keep(partial: Path, resume: bool) -> bool:
    """After an error: keep the partial folder if that is asked and worth it, else remove it."""
    if resume and worth_resuming(partial):
        return True
    shutil.rmtree(partial, ignore_errors=True)
    return False


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(
            f"cannot make the folder {target.parent}: {error.strerror}",
            "choose an output folder you can write to",
        ) from error


def _prepare(partial: Path, left_over: bool, resume: bool) -> None:
    """An empty partial folder, or one to go on with. What is not known to be ours is never removed.

    Ours is what a holder of the lock left when it died (`left_over`), and what carries a journal.
    """
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise BadInputError(
            f"{partial} is there and is no folder of ours", "move it away, or choose another name"
        )
    if partial.is_dir():
        if resume and worth_resuming(partial):
            return
        ours = left_over or any((partial / name).is_file() for name in (JOURNAL, _OLD_OWNER))
        if not ours and any(partial.iterdir()):
            raise BadInputError(
                f"{partial} is there, and nothing says that this program left it",
                "look into it, then remove it yourself or choose another name",
            )
        shutil.rmtree(partial)
    try:
        partial.mkdir()
    except OSError as error:
        raise BadInputError(
            f"cannot write in {partial.parent}: {error.strerror}", "choose an output folder you can write to"
        ) from error
