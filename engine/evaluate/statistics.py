"""Intervals and paired tests, each with its source. Pure numpy and scipy; no model, no tables.

Corpus metrics (BLEU, perplexity) are functions of summed per-sample statistics, so a bootstrap resample is a
matrix of counts times a matrix of statistics: thousands of resamples cost milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Combine = Callable[[FloatArray], FloatArray]  # (resamples, k) sums of statistics -> (resamples,) values

RESAMPLES = 2000
SEED = 20240501
ALPHA = 0.05


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


def resample_counts(n: int, resamples: int = RESAMPLES, seed: int = SEED) -> FloatArray:
    """How often each of n items is drawn in each bootstrap resample: (resamples, n), rows sum to n."""
    generator = np.random.default_rng([seed, n])
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


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
    values = combine(resample_counts(len(stats), resamples) @ stats)
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedResult:
    """difference = first - second on the same n items; p two-sided; low, high: 95% of the difference."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def paired_bootstrap(
    first: FloatArray, second: FloatArray, combine: Combine, resamples: int = RESAMPLES
) -> PairedResult:
    """Paired bootstrap of a corpus metric (Koehn, EMNLP 2004), the same items drawn for both.

    p = 2 min(P(d <= 0), P(d >= 0)) over the resampled differences, with (count + 1) / (resamples + 1), so it is
    never 0. first, second: (n, k) statistics of the same items in the same order.
    """
    if first.shape != second.shape:
        raise ValueError(f"paired statistics differ in shape: {first.shape} and {second.shape}")
    n = len(first)
    difference = float(combine(first.sum(0, keepdims=True))[0] - combine(second.sum(0, keepdims=True))[0])
    if n < 2:
        return PairedResult(difference, math.nan, math.nan, 1.0, n)
    counts = resample_counts(n, resamples)
    differences = combine(counts @ first) - combine(counts @ second)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return PairedResult(difference, math.nan, math.nan, 1.0, n)
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))
    low, high = np.percentile(differences, [2.5, 97.5])
    return PairedResult(difference, float(low), float(high), p, n)


def ratio(sums: FloatArray) -> FloatArray:
    """Mean of a quantity: column 0 over column 1 (a sum and how many)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def perplexity(sums: FloatArray) -> FloatArray:
    """exp(-log-likelihood / tokens): column 0 the summed log-likelihood in nats, column 1 the tokens."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.exp(-sums[:, 0] / sums[:, 1])
