"""Intervals and tests against statsmodels, scipy and plain loops."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, bootstrap, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from engine.evaluate import resampling
from engine.evaluate.resampling import exchanged_sums, resampled_sums
from engine.evaluate.statistics import (
    MOST_ITEMS,
    bootstrap_interval,
    bootstrap_needed,
    clopper_pearson,
    holm,
    items_needed,
    least_significant,
    mcnemar_difference,
    mcnemar_exact,
    mcnemar_needed,
    mcnemar_power,
    paired_bootstrap,
    perplexity,
    power_gap,
    ratio,
    seed_spread,
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


def column(values):
    return np.stack([values, np.ones(len(values))], 1)


def randomised(first, second, combine, resamples, seed=1):
    """scipy's p of combine(sums of first) - combine(sums of second)."""
    n, both = len(first), np.concatenate([first, second])

    def difference(mine, theirs, axis):
        sums = [both[np.moveaxis(places, axis, -1)].sum(-2) for places in (mine, theirs)]
        values = [combine(s.reshape(-1, both.shape[1])).reshape(s.shape[:-1]) for s in sums]
        return values[0] - values[1]

    places = (np.arange(n), np.arange(n) + n)
    return permutation_test(
        places, difference, permutation_type="samples", vectorized=True, axis=0, n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).pvalue  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 7, 11])
@pytest.mark.parametrize("gap", [0.0, 0.4])
def test_p_of_few_items_is_that_of_all_exchanges(n, gap):
    generator = np.random.default_rng([20, n])
    counts = generator.integers(5, 40, n)
    first, second = (np.stack([-counts * generator.gamma(9, 0.2 + g, n), counts], 1) for g in (gap, 0.0))
    for combine in (ratio, perplexity):
        found = paired_bootstrap(first, second, combine)
        assert found.p == pytest.approx(randomised(first, second, combine, 10**6), abs=1e-9)


def test_p_of_many_items_is_scipys_within_the_error_of_sampling():
    generator = np.random.default_rng(21)
    for n, gap in ((12, 0.5), (40, 0.2), (40, 0.4), (100, 0.0)):
        level = generator.normal(3, 2, n)
        first, second = (column(level + g + generator.normal(0, 1, n)) for g in (gap, 0.0))
        expected = randomised(first, second, ratio, 8000)
        error = math.sqrt(expected * (1 - expected) * (1 / 2000 + 1 / 8000))
        assert paired_bootstrap(first, second, ratio).p == pytest.approx(expected, abs=4 * error + 1e-3)


@pytest.mark.parametrize("n", [2, 5, 8, 12, 24])
def test_p_is_seldom_small_where_there_is_nothing(n):
    generator = np.random.default_rng([22, n])
    seen = 0
    for _ in range(700):
        first, second = (column(generator.gamma(2.0, 10.0, n)) for _ in range(2))
        seen += paired_bootstrap(first, second, ratio, resamples=400).p < 0.05
    assert seen / 700 <= (0 if n <= 5 else 0.07)  # 2 / 2^5 is .0625: five items cannot show anything
    assert n < 8 or seen / 700 >= 0.02


def test_p_sees_what_is_there():
    generator = np.random.default_rng(23)
    for n, gap, power in ((12, 1.0, 0.88), (24, 0.6, 0.80)):  # of the paired t test, at this gap in sd
        seen = [
            paired_bootstrap(column(generator.normal(gap, 1, n)), column(np.zeros(n)), ratio, 400).p < 0.05
            for _ in range(300)
        ]
        assert np.mean(seen) == pytest.approx(power, abs=0.07)
    ones = np.ones(6)
    assert paired_bootstrap(column(ones), column(0 * ones), ratio).p == 2 / 64
    assert paired_bootstrap(column(ones[:1]), column(0 * ones[:1]), ratio).p == 1


def test_equal_differences_are_ties_whatever_the_order_of_the_sum():
    """Ten differences of one size: 2 (1 + 10) of the 1,024 exchanges are as large as nine against one."""
    change = np.array([0.1] * 9 + [-0.1])
    level = np.random.default_rng(24).normal(1e6, 1e5, 10)
    assert paired_bootstrap(column(level + change), column(level), ratio).p == 22 / 1024


def test_what_has_no_value_is_not_tested():
    some = column(np.arange(5.0))
    for gone in (math.nan, math.inf):
        broken = some.copy()
        broken[2, 0] = gone
        found = paired_bootstrap(broken, some, ratio)
        assert math.isnan(found.p) and math.isnan(found.low) and not math.isfinite(found.difference)
    assert math.isnan(paired_bootstrap(0 * some, some, ratio).p)  # 0 / 0
    assert math.isnan(paired_bootstrap(some[:0], some[:0], ratio).p)


def test_exchanges_without_a_value_are_left_out():
    """Only one item of either side has a count: the exchanges of that item alone say nothing."""
    first = np.array([[3.0, 1.0], [0.0, 0.0]])
    second = np.array([[0.0, 0.0], [1.0, 1.0]])
    found = paired_bootstrap(first, second, ratio)
    assert found.difference == 2 and found.p == 1  # +2 and -2 are all there is
    long = [np.concatenate([stats, np.zeros((12, 2))]) for stats in (first, second)]
    assert paired_bootstrap(*long, ratio).p == 1


def test_resamples_draw_n_of_n_alike_for_everything_side_by_side():
    counts = resampled_sums(np.eye(7), 50)
    assert counts.shape == (50, 7) and (counts.sum(1) == 7).all() and (counts != 1).any()
    both = resampled_sums(np.hstack([np.eye(7), 2 * np.eye(7)]), 50)
    assert (both[:, :7] == counts).all() and (both[:, 7:] == 2 * counts).all()
    many = resampled_sums(np.eye(7), 20_000)
    assert many.mean(0) == pytest.approx(np.ones(7), abs=0.03)
    assert many.var(0) == pytest.approx(np.full(7, 6 / 7), abs=0.05)  # n of n: binomial(7, 1/7)


@pytest.mark.parametrize("n", [3, 7, 12, 33, 64])
def test_exchanges_are_fair_coins_and_nothing_is_lost(n):
    mine, theirs, everything = exchanged_sums(np.eye(n), np.zeros((n, n)), 20_000)
    assert everything == (n <= 11) and len(mine) == (2**n if everything else 20_000)
    assert (mine + theirs == 1).all() and set(np.unique(mine)) == {0.0, 1.0}
    assert mine.mean(0) == pytest.approx(np.full(n, 0.5), abs=0.02)
    apart = np.corrcoef(mine.T) - np.eye(n)
    assert np.abs(apart).max() < 0.04
    assert not everything or len(np.unique(mine, axis=0)) == 2**n


def test_resampling_in_pieces_changes_nothing(monkeypatch):
    stats = np.arange(26.0).reshape(13, 2)
    whole = resampled_sums(stats, 501), *exchanged_sums(stats, stats[::-1], 501)[:2]
    for piece in (1, 40, 13 * 500):
        monkeypatch.setattr(resampling, "PIECE", piece)
        pieces = resampled_sums(stats, 501), *exchanged_sums(stats, stats[::-1], 501)[:2]
        assert all((a == b).all() for a, b in zip(whole, pieces, strict=True))


def test_resampling_many_items_needs_little_memory():
    stats = column(np.random.default_rng(25).gamma(2.0, size=20_000))
    tracemalloc.start()
    try:
        bootstrap_interval(stats, ratio, resamples=300)
        paired_bootstrap(stats, stats[::-1], ratio, resamples=300)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 45e6  # a matrix of 300 by 20,000 is 48 MB


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_is_statsmodels(ps):
    expected = multipletests(ps, method="holm")[1] if ps else []
    assert holm(ps) == pytest.approx(list(expected), abs=1e-12)


def test_holm_refuses_what_is_no_p():
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    for wrong in (math.nan, -0.1, 1.2):
        with pytest.raises(ValueError, match="between 0 and 1"):
            holm([0.5, wrong])


def test_interval_of_a_paired_difference_as_published():
    """Fagerland, Lydersen and Laake (2014), and the R package contingencytables: Tango's score interval."""
    assert mcnemar_difference(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)  # Bentur et al. (2009)
    assert mcnemar_difference(6, 16, 161) == pytest.approx((-0.1240, -0.0054), abs=5e-5)  # Cavo et al. (2012)


def likelihood_bound(b, c, n, z, side):
    """The same interval without its closed form: the share q is found by maximising the likelihood under d."""

    def score(d):
        def minus_log(q):  # of the multinomial with shares q + d, q, and the rest
            shares = ((b, q + d), (c, q), (n - b - c, 1 - d - 2 * q))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in shares if k)

        low, high = max(0.0, -d), (1 - d) / 2
        q = minimize_scalar(minus_log, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (b - c - n * d) / math.sqrt(n * (2 * q + d - d * d))

    edge = (b - c) / n
    return brentq(lambda d: score(d) - side * z, *((-0.999, edge) if side > 0 else (edge, 0.999)))


@pytest.mark.parametrize(
    ("b", "c", "n"), [(40, 20, 160), (3, 1, 30), (95, 85, 1273), (0, 4, 50), (12, 12, 40)]
)
def test_interval_of_a_paired_difference_by_maximum_likelihood(b, c, n):
    low, high = mcnemar_difference(b, c, n)
    assert low == pytest.approx(likelihood_bound(b, c, n, 1.959964, 1), abs=2e-5)
    assert high == pytest.approx(likelihood_bound(b, c, n, 1.959964, -1), abs=2e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_interval_of_a_paired_difference_holds_it(nbc):
    n, b, c = nbc
    c = min(c, n - b)
    low, high = mcnemar_difference(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1 and low < high
    assert mcnemar_difference(c, b, n) == pytest.approx((-high, -low), abs=1e-7)
    z = abs(b - c) / math.sqrt(b + c) if b + c else 0.0
    if abs(z - 1.959964) > 1e-4:
        assert (low <= 0 <= high) == (z < 1.959964)  # the asymptotic McNemar test's answer


def test_interval_of_a_paired_difference_at_the_ends():
    assert mcnemar_difference(0, 0, 0) == (-1, 1)
    assert mcnemar_difference(5, 0, 5)[1] == 1 and mcnemar_difference(0, 5, 5)[0] == -1
    with pytest.raises(ValueError, match="discordant of 5"):
        mcnemar_difference(3, 3, 5)


@pytest.mark.parametrize(("n", "b", "c"), [(48, 0.15, 0.05), (100, 0.10, 0.10), (300, 0.02, 0.06)])
def test_coverage_of_the_paired_difference(n, b, c):
    draws = np.random.default_rng(7).multinomial(n, [b, c, 1 - b - c], size=1500)
    known = {}
    inside = 0
    for first, second, _ in draws.tolist():
        low, high = known.setdefault((first, second), mcnemar_difference(first, second, n))
        inside += low <= b - c <= high
    assert 0.93 <= inside / len(draws) <= 0.97


def test_coverage_of_clopper_pearson_is_never_under_95():
    for n, p in ((5, 0.1), (20, 0.5), (48, 0.9), (200, 0.03)):
        inside = [clopper_pearson(k, n)[0] <= p <= clopper_pearson(k, n)[1] for k in range(n + 1)]
        assert binom.pmf(np.arange(n + 1), n, p)[inside].sum() >= 0.95


def test_coverage_of_the_bootstrap_interval():
    generator = np.random.default_rng(11)
    inside = 0
    for _ in range(400):
        values = generator.gamma(2.0, 10.0, 60)  # skewed, like sentence scores
        low, high = bootstrap_interval(np.stack([values, np.ones(60)], 1), ratio, resamples=400)
        inside += low <= 20 <= high
    assert 0.90 <= inside / 400 <= 0.97


def test_the_paired_bootstrap_seldom_sees_what_is_not_there():
    """Two mixtures that differ by chance alone, 50 prompts: p < .05 in at most 7 of 100."""
    generator = np.random.default_rng(12)
    seen = 0
    for _ in range(600):
        level = generator.normal(30, 15, 50)
        both = [np.stack([level + generator.normal(0, 6, 50), np.ones(50)], 1) for _ in range(2)]
        seen += paired_bootstrap(*both, ratio, resamples=500).p < 0.05
    assert seen / 600 <= 0.07


def test_seeds_of_one_prompt_stay_together():
    """Five yes/no answers a prompt: summed per prompt the test is right, taken as independent it is not."""
    generator = np.random.default_rng(13)
    together = apart = 0
    for _ in range(300):
        rates = generator.beta(0.3, 0.3, (2, 40))  # a prompt is answered much alike with every seed
        answers = generator.binomial(1, rates[:, :, None], (2, 40, 5)).astype(float)
        first, second = (np.stack([a.sum(1), np.full(40, 5.0)], 1) for a in answers)
        together += paired_bootstrap(first, second, ratio, resamples=300).p < 0.05
        flat = [np.stack([a.ravel(), np.ones(200)], 1) for a in answers]
        apart += paired_bootstrap(*flat, ratio, resamples=300).p < 0.05
    assert together / 300 <= 0.08 < 0.2 < apart / 300


def test_power_of_mcnemar_is_that_of_simulated_tests():
    generator = np.random.default_rng(14)
    for share, gap, n in ((0.2, 0.035, 1273), (0.3, 0.15, 80), (0.05, 0.05, 157)):
        b, c, _ = generator.multinomial(n, [(share + gap) / 2, (share - gap) / 2, 1 - share], 4000).T
        seen = np.mean([mcnemar_exact(*pair) < 0.05 for pair in zip(b.tolist(), c.tolist(), strict=True)])
        assert mcnemar_power(share, gap, n) == pytest.approx(seen, abs=0.025)


@pytest.mark.parametrize(
    ("b", "c", "n"), [(95, 85, 1273), (12, 6, 48), (3, 1, 20), (30, 10, 100), (1, 0, 5), (700, 300, 5000)]
)
def test_needed_items_are_enough_and_not_too_many(b, c, n):
    found = mcnemar_needed(b, c, n)
    assert found == mcnemar_needed(c, b, n)
    assert 0.8 <= mcnemar_power((b + c) / n, (b - c) / n, found) < 0.85
    assert mcnemar_power((b + c) / n, (b - c) / n, found - 1) < 0.8
    draws = np.random.default_rng(15).multinomial(found, [b / n, c / n, 1 - (b + c) / n], 1000)
    seen = np.mean([mcnemar_exact(x, y) < 0.05 for x, y, _ in draws.tolist()])
    assert 0.75 <= seen <= 0.85


def test_needed_items_of_hopeless_and_of_large_cases():
    assert mcnemar_needed(7, 7, 100) is None and mcnemar_needed(0, 0, 0) is None
    assert mcnemar_needed(1001, 1000, 100_000) is None  # more than MOST_ITEMS
    many = mcnemar_needed(1020, 1000, 100_000)
    assert 1_000_000 < many < MOST_ITEMS
    assert mcnemar_power(0.0202, 0.0002, many) == pytest.approx(0.8, abs=0.005)
    assert mcnemar_needed(5, 0, 5) == 6  # five of five is p = .0625, six of six .031


def test_power_gap():
    assert power_gap(0.2, 1273) == pytest.approx(0.035, abs=5e-4)
    assert power_gap(0.0, 100) is None and power_gap(0.02, 100) is None
    for share, n in ((0.2, 1273), (0.4, 200), (0.05, 3000)):
        gap = power_gap(share, n)
        b, c = (share + gap) / 2 * 1e6, (share - gap) / 2 * 1e6
        assert mcnemar_needed(round(b), round(c), 10**6) == pytest.approx(n, rel=0.08)
        assert 0.75 <= mcnemar_power(share, gap, n) <= 0.8
    with pytest.raises(ValueError, match="between 0 and 1"):
        power_gap(0.2, 100, power=1.0)


def test_items_needed_by_the_bootstrap_are_enough():
    """40 prompts show a gap; with as many prompts as it says, four of five fresh samples show it too."""
    generator = np.random.default_rng(16)

    def measured(n, gap):
        level = generator.normal(30, 15, n)
        return [np.stack([level + g + generator.normal(0, 6, n), np.ones(n)], 1) for g in (gap, 0.0)]

    first, second = measured(40, 2.0)
    change = (first - second)[:, 0]
    first[:, 0] += 2.0 - change.mean()  # observed exactly
    needed = bootstrap_needed(first, second, ratio)
    error = change.std(ddof=1) / math.sqrt(40)
    assert needed == pytest.approx(40 * (2.8016 * error / 2.0) ** 2, rel=0.1)
    true = round(72 * (2.8016 / 2.0) ** 2)  # the difference of two normals of sd 6 has variance 72
    seen = np.mean(
        [paired_bootstrap(*measured(true, 2.0), ratio, resamples=300).p < 0.05 for _ in range(400)]
    )
    assert 0.75 <= seen <= 0.85
    assert items_needed(2.0, math.sqrt(72 / 40), 40) == pytest.approx(true, abs=1)


def test_items_needed_of_nothing():
    same = np.stack([np.arange(9.0), np.ones(9)], 1)
    assert bootstrap_needed(same, same, ratio) is None
    assert bootstrap_needed(same[:1], same[:1] + 1, ratio) is None  # one item says nothing about its error
    assert items_needed(1e-9, 1.0, 100) is None
    assert items_needed(1.0, 0.0, 5) == 6  # always the same difference: 2 / 2^6 is the first p under .05
    assert items_needed(5.0, 1.0, 4) == 6 and items_needed(5.0, 1.0, 4, alpha=0.01) == 8
    assert items_needed(math.nan, 1.0, 100) is None


def test_spread_over_seeds():
    assert seed_spread([1.0, 2.0, 4.0]) == pytest.approx((np.mean([1, 2, 4]), np.std([1, 2, 4], ddof=1), 3))
    mean, sd, n = seed_spread([5.0])
    assert (mean, n) == (5, 1) and math.isnan(sd)
    assert seed_spread([])[2] == 0 and math.isnan(seed_spread([])[0])
