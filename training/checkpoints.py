"""Checkpoints that count only when they are whole. Used by `training.trainer` and `training.run`.

    RUN/checkpoints/checkpoint-STEP/    as transformers' Trainer writes it (adapter, optimizer, schedule, random states)
                    checkpoint.json     {"files": {name: bytes}}: written last, after everything reached the disk

What a kill left half-written has no mark or files of other sizes, and is passed over. Older checkpoints are removed
only after a newer one has its mark.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.atomic import NO_SPACE, sync_tree, write_json
from engine.errors import BadInputError, MedmergeError, NoSpaceError

MARK = "checkpoint.json"
FULL_BELOW = 1 << 20  # bytes free: torch's writer says "unexpected pos" and not that the disk is full


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Write a checkpoint in the block. On error what was written is removed, and the ones before are kept.

    Raises NoSpaceError when the disk is full, MedmergeError when it fails in another way.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = _is_full(error, folder)
        shutil.rmtree(folder, ignore_errors=True)
        kept = newest(folder.parent, required=False)
        what = f"the one before it, {kept.name}, is kept" if kept else "there is none before it"
        if full:
            raise NoSpaceError(
                f"the disk filled up while {folder} was written; {what}", "free some space and resume the run"
            ) from error
        raise MedmergeError(
            f"{folder} could not be written: {error}; {what}", "see to that disk, then resume the run"
        ) from error


def _is_full(error: BaseException, folder: Path) -> bool:
    if (isinstance(error, OSError) and error.errno in NO_SPACE) or "No space left" in str(error):
        return True
    return folder.parent.is_dir() and shutil.disk_usage(folder.parent).free < FULL_BELOW


def mark(folder: Path, keep: int) -> None:
    """Declare a checkpoint whole, once it is on the disk, and remove all but the `keep` newest."""
    sync_tree(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARK
    }
    write_json(folder / MARK, {"files": files})
    for old in _whole(folder.parent)[keep:]:
        if old != folder:
            (old / MARK).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _whole(parent: Path) -> list[Path]:
    """The whole checkpoints of a run, newest first."""
    found = [path for path in parent.glob("checkpoint-*") if path.name[11:].isdigit() and _is_whole(path)]
    return sorted(found, key=step_of, reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest(parent: Path, required: bool = True) -> Path | None:
    """The newest whole checkpoint. Without one: BadInputError if it is `required`, else None."""
    whole = _whole(parent)
    if whole:
        return whole[0]
    if required:
        raise BadInputError(
            f"{parent.parent} has no whole checkpoint to resume from",
            "remove that folder and start the run anew",
        )
    return None


def remove_torn(parent: Path) -> list[str]:
    """Remove what kills left half-written, so that nothing of it is ever mixed with a new checkpoint."""
    whole = set(_whole(parent))
    torn = [path for path in parent.glob("checkpoint-*") if path not in whole]
    for path in torn:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in torn)


def random_states() -> dict[str, Any]:
    """The states of all random generators that training draws from."""
    import numpy
    import torch

    states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    import numpy
    import torch

    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.random.set_rng_state(states["cuda"])
