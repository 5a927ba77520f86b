"""Rounding to bf16 against torch, over every exponent and every kind of tie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.merge.rounding import LARGEST, holds_nan, narrow_bf16, surely_finite, widen_into


def bf16_bits(values: np.ndarray) -> np.ndarray:
    out, low = np.empty(len(values), np.uint16), np.empty(len(values), np.uint16)
    narrow_bf16(values.copy(), out, low, np.empty(len(values), np.bool_))
    return out


def torch_bits(values: np.ndarray) -> np.ndarray:
    import torch

    return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_every_upper_half_with_the_lower_halves_that_matter() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32)
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = ((upper << 16) | np.uint32(low)).view(np.float32)
        values = values[np.isfinite(values)]
        np.testing.assert_array_equal(bf16_bits(values), torch_bits(values))


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False)))
def test_agrees_with_torch(values: np.ndarray) -> None:
    np.testing.assert_array_equal(bf16_bits(values), torch_bits(values))


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32)))
def test_surely_finite_never_lies(values: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        for dtype in ("BF16", "F16", "F32"):
            if surely_finite(values, dtype):
                assert np.isfinite(values).all() and np.abs(values).max() <= LARGEST[dtype]


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)])
def test_holds_nan(dtype: str, kind: type) -> None:
    values = np.array([1.0, np.inf, -np.inf, 0.0, -0.0], kind)
    assert not holds_nan(values.data.cast("B"), dtype)
    for nan in (np.nan, -np.nan):
        values[3] = nan
        assert holds_nan(values.data.cast("B"), dtype)


def test_holds_nan_in_bf16_and_not_in_integers() -> None:
    bits = np.array([0x3F80, 0x7F80, 0xFF80, 0x7F7F], np.uint16)  # 1, inf, -inf, the largest
    assert not holds_nan(bits.data.cast("B"), "BF16")
    for nan in (0x7F81, 0xFFC0, 0x7FFF):
        bits[0] = nan
        assert holds_nan(bits.data.cast("B"), "BF16")
    assert not holds_nan(bits.data.cast("B"), "I16")
    assert not holds_nan(memoryview(b""), "BF16")


def test_widening_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, np.float32)
    widen_into(bits.data.cast("B"), "BF16", out)
    np.testing.assert_array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)
    widen_into(bits.data.cast("B"), "F16", out)
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))
