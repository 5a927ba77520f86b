"""Sums of per-item statistics over random draws: of items (bootstrap), and of which side an answer is on (exchanges).

`statistics.py` calls this. The matrix of draws is made and used in pieces, because whole it would take 8 bytes for
every item of every resample: 320 MB for 20,000 items. The numbers do not depend on the size of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 2000
SEED = 20240501
PIECE = 2**20  # numbers of a resampling matrix held at once: 8 MB
EXACT_EXCHANGES = 2048  # up to so many ways to exchange the answers of n items, all are tried: n up to 11


def resampled_sums(stats: FloatArray, resamples: int = RESAMPLES, seed: int = SEED) -> FloatArray:
    """The sums of n items drawn with replacement from the n rows of stats, `resamples` times: (resamples, k).

    The draws depend on n and the seed only, so two models' statistics side by side are drawn alike.
    """
    n = len(stats)
    generator = np.random.default_rng([seed, n])

    def drawn(rows: int) -> FloatArray:
        places = generator.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        return np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)

    return np.concatenate([_sums(drawn(rows), stats) for rows in _pieces(resamples, n)])


def exchanged_sums(
    first: FloatArray, second: FloatArray, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[FloatArray, FloatArray, bool]:
    """The sums of both sides after a fair coin per item has said whether its two answers change places.

    Returns: ((m, k), (m, k), whether these are all the exchanges there are; then m = 2^n, else `resamples`).
    """
    n = len(first)
    everything = 2**n <= EXACT_EXCHANGES
    generator = np.random.default_rng([seed, n, 1])

    def coins(rows: int) -> FloatArray:
        words = generator.integers(0, 2**32, size=(rows, -(-n // 32)), dtype=np.uint32)
        return np.unpackbits(words.view(np.uint8), axis=1)[:, :n].astype(np.float64)

    change, base = first - second, second.sum(0, keepdims=True)
    if everything:
        signs = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
        moved = _sums(signs, change)
    else:
        moved = np.concatenate([_sums(coins(rows), change) for rows in _pieces(resamples, n)])
    return base + moved, first.sum(0, keepdims=True) - moved, everything


def _pieces(rows: int, n: int) -> Iterator[int]:
    """`rows` in pieces whose matrices of n columns stay small."""
    step = max(1, PIECE // max(1, n))
    return (min(step, rows - start) for start in range(0, rows, step))


def _sums(weights: FloatArray, stats: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore"):  # a statistic that is not finite makes its sums so
        return weights @ stats
