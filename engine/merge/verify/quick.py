"""The inner loops of a measurement: compiled (_verify.c) where an install could build it, else numpy.

They find which elements equal our own float32 result, rounded; none decides that an element is wrong. The
compiled loops also let pass a rounding of a value two units (2^-24 of it each) away: our sums of K terms are within
K + 6 units of v, those of R ranks within R + 3, and the bounds e of formulas.py and measure.py are at least two units
wider. What hangs on a tie then needs no float64. The environment variable MEDMERGE_KERNEL=plain asks for numpy. The
code is the verifier's own: it shares nothing with the merge's kernel. comparison.py holds the largest of the loops.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.merge.verify.rounding import Array, Float32Array, Float64Array, fast_bits

VERSION = 2
MOST = 8  # entries the compiled loops take
STORED = {"BF16": 0, "F16": 1, "F32": 2}
DELTA, NOTHING = 3, 4


@dataclass(frozen=True)
class Source:
    """What the loops read, flat: bits of a stored tensor (its delta is x - W), float32 deltas, or no change."""

    values: Array
    kind: int

    def delta(self, base: Float32Array) -> Float32Array:
        """The change of W (float32, flat), in numpy."""
        if self.kind == DELTA:
            return np.asarray(self.values)
        if self.kind == NOTHING:
            return np.zeros_like(base)
        return np.asarray(self.widened() - base)

    def widened(self) -> Float32Array:
        """Stored bits as float32, in numpy."""
        if self.kind == STORED["BF16"]:
            return np.asarray((self.values.astype(np.uint32) << 16).view(np.float32))
        return self.values.view(np.float16 if self.kind == STORED["F16"] else np.float32).astype(np.float32)


def nothing(base: Source) -> Source:
    """No change of as many elements."""
    return Source(base.values, NOTHING)


@dataclass(frozen=True)
class Compared:
    """One block: error (flat), which elements differ from ours, how many are the base's, and should be."""

    error: Float32Array
    differs: Array
    unequal: int
    unchanged: int
    ideal_unchanged: int


def linear(base: Source, merged: Source, delta: Float32Array, error: Float32Array) -> Compared | None:
    """Base and merge against W + delta; error = (y - W) - delta is written. None: take numpy."""
    library = compiled()
    if library is None:
        return None
    differs, counts = np.empty(delta.size, np.bool_), np.zeros(3, np.int64)
    library.medverify_linear(
        base.values.ctypes.data, base.kind, merged.values.ctypes.data, merged.kind, delta.ctypes.data, delta.size,
        error.ctypes.data, differs.ctypes.data, counts.ctypes.data,
    )  # fmt: skip
    return Compared(error, differs, *(int(count) for count in counts))


def widen_half(raw: Array, dtype: str) -> Float32Array:
    """BF16 or F16 bits as float32, exact."""
    library, source = compiled(), Source(raw, STORED[dtype])
    if library is None or not raw.flags.c_contiguous:
        return source.widened()
    out = np.empty(raw.shape, np.float32)
    library.medverify_widen(raw.ctypes.data, source.kind, raw.size, out.ctypes.data)
    return out


def count_sizes(base: Source, sources: Sequence[Source], counts: Array) -> None:
    """Add to `counts` (K, 32768; int64) how many |d_k| have each value of their upper 16 bits."""
    library = compiled()
    if library is None:
        wide = base.widened()
        for own, source in zip(counts, sources, strict=True):
            own += np.bincount(_magnitudes(source.delta(wide)) >> 16, minlength=1 << 15)
        return
    scratch, kinds = np.empty(4 << 15, np.uint32), kinds_of(sources)
    library.medverify_sizes(
        base.values.ctypes.data, base.kind, pointers([s.values for s in sources]), kinds.ctypes.data, len(sources),
        base.values.size, counts.ctypes.data, scratch.ctypes.data,
    )  # fmt: skip


def count_within(base: Source, sources: Sequence[Source], upper: Sequence[int], counts: Array) -> None:
    """Add to `counts` (K, 65536; int64) the lower 16 bits of those |d_k| whose upper 16 are upper[k] (-1: none)."""
    library = compiled()
    if library is None:
        wide = base.widened()
        for own, source, wanted in zip(counts, sources, upper, strict=True):
            if wanted >= 0:
                bits = _magnitudes(source.delta(wide))
                own += np.bincount(bits[bits >> 16 == wanted] & 0xFFFF, minlength=1 << 16)
        return
    kinds, wanted_bins = kinds_of(sources), np.array(upper, np.int32)
    library.medverify_sizes_within(
        base.values.ctypes.data, base.kind, pointers([s.values for s in sources]), kinds.ctypes.data, len(sources),
        base.values.size, wanted_bins.ctypes.data, counts.ctypes.data,
    )  # fmt: skip


def _magnitudes(values: Float32Array) -> Array:
    return np.asarray(np.ascontiguousarray(values).reshape(-1).view(np.uint32) & 0x7FFFFFFF)


def dots(base: Source, one: Source, two: Source, a: float, b: float) -> Float64Array:
    """P.Q, P.P and Q.Q in float64 of P = W + a d_1 and Q = W + b d_2, each rounded to float32."""
    library, sums = compiled(), np.zeros(3)
    if library is not None:
        factors, kinds = np.array([a, b], np.float32), kinds_of((one, two))
        library.medverify_dots(
            base.values.ctypes.data, base.kind, pointers([one.values, two.values]), kinds.ctypes.data,
            factors.ctypes.data, base.values.size, sums.ctypes.data,
        )  # fmt: skip
        return sums
    wide = base.widened()
    p, q = ((wide + np.float32(x) * s.delta(wide)).astype(np.float64) for x, s in ((a, one), (b, two)))
    return np.array([p @ q, p @ p, q @ q])


def kept(key: Array, start: int, count: int, limit: int) -> Array | None:
    """Which draws are under `limit` (draws.py), compiled (needs 128-bit products); None: take numpy."""
    library = compiled()
    if library is None or os.name == "nt" or start % 8 or limit >= 2**32:
        return None
    out = np.empty(count, np.bool_)
    library.medverify_kept(int(key[0]), int(key[1]), start, count, limit, out.ctypes.data)
    return out


def pointers(arrays: Sequence[Array]) -> Any:
    return (_P * len(arrays))(*(array.ctypes.data for array in arrays))


def kinds_of(sources: Sequence[Source]) -> Array:
    return np.array([source.kind for source in sources], np.int32)


def rounded(value: Float32Array, dtype: str) -> Array:
    """The bits of float32 values in `dtype`, leaving the values alone."""
    return fast_bits(value.copy(), dtype)


@cache
def compiled() -> Any:
    """The compiled loops, or None."""
    if os.environ.get("MEDMERGE_KERNEL") == "plain":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_verify" + suffix)
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            if library.medverify_version() != VERSION:
                return None
        except (OSError, AttributeError):
            return None
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, f"medverify_{name}")
            function.restype, function.argtypes = None, arguments
        library.medverify_compare.restype = _L
        return library
    return None


_P, _I, _L, _F, _U = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_uint64
_SIGNATURES: dict[str, list[type]] = {
    "widen": [_P, _I, _L, _P],
    "linear": [_P, _I, _P, _I, _P, _L, _P, _P, _P],
    "compare": [_P, _I, _P, _I, _P, _P, _P, _L, _L, _F, _P, _P, _P, _I, _F, _I, _P, _P, _P, _P],
    "sizes": [_P, _I, _P, _P, _L, _L, _P, _P],
    "sizes_within": [_P, _I, _P, _P, _L, _L, _P, _P],
    "dots": [_P, _I, _P, _P, _P, _L, _P],
    "kept": [_U, _U, _U, _L, ctypes.c_uint32, _P],
}
