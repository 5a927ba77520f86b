"""The verifier's rounding against torch and against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.merge.verify.bits import widen_bits
from engine.merge.verify.measure import half_step, quick_equal
from engine.merge.verify.rounding import FORMATS, fast_bits, round_to, truncate_to

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def exact(value: float, dtype: str) -> float:
    """Nearest multiple of the step, ties to even, in rational arithmetic."""
    form = FORMATS[dtype]
    exponent = np.frexp(value)[1] if value else -2000
    step = Fraction(2) ** max(int(exponent) - form.digits, form.least)
    rounded = round(Fraction(value) / step) * step  # Python rounds half to even
    return float(rounded) if abs(rounded) <= form.largest else float(np.copysign(np.inf, value))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_round_to_is_the_definition(dtype: str, value: float) -> None:
    assert round_to([value], dtype)[0] == exact(value, dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_ties_and_specials(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16).copy()).view(TORCH[dtype]).double().numpy()
    finite = np.sort(values[np.isfinite(values)])
    middles = (finite[:-1] + finite[1:]) / 2
    for points in (finite, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)):
        expected = np.array([exact(v, dtype) for v in points[::37]])
        np.testing.assert_array_equal(round_to(points[::37], dtype), expected)
    assert np.isnan(round_to([np.nan], dtype)[0])
    assert round_to([np.inf, -np.inf], dtype).tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_fast_bits_and_widening_agree_with_torch(dtype: str) -> None:
    random = np.random.default_rng(0)
    values = np.concatenate(
        [
            random.standard_normal(5000).astype(np.float32)
            * np.float32(10.0) ** random.integers(-9, 4, 5000),
            np.array([0.0, -0.0, 1.00390625, 1.01171875, 65519.9, 65520.0, 1e-40], dtype=np.float32),
        ]
    ).astype(np.float32)
    reference = torch.from_numpy(values).to(TORCH[dtype])
    raw = fast_bits(values.copy(), dtype)
    signed = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}[dtype]
    np.testing.assert_array_equal(raw.view(f"i{raw.itemsize}"), reference.view(signed).numpy())
    np.testing.assert_array_equal(widen_bits(raw, dtype), reference.float().numpy())
    rounded = reference.float().numpy()
    assert quick_equal(values.copy(), rounded, raw, dtype).mean() > 0.999  # ties may go the other way
    np.testing.assert_array_equal(round_to(values, dtype), reference.double().numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_step_is_half_the_distance_to_the_next_number(dtype: str) -> None:
    bits = np.arange(0, 0x7B00, 17, dtype=np.uint16)
    values = widen_bits(bits, dtype).astype(np.float64)
    following = widen_bits(bits + 1, dtype).astype(np.float64)
    np.testing.assert_array_equal(half_step(widen_bits(bits, dtype), dtype), (following - values) / 2)


def test_truncation_goes_towards_zero() -> None:
    assert truncate_to([1.999, -1.999, 0.1], "BF16").tolist() == [1.9921875, -1.9921875, 0.099609375]
