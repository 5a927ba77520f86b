"""The one writer of a run: rows in, progress, tables and events out. Executors hand it what they measured.

A cell is done, failed (its server or file gave up; it can be run again) or open. Whoever measures, rows pass
through here, in the job's own process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from engine.errors import BadInputError, BadRecipeError
from engine.evaluate.bench import Stamps, changed_since
from engine.evaluate.cells import Cell
from engine.evaluate.data import Sample
from engine.evaluate.rows import Row, sha256
from engine.evaluate.store import RunStore
from engine.jobs.events import EventWriter


class Recorder:
    """Keeps the rows of a run's cells and tells how far it is."""

    def __init__(
        self,
        store: RunStore,
        samples: Mapping[str, Sequence[Sample]],
        cells: Sequence[Cell],
        events: EventWriter,
        mode: str,
        stamps: Stamps,
        warnings: Sequence[str] = (),
        doubts: Mapping[str, str] | None = None,
    ) -> None:
        self.store, self.samples, self.cells, self.events, self.mode = store, samples, cells, events, mode
        self.warnings, self.doubts = list(warnings), dict(doubts or {})
        self.failed: dict[str, str] = {}  # hash of a cell -> why
        self._stamps = stamps
        self._total = sum(len(samples[cell.task.name]) for cell in cells)
        self._counted: dict[str, int] = {}
        self._started: dict[str, tuple[float, int]] = {}  # hash -> when, tokens so far
        self._groups: dict[tuple[str, ...], list[Cell]] = {}

    def todo(self) -> list[Cell]:
        """Cells that are not done, in order; those that are, are told."""
        for cell in self.cells:
            if self.store.is_done(cell.hash):
                self._count(cell, len(self.samples_of(cell)))
                self._tell(cell)
        return [cell for cell in self.cells if not self.store.is_done(cell.hash)]

    def samples_of(self, cell: Cell) -> Sequence[Sample]:
        return self.samples[cell.task.name]

    def kept(self, cell: Cell) -> set[str]:
        """Ids of the samples of a cell that have a row already."""
        return {row["id"] for row in self.store.kept_rows(cell)}

    def begin(self, cell: Cell) -> None:
        """Called before a cell is measured. Raises BadInputError when a weight file changed since the run started."""
        self.check_files(cell)
        self._started.setdefault(cell.hash, (time.monotonic(), 0))

    def check_files(self, cell: Cell) -> None:
        """Raises BadInputError naming a file this cell needs that is not what it was when the run started."""
        path = changed_since(self._stamps, cell)
        if path is not None:
            raise BadInputError(
                f"{path} changed on disk since this run started",
                "cells that are done are right; start again to measure what is there now (under another --out)",
            )

    def add(self, cell: Cell, rows: Sequence[Row], prompts: Sequence[str]) -> None:
        """Keep finished rows and the prompts they were asked with.

        Raises BadInputError when a weight file changed: rows that may be of another model are not kept.
        """
        self.check_files(cell)
        self.store.append(cell, rows, {sha256(text): text for text in prompts})
        when, tokens = self._started.get(cell.hash, (time.monotonic(), 0))
        tokens += sum(max(0, int(row.get("new_tokens") or row.get("tokens") or 0)) for row in rows)
        self._started[cell.hash] = (when, tokens)

    def advance(self, cell: Cell, done: int) -> None:
        """`done` samples of this cell are measured (whether now or before)."""
        self._count(cell, done)

    def finish(self, cell: Cell) -> None:
        """Seal a cell whose rows are all there, and tell its numbers.

        Raises BadRecipeError when the rows kept are of other samples, BadInputError when a weight file changed.
        """
        self.check_files(cell)
        samples = self.samples_of(cell)
        if self.kept(cell) != {sample.id for sample in samples}:
            raise BadRecipeError(
                f"{self.store.folder}: the rows kept of cell {cell.hash} are of other samples",
                "delete that cell",
            )
        self.store.seal(cell, [sample.id for sample in samples])
        self.failed.pop(cell.hash, None)
        self.write_cells()
        self._count(cell, len(samples))
        when, tokens = self._started.get(cell.hash, (time.monotonic(), 0))
        seconds = time.monotonic() - when
        rate = f", {tokens / seconds:.0f} tokens/s" if tokens and seconds else ""
        self.events.log(f"{cell.title}: {len(samples)} samples in {seconds:.1f} s{rate}")
        self._tell(cell)

    def fail(self, cell: Cell, reason: str) -> None:
        """The cell cannot be measured now; its rows are kept, the run goes on, `--resume` tries it again."""
        self.failed[cell.hash] = reason
        self.write_cells()
        self._count(cell, len(self.samples_of(cell)))
        self.events.warning(f"{cell.title} failed: {reason}")

    def write_cells(self) -> None:
        self.store.write_cells(self.mode, self.cells, self.failed, self.warnings, self.doubts)

    def _count(self, cell: Cell, done: int) -> None:
        self._counted[cell.hash] = done
        self.events.progress(
            sum(self._counted.values()), self._total, unit="samples", message=cell.title, phase="evaluate"
        )

    def _tell(self, cell: Cell) -> None:
        """The numbers of the cell's group so far, as events."""
        from engine.evaluate.tables import group_key, series_of, to_rows

        group = self._groups.setdefault(group_key(cell.spec), [])
        if cell not in group:
            group.append(cell)
        frames = [self.store.frame(member.hash) for member in group]
        for row in to_rows(self.store.folder.name, [(cell.spec, series_of(cell.spec, frames))]):
            self.events.row(**row.to_dict())
