"""The models of a run, opened when a cell needs them: one process has one bench. Imports torch only on use.

The local executor keeps one in the job's own process, a Ray worker one in each actor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.evaluate.cells import Cell
from engine.evaluate.config import EvalConfig, GgufFile, Server
from engine.evaluate.data import Sample
from engine.evaluate.rows import Row
from engine.weights import Adapter, Checkpoint
from engine.weights.checkpoint import COMPANIONS, INDEX


class Work(Protocol):
    """One cell on its model. The batches depend on the samples alone, so that a resumed cell has the same ones."""

    prompts: list[str]
    batches: list[list[int]]  # indices into the samples

    def run(self, batch: Sequence[int]) -> list[Row]:
        """The rows of these samples, in their order."""
        ...


class Bench:
    """Opens what a cell runs on. At most one base and one GGUF file are held at a time."""

    def __init__(self, config: EvalConfig, log: Callable[[str], None]) -> None:
        self.config, self.log = config, log
        self._live: Any = None
        self._file: tuple[GgufFile, Any] | None = None

    def work(self, cell: Cell, samples: Sequence[Sample]) -> Work:
        """The cell ready to run. Raises MedmergeError when its model cannot be opened."""
        if isinstance(cell.model, GgufFile):
            return self._gguf(cell.model).work(cell, samples)
        if isinstance(cell.model, Server):
            from engine.evaluate.backends.server import ServerBackend

            return ServerBackend(cell.model, self.config.base, self.log).work(cell, samples)
        from engine.evaluate.execute import CellWork

        return CellWork(self._mixture(cell), cell, samples)

    def close(self) -> None:
        """Give the memory of all models back."""
        self._live = None
        self._close_file()

    def _mixture(self, cell: Cell) -> Any:
        """The base in memory with this cell's mixture in it."""
        from engine.evaluate.live import LiveModel

        config = self.config
        if self._live is None:
            self._close_file()
            if config.base is None:
                raise ValueError("a mixture needs a base")
            base = Checkpoint.open(config.base)
            adapters = {label: Adapter.open(path) for label, path in config.adapters.items()}
            self.log(f"loading {base.name}")
            started = time.monotonic()
            self._live = LiveModel(base, adapters, config.dtype, config.compute, config.device)
            self.log(f"loaded in {time.monotonic() - started:.1f} s on {self._live.device}")
        if self._live.weights != dict(cell.weights):
            self._live.set_weights(cell.weights)
        return self._live

    def _gguf(self, file: GgufFile) -> Any:
        from engine.evaluate.backends.gguf import GgufBackend

        if self._file is None or self._file[0] != file:
            self.close()
            self.log(f"loading {file.path.name}")
            self._file = (file, GgufBackend(file, self.config.device))
        return self._file[1]

    def _close_file(self) -> None:
        if self._file is not None:
            self._file[1].close()
            self._file = None


Stamps = dict[Path, tuple[int, int, int]]


def stamps_of(config: EvalConfig) -> Stamps:
    """Size, time and inode of every file a cell's hash covers: what changes when one is replaced or written to.

    A README beside the weights is none of them; nor is a base that no mixture is made on.
    """
    folders = [*config.adapters.values(), *([config.base] if config.base else [])] if config.weights else []
    files = [path for folder in folders for path in sorted(folder.iterdir()) if _matters(path)]
    return {path: stamp_of(path) for path in [*files, *(file.path for file in config.gguf)]}


def changed_since(stamps: Stamps, cell: Cell) -> Path | None:
    """The first file this cell is measured with that is not what it was, or None. A server's cell has no file."""
    if isinstance(cell.model, Server):
        return None
    if isinstance(cell.model, GgufFile):
        read = [cell.model.path]
    else:
        read = [path for path in stamps if path.suffix != ".gguf"]
    return next((path for path in read if path in stamps and stamp_of(path) != stamps[path]), None)


def _matters(path: Path) -> bool:
    """Weights, and what decides shapes and texts, as in `cells.base_sha256` and an adapter's hash."""
    named = path.name in (INDEX, "adapter_config.json") or path.name in COMPANIONS
    weights = path.suffix == ".safetensors"
    return path.is_file() and (weights or (named and path.suffix in (".json", ".jinja", ".model")))


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Size, time and inode of a file; (-1, 0, 0) when it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return (-1, 0, 0)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)
