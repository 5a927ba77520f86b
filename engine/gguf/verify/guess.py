"""Which weights are in a GGUF nobody can say the recipe of: `medmerge verify FILE.gguf` without weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from engine.gguf.verify.asked import Float64Array
from engine.gguf.verify.sample import ROUTES, Piece, least_squares

DIGITS = (1, 2, 3, 4)
ACCEPTED = 2e-4  # share of sampled elements that right weights may leave unexplained
_SHRINK = 0.1  # coarse types shrink all values by up to a tenth
_MOST = 400  # combinations tried at one digit
_THIN = 40_000  # elements they are tried on first


def guess_weights(pieces: Sequence[Piece], labels: tuple[str, ...]) -> tuple[dict[str, float], bool]:
    """The roundest weights that explain the sampled elements, and whether they do.

    Starts at the least-squares fit and tries weights of 1, 2, ... 4 decimals near it, each time from the best
    before: the number of elements beyond their bound grows with the distance from the right weights. Every element
    is judged by the result afterwards: a wrong guess cannot pass.
    """
    best, error = least_squares(pieces, labels)
    reach = 4 * error + _SHRINK * np.abs(best)
    whole = sum(piece.x.size for piece in pieces)
    thin = [piece.thin(max(1, whole // _THIN)) for piece in pieces]
    elements = sum(piece.x.size for piece in thin)
    for digits in DIGITS:
        step = 10.0**-digits
        axes = [
            np.unique(np.append(np.round(np.arange(c - r, c + r, step), digits), np.round(c, digits)))
            for c, r in zip(best, reach, strict=True)
        ]
        grid = [np.array(weights) for weights in itertools.product(*axes)]
        near = sorted(range(len(grid)), key=lambda i: float(np.abs(grid[i] - best).sum()))[:_MOST]
        counts = [_left(thin, labels, grid[i]) for i in near]
        fewest = int(np.argmin(counts))
        best = grid[near[fewest]]
        if counts[fewest] <= ACCEPTED * elements and _left(pieces, labels, best) <= ACCEPTED * whole:
            return dict(zip(labels, best.tolist(), strict=True)), True
        reach = np.full(len(labels), step)
    return dict(zip(labels, best.tolist(), strict=True)), False


def _left(pieces: Sequence[Piece], labels: tuple[str, ...], weights: Float64Array) -> int:
    """Elements unexplained by these weights, by the best route."""
    own = [np.array([weights[labels.index(label)] for label in piece.pair.labels]) for piece in pieces]
    return min(
        sum(int(np.count_nonzero(piece.wrong(w, route))) for piece, w in zip(pieces, own, strict=True))
        for route in ROUTES
    )
