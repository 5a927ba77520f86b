"""The compiled loops give what numpy gives; both threshold and draws follow their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.merge.verify import quick
from engine.merge.verify.bits import same_bytes
from engine.merge.verify.comparison import Election, Wanted, compare
from engine.merge.verify.draws import Draws
from engine.merge.verify.quick import DELTA, Source, nothing
from engine.merge.verify.threshold import Sizes
from engine.weights.tensorfile import TensorFile
from tests.engine.merge import references

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = ("BF16", "F16", "F32")
Reload = Callable[[str], None]


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(values: Array, dtype: str) -> Source:
    return Source(quick.rounded(values, dtype), quick.STORED[dtype])


def in_torch(values: Array, dtype: str) -> Array:
    """Rounded by torch, as float32."""
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return torch.from_numpy(values).to(kinds[dtype]).float().numpy()


@pytest.mark.parametrize("n", [1, 7, 8, 511, 513, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(use: Reload, n: int, dtype: str) -> None:
    """One delta on one tensor: what differs, and the error, of each element."""
    use("")
    w, delta, error = in_torch(normal(0, n), "BF16"), normal(1, n) * np.float32(0.01), np.empty(n, np.float32)
    y = in_torch(w + delta * np.float32(1.004), dtype)  # a little off
    found = quick.linear(stored(w, "BF16"), stored(y, dtype), delta, error)
    assert found is not None
    np.testing.assert_array_equal(found.error, (y - w) - delta)
    np.testing.assert_array_equal(found.differs, differs(w + delta, y, dtype))
    assert found.unequal == np.count_nonzero(found.differs)
    assert found.unchanged == np.count_nonzero(in_torch(w, dtype) == y)
    assert found.ideal_unchanged == np.count_nonzero(in_torch(w, dtype) == in_torch(w + delta, dtype))


def differs(value: Array, y: Array, dtype: str) -> Array:
    """y is no rounding of any number within 2^-23 of the value."""
    near = [value.astype(np.float64) * (1 + step * 2.0**-23) for step in (-1, 0, 1)]
    if dtype == "F32":
        low, high = np.minimum(near[0], near[2]), np.maximum(near[0], near[2])
        return ~((low <= y) & (y <= high))
    return ~np.any([in_torch(v.astype(np.float32), dtype) == y for v in near], axis=0)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("kind", ["plain", ""])
def test_untouched_in_another_dtype(use: Reload, tmp_path: Path, kind: str, dtype: str) -> None:
    """Every bfloat16, also beyond the largest half and among its subnormals, against torch; then one bit changed."""
    use(kind)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = torch.where(every.isnan(), 0, every)
    changed = every.to({"F16": torch.float16, "F32": torch.float32}[dtype])
    wrong = changed.clone()
    wrong.view(torch.int16)[12345] ^= 1
    save_file({"base": every, "right": changed, "wrong": wrong}, tmp_path / "x.safetensors")
    held = TensorFile.open(tmp_path / "x.safetensors").tensors
    assert same_bytes(held["base"], held["right"]) == 0
    assert same_bytes(held["base"], held["wrong"]) == 1


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_half_is_widened(use: Reload, dtype: str) -> None:
    use("")
    bits = np.arange(1 << 16, dtype=np.uint16)
    kind = torch.bfloat16 if dtype == "BF16" else torch.float16
    wanted = torch.from_numpy(bits.view(np.int16)).view(kind).float().numpy()
    np.testing.assert_array_equal(quick.widen_half(bits, dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [0, -12, -24, -36])
def test_rounding_is_torchs(use: Reload, dtype: str, power: int) -> None:
    """Nothing differs where torch rounded; one step off, everything does (but float32, which has no more digits)."""
    use("")
    value = normal(5, 20_000) * np.float32(2.0**power)
    base, error = Source(np.zeros(value.size, np.uint16), 0), np.empty_like(value)
    right = stored(in_torch(value, dtype), dtype)
    found = quick.linear(base, right, value, error)
    assert found is not None
    assert found.unequal == 0
    found = quick.linear(
        base, Source(right.values + np.array(4, right.values.dtype), right.kind), value, error
    )
    assert found is not None
    assert found.unequal == value.size


METHODS = {
    "linear": Wanted(np.array([0.5, -0.25, 2.0])),
    "less": Wanted(np.array([0.5, -0.25, 2.0]), less=-0.4),
    "ties": Wanted(
        np.array([0.5, -0.25, 2.0]), 0.0, (), Election(np.array([0.5, -0.25, 2.0]), [0.5] * 3, True, 0.7)
    ),
    "dare": Wanted(np.array([0.5, -0.25, 2.0]), 0.0, list(normal(2, 3, 5000) > 0)),
    "dare_ties": Wanted(
        np.array([1.0, 0.5, 4.0]),
        0.0,
        list(normal(2, 3, 5000) > 0),
        Election(np.array([0.5, 0.25, 2.0]), [0.0] * 3, False, 1.0),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_compiled_comparison_is_numpys(use: Reload, method: str, dtype: str) -> None:
    """Entries as stored, as deltas and absent, a merge that is right but for some elements: both ways agree."""
    wanted, n = METHODS[method], 5000
    w, x, delta = (in_torch(normal(seed, n), "BF16") for seed in (0, 1, 2))
    sources = [stored(x, dtype), Source(delta, DELTA), nothing(stored(w, dtype))]
    y = w + wanted.more(w, [source.delta(w) for source in sources])
    y[::97] *= np.float32(1.1)
    merged, results = stored(y, dtype), []
    for kind in ("plain", ""):
        use(kind)
        results.append(compare(stored(w, dtype), merged, sources, wanted, sums=True))
    plain, quickly = results
    near = set(plain.where) - set(quickly.where)  # the loops let near ties pass
    assert set(quickly.where) <= set(plain.where) and len(near) < 0.01 * n + (n if dtype == "F32" else 0)
    assert set(range(0, n, 97)) - set(np.flatnonzero(y == 0)) <= set(quickly.where)
    at = np.isin(plain.where, quickly.where)
    np.testing.assert_allclose(quickly.error, plain.error[at], rtol=1e-3, atol=1e-6)
    assert quickly.unchanged == plain.unchanged
    assert abs(quickly.ideal_unchanged - plain.ideal_unchanged) <= 5
    for one, two in (
        (quickly.square, plain.square),
        (quickly.against, plain.against),
        (quickly.gram, plain.gram),
    ):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_a_merge_with_nan_is_left_to_numpy(use: Reload) -> None:
    use("")
    w = normal(0, 600)
    y = w.copy()
    y[7] = np.nan
    found = compare(stored(w, "BF16"), stored(y, "BF16"), [], Wanted(np.zeros(0)))
    assert found.not_finite == 1
    assert found.where.tolist() == [7]
    assert found.square == 0.0


def test_dots(use: Reload) -> None:
    base, one, two = normal(0, 1003), normal(1, 1003), in_torch(normal(2, 1003), "F16")
    w = in_torch(base, "BF16").astype(np.float64)
    p, q = w + 0.5 * one, w + 0.25 * (two - w)
    for kind in ("plain", ""):
        use(kind)
        found = quick.dots(stored(base, "BF16"), Source(one, DELTA), stored(two, "F16"), 0.5, 0.25)
        np.testing.assert_allclose(found, [p @ q, p @ p, q @ q], rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", ""])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9999, 1.0])
def test_threshold_is_the_kth_largest(use: Reload, kind: str, density: float) -> None:
    use(kind)
    smooth, tied = normal(3, 9001), np.round(normal(4, 9001), 1)
    zero = Source(np.zeros(1000, np.float32).view(np.uint32), quick.STORED["F32"])
    blocks = [
        (
            Source(zero.values[: len(smooth[i : i + 1000])], zero.kind),
            [Source(smooth[i : i + 1000], DELTA), Source(tied[i : i + 1000], DELTA)],
        )
        for i in range(0, 9001, 1000)
    ]
    sizes = Sizes(lambda: iter(blocks), 2)
    for values, found in zip((smooth, tied), sizes.thresholds([density] * 2), strict=True):
        mask, _ = references.trim(values, density)
        np.testing.assert_array_equal(np.abs(values) >= np.float32(found), mask)


@pytest.mark.parametrize("kind", ["plain", ""])
@pytest.mark.parametrize("start", [0, 8, 13, 4096])
def test_draws(use: Reload, kind: str, start: int) -> None:
    use(kind)
    draws = Draws(5, "pt", "model.layers.0.mlp.up_proj.weight")
    every = references.dare_draws(5, "pt", "model.layers.0.mlp.up_proj.weight", 6000)
    np.testing.assert_array_equal(draws.numbers(start, 1000), every[start : start + 1000])
    for density in (0.0, 0.3, 1.0):
        wanted = every[start : start + 1000].astype(np.float64) < density * 2.0**32
        np.testing.assert_array_equal(draws.kept(start, 1000, density), wanted)
