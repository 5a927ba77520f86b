"""Stored bits as numbers, by blocks of rows. The verifier's own, not the merge's."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from engine.errors import BadTensorFileError
from engine.merge.verify.quick import STORED, Source, linear, widen_half
from engine.merge.verify.rounding import FORMATS, Array, Float32Array, Float64Array, fast_bits
from engine.weights.tensorfile import ITEM_SIZE, TensorInfo, read_bytes

BLOCK_ELEMENTS = (
    1 << 16
)  # 256 KiB of float32: buffers stay in the cache and the heap (measured 3x faster than 1 MiB)


class Rows:
    """Some rows of a tensor as stored; `values` widens all of them, once somebody asks."""

    def __init__(self, bits: Array, dtype: str, columns: int) -> None:
        self.bits, self.dtype, self.columns = bits, dtype, columns

    @classmethod
    def read(cls, tensor: TensorInfo, first: int, count: int) -> Rows:
        return cls(raw_rows(tensor, first, count), tensor.dtype, max(1, tensor.columns))

    @classmethod
    def of(cls, values: Float32Array) -> Rows:
        """float32 values (rows, columns)."""
        return cls(np.ascontiguousarray(values).reshape(-1).view(np.uint32), "F32", values.shape[1])

    def __len__(self) -> int:
        return self.bits.size // self.columns

    @property
    def size(self) -> int:
        return self.bits.size

    @cached_property
    def values(self) -> Float32Array:
        """(rows, columns)"""
        return widen_bits(self.bits, self.dtype).reshape(-1, self.columns)

    def at(self, where: Array) -> Float64Array:
        """The values at flat positions, float64."""
        return widen_bits(self.bits[where], self.dtype).astype(np.float64)

    def part(self, first: int, count: int) -> Rows:
        columns = self.columns
        return Rows(self.bits[first * columns : (first + count) * columns], self.dtype, columns)

    @property
    def source(self) -> Source:
        """The same for the compiled loops."""
        return Source(self.bits, STORED[self.dtype])


def raw_rows(tensor: TensorInfo, first: int, count: int) -> Array:
    """The stored bits of some rows, as a flat array of unsigned integers."""
    size = tensor.columns * ITEM_SIZE[tensor.dtype]
    return np.frombuffer(read_bytes(tensor, first * size, count * size), dtype=FORMATS[tensor.dtype].bits)


def widen_bits(raw: Array, dtype: str) -> Float32Array:
    """Stored bits as float32 values, exact."""
    return raw.view(np.float32) if dtype == "F32" else widen_half(raw, dtype)


def read_block(tensor: TensorInfo, first: int, count: int) -> Float32Array:
    """Rows as float32 (count, columns). Rows beyond the tensor's last are 0: a base that the merge has outgrown."""
    there = max(0, min(count, tensor.rows - first))
    values = widen_bits(raw_rows(tensor, first, there), tensor.dtype).reshape(there, tensor.columns)
    if there == count:
        return values
    return np.concatenate([values, np.zeros((count - there, tensor.columns), np.float32)])


def same_bytes(base: TensorInfo, merged: TensorInfo) -> int:
    """How many elements of an untouched tensor differ: bit for bit, or after one rounding to another dtype."""
    if base.dtype != merged.dtype and not (base.dtype in FORMATS and merged.dtype in FORMATS):
        raise BadTensorFileError(
            f"{merged.file}: {merged.name} is {merged.dtype}, and {base.dtype} in the base",
            "only BF16, F16 and F32 can be compared across dtypes",
        )
    size, out = ITEM_SIZE[base.dtype], ITEM_SIZE[merged.dtype]
    differing, none, room = 0, np.zeros(BLOCK_ELEMENTS, np.float32), np.empty(BLOCK_ELEMENTS, np.float32)
    for first in range(0, base.elements, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, base.elements - first)
        ours, theirs = (
            read_bytes(base, first * size, count * size),
            read_bytes(merged, first * out, count * out),
        )
        if base.dtype == merged.dtype:
            if ours != theirs:
                a: Any = np.frombuffer(ours, np.uint8).reshape(count, size)
                b: Any = np.frombuffer(theirs, np.uint8).reshape(count, size)
                differing += int(np.count_nonzero((a != b).any(axis=1)))
            continue
        w, y = (
            np.frombuffer(data, FORMATS[side.dtype].bits) for data, side in ((ours, base), (theirs, merged))
        )
        rounded = linear(
            Source(w, STORED[base.dtype]), Source(y, STORED[merged.dtype]), none[:count], room[:count]
        )
        if rounded is not None:
            differing += count - rounded.unchanged
            continue
        differing += int(np.count_nonzero(fast_bits(widen_bits(w, base.dtype), merged.dtype) != y))
    return differing
