"""A block of a tensor's rows, and the memory a worker does blocks in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.merge.kernel.plain import SCRATCH, Float32


@dataclass(frozen=True)
class Block:
    """Rows `first : first + rows` of one tensor (of one expert, where it has several)."""

    number: int  # of this tensor
    first: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


class Buffers:
    """One worker's memory, used for every block."""

    def __init__(self, elements: int, entries: int, copied: int = 0) -> None:
        """`elements` of the largest block, `entries` of the recipe, bytes of the largest `copied` piece."""
        self.raw = np.empty(max(elements * 4, copied), np.uint8)
        self.out = np.empty(elements * 4, np.uint8)
        self.extra = np.empty(elements, np.float32)
        self.scratch = np.empty(SCRATCH, np.float32)
        self._elements, self._entries = elements, entries
        self._deltas: Float32 | None = None
        self._values: Float32 | None = None

    def deltas(self, count: int) -> Float32:
        """(entries, count) float32, contiguous; made when first asked for."""
        if self._deltas is None:
            self._deltas = np.empty(self._entries * self._elements, np.float32)
        return self._deltas[: self._entries * count].reshape(self._entries, count)

    def values(self, count: int) -> Float32:
        if self._values is None:
            self._values = np.empty(self._elements, np.float32)
        return self._values[:count]
