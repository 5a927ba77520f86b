"""The inner loops of a measurement: compiled (_verify.c) where an install could build it, else numpy.

Both find which elements equal our own float32 result, rounded; neither decides that an element is wrong. The
compiled loops also let pass a rounding of a value two units (2^-24 of it each) away: our sums of K terms are within
K + 6 units of v, those of R ranks within R + 3, and the bounds e of formulas.py and measure.py are at least two units
wider. What hangs on a tie then needs no float64. The environment variable MEDMERGE_KERNEL=plain asks for numpy. The
code is the verifier's own: it shares nothing with the merge's kernel.
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

VERSION = 1
_MOST = 8  # entries of a compiled election
_P, _I, _L, _F, _U = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_uint64


@dataclass(frozen=True)
class Compared:
    """One block: error (flat), which elements differ from ours, how many are the base's, and should be."""

    error: Float32Array
    differs: Array
    unequal: int
    unchanged: int
    ideal_unchanged: int


def linear(
    base: Array, merged: Array, delta: Float32Array, less: float, error: Float32Array
) -> Compared | None:
    """BF16 bits of base and merge against W + less W + delta; error = (y - W) - (less W + delta). None: take numpy."""
    library = _library()
    if library is None or base.dtype != np.uint16 or merged.dtype != np.uint16:
        return None
    differs, counts = np.empty(base.size, np.bool_), np.zeros(3, np.int64)
    library.medverify_linear(
        base.ctypes.data, merged.ctypes.data, delta.ctypes.data, less, base.size, error.ctypes.data,
        differs.ctypes.data, counts.ctypes.data,
    )  # fmt: skip
    return Compared(error, differs, *(int(count) for count in counts))


def compare(base: Array, merged: Array, value: Float32Array) -> Compared | None:
    """BF16 bits of base and merge against a float32 value; error = y - value. None: take numpy."""
    library = _library()
    if library is None or base.dtype != np.uint16 or merged.dtype != np.uint16:
        return None
    error = np.empty(base.size, np.float32)
    differs, counts = np.empty(base.size, np.bool_), np.zeros(3, np.int64)
    library.medverify_compare(
        base.ctypes.data, merged.ctypes.data, value.ctypes.data, base.size, error.ctypes.data,
        differs.ctypes.data, counts.ctypes.data,
    )  # fmt: skip
    return Compared(error, differs, *(int(count) for count in counts))


def widen_bf16(raw: Array) -> Float32Array:
    """BF16 bits as float32, exact."""
    library = _library()
    if library is None:
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    out = np.empty(raw.shape, np.float32)
    library.medverify_widen(raw.ctypes.data, raw.size, out.ctypes.data)
    return out


def difference(raw: Array, base: Float32Array) -> Float32Array | None:
    """BF16 bits minus W, float32 of W's shape. None: take numpy."""
    library = _library()
    if library is None:
        return None
    out = np.empty_like(base)
    library.medverify_difference(raw.ctypes.data, base.ctypes.data, raw.size, out.ctypes.data)
    return out


def combine(
    base: Float32Array,
    share: float,
    deltas: Sequence[Float32Array],
    coefficients: Float64Array,
    kept: Sequence[Array] = (),
) -> Float32Array:
    """share W + sum a_k d_k, of the elements that stay where masks are given."""
    library, out = _library(), np.empty_like(base)
    if library is not None:
        rows, masks = [np.ascontiguousarray(d) for d in deltas], [np.ascontiguousarray(m) for m in kept]
        numbers = np.ascontiguousarray(coefficients, np.float32)
        library.medverify_combine(
            base.ctypes.data, share, _pointers(rows), numbers.ctypes.data, _pointers(masks) if masks else None,
            len(rows), base.size, out.ctypes.data,
        )  # fmt: skip
        return out
    np.multiply(base, np.float32(share), out=out)
    for k, (a, delta) in enumerate(zip(coefficients, deltas, strict=True)):
        part = delta * np.float32(a)
        if kept:
            part *= kept[k]
        out += part
    return out


def elect(
    base: Float32Array,
    deltas: Sequence[Float32Array],
    weights: Float64Array,
    own: Float64Array,
    limits: Sequence[float],
    kept: Sequence[Array],
    normalize: bool,
    lam: float,
) -> Float32Array:
    """W + lam * the sum of the weighted deltas that stay and agree with the majority sign (see formulas.py)."""
    library = _library()
    if library is None or not 0 < len(deltas) <= _MOST:
        return _elect(base, deltas, weights, own, limits, kept, normalize, lam)
    out = np.empty_like(base)
    numbers = [np.ascontiguousarray(x, np.float32) for x in (weights, own, limits)]
    rows = [np.ascontiguousarray(delta) for delta in deltas]
    masks = [np.ascontiguousarray(mask) for mask in kept]
    library.medverify_elect(
        _pointers(rows), len(rows), base.size, base.ctypes.data, *(x.ctypes.data for x in numbers),
        _pointers(masks) if masks else None, normalize, lam, out.ctypes.data,
    )  # fmt: skip
    return out


def _elect(
    base: Float32Array,
    deltas: Sequence[Float32Array],
    weights: Float64Array,
    own: Float64Array,
    limits: Sequence[float],
    kept: Sequence[Array],
    normalize: bool,
    lam: float,
) -> Float32Array:
    parts = []
    for k, delta in enumerate(deltas):
        part = delta * np.float32(weights[k])
        part *= np.abs(delta) >= np.float32(limits[k])
        if kept:
            part *= kept[k]
        parts.append(part)
    sign = np.where(np.sum(parts, axis=0) >= 0, np.float32(1), np.float32(-1))
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    for part, weight in zip(parts, own, strict=True):
        agrees = part * sign > 0
        total += part * agrees
        divisor += agrees * np.float32(weight)
    if normalize:
        total /= np.where(np.abs(divisor) < 1e-8, np.float32(1), divisor)
    return np.asarray(total * np.float32(lam) + base)


def count_sizes(delta: Float32Array, counts: Array) -> None:
    """Add to `counts` (32768, int64) how many |d| have each value of their upper 16 bits."""
    library, delta = _library(), np.ascontiguousarray(delta)
    if library is None:
        counts += np.bincount(_magnitudes(delta) >> 16, minlength=1 << 15)
        return
    scratch = np.empty(4 << 15, np.uint32)
    library.medverify_sizes(delta.ctypes.data, delta.size, counts.ctypes.data, scratch.ctypes.data)


def count_within(delta: Float32Array, upper: int, counts: Array) -> None:
    """Add to `counts` (65536, int64) the lower 16 bits of those |d| whose upper 16 bits are `upper`."""
    library, delta = _library(), np.ascontiguousarray(delta)
    if library is None:
        bits = _magnitudes(delta)
        counts += np.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=1 << 16)
        return
    library.medverify_sizes_within(delta.ctypes.data, delta.size, upper, counts.ctypes.data)


def _magnitudes(values: Float32Array) -> Array:
    return np.asarray(values.reshape(-1).view(np.uint32) & 0x7FFFFFFF)


def dots(base: Float32Array, one: Float32Array, two: Float32Array, a: float, b: float) -> Float64Array:
    """P.Q, P.P and Q.Q in float64 of P = W + a one and Q = W + b two, each rounded to float32."""
    library, sums = _library(), np.zeros(3)
    if library is not None:
        one, two = np.ascontiguousarray(one), np.ascontiguousarray(two)
        library.medverify_dots(
            base.ctypes.data, one.ctypes.data, two.ctypes.data, a, b, base.size, sums.ctypes.data
        )
        return sums
    p, q = ((base + np.float32(x) * d).astype(np.float64) for x, d in ((a, one), (b, two)))
    return np.array([p @ q, p @ p, q @ q])


def kept(key: Array, start: int, count: int, limit: int) -> Array | None:
    """Which draws are under `limit` (draws.py), compiled (needs 128-bit products); None: take numpy."""
    library = _library()
    if library is None or os.name == "nt" or start % 8 or limit >= 2**32:
        return None
    out = np.empty(count, np.bool_)
    library.medverify_kept(int(key[0]), int(key[1]), start, count, limit, out.ctypes.data)
    return out


def _pointers(arrays: Sequence[Array]) -> Any:
    return (_P * len(arrays))(*(array.ctypes.data for array in arrays))


def rounded(value: Float32Array, dtype: str) -> Array:
    """The bits of float32 values in `dtype`, leaving the values alone."""
    return fast_bits(value.copy(), dtype)


@cache
def _library() -> Any:
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
        return library
    return None


_SIGNATURES: dict[str, list[type]] = {
    "widen": [_P, _L, _P],
    "difference": [_P, _P, _L, _P],
    "linear": [_P, _P, _P, _F, _L, _P, _P, _P],
    "compare": [_P, _P, _P, _L, _P, _P, _P],
    "combine": [_P, _F, _P, _P, _P, _L, _L, _P],
    "elect": [_P, _L, _L, _P, _P, _P, _P, _P, _I, _F, _P],
    "sizes": [_P, _L, _P, _P],
    "sizes_within": [_P, _L, ctypes.c_uint32, _P],
    "dots": [_P, _P, _P, _F, _F, _L, _P],
    "kept": [_U, _U, _U, _L, ctypes.c_uint32, _P],
}
