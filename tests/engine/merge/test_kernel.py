"""The compiled inner loops against the numpy ones, and both against float64 and torch's own rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch

from engine.errors import BadInputError
from engine.merge.kernel import compiled
from engine.merge.kernel.device import DeviceKernel
from engine.merge.kernel.plain import HIGH_BINS, LOW_BINS, SCRATCH, PlainKernel, widen

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PLAIN = PlainKernel()


def kernels() -> Iterator[PlainKernel]:
    yield PLAIN
    library = compiled.find_library()
    if library is not None:
        found = compiled.load(library)
        assert found is not None
        yield found
    yield cast(PlainKernel, DeviceKernel(PLAIN, "cpu"))  # the code that runs on CUDA, on torch's processor


@pytest.fixture(params=list(kernels()), ids=lambda kernel: kernel.name.partition(",")[0].partition(" (")[0])
def kernel(request: pytest.FixtureRequest) -> PlainKernel:
    return request.param


def test_the_compiled_kernel_is_built_here() -> None:
    assert compiled.find_library() is not None, "no C compiler was there when this was installed"


def random_bits(dtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Random finite numbers of a dtype over its whole range, subnormal ones and both zeros too, as bytes."""
    random = np.random.default_rng(seed)
    kind = np.uint32 if dtype == "F32" else np.uint16
    bits = random.integers(0, np.iinfo(kind).max, count, dtype=kind, endpoint=True)
    exponent = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    bits[(bits & exponent) == exponent] ^= kind(exponent)
    bits[:2] = (0, kind(1) << (31 if dtype == "F32" else 15))
    return bits.view(np.uint8)


def as_torch(data: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.tobytes()), dtype=TORCH[dtype])


@pytest.mark.parametrize("source", TORCH)
@pytest.mark.parametrize("target", TORCH)
def test_conversion_is_torchs_for_every_number(kernel: PlainKernel, source: str, target: str) -> None:
    """Every 16-bit number (a million float32 ones), converted: the bits torch makes of them."""
    if source == "F32":
        data = random_bits("F32", 1 << 20)
    else:
        every = np.arange(1 << 16, dtype=np.uint16)
        exponent = 0x7F80 if source == "BF16" else 0x7C00
        data = every[(every & exponent) != exponent].view(np.uint8)
    wanted = as_torch(data, source).to(TORCH[target])
    count = len(wanted)
    out = np.empty(count * 4, np.uint8)
    kernel.linear(data, source, 1.0, None, None, 0, 1, count, np.empty(SCRATCH, np.float32), out, target)
    found = as_torch(out[: count * wanted.element_size()], target)
    kind = torch.int32 if target == "F32" else torch.int16
    differing = torch.nonzero(found.view(kind) != wanted.view(kind)).flatten()
    assert len(differing) == 0, [(float(wanted[i]), float(found[i])) for i in differing[:3]]


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"), [(1, 1, 1), (7, 33, 5), (13, 1040, 32), (6, 2047, 3), (64, 96, 0)]
)
@pytest.mark.parametrize("dtype", TORCH)
def test_linear_is_the_float64_sum(
    kernel: PlainKernel, rows: int, columns: int, ranks: int, dtype: str
) -> None:
    random = np.random.default_rng(rows + columns)
    left = random.standard_normal((rows + 4, ranks)).astype(np.float32)
    right = random.standard_normal((ranks, columns)).astype(np.float32)
    extra = random.standard_normal(rows * columns).astype(np.float32)
    base = torch.from_numpy(random.standard_normal(rows * columns)).to(TORCH[dtype])
    data = base.view(torch.uint8).numpy()
    out = np.empty(rows * columns * 4, np.uint8)
    factors = kernel.pack(left, right) if ranks else None
    scratch = np.empty(SCRATCH, np.float32)
    first = 4 if ranks else 0
    largest = kernel.linear(data, dtype, 0.75, extra, factors, first, rows, columns, scratch, out, "F32")
    product = left[first : first + rows].astype(np.float64) @ right
    exact = 0.75 * base.double().numpy() + extra + product.ravel()
    size = (
        np.abs(base.double().numpy())
        + np.abs(extra)
        + (np.abs(left[first : first + rows]) @ np.abs(right)).ravel()
    )
    found = out.view(np.float32)[: exact.size].astype(np.float64)
    assert (np.abs(found - exact) <= (ranks + 4) * 2.0**-24 * size).all()
    assert largest == np.float32(np.abs(found).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_largest(kernel: PlainKernel, bad: float) -> None:
    values = np.ones(5000, np.float32)
    values[4321] = bad
    data = values.view(np.uint8)
    out = np.empty(20000, np.uint8)
    found = kernel.linear(
        data, "F32", 1.0, None, None, 0, 1, 5000, np.empty(SCRATCH, np.float32), out, "BF16"
    )
    assert not found < np.inf
    assert not kernel.largest(data, "F32", 5000) < np.inf
    half = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()
    assert not kernel.largest(half, "BF16", 5000) < np.inf


def test_dare_draws_are_numpys_philox(kernel: PlainKernel) -> None:
    """Element i is kept by the i-th 32-bit half of Philox4x64-10, wherever a block begins and ends."""
    key, density, count = (0x0123456789ABCDEF, 0xFEDCBA9876543210), 0.3, 5003
    raw = np.random.Philox(key=np.array(key, np.uint64), counter=0).random_raw(count)
    draws = np.stack([raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)], axis=1).ravel()[:count]
    wanted = np.where(draws < np.uint64(int(density * 2**32)), np.float32(1 / density), np.float32(0))
    for edges in ([0, count], [0, 1, 7, 8, 520, 1033, 4097, count]):
        found = np.ones(count, np.float32)
        for begin, end in itertools.pairwise(edges):
            block = found[begin:end]
            kernel.dare(block, begin, key, density, 1 / density)
        assert np.array_equal(found, wanted)
    everything = np.full(100, 2, np.float32)
    kernel.dare(everything, 0, key, 1.0, 1.0)
    assert (everything == 2).all()


def test_elect_is_the_formula(kernel: PlainKernel) -> None:
    random = np.random.default_rng(3)
    d = random.standard_normal((3, 2500)).astype(np.float32)
    d[:, :40] = 0
    d[0, 40:60], d[1, 40:60], d[2, 40:60] = 0.5, -0.25, 0  # cancels with weights 1, 2: the sign is then +
    weights = np.array([1.0, 2.0, -0.3], np.float32)
    for normalize in (True, False):
        out = np.empty(2500, np.float32)
        kernel.elect(d.copy(), weights, normalize, 0.8, out)
        weighted = d.astype(np.float64) * weights[:, None].astype(np.float64)
        sign = np.where(weighted.sum(axis=0) >= 0, 1, -1)
        agrees = np.sign(weighted) == sign
        divisor = (weights[:, None] * agrees).sum(axis=0) if normalize else np.ones(2500)
        wanted = 0.8 * (weighted * agrees).sum(axis=0) / np.where(np.abs(divisor) < 1e-8, 1, divisor)
        sure = (np.abs(weighted.sum(axis=0)) > 1e-5) | (np.abs(weighted).max(axis=0) == 0)
        sure[40:60] = True
        assert np.allclose(out[sure], wanted[sure], rtol=2e-6, atol=1e-7)


def test_histograms_give_the_kth_largest(kernel: PlainKernel) -> None:
    random = np.random.default_rng(4)
    d = random.standard_normal(10_000).astype(np.float32) * np.float32(1e-3)
    d[:100] = d[100]
    high = np.zeros(HIGH_BINS, np.int64)
    kernel.histogram(d, high)
    bits = np.abs(d).view(np.uint32)
    assert np.array_equal(high, np.bincount(bits >> 15, minlength=HIGH_BINS))
    part = int(np.argmax(high))
    low = np.zeros(LOW_BINS, np.int64)
    kernel.histogram_within(d, part, low)
    inside = bits[bits >> 15 == part]
    assert np.array_equal(low, np.bincount(inside & 0x7FFF, minlength=LOW_BINS)) and low.sum() == high[part]


def test_small_loops(kernel: PlainKernel) -> None:
    random = np.random.default_rng(5)
    p, q = (random.standard_normal(3001).astype(np.float32) for _ in range(2))
    one, two = p.astype(np.float64), q.astype(np.float64)
    assert np.allclose(kernel.dots(p, q), [one @ one, two @ two, one @ two], rtol=1e-12)
    out = np.empty(3001, np.float32)
    kernel.difference(p.view(np.uint8), "F32", q.view(np.uint8), "F32", out)
    assert np.array_equal(out, p - q)
    half = torch.from_numpy(q).to(torch.float16)
    kernel.difference(p.view(np.uint8), "F32", half.view(torch.uint8).numpy(), "F16", out)
    assert np.array_equal(out, p - half.float().numpy())
    kernel.scaled(half.view(torch.uint8).numpy(), "F16", 0.5, True, out)
    assert np.allclose(out, p - 0.5 * half.float().numpy(), atol=1e-6)
    trimmed = p.copy()
    kernel.trim(trimmed, 1.0)
    assert np.array_equal(trimmed, np.where(np.abs(p) >= 1, p, 0))
    kernel.low_rank(kernel.pack(p[:3000].reshape(100, 30), q[:3000].reshape(30, 100)), 10, 20, out[:2000])
    exact = one[:3000].reshape(100, 30)[10:30] @ two[:3000].reshape(30, 100)
    assert np.allclose(out[:2000].reshape(20, 100), exact, atol=1e-4)


def test_both_kernels_agree_on_subnormal_halves() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    data = every[(every & 0x7C00) != 0x7C00].view(np.uint8)
    for kernel in kernels():
        out = np.empty(data.size // 2, np.float32)
        kernel.scaled(data, "F16", 1.0, False, out)
        assert np.array_equal(out, widen(data, "F16", out.size))


def test_a_device_torch_does_not_know_is_named() -> None:
    with pytest.raises(BadInputError, match="there is no device 'tpu'"):
        DeviceKernel(PLAIN, "tpu")
