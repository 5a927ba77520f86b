"""The compiled inner loops (kernel.c), called through ctypes, which releases the interpreter's lock meanwhile."""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path

import numpy as np

from engine.merge.kernel.plain import Buffer, Float32, Float64, Int64, Packed, PlainKernel

VERSION = 1
_TYPES = {"BF16": 0, "F16": 1, "F32": 2}
_VOID, _I32, _I64, _U32, _U64, _FLOAT = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_float,
)


def find_library() -> Path | None:
    """The shared library beside this file, built by `pip install`; None where no compiler was there."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernel" + suffix)
        if path.is_file():
            return path
    return None


def load(path: Path) -> CompiledKernel | None:
    """The kernel in a library, or None when it cannot be loaded or is another version's."""
    try:
        library = ctypes.CDLL(str(path))
        if library.medmerge_kernel_version() != VERSION:
            return None
    except (OSError, AttributeError):
        return None
    return CompiledKernel(library)


class CompiledKernel(PlainKernel):
    """See PlainKernel for what each function does."""

    compiled = True

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._declare("packed_length", _I64, _I64, _I64)
        self._declare("pack", None, _VOID, _I64, _I64, _VOID)
        self._declare("low_rank", None, _VOID, _VOID, _I64, _I64, _I64, _VOID)
        self._declare(
            "linear", _U32, _VOID, _I32, _FLOAT, _VOID, _VOID, _VOID, _I64, _I64, _I64, _VOID, _VOID, _I32
        )
        self._declare("scaled", None, _VOID, _I32, _FLOAT, _I32, _I64, _VOID)
        self._declare("difference", None, _VOID, _I32, _VOID, _I32, _I64, _VOID)
        self._declare("largest", _U32, _VOID, _I32, _I64)
        self._declare("dots", None, _VOID, _VOID, _I64, _VOID)
        self._declare("histogram", None, _VOID, _I64, _VOID)
        self._declare("histogram_within", None, _VOID, _I64, _U32, _VOID)
        self._declare("trim", None, _VOID, _I64, _FLOAT)
        self._declare("elect", None, _VOID, _VOID, _I64, _I64, _I32, _FLOAT, _VOID)
        self._declare("dare", None, _VOID, _I64, _I64, _U64, _U64, _U64, _FLOAT)
        self._declare("start_writing", None, _I32, _I64, _I64)

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self._library, f"medmerge_{name}")
        function.restype, function.argtypes = result, arguments

    @property
    def name(self) -> str:
        return "compiled, AVX2" if self._library.medmerge_kernel_fast() else "compiled"

    def pack(self, left: Float32, right: Float32) -> Packed:
        ranks, columns = right.shape
        length = self._library.medmerge_packed_length(ranks, columns)
        packed = np.empty(length, np.float32)
        right = np.ascontiguousarray(right)
        self._library.medmerge_pack(right.ctypes.data, ranks, columns, packed.ctypes.data)
        return Packed(np.ascontiguousarray(left), packed, ranks, columns)

    def low_rank(self, factors: Packed, first: int, rows: int, out: Float32) -> None:
        left = factors.left[first : first + rows]
        self._library.medmerge_low_rank(
            left.ctypes.data, factors.right.ctypes.data, factors.ranks, rows, factors.columns, out.ctypes.data
        )

    def linear(
        self,
        base: Buffer,
        base_dtype: str,
        coefficient: float,
        extra: Float32 | None,
        factors: Packed | None,
        first: int,
        rows: int,
        columns: int,
        scratch: Float32,
        out: Buffer,
        dtype: str,
    ) -> float:
        left = right = None
        ranks = 0
        if factors is not None:
            block = factors.left[first : first + rows]
            left, right, ranks = block.ctypes.data, factors.right.ctypes.data, factors.ranks
        bits = self._library.medmerge_linear(
            base.ctypes.data, _TYPES[base_dtype], coefficient, None if extra is None else extra.ctypes.data,
            left, right, ranks, rows, columns, scratch.ctypes.data, out.ctypes.data, _TYPES[dtype],
        )  # fmt: skip
        return _from_bits(bits)

    def scaled(self, x: Buffer, dtype: str, coefficient: float, add: bool, out: Float32) -> None:
        self._library.medmerge_scaled(
            x.ctypes.data, _TYPES[dtype], coefficient, add, out.size, out.ctypes.data
        )

    def difference(self, x: Buffer, x_dtype: str, w: Buffer, w_dtype: str, out: Float32) -> None:
        self._library.medmerge_difference(
            x.ctypes.data, _TYPES[x_dtype], w.ctypes.data, _TYPES[w_dtype], out.size, out.ctypes.data
        )

    def largest(self, x: Buffer, dtype: str, count: int) -> float:
        return _from_bits(self._library.medmerge_largest(x.ctypes.data, _TYPES[dtype], count))

    def dots(self, p: Float32, q: Float32) -> Float64:
        sums = np.zeros(3)
        self._library.medmerge_dots(p.ctypes.data, q.ctypes.data, p.size, sums.ctypes.data)
        return sums

    def histogram(self, d: Float32, counts: Int64) -> None:
        self._library.medmerge_histogram(d.ctypes.data, d.size, counts.ctypes.data)

    def histogram_within(self, d: Float32, part: int, counts: Int64) -> None:
        self._library.medmerge_histogram_within(d.ctypes.data, d.size, part, counts.ctypes.data)

    def trim(self, d: Float32, threshold: float) -> None:
        self._library.medmerge_trim(d.ctypes.data, d.size, threshold)

    def elect(self, d: Float32, weights: Float32, normalize: bool, lam: float, out: Float32) -> None:
        entries, count = d.shape
        self._library.medmerge_elect(
            d.ctypes.data, weights.ctypes.data, entries, count, normalize, lam, out.ctypes.data
        )

    def dare(self, d: Float32, first: int, key: tuple[int, int], density: float, scale: float) -> None:
        self._library.medmerge_dare(d.ctypes.data, d.size, first, key[0], key[1], int(density * 2**32), scale)

    def start_writing(self, descriptor: int, offset: int, count: int) -> None:
        self._library.medmerge_start_writing(descriptor, offset, count)


def _from_bits(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))
