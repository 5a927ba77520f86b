"""Which weights are in a merge nobody can say the recipe of: `medmerge verify` without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from engine.merge.verify.fit import fit
from engine.merge.verify.replay import implied_weights
from engine.merge.verify.sample import draw
from engine.merge.verify.stats import TensorStats
from engine.weights.checkpoint import Checkpoint

DIGITS = (1, 2, 3, 4, 5)
LARGEST_PART = 12  # equal shares of up to so many are tried as fractions


@dataclass(frozen=True)
class Guess:
    """The weights to judge the elements by. `fits` is the share of sampled elements they explain."""

    weights: dict[str, float]
    fits: float

    def with_rest(self, label: str, labels: Sequence[str]) -> Guess:
        """With one more label, which counts what the others leave of 1; in the order of `labels`."""
        weights = {**self.weights, label: round(1.0 - sum(self.weights.values()), 12)}
        return Guess({each: weights[each] for each in labels}, self.fits)


def guess_weights(
    stats: Sequence[TensorStats], base: Checkpoint, merged: Checkpoint, labels: Sequence[str]
) -> Guess:
    """The roundest weights that explain the most elements of a sample.

    Rounding shrinks small deltas, so the least-squares fit of a right merge of (.3, .7) may be (.26, .60).
    `implied_weights` undoes that; people ask for round numbers, so its result is tried to 1 and 2 decimals, as
    fractions (thirds, sevenths), and to 3, 4 and 5 decimals, and the first that explains as much as any other
    is taken. Elements are then judged by it in
    full: a wrong guess cannot pass, only fail.
    """
    moved = [tensor for tensor in stats if not tensor.untouched_in_fact]
    if not moved:
        return Guess(dict.fromkeys(labels, 0.0), 1.0)
    sample = draw(moved, base, merged, labels)
    implied = implied_weights(sample)
    present = fit(stats, labels).norms > 0
    implied = np.where(present, implied, 0.0)
    best, most = implied, -1.0
    parts = np.array([float(Fraction(w).limit_denominator(LARGEST_PART)) for w in implied])
    rounded = [np.round(implied, digits) for digits in DIGITS]
    for candidate in (*rounded[:2], parts, *rounded[2:]):
        share = float(np.mean(sample.fits(np.broadcast_to(candidate[:, None], sample.deltas.shape))))
        if share > most + 1e-3:
            best, most = candidate, share
    return Guess({label: float(w) for label, w in zip(labels, best, strict=True)}, most)
