"""The stacked B of experts' low-rank changes, kept by expert while a merge cuts one expert after the other from it.

A row of B holds columns of all experts, so cutting one expert out reads all of B. For `engine.merge`, which takes
the experts of a layer one by one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.weights.tensorfile import ITEM_SIZE, Float32Array, TensorInfo, read_bytes, widen

LIMIT = (
    96 << 20
)  # bytes kept: a layer's B of two adapters on 128 experts (rank 16, float32) and the next one's


class StackedColumns:
    """B (out, rank * experts) as (experts, out, rank), as stored; those used last stay. Safe for several threads."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[Path, str], npt.NDArray[np.generic]] = OrderedDict()
        self._lock = threading.Lock()

    def of(
        self, b: TensorInfo, expert: int, experts: int, grouped: bool, first: int, rows: int
    ) -> Float32Array:
        """Rows `first : first + rows` of one expert's B, (rows, rank), float32.

        `grouped`: the columns of an expert lie side by side; else rank by rank, all experts of each.
        """
        with self._lock:
            found = self._kept.get((b.file, b.name))
            if found is None:
                found = self._kept[b.file, b.name] = _by_expert(b, experts, grouped)
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self._limit:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((b.file, b.name))
        own = found[expert, first : first + rows]
        return widen(own.tobytes(), b.dtype).reshape(own.shape)


def _by_expert(b: TensorInfo, experts: int, grouped: bool) -> npt.NDArray[np.generic]:
    stored = np.frombuffer(read_bytes(b), f"<u{ITEM_SIZE[b.dtype]}")
    if grouped:
        return np.ascontiguousarray(stored.reshape(b.rows, experts, -1).transpose(1, 0, 2))
    return np.ascontiguousarray(stored.reshape(b.rows, -1, experts).transpose(2, 0, 1))
