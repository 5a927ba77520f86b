"""What runs in a Ray worker: one process with one bench, which gives the rows of a cell batch by batch.

The driver (`ray_executor`) sends cells and keeps the rows. A worker is asked first whether it is the same as the
driver in what rows depend on: the cell's hash was made there.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import MedmergeError
from engine.evaluate.bench import Bench, Stamps, stamp_of, stamps_of
from engine.evaluate.cells import FORMAT, Cell, base_sha256
from engine.evaluate.config import EvalConfig, GgufFile
from engine.evaluate.data import Sample
from engine.evaluate.rows import Row
from engine.weights import Adapter, Checkpoint
from engine.weights.tensorfile import file_sha256


@dataclass(frozen=True)
class Wanted:
    """What the driver's cells say about libraries and files; a worker must find the same.

    files: SHA-256 by path of the base's folder, the adapters' folders and the GGUF files, as in the hashes of
        the cells. stamps: size, time and inode of what lies there, as the driver sees it.
    """

    versions: dict[str, str]
    files: dict[Path, str]
    stamps: Stamps
    format: str = FORMAT

    @classmethod
    def of(cls, config: EvalConfig, cells: Sequence[Cell]) -> Wanted:
        versions: dict[str, str] = {}
        files: dict[Path, str] = {}
        for cell in cells:
            versions.update(cell.spec["versions"])
            if isinstance(cell.model, GgufFile):
                files[cell.model.path] = cell.spec["base"]["sha256"]
            elif cell.model is None and config.base is not None:
                files[config.base] = cell.spec["base"]["sha256"]
                files.update({config.adapters[label]: sha for label, sha in cell.spec["adapters"].items()})
        return cls(versions, files, stamps_of(config))

    def differences(self, config: EvalConfig) -> list[str]:
        """In words, what is different in this process and on this machine; empty when nothing is."""
        found = []
        if self.format != FORMAT:
            found.append(f"its medmerge measures by {FORMAT}, this one by {self.format}")
        for name, version in self.versions.items():
            try:
                here = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                here = "not installed"
            if here != version:
                found.append(f"{name} is {here} there and {version} here")
        return found or [words for path in self.files if (words := self._other_file(path, config))]

    def _other_file(self, path: Path, config: EvalConfig) -> str:
        """Why the file or folder is not the driver's. Equal size, time and inode say it is, as on a shared disk;
        else it is a copy, and is hashed whole."""
        mine = {p: stamp for p, stamp in self.stamps.items() if p == path or p.parent == path}
        if not path.exists():
            return f"{path} is not there"
        try:
            if mine and all(stamp_of(p) == stamp for p, stamp in mine.items()):
                return ""
            here = _sha256(path, config)
        except (MedmergeError, OSError) as error:
            return str(error)
        return (
            "" if here == self.files[path] else f"{path} holds something else there (SHA-256 {here[:12]}...)"
        )


def _sha256(path: Path, config: EvalConfig) -> str:
    """As in a cell's hash."""
    if path == config.base:
        return base_sha256(Checkpoint.open(path))
    return Adapter.open(path).sha256 if path.is_dir() else file_sha256(path)


@dataclass(frozen=True)
class Ready:
    """A worker that has started: where, and why it must not be used (empty when it may)."""

    host: str
    pid: int
    differences: list[str]


@dataclass(frozen=True)
class Piece:
    """Rows of one batch. done: samples of the cell measured so far, now or before; said: for the run's log."""

    rows: list[Row]
    prompts: list[str]
    done: int
    said: list[str] = field(default_factory=list)


class Worker:
    """The actor. `config` names the device and the compute dtype the driver resolved, nothing automatic."""

    def __init__(
        self, config: EvalConfig, wanted: Wanted, threads: int, environment: Mapping[str, str]
    ) -> None:
        os.environ.update(environment)
        self.config, self.wanted, self.threads = config, wanted, threads
        self._said: list[str] = []
        self._bench = Bench(config, self._said.append)

    def check(self) -> Ready:
        """Called once, before any cell."""
        differences = self.wanted.differences(self.config)
        if not differences:
            import torch

            from engine.evaluate.live import pick_device

            torch.set_num_threads(self.threads)
            try:
                pick_device(self.config.device)
            except MedmergeError as error:
                differences.append(error.message)
        return Ready(socket.gethostname(), os.getpid(), differences)

    def measure(
        self, cell: Cell, samples: Sequence[Sample], kept: Set[str]
    ) -> Iterator[Piece | MedmergeError]:
        """The rows of the batches that are not wholly in `kept`. An error of ours is the last thing given: as a
        value, because Ray would wrap a raised one into a class of its own."""
        try:
            work = self._bench.work(cell, samples)
            done = 0
            for batch in work.batches:
                done += len(batch)
                if all(samples[i].id in kept for i in batch):
                    continue
                rows = [row for row in work.run(batch) if row["id"] not in kept]
                said = self._said[:]
                self._said.clear()
                yield Piece(rows, [work.prompts[i] for i in batch], done, said)
        except MedmergeError as error:
            yield error
