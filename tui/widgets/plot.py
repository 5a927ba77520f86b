"""Curves in a plot with the legend beside its title, so that it covers nothing. Imports numpy: mount it late.

A series keeps its colour while it lives; values that are not finite leave a gap, and so do those that have no
logarithm where the axis is logarithmic. Used by the train and evaluate screens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from textual import events
from textual.app import ComposeResult
from textual.color import Color
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static
from textual_plot import HiResMode, NumericAxisFormatter, PlotWidget

from tui.safe_text import plain
from tui.text import cut

MOST_POINTS = 600  # of a curve that are drawn; longer ones are thinned to what a screen can show
LEGEND_NAME = 24  # cells


@dataclass(frozen=True)
class Series:
    """One curve. `style` is a theme variable without $ ("pt"); `faded` draws weak dots (what lies behind a mean);
    `marker` draws points with that character, besides the line or (without `line`) alone. `band`: (x, low, high) of an
    interval around it, shaded; `dotted`: a line of dots, for floors."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str = "primary"
    faded: bool = False
    marker: str = ""
    line: bool = True
    named: bool = True  # whether it is in the legend
    band: tuple[tuple[float, float, float], ...] = ()
    dotted: bool = False


class LogFormatter(NumericAxisFormatter):
    """Ticks of an axis whose positions are log10 of the values: 1, 2, 5 of every decade, round steps within one."""

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        low, high = 10**min_, 10**max_
        if high / low < 8:
            return [math.log10(tick) for tick in super().get_ticks(low, high, max_ticks) if tick > 0]
        decades = range(math.floor(min_), math.ceil(max_) + 1)
        leads = (1, 2, 5) if max_ - min_ <= 3 else (1,)
        ticks = [decade + math.log10(lead) for decade in decades for lead in leads]
        return [tick for tick in ticks if min_ - 1e-9 <= tick <= max_ + 1e-9]

    def get_labels_for_ticks(self, ticks: Sequence[float]) -> list[str]:
        return [f"{float(f'{10**tick:.6g}'):g}" for tick in ticks]


class QuietPlot(PlotWidget, can_focus=False):
    """A plot that takes no focus and no keys: arrows belong to the screen."""

    DEFAULT_CSS = """
    QuietPlot > .plot--axis { color: $rule; }
    QuietPlot > .plot--tick { color: $faint; text-style: none; }
    QuietPlot > .plot--label { color: $faint; text-style: none; }
    """


class PlotPanel(Vertical):
    """A title with legend, and the plot under it. `show` replaces the curves; equal curves change nothing."""

    DEFAULT_CSS = """
    PlotPanel { height: 1fr; min-height: 8; }
    PlotPanel > .title { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    PlotPanel > .empty { height: 1fr; color: $faint; content-align: center middle; text-align: center; }
    """

    def __init__(
        self, title: str, x_label: str = "", empty: Content | str = "", *, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.heading, self.x_label, self.empty = title, x_label, empty
        self.note = ""
        self._shown: object = None
        self._told: tuple[Sequence[Series], int] | None = None  # what the title names
        self._series: tuple[Series, ...] | None = None
        self._limits: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
        self._log = False

    def compose(self) -> ComposeResult:
        yield Static(Content(self.heading), classes="title")
        yield Static(self.empty if isinstance(self.empty, Content) else Content(self.empty), classes="empty")
        yield QuietPlot(allow_pan_and_zoom=False)

    def on_mount(self) -> None:
        plot = self.query_one(QuietPlot)
        plot.margin_top, plot.margin_bottom, plot.margin_left = 0, 2, 8
        plot.display = False
        self.app.theme_changed_signal.subscribe(self, lambda theme: self.call_after_refresh(self._again))

    def _again(self) -> None:
        """Draw what is shown in the colours of another theme."""
        self._shown = None
        if self._series is not None:
            y_limits, x_limits = self._limits
            self.show(self._series, "", self.note, y_limits, x_limits, self._log)

    def on_resize(self, event: events.Resize) -> None:
        if self._told:
            self.query_one(".title", Static).update(self._title(*self._told))

    @property
    def shown(self) -> tuple[Series, ...]:
        """The series as they were given."""
        return self._series or ()

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """Lowest and highest x and y of the axes; y is log10 of the values on a logarithmic axis."""
        plot = self.query_one(QuietPlot)
        return plot._x_min, plot._x_max, plot._y_min, plot._y_max

    def say_when_empty(self, words: Content | str) -> None:
        """What stands in the place of a plot without curves."""
        if words != self.empty:
            self.empty = words
            self.query_one(".empty", Static).update(words if isinstance(words, Content) else Content(words))

    def show(
        self,
        series: Sequence[Series],
        title: str = "",
        note: str = "",
        y_limits: tuple[float, float] | None = None,
        x_limits: tuple[float, float] | None = None,
        log: bool = False,
    ) -> None:
        """Draw these curves. Without any point the empty words stand there instead. `log`: a logarithmic y axis; what
        is not above 0 leaves a gap there, and the title counts it. `note` stands behind the title."""
        self.heading, self.note = title or self.heading, note
        asked = (tuple(series), self.heading, note, y_limits, x_limits, log)
        if asked == self._shown:
            return
        self._shown, self._series, self._log = asked, tuple(series), log
        self._limits = (y_limits, x_limits)
        scaled = [_logarithms(one) for one in self._series] if log else list(self._series)
        drawn = [one for one in scaled if any(math.isfinite(y) for _, y in one.points)]
        plot = self.query_one(QuietPlot)
        plot.display = bool(drawn)
        self.query_one(".empty").display = not drawn
        self._told = (drawn, _lost(self._series) if log else 0)
        self.query_one(".title", Static).update(self._title(*self._told))
        if not drawn:
            return
        plot.clear()
        plot.set_y_formatter(LogFormatter() if log else NumericAxisFormatter())
        ys = [y for one in drawn for _, y in one.points] + [
            y for one in drawn for _, *ends in one.band for y in ends
        ]
        low, high = y_limits or (_log_limits(ys) if log else _limits(ys))
        for one in drawn:
            self._shade(plot, one, high - low)
        # The first one named lies on top, points above lines, and what is faded under everything.
        for one in sorted(drawn, key=lambda one: (one.faded, one.line))[::-1]:
            self._draw_series(plot, one)
        plot.set_ylimits(low, high)
        xs = [x for one in drawn for x, _ in one.points]
        left, right = x_limits or (min(xs), max(xs))
        margin = (right - left) * 0.02 or 0.5  # room for the marker of the first and the last point
        plot.set_xlimits(left - margin, right + margin)

    def _title(self, drawn: Sequence[Series], lost: int) -> Content:
        head = Content.styled(plain(self.heading), "bold")
        if self.x_label:
            head += Content.styled(f" by {self.x_label}" + (f", {self.note}" if self.note else ""), "$faint")
        if lost:
            head += Content.styled(f"   {lost} not above 0 left out", "$warning")
        legend = [
            Content.assemble(
                (
                    f"{one.marker if one.marker and not one.line else '··' if one.dotted else '━━'} ",
                    self._css(one),
                ),
                (cut(one.name, LEGEND_NAME), "$faint"),
            )
            for one in drawn
            if one.named
        ]
        room = self.size.width or 80
        for number, entry in enumerate(legend):
            counted = 0 if number == len(legend) - 1 else 5  # "   +2" must still have room
            if number and head.cell_length + 3 + entry.cell_length + counted > room:
                return head + Content.styled(f"   +{len(legend) - number}", "$faint")
            head += Content("   ") + entry
        return head

    def _draw_series(self, plot: PlotWidget, one: Series) -> None:
        style = self._rich(one)
        points = thinned(one.points)
        lonely: list[tuple[float, float]] = []
        if one.faded:
            dots = [(x, y) for x, y in points if math.isfinite(y)]
            xs, ys = [x for x, _ in dots], [y for _, y in dots]
            plot.scatter(xs, ys, marker_style=style, hires_mode=HiResMode.BRAILLE)
        elif one.dotted:
            dots = dotted_line(points)
            xs, ys = [x for x, _ in dots], [y for _, y in dots]
            plot.scatter(xs, ys, marker_style=style, hires_mode=HiResMode.BRAILLE)
        elif one.line:
            for start, end in _pieces(points):
                piece = points[start:end]
                if len(piece) == 1:
                    lonely += piece
                    continue
                xs, ys = [x for x, _ in piece], [y for _, y in piece]
                plot.plot(xs, ys, line_style=style, hires_mode=HiResMode.BRAILLE)
        marked = [(x, y) for x, y in points if math.isfinite(y)] if one.marker else lonely
        if marked:
            marker = one.marker or "●"
            plot.scatter([x for x, _ in marked], [y for _, y in marked], marker=marker, marker_style=style)

    def _shade(self, plot: PlotWidget, one: Series, span: float) -> None:
        """Weak dots over the band of a series, as wide as it is between the points measured."""
        dots = band_dots(one.band, span)
        if dots:
            style = self._rich(replace(one, faded=True))
            xs, ys = [x for x, _ in dots], [y for _, y in dots]
            plot.scatter(xs, ys, marker_style=style, hires_mode=HiResMode.BRAILLE)

    def _css(self, one: Series) -> str:
        return f"${one.style}" + (" 50%" if one.faded else "")

    def _rich(self, one: Series) -> str:
        variables = self.app.theme_variables
        color = Color.parse(variables.get(one.style, variables["primary"]))
        if one.faded:
            color = color.blend(Color.parse(variables["background"]), 0.5)
        return color.hex6


def dotted_line(points: Sequence[tuple[float, float]], dots: int = 20) -> list[tuple[float, float]]:
    """Dots at equal steps of x along the straight lines between finite points."""
    found = [point for point in points if math.isfinite(point[1])]
    for (x0, y0), (x1, y1) in pairwise(list(found)):
        steps = max(1, round(dots * (x1 - x0) / ((found[-1][0] - found[0][0]) or 1.0))) if x1 > x0 else 1
        for n in range(1, steps):
            found.append((x0 + (x1 - x0) * n / steps, y0 + (y1 - y0) * n / steps))
    return found


def band_dots(
    band: Sequence[tuple[float, float, float]], span: float, columns: int = 70, rows: int = 26
) -> list[tuple[float, float]]:
    """Dots in a chessboard pattern between the low and high ends of an interval; `span`: of the y axis."""
    found: list[tuple[float, float]] = []
    if span <= 0 or len(band) < 2:
        return [(x, y) for x, *ends in band for y in ends]
    width, step = band[-1][0] - band[0][0], span / rows
    for (x0, low0, high0), (x1, low1, high1) in pairwise(band):
        count = max(1, round(columns * (x1 - x0) / width)) if width > 0 else 1
        for n in range(count + 1):
            share = n / count
            x, low, high = (
                x0 + (x1 - x0) * share,
                low0 + (low1 - low0) * share,
                high0 + (high1 - high0) * share,
            )
            if not (math.isfinite(low) and math.isfinite(high)):
                continue
            first = math.ceil(low / step)
            found += [(x, k * step) for k in range(first, math.floor(high / step) + 1) if (k + n) % 2 == 0]
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> Sequence[tuple[float, float]]:
    """At most about `most` of the points: of every stretch its first, lowest, highest and last one in their order, so
    that no peak is lost; a gap in it stays a gap."""
    if len(points) <= most:
        return points
    parts = most // 4
    kept: list[tuple[float, float]] = []
    for start, end in pairwise(round(i * len(points) / parts) for i in range(parts + 1)):
        finite = [index for index in range(start, end) if math.isfinite(points[index][1])]
        gap = [index for index in range(start, end) if not math.isfinite(points[index][1])][:1]
        if finite:
            lowest = min(finite, key=lambda index: points[index][1])
            highest = max(finite, key=lambda index: points[index][1])
            gap += [finite[0], lowest, highest, finite[-1]]
        kept += [points[index] for index in sorted(set(gap))]
    return kept


def _logarithms(one: Series) -> Series:
    """The series with log10 of its values; NaN for those that have none."""
    points = tuple((x, math.log10(y) if y > 0 and math.isfinite(y) else math.nan) for x, y in one.points)
    return replace(one, points=points)


def _lost(series: Sequence[Series]) -> int:
    """How many measured values of the named series have no place on a logarithmic axis."""
    return sum(1 for one in series if one.named or one.marker for _, y in one.points if y <= 0)


def _pieces(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Runs of finite points: a value that is not finite leaves a gap."""
    runs, start = [], None
    for index, (_, y) in enumerate([*points, (0.0, math.nan)]):
        if math.isfinite(y):
            start = index if start is None else start
        elif start is not None:
            runs.append((start, index))
            start = None
    return runs


def _limits(values: Sequence[float], finer: float = 1.0) -> tuple[float, float]:
    """Round limits around the finite values, so that the axis rests while values come in; `finer`: less round ones."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span))
    step = (step / 2 if span / step < 3 else step) / finer
    below = low - 0.04 * span  # room for a marker on the lowest point
    return math.floor((below if below > 0 or low < 0 else low) / step) * step, math.ceil(high / step) * step


def _log_limits(logarithms: Sequence[float]) -> tuple[float, float]:
    """Limits for log10 of values: round values within a decade, else 1, 2 or 5 of one."""
    finite = [value for value in logarithms if math.isfinite(value)]
    low, high = 10 ** min(finite), 10 ** max(finite)
    if high / low < 8:
        below, above = _limits([low, high], finer=2.5)
        if below > 0:
            return math.log10(below), math.log10(above)
    leads = [decade + math.log10(lead) for decade in range(-12, 13) for lead in (1, 2, 5)]
    bottom = max((lead for lead in leads if lead <= min(finite)), default=min(finite))
    top = min((lead for lead in leads if lead >= max(finite) and lead > bottom), default=max(finite) + 1.0)
    return bottom, top


def resting_end(step: float, total: float = 0.0) -> float:
    """Where an x axis ends that a growing curve does not move with every point: the next round number, at most `total`.

    Round are 1, 1.5, 2, 3, 4, 5, 7.5 times a power of ten, from 10 on.
    """
    if step <= 0:
        return total or 10.0
    power = 10.0 ** math.floor(math.log10(step))
    rounds = [power * lead for lead in (1, 1.5, 2, 3, 4, 5, 7.5, 10)]
    end = max(10.0, next(round_ for round_ in rounds if round_ >= step))
    return min(end, total) if total >= step else end
