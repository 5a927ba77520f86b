"""The same detectors over rows that are in memory already. Called by `training.demo.build_data` and tests."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.audit import repeats
from training.audit.fields import Reading
from training.audit.index import IndexBuilder
from training.audit.limits import DETECTORS
from training.audit.scan import FOUND, Batch, matches, without_phrases

ROWS = 1000  # compared at a time

Leak = tuple[int, int, str, float]


def leaks_between(
    train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]], reading: Reading | None = None
) -> list[Leak]:
    """(training row, test row, detector, score) of every leak, as `audit_files` would list them."""
    reading = reading or Reading()
    builder = IndexBuilder(reading)
    builder.add_file((f"test row {number}", row) for number, row in enumerate(test))
    index = builder.build()
    parts, hashes = [np.empty(0, dtype=FOUND)], []
    for first in range(0, len(train), ROWS):
        batch = Batch.read(train[first : first + ROWS], reading)
        found, _ = matches(batch, index)
        found["row"] += first
        parts.append(found)
        hashes.append(batch.hashes)
    found = np.concatenate(parts)
    if len(found):
        found, _ = without_phrases(found, np.concatenate(hashes))
    return [(row, other, DETECTORS[detector], score) for row, other, detector, score in found.tolist()]


def repeats_within(rows: Sequence[dict[str, Any]], reading: Reading | None = None) -> list[repeats.Repeat]:
    """Every row that repeats an earlier one, exactly or nearly, by row."""
    with tempfile.TemporaryDirectory() as folder:
        collected = repeats.Collected(Path(folder))
        for number, first in enumerate(range(0, len(rows), ROWS)):
            batch = Batch.read(rows[first : first + ROWS], reading or Reading())
            batch.words.codes.astype(np.uint32).tofile(repeats.words_file(Path(folder), number))
            collected.add(batch.hashes, repeats.bands(batch), np.diff(batch.starts))
        found = [item for item in collected.repeats() if isinstance(item, repeats.Repeat)]
    return sorted(found, key=lambda repeat: repeat.row)
