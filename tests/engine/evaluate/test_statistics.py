"""Intervals and tests against statsmodels, scipy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from engine.evaluate.statistics import (
    bootstrap_interval,
    clopper_pearson,
    least_significant,
    mcnemar_exact,
    paired_bootstrap,
    perplexity,
    ratio,
    resample_counts,
)


@given(
    st.integers(0, 300)
    .flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
    .filter(lambda kn: kn[1] > 0)
)
def test_clopper_pearson_is_statsmodels_beta(kn):
    k, n = kn
    low, high = proportion_confint(k, n, method="beta")
    expected = (0.0 if k == 0 else low, 1.0 if k == n else high)
    assert clopper_pearson(k, n) == pytest.approx(expected, abs=1e-9)


def test_clopper_pearson_of_small_probes():
    assert clopper_pearson(0, 5) == pytest.approx((0, 0.5218), abs=1e-4)
    assert clopper_pearson(5, 5) == pytest.approx((0.4782, 1), abs=1e-4)
    assert clopper_pearson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="7 of 5"):
        clopper_pearson(7, 5)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_statsmodels_exact(b, c):
    expected = mcnemar([[10, b], [c, 10]], exact=True).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, expected), abs=1e-9)


@given(st.integers(0, 300), st.integers(1, 2000))
def test_least_significant_is_the_border(discordant, n):
    found = least_significant(discordant, n)
    if found is None:
        assert mcnemar_exact(0, discordant) >= 0.05
        return
    gap = round(found * n)
    assert mcnemar_exact((discordant - gap) // 2, (discordant + gap) // 2) < 0.05
    assert gap < 2 or mcnemar_exact((discordant - gap + 2) // 2, (discordant + gap - 2) // 2) >= 0.05


def test_bootstrap_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(3).gamma(2.0, size=80)
    stats = np.stack([values, np.ones(80)], 1)
    expected = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1)
    )
    low, high = bootstrap_interval(stats, ratio, resamples=20000)
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.02)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.02)
    assert bootstrap_interval(stats, ratio) == bootstrap_interval(stats, ratio)
    assert all(math.isnan(x) for x in bootstrap_interval(stats[:1], ratio))


def test_perplexity_is_of_all_tokens_not_a_mean_of_passages():
    sums = np.array([[-30.0, 10.0], [-2.0, 2.0]])
    assert perplexity(sums.sum(0, keepdims=True))[0] == pytest.approx(math.exp(32 / 12))


def test_paired_bootstrap_sees_a_small_steady_gap_that_intervals_hide():
    generator = np.random.default_rng(0)
    level = generator.normal(50, 20, 60)  # samples differ a lot from each other
    first = np.stack([level + 2 + generator.normal(0, 1, 60), np.ones(60)], 1)
    second = np.stack([level, np.ones(60)], 1)
    found = paired_bootstrap(first, second, ratio)
    assert found.difference == pytest.approx((first - second)[:, 0].mean())
    assert found.p < 0.01 and found.low > 0
    low, high = bootstrap_interval(second, ratio)
    assert low < first[:, 0].mean() < high  # unpaired, nothing would be seen
    swapped = paired_bootstrap(second, first, ratio)
    assert swapped.p == found.p and swapped.difference == -found.difference
    assert paired_bootstrap(second, second, ratio).p == 1
    with pytest.raises(ValueError, match="shape"):
        paired_bootstrap(first, second[:-1], ratio)


def test_resample_counts_draw_n_of_n():
    counts = resample_counts(7, 50)
    assert counts.shape == (50, 7) and (counts.sum(1) == 7).all() and (counts != 1).any()
