"""Grids and bounds of every type: integers where they should be, and the bound holds for llama.cpp's own quantising."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from engine.gguf.blocks import LAYOUTS, SLOW, _ggml, dequantise, grid, requantise, sizes
from engine.gguf.verify.measure import misses, through

KINDS = list(LAYOUTS)


def rows(seed: int, tails: bool = False) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.standard_t(3, (256, 512)) if tails else generator.standard_normal((256, 512))
    return (0.02 * values).astype(np.float32)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SLOW])
def test_requantising_is_the_gguf_packages(kind: str) -> None:
    """Two implementations of the simple types: ggml's in C and the gguf package's in numpy, bit for bit."""
    import gguf

    values = rows(0)
    right = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(requantise(values, kind), right.view(np.uint8).reshape(256, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_values_lie_on_the_grid(kind: str) -> None:
    values = rows(1)
    raw = requantise(values, kind)
    x = dequantise(raw, kind)
    places = grid(raw, kind, x)
    assert places is not None
    number = (x - places.low) / places.step
    assert np.abs(number - np.rint(number)).max() < 2e-3
    assert number.min() > -1e-3 and number.max() < LAYOUTS[kind].steps + 1e-3
    assert len(np.unique(np.rint(number))) > LAYOUTS[kind].steps * 0.6  # every integer is reached


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_what_llama_cpp_quantises(kind: str, tails: bool) -> None:
    """And is sharp: values moved by a twentieth of a step break it for about a twentieth of the elements."""
    values = rows(2, tails)
    raw = requantise(values, kind)
    x, v = dequantise(raw, kind), values.reshape(-1)
    places = grid(raw, kind, x)
    assert places is not None
    found = misses(x, v, kind, places)
    beyond = ((x >= places.high) & (v > x)) | ((x <= places.low) & (v < x))
    assert not (found & ~beyond).any()  # inside of the grid: none
    assert found.mean() < (5e-3 if tails else 1e-4)  # far outside of it: llama.cpp's search leaves a few
    moved = misses(x, v + 0.05 * places.step, kind, places)
    assert 0.01 < moved.mean() < 0.08


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q4_0"])
def test_the_bound_holds_with_an_importance_matrix(kind: str) -> None:
    import gguf

    values = rows(3)
    importance = np.random.default_rng(4).gamma(0.5, size=512).astype(np.float32)
    target = np.zeros((256, 512 // sizes(kind)[0] * sizes(kind)[1]), np.uint8)
    _ggml().ggml_quantize_chunk(
        int(gguf.GGMLQuantizationType[kind]), values.ctypes.data, target.ctypes.data, 0, 256, 512,
        importance.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    assert not np.array_equal(target, requantise(values, kind))
    x, v = dequantise(target, kind), values.reshape(-1)
    places = grid(target, kind, x)
    assert places is not None
    # weighted, llama.cpp settles a block's scale after its numbers are chosen: some are then not the nearest
    assert misses(x, v, kind, places).mean() < 0.01


def test_types_without_an_even_grid() -> None:
    raw = requantise(rows(5), "IQ4_NL")
    assert grid(raw, "IQ4_NL", dequantise(raw, "IQ4_NL")) is None


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_by_way_of_a_checkpoint_is_torchs(dtype: str) -> None:
    import torch

    values = rows(6).reshape(-1) * np.geomspace(1e-6, 1e4, 256 * 512, dtype=np.float32)
    kind = torch.bfloat16 if dtype == "BF16" else torch.float16
    assert np.array_equal(through(values, dtype), torch.from_numpy(values).to(kind).float().numpy())
