"""Numbers and small graphics as text: sizes, durations, progress bars, sparklines. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from textual.content import Content

from tui.safe_text import plain

_EIGHTHS = "▁▂▃▄▅▆▇█"


def size(nbytes: float) -> str:
    """Bytes in powers of ten: `410 B`, `12 kB`, `269 MB`, `27.5 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            value = nbytes / unit
            return f"{value:.1f} {name}" if name == "GB" or value < 10 else f"{value:.0f} {name}"
    return f"{nbytes:.0f} B"


def quantity(value: float, unit: str) -> str:
    """A count with its unit: bytes as `size`, others as `1,180 steps`."""
    if unit == "B":
        return size(value)
    number = f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.1f}"
    return f"{number} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds in words: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def parameters(count: int) -> str:
    """`134.5 M`, `14.8 B`."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def bar(fraction: float, width: int) -> Content:
    """A progress bar of `width` cells; the done part in the accent colour."""
    done = round(min(max(fraction, 0.0), 1.0) * width)
    return Content.assemble(("━" * done, "$primary"), ("━" * (width - done), "$rule"))


def sparkline(values: Sequence[float], width: int = 0, from_zero: bool = True) -> str:
    """Values as eighth blocks, from 0 (or the smallest) to the largest; means of equal parts when there are more
    than `width`. A value that is not finite leaves a gap. An empty sequence gives "".
    """
    points = list(values)
    if width and len(points) > width:
        edges = [round(i * len(points) / width) for i in range(width + 1)]
        points = [_mean(points[a:b]) for a, b in pairwise(edges)]
    finite = [value for value in points if math.isfinite(value)]
    if not from_zero and finite:
        lowest = min(finite)
        points = [value - lowest for value in points]
        finite = [value - lowest for value in finite]
    top = max(finite, default=0.0)
    if top <= 0:
        return "".join("▁" if math.isfinite(value) else " " for value in points)
    return "".join(
        _EIGHTHS[min(7, max(0, math.ceil(value / top * 8) - 1))] if math.isfinite(value) else " "
        for value in points
    )


def smooth(points: Sequence[tuple[float, float]], keep: float = 0.9) -> tuple[tuple[float, float], ...]:
    """Exponential moving average of y, s = keep * s + (1 - keep) * y, corrected for its start as in Adam
    (arXiv 1412.6980, section 3); points that are not finite are passed through and not averaged."""
    out, mean, share = [], 0.0, 1.0
    for x, y in points:
        if math.isfinite(y):
            mean, share = keep * mean + (1 - keep) * y, share * keep
            y = mean / (1 - share)
        out.append((x, y))
    return tuple(out)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def cut(text: str, width: int) -> str:
    """Foreign text made safe, in at most `width` cells, ending in "…" when shortened."""
    content = Content(plain(text))
    if content.cell_length <= width:
        return content.plain
    return content.truncate(max(width, 1), ellipsis=True).plain


def fit(text: str, width: int) -> str:
    """`cut`, then filled with spaces to exactly `width` cells: columns that stay in line."""
    short = cut(text, width)
    return short + " " * max(0, width - Content(short).cell_length)


def weight(value: float | None) -> str:
    """A merge weight: two decimals, three when the third is not zero."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value * 100 - round(value * 100)) < 1e-6 else f"{value:.3f}"


def weight_name(weights: dict[str, float]) -> str:
    """A name for a mixture: {"pt": .3, "sft": .7} gives `pt30-sft70`; finer weights keep their digits."""
    return "-".join(f"{label}{_percent(value)}" for label, value in weights.items())


def _percent(value: float) -> str:
    text = f"{value * 100:.1f}".rstrip("0").rstrip(".").replace(".", "_")
    return text.replace("-", "m")
