"""The compiled loops give what numpy gives; both threshold and draws follow their definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from engine.merge.verify import quick
from engine.merge.verify.draws import Draws
from engine.merge.verify.threshold import Sizes
from tests.engine.merge import references

Array = np.ndarray[Any, np.dtype[Any]]
Reload = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reload]:
    """`use("plain")` takes numpy from here on, `use("")` the compiled loops, or skips where there are none."""

    def choose(kind: str) -> None:
        monkeypatch.setenv("MEDMERGE_KERNEL", kind)
        quick._library.cache_clear()
        if not kind and quick._library() is None:
            pytest.skip("not compiled here")

    yield choose
    monkeypatch.undo()
    quick._library.cache_clear()


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bf16(values: Array) -> Array:
    return quick.rounded(values, "BF16")


@pytest.mark.parametrize("n", [1, 7, 8, 511, 512, 5000])
@pytest.mark.parametrize("less", [0.0, 0.25])
def test_linear(use: Reload, n: int, less: float) -> None:
    use("")
    base, delta, error = bf16(normal(0, n)), normal(1, n) * np.float32(0.01), np.empty(n, np.float32)
    merged = bf16(quick.widen_bf16(base) + delta)
    found = quick.linear(base, merged, delta, less, error)
    assert found is not None
    w, y = (base.astype(np.uint32) << 16).view(np.float32), (merged.astype(np.uint32) << 16).view(np.float32)
    more = np.float32(less) * w + delta
    np.testing.assert_array_equal(found.error, (y - w) - more)
    near = [bf16((w + more) * np.float32(1 + step * 2.0**-23)) for step in (-1, 0, 1)]
    np.testing.assert_array_equal(found.differs, ~np.any([bits == merged for bits in near], axis=0))
    assert found.unequal == np.count_nonzero(found.differs)
    assert found.unchanged == np.count_nonzero(base == merged)
    assert found.ideal_unchanged == np.count_nonzero(base == bf16(w + more))
    compared = quick.compare(base, merged, w + more)
    assert compared is not None
    np.testing.assert_array_equal(compared.differs, found.differs)
    np.testing.assert_array_equal(compared.error, y - (w + more))


@pytest.mark.parametrize("entries", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_elect(use: Reload, entries: int, normalize: bool, masked: bool) -> None:
    base, deltas = normal(0, 1300), normal(1, entries, 1300)
    weights = np.array([0.5, -0.25, 2.0][:entries])
    kept = list(normal(2, entries, 1300) > 0) if masked else []
    results = []
    for kind in ("plain", ""):
        use(kind)
        results.append(
            quick.elect(base, list(deltas), weights, weights, [0.5] * entries, kept, normalize, 0.7)
        )
    np.testing.assert_allclose(results[1], results[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("masked", [True, False])
def test_combine(use: Reload, masked: bool) -> None:
    base, deltas = normal(0, 1300), normal(1, 2, 1300)
    kept = list(normal(2, 2, 1300) > 0) if masked else []
    masks = kept or [np.ones(1300, bool)] * 2
    wanted = 0.5 * base.astype(np.float64) + 0.25 * deltas[0] * masks[0] - 3.0 * deltas[1] * masks[1]
    for kind in ("plain", ""):
        use(kind)
        found = quick.combine(base, 0.5, list(deltas), np.array([0.25, -3.0]), kept)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_difference(use: Reload) -> None:
    use("")
    x, w = bf16(normal(0, 77)), normal(1, 77)
    found = quick.difference(x, w)
    assert found is not None
    np.testing.assert_array_equal(found, (x.astype(np.uint32) << 16).view(np.float32) - w)


def test_dots(use: Reload) -> None:
    base, one, two = normal(0, 1003), normal(1, 1003), normal(2, 1003)
    p, q = base.astype(np.float64) + 0.5 * one, base.astype(np.float64) + 0.25 * two
    for kind in ("plain", ""):
        use(kind)
        np.testing.assert_allclose(quick.dots(base, one, two, 0.5, 0.25), [p @ q, p @ p, q @ q], rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", ""])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9999, 1.0])
def test_threshold_is_the_kth_largest(use: Reload, kind: str, density: float) -> None:
    use(kind)
    smooth, tied = normal(3, 9001), np.round(normal(4, 9001), 1)
    blocks = [(smooth[i : i + 1000], tied[i : i + 1000]) for i in range(0, 9001, 1000)]
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
