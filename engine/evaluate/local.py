"""Measures cells one after the other in the job's own process."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import CancelledError, MedmergeError, NotFiniteError
from engine.evaluate.bench import Bench
from engine.evaluate.cells import Cell
from engine.evaluate.recorder import Recorder


def measure(bench: Bench, recorder: Recorder, cells: Sequence[Cell]) -> None:
    """Measure all cells. One whose GGUF file or server gives up, or whose model gives values that are not numbers, is
    marked failed, and the others go on."""
    for cell in cells:
        try:
            measure_cell(bench, recorder, cell)
        except MedmergeError as error:
            broken = isinstance(error, NotFiniteError)
            if isinstance(error, CancelledError) or (cell.model is None and not broken):
                raise
            recorder.fail(cell, str(error))


def measure_cell(bench: Bench, recorder: Recorder, cell: Cell) -> None:
    """Measure the batches of a cell that are not wholly done, then seal it."""
    recorder.begin(cell)
    samples = recorder.samples_of(cell)
    work = bench.work(cell, samples)
    kept = recorder.kept(cell)
    done = 0
    for batch in work.batches:
        if not all(samples[i].id in kept for i in batch):
            rows = [row for row in work.run(batch) if row["id"] not in kept]
            recorder.add(cell, rows, [work.prompts[i] for i in batch])
        done += len(batch)
        recorder.advance(cell, done)
    recorder.finish(cell)
