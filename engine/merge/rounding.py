"""float32 to bf16, fp16 or fp32 bytes, rounded once to the nearest (ties to even), into given buffers.

numpy has no bf16. A float32's upper half is a bf16, so rounding is integer arithmetic on its bits: add half a
unit of the last kept place and cut; where the cut part was exactly half, clear the last bit (ties to even).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LARGEST = {"BF16": 3.3895313892515355e38, "F16": 65504.0, "F32": 3.4028234663852886e38}
_HALF = np.uint32(0x8000)

Bits16 = npt.NDArray[np.uint16]
Bits32 = npt.NDArray[np.uint32]
Float32 = npt.NDArray[np.float32]


def narrow_bf16(values: Float32, out: Bits16, low: Bits16, tie: npt.NDArray[np.bool_]) -> None:
    """Round finite flat float32 `values` to bf16 bits in `out`. Destroys `values`; `low` and `tie` are scratch."""
    bits: Bits32 = values.view(np.uint32)
    np.copyto(low, bits, casting="unsafe")  # the lower halves
    np.equal(low, 0x8000, out=tie)
    np.add(bits, _HALF, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="unsafe")
    if tie.any():
        where = np.flatnonzero(tie)
        out[where] &= np.uint16(0xFFFE)


def widen_into(data: memoryview, dtype: str, out: Float32) -> None:
    """Bytes of BF16, F16 or F32 as float32 into `out` (flat, same number of elements); exact."""
    if dtype == "BF16":
        bits: Bits32 = out.view(np.uint32)
        np.copyto(bits, np.frombuffer(data, dtype="<u2"))
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, np.frombuffer(data, dtype={"F16": "<f2", "F32": "<f4"}[dtype]))


def surely_finite(values: Float32, dtype: str) -> bool:
    """Whether every value is finite and stays finite in `dtype`, by one fast pass; False means "look closer".

    The sum of squares is finite and below LARGEST**2 only if every value is: one BLAS dot product.
    """
    limit = min(LARGEST[dtype] ** 2, 3.0e38)
    return bool(np.dot(values, values) < limit)


def holds_nan(data: memoryview, dtype: str) -> bool:
    """Whether raw bytes of a float dtype hold a NaN (infinity is let through: masks are made of it)."""
    if dtype == "BF16":
        return bool((np.frombuffer(data, dtype="<u2") & np.uint16(0x7FFF)).max(initial=0) > 0x7F80)
    if dtype == "F16":
        return bool((np.frombuffer(data, dtype="<u2") & np.uint16(0x7FFF)).max(initial=0) > 0x7C00)
    if dtype in ("F32", "F64"):
        return bool(np.isnan(np.frombuffer(data, dtype="<f4" if dtype == "F32" else "<f8")).any())
    return False
