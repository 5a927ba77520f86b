"""Numbers and small graphics as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.content import Content

from tui import text


@pytest.mark.parametrize(
    "nbytes, words",
    [(0, "0 B"), (999, "999 B"), (12_345, "12 kB"), (1_840_000, "1.8 MB"), (27.5e9, "27.5 GB")],
)
def test_sizes(nbytes: float, words: str) -> None:
    assert text.size(nbytes) == words


@pytest.mark.parametrize("seconds, words", [(3, "3 s"), (600, "10 min"), (11_100, "3 h 05 min"), (-1, "0 s")])
def test_durations(seconds: float, words: str) -> None:
    assert text.duration(seconds) == words


def test_sparkline_goes_from_zero_to_the_largest() -> None:
    assert text.sparkline([0, 1, 2, 4, 8]) == "▁▁▂▄█"
    assert text.sparkline([1, math.nan, 1]) == "█ █"
    assert text.sparkline([]) == "" and text.sparkline([0, 0]) == "▁▁"
    assert len(text.sparkline(list(range(1000)), 40)) == 40


@given(st.text(), st.integers(1, 60))
def test_fit_fills_exactly_and_is_safe(words: str, width: int) -> None:
    fitted = text.fit(words, width)
    assert Content(fitted).cell_length == width
    assert not set(fitted) & {"\x1b", "\n", "\r", "\x9b"}


@given(st.floats(-2, 3), st.integers(1, 60))
def test_bar_has_its_width(fraction: float, width: int) -> None:
    assert text.bar(fraction, width).cell_length == width


def test_sparkline_from_the_smallest() -> None:
    assert text.sparkline([2, 4, 6], from_zero=False) == "▁▄█"


def test_smooth_keeps_a_constant_and_follows_a_step() -> None:
    assert [round(y, 9) for _, y in text.smooth([(i, 3.0) for i in range(5)])] == [3.0] * 5
    out = text.smooth([(0, 1.0), (1, math.nan), (2, 3.0)], keep=0.5)
    assert math.isnan(out[1][1]) and out[2] == (2, pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75))


def test_names_of_mixtures() -> None:
    assert text.weight_name({"pt": 0.3, "sft": 0.7}) == "pt30-sft70"
    assert text.weight_name({"pt": 0.125, "sft": 1.0}) == "pt12_5-sft100"
    assert text.weight_name({"pt": -0.1}) == "ptm10"
    assert text.weight(0.3) == "0.30" and text.weight(0.125) == "0.125" and text.weight(None) == "–"
