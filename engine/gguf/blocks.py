"""The blocks GGUF types store: their values, the grid each block spans, and llama.cpp's own quantisation.

A quantised block holds small integers q and a scale (and for some types a minimum), so its values lie on a grid
low, low + step, ..., high. `grid` finds it by dequantising the same block with all integers at their smallest and
at their largest, so no formula of a type is written here, only where its integers lie. Layouts: ggml-common.h.
Dequantising is the `gguf` package's; `requantise` calls ggml's `ggml_quantize_chunk`, which is what
`llama_model_quantize` calls for each run of rows.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ChildFailedError
from engine.weights.tensorfile import Float32Array

Bytes = npt.NDArray[np.uint8]
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Layout:
    """Where the integers of a block lie (byte ranges), how many steps they span, and how scales were rounded.

    `scale_error`: ggml's quantiser divides by the float32 scale and stores it as float16, so a value may be off
    by |q| * 2^-11 steps besides half a step. K-quants choose q for the stored scale: none.
    """

    integers: tuple[tuple[int, int], ...]
    steps: int
    smallest: int = 0x00
    largest: int = 0xFF
    scale_error: bool = False


LAYOUTS = {
    "Q8_0": Layout(((2, 34),), 254, 0x81, 0x7F, True),
    "Q4_0": Layout(((2, 18),), 15, scale_error=True),
    "Q4_1": Layout(((4, 20),), 15, scale_error=True),
    "Q5_0": Layout(((2, 22),), 31, scale_error=True),
    "Q5_1": Layout(((4, 24),), 31, scale_error=True),
    "Q2_K": Layout(((16, 80),), 3),
    "Q3_K": Layout(((0, 96),), 7),
    "Q4_K": Layout(((16, 144),), 15),
    "Q5_K": Layout(((16, 176),), 31),
    "Q6_K": Layout(((0, 192),), 63),
}
# Quantised by a search that takes long: a sample of their rows is enough for what is only an expectation.
SLOW = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Grid:
    """The grid each element of some blocks lies on, float32 arrays of the elements' shape.

    `low` and `high` are its ends, `half` is half a step plus what rounding the scale may add: a value x between
    the ends is stored as the grid point within `half` of it, a value outside as the nearer end.
    """

    low: Float32Array
    high: Float32Array
    step: Float32Array
    half: Float32Array


def sizes(kind: str) -> tuple[int, int]:
    """(elements, bytes) of one block."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(block), int(size)


def dequantise(raw: Bytes, kind: str) -> Float32Array:
    """Stored bytes (any shape) as a flat float32 array, by the gguf package."""
    import gguf

    flat = raw.reshape(1, -1)
    if kind == "F32":
        return flat.view("<f4").reshape(-1)
    if kind == "F16":
        return flat.view("<f2").reshape(-1).astype(np.float32)
    with np.errstate(all="ignore"):  # a scale may be infinite in a damaged file; NaN is counted by the caller
        values: Float32Array = gguf.dequantize(flat, gguf.GGMLQuantizationType[kind]).reshape(-1)
    return values


def dequantisable(kind: str) -> bool:
    """Whether the gguf package can read this type."""
    if kind in ("F32", "F16"):
        return True
    try:
        dequantise(np.zeros(sizes(kind)[1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def grid(raw: Bytes, kind: str, values: Float32Array) -> Grid | None:
    """The grid of every element of the blocks in `raw`, or None for a type without an even grid (IQ types)."""
    layout = LAYOUTS.get(kind)
    if layout is None:
        return None
    blocks = raw.reshape(-1, sizes(kind)[1]).copy()
    ends = []
    for byte in (layout.smallest, layout.largest):
        for first, last in layout.integers:
            blocks[:, first:last] = byte
        ends.append(dequantise(blocks, kind))
    low, high = np.minimum(*ends), np.maximum(*ends)
    step = np.divide(high - low, np.float32(layout.steps), dtype=np.float32)
    half = np.multiply(step, np.float32(0.5), dtype=np.float32)
    if layout.scale_error:  # |q| d 2^-11, and for types with a minimum |m| 2^-11
        offset = low if kind.endswith("_1") else np.zeros_like(low)
        half = half * np.float32(1 + 2.0**-10)  # the step divided by was up to 2^-11 larger, too
        half += np.float32(2.0**-11) * (np.abs(values - offset) + np.abs(offset))
    half += np.float32(2.0**-21) * (
        np.abs(low) + np.abs(high)
    )  # float32 while searching for the nearest point
    return Grid(low, high, step, half)


@functools.cache
def _ggml() -> Any:
    """ggml's library out of llama-cpp-python, without importing that package (which starts llama.cpp)."""
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for pattern in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            for path in (Path(folder) / "lib").glob(pattern):
                library = ctypes.CDLL(str(path))
                library.ggml_quantize_chunk.restype = ctypes.c_size_t
                library.ggml_quantize_chunk.argtypes = [
                    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                    ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
                ]  # fmt: skip
                return library
    raise ChildFailedError(
        "ggml's library was not found in llama-cpp-python", "install it again: pip install llama-cpp-python"
    )


def requantise(rows: Float32Array, kind: str) -> Bytes:
    """float32 rows (n, columns) as llama.cpp stores them without an importance matrix, (n, bytes of a row).

    Raises ChildFailedError when ggml is missing or refuses.
    """
    import gguf

    block, size = sizes(kind)
    source = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = source.shape
    target = np.zeros((count, columns // block * size), np.uint8)
    written = _ggml().ggml_quantize_chunk(
        int(gguf.GGMLQuantizationType[kind]), source.ctypes.data, target.ctypes.data, 0, count, columns, None
    )
    if written != target.size:
        raise ChildFailedError(f"ggml quantised {target.size} bytes of {kind} to {written}")
    return target
