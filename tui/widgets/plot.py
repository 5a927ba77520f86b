"""Curves in a plot with the legend beside its title, so that it covers nothing. Imports numpy: mount it late.

A series keeps its colour while it lives; values that are not finite leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from textual.app import ComposeResult
from textual.color import Color
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static
from textual_plot import HiResMode, PlotWidget

from tui.safe_text import plain


@dataclass(frozen=True)
class Series:
    """One curve. `style` is a theme variable without $ ("pt"); `faded` draws it weaker (an older run);
    `marker` draws points with that character, besides the line or (without `line`) alone."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str = "primary"
    faded: bool = False
    marker: str = ""
    line: bool = True
    named: bool = True  # whether it is in the legend


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
    PlotPanel > .title { height: 1; }
    PlotPanel > .empty { height: 1fr; color: $faint; content-align: center middle; }
    """

    def __init__(self, title: str, x_label: str = "", empty: str = "", *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.heading, self.x_label, self.empty = title, x_label, empty
        self._shown: tuple[Series, ...] | None = None
        self._theme = ""

    def compose(self) -> ComposeResult:
        yield Static(Content(self.heading), classes="title")
        yield Static(Content(self.empty), classes="empty")
        yield QuietPlot(allow_pan_and_zoom=False)

    def on_mount(self) -> None:
        plot = self.query_one(QuietPlot)
        plot.margin_top, plot.margin_bottom, plot.margin_left = 0, 2, 8
        plot.set_xlabel(self.x_label)
        plot.display = False
        self.app.theme_changed_signal.subscribe(self, lambda theme: self.call_after_refresh(self._again))

    def _again(self) -> None:
        shown, self._shown = self._shown, None
        if shown is not None:
            self.show(shown)

    def show(
        self, series: Sequence[Series], title: str = "", y_limits: tuple[float, float] | None = None
    ) -> None:
        """Draw these curves. Without any point the empty words stand there instead."""
        shown = tuple(series)
        if title:
            self.heading = title
        if shown == self._shown:
            return
        self._shown = shown
        drawn = [one for one in shown if any(math.isfinite(y) for _, y in one.points)]
        plot = self.query_one(QuietPlot)
        plot.display = bool(drawn)
        self.query_one(".empty").display = not drawn
        legend = [
            Content.assemble(
                (f"{one.marker if one.marker and not one.line else '━━'} ", self._css(one)),
                (plain(one.name), "$faint"),
            )
            for one in drawn
            if one.named
        ]
        self.query_one(".title", Static).update(
            Content("   ").join([Content.styled(self.heading, "bold"), *legend])
        )
        if not drawn:
            return
        plot.clear()
        for one in reversed(drawn):  # the first one named lies on top
            self._draw_series(plot, one)
        low, high = y_limits or _limits([y for one in drawn for _, y in one.points])
        plot.set_ylimits(low, high)
        xs = [x for one in drawn for x, _ in one.points]
        left, right = min(xs), max(xs)
        margin = (right - left) * 0.03 or 0.5  # room for the marker of the first and the last point
        plot.set_xlimits(left - margin, right + margin)

    def _draw_series(self, plot: PlotWidget, one: Series) -> None:
        points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        style = self._rich(one)
        if one.line and len(points) > 1:
            for start, end in _pieces(one.points):
                piece = one.points[start:end]
                plot.plot(
                    [x for x, _ in piece],
                    [y for _, y in piece],
                    line_style=style,
                    hires_mode=HiResMode.BRAILLE,
                )
        if one.marker or len(points) == 1:
            plot.scatter(xs, ys, marker=one.marker or "●", marker_style=style)

    def _css(self, one: Series) -> str:
        return f"${one.style}" + (" 50%" if one.faded else "")

    def _rich(self, one: Series) -> str:
        variables = self.app.theme_variables
        color = Color.parse(variables.get(one.style, variables["primary"]))
        if one.faded:
            color = color.blend(Color.parse(variables["background"]), 0.55)
        return color.hex6


def _pieces(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Runs of at least two finite points: a value that is not finite leaves a gap."""
    runs, start = [], None
    for index, (_, y) in enumerate([*points, (0.0, math.nan)]):
        if math.isfinite(y):
            start = index if start is None else start
        elif start is not None:
            if index - start > 1:
                runs.append((start, index))
            start = None
    return runs


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Round limits around the finite values, so that the axis rests while values come in."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span))
    step = step / 2 if span / step < 3 else step
    below = low - 0.04 * span  # room for a marker on the lowest point
    return math.floor((below if below > 0 or low < 0 else low) / step) * step, math.ceil(high / step) * step
