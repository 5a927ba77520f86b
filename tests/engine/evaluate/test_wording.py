"""Sentences of comparisons, case by case, and rounding that never changes what a number says."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.evaluate.wording import Compared, comparison, number, probability, rounded_up, signed

CLOSE = Compared(
    first="PT30 SFT70", second="SFT", task="medqa", metric="accuracy", value=68.1, other=66.4, difference=1.7,
    low=-0.6, high=4.0, p=0.118, p_holm=0.36, n=1273, discordant=180, needed=4812, least=2.5,
)  # fmt: skip


def say(**changes):
    return comparison(dataclasses.replace(CLOSE, **changes))


def test_not_distinguishable():
    assert say() == (
        "PT30 SFT70 against SFT on medqa (accuracy): 68.1 against 66.4, difference +1.7 points [-0.6, +4.0], "
        "not distinguishable at n = 1,273 (exact McNemar p = .12, Holm .36; 180 discordant); "
        "2.5 points would have been enough for one test alone; "
        "about 4,900 items would be needed to see it with 80% power for one test alone"
    )
    assert "enough" not in say(least=None)
    assert "; 2.6 points would have been enough" in say(least=2.51)  # 2.5 would not have been
    assert say(p_holm=None).endswith(
        "; 2.5 points would have been enough; about 4,900 items would be needed to see it with 80% power"
    )
    assert say(needed=None).endswith(
        "enough for one test alone; more than 10 million items would be needed to see it"
    )


def test_distinguishable():
    found = say(difference=-4.2, low=-7.0, high=-1.4, value=62.2, p=0.0038, p_holm=0.0114, discordant=1804)
    assert found.endswith(
        "62.2 against 66.4, difference -4.2 points [-7.0, -1.4], "
        "lower than SFT at n = 1,273 (exact McNemar p = .004, Holm .01; 1,804 discordant)"
    )
    assert "higher than SFT at n" in say(p=0.00001, p_holm=None)
    assert "(exact McNemar p < .001; 180 discordant)" in say(p=0.00001, p_holm=None)
    assert "Holm < .001;" in say(p=0.00001, p_holm=0.00009)


def test_holm_decides():
    found = say(p=0.02, p_holm=0.08, needed=900)
    assert found.endswith(
        "not distinguishable at n = 1,273 (exact McNemar p = .02, Holm .08; 180 discordant): "
        "significant alone, not among the comparisons made"
    )
    assert "higher than SFT" in say(p=0.02, p_holm=None)


def test_no_difference_at_all():
    found = say(value=66.4, difference=0.0, low=-2.0, high=2.0, p=1.0, p_holm=1.0, needed=None)
    assert found.endswith(
        "difference 0.0 points [-2.0, +2.0], not distinguishable at n = 1,273 (exact McNemar p = 1, Holm 1; "
        "180 discordant); no difference at all was observed; 2.5 points would have been enough for one test alone"
    )
    none = say(difference=0.0, discordant=0, p=1.0, p_holm=None, least=None, needed=None)
    assert none.endswith("(exact McNemar p = 1; 0 discordant); no difference at all was observed")


def test_other_metrics_and_nothing_to_test():
    found = say(
        metric="perplexity", value=9.684, other=9.5, difference=0.184, low=-0.004, high=0.37, p=0.06,
        p_holm=None, discordant=None, needed=150, least=None, n=100, unit="", digits=2,
    )  # fmt: skip
    assert found == (
        "PT30 SFT70 against SFT on medqa (perplexity): 9.68 against 9.50, difference +0.18 [-0.004, +0.37], "
        "not distinguishable at n = 100 (paired randomisation p = .06); "
        "about 150 items would be needed to see it with 80% power"
    )
    untested = say(p=None, p_holm=None, low=math.nan, high=math.nan, n=1, discordant=None)
    assert untested.endswith("difference +1.7 points, not tested (n = 1)")
    assert "needed" not in say(needed=1000)  # a number we have already cannot be what is missing


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.118, "p = .12"), (0.0496, "p = .0496"), (0.04999, "p = .04999"), (0.05, "p = .05"),
        (0.0504, "p = .05"), (0.0038, "p = .004"), (0.00099, "p < .001"), (0.001, "p = .001"), (0.996, "p > .99"),
        (1.0, "p = 1"), (0.5, "p = .50"), (0.0, "p < .001"), (0.0099, "p = .010"),
    ],
)  # fmt: skip
def test_probabilities(p, text):
    assert probability(p) == text


@given(st.floats(0.001, 0.99))
def test_a_shown_p_is_on_its_side_of_alpha(p):
    shown = probability(p)
    if 0.0499999 <= p < 0.05:
        return  # closer than six digits show
    assert (float(shown.removeprefix("p = ")) < 0.05) == (p < 0.05)


@given(st.floats(-1e6, 1e6))
def test_signs_are_never_rounded_away(value):
    shown = float(signed(value).replace(",", ""))
    if abs(value) > 1e-9:
        assert (shown > 0) == (value > 0) and (shown < 0) == (value < 0)
    assert signed(value) != "-0.0" and "−" not in signed(value)
    assert abs(shown - value) <= 0.05 + 1e-9


def test_numbers():
    assert signed(-3.2e-8) == "-3e-08" and signed(1e-17) == "0.0"
    assert (number(1234.56), number(0.04), number(-0.0), signed(-0.0), signed(0.0)) == (
        "1,234.6", "0.04", "0.0", "0.0", "0.0",
    )  # fmt: skip


@given(st.integers(1, 10**7))
def test_items_are_never_rounded_down(items):
    assert items <= rounded_up(items) <= items * 1.1
    assert rounded_up(4812) == 4900 and rounded_up(99) == 99 and rounded_up(101) == 110
