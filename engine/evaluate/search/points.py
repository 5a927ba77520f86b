"""What a search tries, in which order: a grid of uniform weights, half steps around its best, then CMA-ES.

CMA-ES (Hansen, arXiv 1604.00772; library `cmaes`) needs values only, no gradients. It starts at the best uniform
mixture, so on the dev half the layer-wise result is never worse than that. Pure functions of a `value` function;
the same seed and values give the same points, which is how a stopped search goes on (engine/evaluate/search/log.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.evaluate.search.space import Point, rounded

Value = Callable[[Point, str], float]  # (point, phase) -> what is maximised
SPREAD = 0.2  # first standard deviation of CMA-ES, as a share of high - low
_WORST = -1e30


@dataclass(frozen=True)
class Best:
    point: Point
    value: float


def uniform_grid(low: float, high: float, steps: int, adapters: int) -> list[Point]:
    """All combinations of `steps` even numbers from low to high: points of one number per adapter."""
    ticks = [low + (high - low) * n / (steps - 1) for n in range(steps)]
    return [rounded(point) for point in itertools.product(ticks, repeat=adapters)]


def half_steps(best: Sequence[float], low: float, high: float, steps: int) -> list[Point]:
    """The neighbours of `best` half a grid step away in any direction, inside the bounds, without itself."""
    half = (high - low) / (steps - 1) / 2
    shifts = itertools.product((-half, 0.0, half), repeat=len(best))
    near = [rounded([b + s for b, s in zip(best, shift, strict=True)]) for shift in shifts]
    return [p for p in near if p != rounded(best) and all(low <= x <= high for x in p)]


def best_uniform(
    value: Value, asked: Point, spread: Callable[[Point], Point], low: float, high: float, steps: int
) -> tuple[Point, Best]:
    """The best of the asked mixture, the grid, and half steps around the grid's best.

    Args:
        asked: one number per adapter; `spread` makes a point of the whole space of such numbers.
    Returns: the winner's numbers per adapter, and it as a point. Of equals the first tried wins.
    """
    tried = {asked: value(spread(asked), "asked")}
    for point in uniform_grid(low, high, steps, len(asked)):
        if point not in tried:
            tried[point] = value(spread(point), "grid")
    for point in half_steps(_first_best(tried), low, high, steps):
        if point not in tried:
            tried[point] = value(spread(point), "grid")
    winner = _first_best(tried)
    return winner, Best(spread(winner), tried[winner])


def layerwise(value: Value, start: Best, low: float, high: float, evaluations: int, seed: int) -> Best:
    """CMA-ES from `start` inside the bounds; the best of `evaluations` points and `start` itself.

    It ends early when CMA-ES says that it has converged. Values that are not finite count as very bad.
    """
    import numpy as np
    from cmaes import CMA

    size = len(start.point)
    optimiser = CMA(
        mean=np.array(start.point, dtype=np.float64),
        sigma=SPREAD * (high - low),
        bounds=np.tile(np.array([low, high], dtype=np.float64), (size, 1)),
        seed=seed,
    )
    best, told = start, []
    for _ in range(evaluations):
        point = rounded(np.clip(optimiser.ask(), low, high).tolist())
        found = value(point, "search")
        found = found if math.isfinite(found) else _WORST
        if found > best.value:
            best = Best(point, found)
        told.append((np.array(point), -found))
        if len(told) == optimiser.population_size:
            optimiser.tell(told)
            told = []
            if optimiser.should_stop():
                break
    return best


def _first_best(tried: dict[Point, float]) -> Point:
    return max(tried, key=lambda point: tried[point] if math.isfinite(tried[point]) else _WORST)
