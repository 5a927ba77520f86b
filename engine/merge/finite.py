"""NaN, infinity and overflow: found by the largest magnitude of each block, named here."""

from __future__ import annotations

import numpy as np

from engine.errors import BadAdapterError, BadModelError
from engine.merge.blocks import Block
from engine.merge.kernel import kernel
from engine.merge.kernel.plain import LARGEST, Buffer, widen
from engine.merge.layout import TensorPlan
from engine.weights.changes import Replacement
from engine.weights.tensorfile import read_rows

# Halfway to the next power of two beyond the largest value is where rounding reaches infinity.
LIMIT = {"F16": 65520.0, "BF16": 3.3961775292304957e38, "F32": float("inf")}


def refuse_nan(tensor: TensorPlan, data: Buffer) -> None:
    """Raise BadModelError when copied bytes hold NaN (infinity is let through: masks are made of it)."""
    dtype = tensor.source.dtype
    if dtype in LIMIT:
        found = kernel().largest(data, dtype, data.size // (4 if dtype == "F32" else 2))
        if np.isnan(found):
            raise _not_finite(tensor)
    elif dtype == "F64" and np.isnan(data.view("<f8")).any():
        raise _not_finite(tensor)


def look_closer(tensor: TensorPlan, block: Block, data: Buffer, largest: float) -> None:
    """Raise what is wrong with a block whose largest magnitude does not fit; return if nothing is.

    Infinity in the base is let through where nothing is added.
    """
    if block.first < tensor.source.rows:
        base = widen(data, tensor.source.dtype, block.elements)
        if np.isnan(base).any() or (tensor.parts and not np.isfinite(base).all()):
            raise _not_finite(tensor)
        if not tensor.parts and np.isinf(largest):
            finite = base[np.isfinite(base)]
            largest = float(np.abs(finite).max(initial=0.0))
            if largest < LIMIT[tensor.target.dtype]:
                return
    for part in tensor.parts:
        if isinstance(part.change, Replacement) and part.rows is None:
            values = part.change.values
            if not np.isfinite(read_rows(values, block.first, block.rows)).all():
                raise BadModelError(
                    f"{values.file}: {values.name} holds NaN or infinity", "this file is broken: get it again"
                )
    raise too_large(tensor, largest)


def too_large(tensor: TensorPlan, largest: float) -> BadAdapterError:
    """What to say of a merge whose numbers reach `largest`, which its dtype cannot hold."""
    return BadAdapterError(
        f"{tensor.target.name}: the merged weights reach {largest:.4g}, more than {tensor.target.dtype} can hold "
        f"({LARGEST[tensor.target.dtype]:.4g})",
        "choose --dtype bfloat16 or float32, or smaller weights",
    )


def _not_finite(tensor: TensorPlan) -> BadModelError:
    return BadModelError(
        f"{tensor.source.file}: {tensor.source.name} holds NaN or infinity",
        "this checkpoint is broken: get it again",
    )
