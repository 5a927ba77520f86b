"""Correct rounding to the dtypes weights are stored in.

`round_to` follows the definition (any float64, one rounding, half to even). `fast_bits` is the quick path for
float32 values. Tests hold both against torch's rounding and exact fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: `digits` significant bits, smallest step 2**`least`, largest number."""

    digits: int
    least: int
    largest: float
    bits: str  # numpy dtype of the stored bits


FORMATS = {
    "BF16": Format(8, -133, (2 - 2.0**-7) * 2.0**127, "<u2"),
    "F16": Format(11, -24, 65504.0, "<u2"),
    "F32": Format(24, -149, (2 - 2.0**-23) * 2.0**127, "<u4"),
}


def round_to(values: npt.ArrayLike, dtype: str) -> Float64Array:
    """Nearest number of `dtype` to each float64 value, ties to even, as float64; overflow is infinity.

    With |x| in [2^e, 2^(e+1)) the step is q = 2^max(e + 1 - digits, least), and the result is rint(x / q) q:
    division and product by a power of two are exact in float64, and rint rounds half to even.
    """
    x = np.asarray(values, dtype=np.float64)
    step = _steps(x, FORMATS[dtype])
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = x / step
        np.rint(rounded, out=rounded)
        rounded *= step
    beyond = np.abs(rounded) > FORMATS[dtype].largest
    if beyond.any():
        rounded[beyond] = np.copysign(np.inf, rounded[beyond])
    return rounded


def truncate_to(values: npt.ArrayLike, dtype: str) -> Float64Array:
    """The number of `dtype` next to each float64 value towards zero (what dropping bits does)."""
    x = np.asarray(values, dtype=np.float64)
    step = _steps(x, FORMATS[dtype])
    return np.asarray(np.trunc(x / step) * step)


def _steps(x: Float64Array, form: Format) -> Float64Array:
    """The distance between neighbours of the format at each value (1 where the value is NaN or infinite)."""
    power = (x.view(np.uint64) & np.uint64(0x7FF0000000000000)).view(np.float64)  # 2^e, exponent bits alone
    step = np.maximum(power * 2.0 ** (1 - form.digits), 2.0**form.least)
    return np.where(np.isfinite(step), step, 1.0)


def fast_bits(values: Float32Array, dtype: str) -> Array:
    """The stored bits of finite float32 values rounded to `dtype` (callers treat NaN and infinity apart)."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return _bf16(values.view(np.uint32))


def _bf16(whole: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Upper 16 bits after adding just under half a step, plus one where the kept part is odd."""
    odd = whole >> 16
    odd &= 1
    odd += 0x7FFF
    odd += whole
    odd >>= 16
    return odd.astype(np.uint16)
