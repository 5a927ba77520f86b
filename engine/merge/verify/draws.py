"""DARE's random numbers, from their definition: which elements of a delta stay.

Element i (row-major, in the tensor as stored) stays when draw(i) < floor(density 2^32). The draws are the low, then
the high half of each word of Philox4x64-10 (Salmon et al. 2011) as numpy's, counter 0, with the first 16 bytes
of SHA-256("medmerge.dare/1\\n{seed}\\n{label}\\n{tensor name}") as its key.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from engine.merge.verify.quick import kept
from engine.merge.verify.rounding import Array

_PER_COUNT = 8  # draws a counter step gives: four words of two halves


class Draws:
    """The draws of one label on one tensor, from any element on."""

    def __init__(self, seed: int, label: str, tensor: str) -> None:
        text = f"medmerge.dare/1\n{seed}\n{label}\n{tensor}"
        self._key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8").astype(np.uint64)

    def kept(self, start: int, count: int, density: float) -> npt.NDArray[np.bool_]:
        """Which of the elements start, ..., start + count - 1 stay."""
        limit = math.floor(density * 2.0**32)
        if limit >= 2**32:
            return np.ones(count, dtype=bool)
        quick = kept(self._key, start, count, limit)
        if quick is not None:
            return quick
        return np.asarray(self.numbers(start, count) < np.uint32(limit))

    def numbers(self, start: int, count: int) -> Array:
        """draw(start), ..., uint32."""
        step, skip = divmod(start, _PER_COUNT)
        words = (skip + count + 1) // 2
        raw = np.random.Philox(key=self._key, counter=step).random_raw(words)
        return np.asarray(raw).astype("<u8").view("<u4")[skip : skip + count]
