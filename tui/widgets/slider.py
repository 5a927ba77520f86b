"""A merge weight under the fingers: arrow keys, typing, or the mouse.

`PT   ━━━━━━●──────────── 0.30`. Left and right change by 0.05, with shift by 0.01; Home and End go to the
ends; `.`, `0`, `-` or Enter begin typing a number (other digits switch screens), Enter takes it, Esc leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from tui.text import weight
from tui.theme import LABEL_STYLE, label_style

LABEL_WIDTH = 5
VALUE_WIDTH = 8


class WeightSlider(Widget, can_focus=True):
    """One weight. Posts `Changed` whenever the value does."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    WeightSlider { height: 1; width: 1fr; }
    """
    BINDINGS = [
        Binding("left", "nudge(-0.05)", "−0.05", show=False),
        Binding("right", "nudge(0.05)", "+0.05", show=False),
        Binding("shift+left", "nudge(-0.01)", "−0.01", show=False),
        Binding("shift+right", "nudge(0.01)", "+0.01", show=False),
        Binding("home", "put(0)", "0", show=False),
        Binding("end", "put(1)", "1", show=False),
        Binding("enter", "type", "type a weight", show=False),
    ]

    value = reactive(0.0)
    typed: reactive[str | None] = reactive(None)

    @dataclass
    class Changed(Message):
        slider: WeightSlider
        value: float

        @property
        def control(self) -> WeightSlider:
            return self.slider

    def __init__(
        self,
        label: str,
        value: float = 0.0,
        lowest: float = 0.0,
        highest: float = 1.0,
        *,
        typed: tuple[float, float] = (-2.0, 2.0),
        id: str | None = None,
    ) -> None:
        super().__init__(id=id)
        self.label = label
        self.lowest, self.highest = lowest, highest
        self.least, self.most = typed
        self.set_reactive(WeightSlider.value, value)

    # what may be typed goes beyond the bar's ends: weights above 1 and below 0 are legal, only rare
    def put(self, value: float) -> None:
        """Set the weight (rounded to 0.001) and tell about it."""
        value = round(value, 3)
        if value != self.value:
            self.value = value
            self.post_message(self.Changed(self, value))

    def action_nudge(self, by: float) -> None:
        self.put(min(self.highest, max(self.lowest, self.value + by)))

    def action_put(self, value: float) -> None:
        self.put(value)

    def action_type(self) -> None:
        if self.typed is None:
            self.typed = ""
            return
        text, self.typed = self.typed, None
        try:
            value = float(text)
        except ValueError:
            return
        if self.least <= value <= self.most:
            self.put(value)
        else:
            what = self.label if self.label.lower() not in LABEL_STYLE else "a weight"
            self.notify(f"{what} lies between {self.least:g} and {self.most:g}", severity="warning")

    def on_key(self, event: events.Key) -> None:
        character = event.character or ""
        if self.typed is None:
            if character in (".", "0", "-"):
                self.typed = character
                event.stop()
                event.prevent_default()
            return
        if character and character in "0123456789.-":
            self.typed = (self.typed + character)[:6]
        elif event.key == "backspace":
            self.typed = self.typed[:-1]
        elif event.key == "escape":
            self.typed = None
        elif event.key == "enter":
            return
        elif event.key in ("tab", "shift+tab", "up", "down"):
            self.action_type()
            return
        event.stop()
        event.prevent_default()

    def on_blur(self) -> None:
        if self.typed is not None:
            self.action_type()

    @property
    def _bar(self) -> tuple[int, int]:
        """(first cell, cells) of the bar."""
        label = max(LABEL_WIDTH, len(self.label) + 1)
        return label, max(8, self.size.width - label - VALUE_WIDTH)

    def render(self) -> Content:
        style = label_style(self.label)
        before, cells = self._bar
        adapter = self.label.lower() in LABEL_STYLE
        span = self.highest - self.lowest
        share = min(1.0, max(0.0, (self.value - self.lowest) / span))
        knob = round(share * (cells - 1))
        number = weight(self.value) if self.typed is None else f"{self.typed}▏"
        focus = self.has_focus
        return Content.assemble(
            (f"{self.label.upper():<{before}}", f"bold {style}")
            if adapter
            else (f"{self.label:<{before}}", "$faint"),
            ("━" * knob, style),
            ("●", f"bold {style}" if not focus else "bold $block-cursor-foreground on " + style),
            ("─" * (cells - 1 - knob), "$rule"),
            (
                f" {number:<{VALUE_WIDTH - 1}}",
                f"bold {style}" + (" reverse" if self.typed is not None else ""),
            ),
        )

    def _from_mouse(self, x: int) -> None:
        first, cells = self._bar
        share = min(1.0, max(0.0, (x - first) / (cells - 1)))
        self.put(round(self.lowest + share * (self.highest - self.lowest), 2))

    def on_mouse_down(self, event: events.MouseDown) -> None:
        first, cells = self._bar
        if first - 1 <= event.x < first + cells + 1:
            self.focus()
            self.capture_mouse()
            self._from_mouse(event.x)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self.app.mouse_captured is self:
            self._from_mouse(event.x)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        self.release_mouse()
