"""Intervals, paired tests and sample sizes, each with its source. Pure numpy and scipy; no model, no tables.

Corpus metrics (BLEU, perplexity) are functions of summed per-sample statistics, so a resample is a matrix of
counts (or of coins) times a matrix of statistics (resampling.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.evaluate.resampling import RESAMPLES, FloatArray, exchanged_sums, resampled_sums

Combine = Callable[[FloatArray], FloatArray]  # (resamples, k) sums of statistics -> (resamples,) values

TIE = 1e-12  # two values closer than this (of their size) are equal: sums in another order differ by as much
ALPHA = 0.05
POWER = 0.8
MOST_ITEMS = 10_000_000  # a needed number of items beyond this is not given: nobody has them
EXACT_ITEMS = 20_000  # up to here the needed number is exact; beyond, the formula is right within 1%


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a proportion (Clopper and Pearson, Biometrika 26, 1934).

    low = Beta^-1(a/2; k, n-k+1), high = Beta^-1(1-a/2; k+1, n-k). 0 of 5 is [0, .52]; n = 0 is [0, 1].
    """
    from scipy.stats import beta

    if not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, n - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return low, high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p: of the discordant pairs, how odd is this split under a fair coin?

    p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2); 1 when nothing is discordant.
    """
    from scipy.stats import binom

    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return min(1.0, 2.0 * float(binom.cdf(min(only_first, only_second), discordant, 0.5)))


def least_significant(discordant: int, n: int, alpha: float = ALPHA) -> float | None:
    """The smallest difference of two proportions (of n) that McNemar calls significant at that discordance.

    None when even a split of all discordant pairs to one side would not be.
    """
    for gap in range(discordant % 2, discordant + 1, 2):
        if mcnemar_exact((discordant - gap) // 2, (discordant + gap) // 2) < alpha:
            return gap / n
    return None


def mcnemar_difference(
    only_first: int, only_second: int, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the paired difference of two proportions, (only_first - only_second) / n.

    Tango's asymptotic score interval (Statistics in Medicine 17, 1998): the differences d that the score test
    does not reject, |b - c - n d| <= z sqrt(n (2 q + d (1 - d))) with q the share of `only_second` that is
    likeliest under d. It needs the discordant counts only and never leaves [-1, 1]. It belongs to McNemar's
    asymptotic test; the exact test is a little more cautious, so near the border 0 may lie just outside the
    interval with an exact p of .05 or more. The test decides. n = 0 is [-1, 1].
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if only_first < 0 or only_second < 0 or only_first + only_second > n:
        raise ValueError(f"{only_first} + {only_second} discordant of {n} cannot be")
    if n == 0:
        return -1.0, 1.0
    z = float(norm.ppf((1 + confidence) / 2))

    def statistic(d: float) -> float:
        linear = (2 * n - only_first + only_second) * d - only_first - only_second
        product = -only_second * d * (1 - d)
        likeliest = (math.sqrt(max(0.0, linear**2 - 8 * n * product)) - linear) / (4 * n)
        gap = only_first - only_second - n * d
        variance = n * (2 * likeliest + d * (1 - d))
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    def root(target: float, low: float, high: float) -> float:
        return float(brentq(lambda d: max(-1e9, min(1e9, statistic(d))) - target, low, high, xtol=1e-12))

    estimate = (only_first - only_second) / n
    edge = 1 - 1e-12
    low = root(z, -edge, min(edge, max(-edge, estimate))) if only_second < n else -1.0
    high = root(-z, min(edge, max(-edge, estimate)), edge) if only_first < n else 1.0
    return low, high


def mcnemar_power(share: float, gap: float, n: int, alpha: float = ALPHA) -> float:
    """How often the exact McNemar test rejects on n items, if `share` of them are discordant and the true
    difference is `gap` (at most `share`). Exact: summed over how many discordant pairs there may be, and how
    they may split.
    """
    from scipy.stats import binom

    middle, spread = n * share, 10 * math.sqrt(n * share * (1 - share)) + 10
    discordant = np.arange(max(0, math.floor(middle - spread)), min(n, math.ceil(middle + spread)) + 1)
    most = binom.ppf(alpha / 2, discordant, 0.5) - 1  # rejected when the smaller side has at most so many
    first = (1 + gap / share) / 2
    rejected = binom.cdf(most, discordant, first) + binom.sf(discordant - most - 1, discordant, first)
    return float(np.dot(binom.pmf(discordant, n, share), np.where(most >= 0, rejected, 0.0)))


def mcnemar_needed(
    only_first: int, only_second: int, n: int, power: float = POWER, alpha: float = ALPHA
) -> int | None:
    """How many items the exact McNemar test needs to see the observed difference, were it the true one.

    N = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 / d^2 (Connor, Biometrics 43, 1987), s the discordant share
    (b + c) / n, d the difference |b - c| / n, z_a two-sided. That is for the asymptotic test: the exact one has
    a power of .77 where .80 is asked, so up to EXACT_ITEMS the number is raised until `mcnemar_power` is reached.
    None when b = c (no number of items shows a difference of 0) and beyond MOST_ITEMS.
    """
    if only_first == only_second or n == 0:
        return None
    share, gap = (only_first + only_second) / n, abs(only_first - only_second) / n
    z_alpha, z_power = _quantiles(power, alpha)
    root = z_alpha * math.sqrt(share) + z_power * math.sqrt(max(0.0, share - gap**2))
    low = _whole((root / gap) ** 2)
    if low is None or low > EXACT_ITEMS:
        return low
    low, high = low - 1, math.ceil(((root + math.sqrt(root**2 + 4 * gap)) / (2 * gap)) ** 2) + 1  # continuity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(share, gap, middle, alpha) >= power else (middle, high)
    return high


def power_gap(discordant_share: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float | None:
    """The true difference of two proportions that McNemar sees on n items with that power (Connor, solved for d).

    With 20% discordant pairs of 1,273 it is .035 (which the exact test sees with a power of .785). None without
    discordant pairs, and when even all of them on one side would be seen less often than that: too few.
    """
    if discordant_share <= 0 or n <= 0:
        return None
    z_alpha, z_power = _quantiles(power, alpha)
    first = z_alpha * math.sqrt(discordant_share)
    rest = z_power**2 * (n * discordant_share + (z_power**2 - z_alpha**2) * discordant_share)
    gap = (first * math.sqrt(n) + math.sqrt(max(0.0, rest))) / (n + z_power**2)
    return gap if gap <= discordant_share else None


def items_needed(
    difference: float, error: float, n: int, power: float = POWER, alpha: float = ALPHA
) -> int | None:
    """How many items a paired test needs to see `difference`, whose standard error on n items is `error`.

    N = n ((z_a + z_b) error / difference)^2: the error falls with the root of N. At least so many that the
    exchanges of `paired_bootstrap` can give a p under alpha, 2 / 2^N: 6 for .05. None when the difference is 0,
    when either is not known, and beyond MOST_ITEMS.
    """
    if not (math.isfinite(difference) and math.isfinite(error)) or difference == 0:
        return None
    found = _whole(n * (sum(_quantiles(power, alpha)) * error / difference) ** 2)
    return None if found is None else max(found, math.floor(math.log2(2 / alpha)) + 1)


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    from scipy.stats import norm

    if not (0 < alpha < 1 and 0 < power < 1):
        raise ValueError(f"power and alpha lie between 0 and 1, and are {power} and {alpha}")
    return float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))


def _whole(items: float) -> int | None:
    return math.ceil(items) if items <= MOST_ITEMS else None


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values of a family of tests (Holm, Scandinavian Journal of Statistics 6, 1979), in their order.

    The k-th smallest of m becomes the largest of (m - j + 1) p_(j) over j <= k, at most 1. A difference whose
    adjusted p is under .05 keeps the chance of any false one in the family under .05, however they depend on
    each other.
    """
    if any(not 0 <= p <= 1 for p in ps):
        raise ValueError(f"p values lie between 0 and 1: {[p for p in ps if not 0 <= p <= 1]}")
    adjusted, reached = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        reached = max(reached, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = reached
    return adjusted


def seed_spread(values: Sequence[float]) -> tuple[float, float, int]:
    """(mean, standard deviation, how many) of one metric over seeds; n - 1 below, nan for a single seed.

    It says how much decoding alone moves a number. It is no interval of the metric: seeds share their prompts.
    """
    if not values:
        return math.nan, math.nan, 0
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan, 1
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values)


def bootstrap_interval(
    stats: FloatArray, combine: Combine, confidence: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap of combine(sum of stats) over items (Efron and Tibshirani, 1993, ch. 13).

    Args:
        stats: (n, k), one row per item (per prompt: several seeds of one prompt are summed first).
        combine: from (m, k) sums to (m,) values; resamples where it is not finite are left out.
    Returns: (low, high); (nan, nan) with fewer than two items, which cannot say how they vary.
    """
    if len(stats) < 2:
        return math.nan, math.nan
    values = combine(resampled_sums(stats, resamples))
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedResult:
    """difference = first - second on the same n items; p two-sided, nan where nothing could be tested; low, high:
    95% of the difference.

    error: its standard error (standard deviation over bootstrap resamples; nan where there is none).
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    error: float = math.nan


def paired_bootstrap(
    first: FloatArray, second: FloatArray, combine: Combine, resamples: int = RESAMPLES
) -> PairedResult:
    """The difference of a corpus metric on the same items: interval by bootstrap, p by randomisation.

    low, high, error: paired bootstrap (Koehn, EMNLP 2004), the same items drawn for both. p: paired (approximate)
    randomisation, two-sided (Yeh, COLING 2000; Riezler and Maxwell, 2005): if the two models do not differ, their
    answers to an item may change places; p is the share of exchanges with a difference at least as large as the
    observed one, of all exchanges up to 11 items, of `resamples` random ones and the observed one beyond. (A p read off
    the bootstrap is far too small on few items: under .05 for half of all null pairs of two items, 12% of eight.)
    Exchanges without a value are left out; p is nan where the observed difference has none.
    first, second: (n, k) statistics of the same items in the same order.
    """
    if first.shape != second.shape:
        raise ValueError(f"paired statistics differ in shape: {first.shape} and {second.shape}")
    n, k = first.shape
    values = [float(combine(stats.sum(0, keepdims=True))[0]) for stats in (first, second)]
    difference = values[0] - values[1]
    if n == 0 or not math.isfinite(difference):
        return PairedResult(difference, math.nan, math.nan, math.nan, n)
    p = _randomised(first, second, combine, values, resamples)
    if n < 2:
        return PairedResult(difference, math.nan, math.nan, p, n)
    sums = resampled_sums(np.hstack([first, second]), resamples)
    differences = _finite(combine(sums[:, :k]), combine(sums[:, k:]))
    if not len(differences):
        return PairedResult(difference, math.nan, math.nan, p, n)
    low, high = np.percentile(differences, [2.5, 97.5])
    error = float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    return PairedResult(difference, float(low), float(high), p, n, error)


def _randomised(
    first: FloatArray, second: FloatArray, combine: Combine, values: Sequence[float], resamples: int
) -> float:
    """p of the observed difference values[0] - values[1] among those of exchanged answers."""
    mine, theirs, everything = exchanged_sums(first, second, resamples)
    found = _finite(combine(mine), combine(theirs))
    tie = TIE * max(1.0, *map(abs, values))
    extreme = int((np.abs(found) >= abs(values[0] - values[1]) - tie).sum())
    observed = 0 if everything else 1  # one of all exchanges is the observed pair itself
    return (extreme + observed) / (len(found) + observed) if len(found) + observed else math.nan


def _finite(first: FloatArray, second: FloatArray) -> FloatArray:
    """first - second, where it has a value."""
    with np.errstate(invalid="ignore"):
        found = first - second
    return found[np.isfinite(found)]


def bootstrap_needed(
    first: FloatArray,
    second: FloatArray,
    combine: Combine,
    power: float = POWER,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
) -> int | None:
    """`items_needed` of `paired_bootstrap`. (Who has its PairedResult already calls that with its numbers.)"""
    found = paired_bootstrap(first, second, combine, resamples)
    return items_needed(found.difference, found.error, found.n, power, alpha)


def ratio(sums: FloatArray) -> FloatArray:
    """Mean of a quantity: column 0 over column 1 (a sum and how many)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def perplexity(sums: FloatArray) -> FloatArray:
    """exp(-log-likelihood / tokens): column 0 the summed log-likelihood in nats, column 1 the tokens."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.exp(-sums[:, 0] / sums[:, 1])
