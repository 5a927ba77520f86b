"""A strip: a number per layer for each kind of module, one character a layer. Plain text, coloured on request.

Size is the height of a block, sign its family and colour: `▁▂▃▄▅▆▇█` above 0, `░▒▓` below, so that nothing depends
on colour. Heights are shares of the largest value, which the caller shows. Used by `medmerge interference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_ABOVE, _BELOW = "▁▂▃▄▅▆▇█", "░▒▓"
_BLUE, _RED, _PLAIN = "\x1b[34m", "\x1b[31m", "\x1b[0m"


def largest(rows: Sequence[Sequence[float | None]]) -> float:
    """The largest size of any value, 0.0 when there is none."""
    return max((abs(x) for row in rows for x in row if x is not None and math.isfinite(x)), default=0.0)


def cells(values: Sequence[float | None], top: float, width: int = 0, colour: bool = False) -> str:
    """One character per value (or per equal part of them, its mean, when there are more than `width`).

    values: numbers from -top to top; None or not finite leaves a gap. Blue is above 0, red below.
    """
    points = list(values)
    if width and len(points) > width:
        edges = [round(i * len(points) / width) for i in range(width + 1)]
        points = [_mean(points[a:b]) for a, b in pairwise(edges)]
    text = ""
    for value in points:
        if value is None or not math.isfinite(value):
            text += " "
            continue
        family = _BELOW if value < 0 else _ABOVE
        share = abs(value) / top if top > 0 else 0.0
        block = family[min(len(family) - 1, max(0, math.ceil(share * len(family)) - 1))]
        text += f"{_RED if value < 0 else _BLUE}{block}{_PLAIN}" if colour else block
    return text


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
