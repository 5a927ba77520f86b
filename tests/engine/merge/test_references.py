"""The references themselves, on numbers small enough to work out by hand (and Philox against its published vector)."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tests.engine.merge import references as ref


def test_linear_and_soup_by_hand() -> None:
    base, deltas = np.array([1.0, 2.0]), [np.array([1.0, -1.0]), np.array([0.5, 4.0])]
    assert ref.linear(base, deltas, [0.5, 2.0], lambda_=3.0).value.tolist() == [5.5, 24.5]
    models = [np.array([1.0, 3.0]), np.array([5.0, 7.0])]
    assert ref.soup(models, [1.0, 3.0]).value.tolist() == [4.0, 6.0]
    assert ref.soup(models, [1.0, 3.0], normalize=False).value.tolist() == [16.0, 24.0]


def test_slerp_of_right_angle_and_of_parallel_vectors() -> None:
    half = ref.slerp(np.array([2.0, 0.0]), np.array([0.0, 4.0]), 0.5).value
    assert half == pytest.approx(
        [2 * 0.5**0.5, 4 * 0.5**0.5], rel=1e-15
    )  # each coefficient is sin 45 degrees
    third = ref.slerp(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 1 / 3).value
    assert third == pytest.approx([np.cos(np.pi / 6), np.sin(np.pi / 6)], rel=1e-15)
    assert ref.slerp(np.array([1.0, 1.0]), np.array([3.0, 3.0]), 0.25).value.tolist() == [1.5, 1.5]
    assert ref.slerp(np.zeros(2), np.array([3.0, 4.0]), 0.5).value.tolist() == [1.5, 2.0]


def test_ties_by_hand() -> None:
    """Density 0.5 keeps two of four; the threshold's equals are all kept; sign by weighted sum; disjoint mean."""
    first, second = np.array([4.0, -3.0, 1.0, 0.5]), np.array([-1.0, -5.0, 2.0, 2.0])
    mask, threshold = ref.trim(second, 0.5)
    assert (mask.tolist(), threshold) == ([False, True, True, True], 2.0)
    found = ref.ties(np.zeros(4), [first, second], [1.0, 3.0], [0.5, 0.5], lambda_=2.0)
    # kept: [4, -3, 0, 0] and [0, -5, 2, 2]; weighted sums 4, -18, 6, 6
    assert found.value.tolist() == [2 * 4.0, 2 * -18 / 4, 2 * 2.0, 2 * 2.0]
    plain = ref.ties(np.zeros(4), [first, second], [1.0, 3.0], [0.5, 0.5], normalize=False)
    assert plain.value.tolist() == [4.0, -18.0, 6.0, 6.0]
    against = ref.ties(np.zeros(1), [np.array([1.0]), np.array([-3.0])], [1.0, 1.0], [1.0, 1.0])
    assert against.value.tolist() == [-3.0]
    level = ref.ties(np.zeros(1), [np.array([2.0]), np.array([-2.0])], [1.0, 1.0], [1.0, 1.0])
    assert (level.value.tolist(), level.undecided.tolist()) == ([2.0], [True])


def test_draws_are_philox_in_counter_order() -> None:
    """Philox4x64-10 of counter 1 (numpy counts up before it draws), key 0: known answer of Random123's kat_vectors."""
    words = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)  # its first block is counter 0
    assert [hex(int(word)) for word in words] == [
        "0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b", "0x7e68b68aec7ba23b",
    ]  # fmt: skip
    digest = hashlib.sha256(b"medmerge.dare/1\n7\npt\nlayer.weight").digest()
    key = np.frombuffer(digest[:16], "<u8")
    draws = ref.dare_draws(7, "pt", "layer.weight", 9)
    words = np.random.Philox(key=key, counter=0).random_raw(5)
    assert draws.tolist() == np.asarray(words, "<u8").view("<u4")[:9].tolist()
    assert ref.dare_draws(7, "pt", "layer.weight", 5).tolist() == draws[:5].tolist()
    assert ref.dare_draws(8, "pt", "layer.weight", 9).tolist() != draws.tolist()


def test_dare_keeps_the_asked_share_and_its_expectation() -> None:
    delta, draws = np.ones(100_000), ref.dare_draws(0, "pt", "x", 100_000)
    dropped = ref.dare_drop(delta, 0.3, draws)
    assert (dropped != 0).mean() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 1e5) ** 0.5)
    assert set(dropped.tolist()) == {0.0, 1 / 0.3}
    assert ref.dare_drop(delta, 1.0, draws).tolist() == delta.tolist()
    assert set(ref.dare_drop(delta, 0.3, draws, rescale=False).tolist()) == {0.0, 1.0}
    weights, densities = [1.0, -2.0], [0.5, 1.0]
    deltas, both = [delta[:50], 2 * delta[:50]], [draws[:50], draws[50:100]]
    linear = ref.dare_linear(np.zeros(50), deltas, weights, densities, both, lambda_=0.5).value
    assert set(linear.tolist()) == {0.5 * (0 - 4), 0.5 * (2 - 4)}
    elected = ref.dare_ties(np.zeros(50), deltas, weights, densities, both).value
    assert set(elected.tolist()) == {-4.0}


def test_a_wrong_element_is_seen() -> None:
    base = np.linspace(-1, 1, 64)
    exact = ref.linear(base, [base / 3], [0.5])
    right = torch.from_numpy(exact.value).to(torch.bfloat16)
    exact.assert_rounded(right)
    wrong = right.clone()
    wrong[7] *= 1.01
    with pytest.raises(AssertionError, match="1 of 64"):
        exact.assert_rounded(wrong)
