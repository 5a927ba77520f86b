"""Widgets whose content is made for their width: they tell the screen when it changes."""

from __future__ import annotations

from textual import events
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static


class WidthChanged(Message):
    """A widget's width is known, or another one."""


class _TellsWidth(Widget):
    _told_width = -1

    def on_resize(self, event: events.Resize) -> None:
        if event.size.width != self._told_width:
            self._told_width = event.size.width
            self.post_message(WidthChanged())


# The look is that of the first base: it comes before _TellsWidth.
class SizedStatic(Static, _TellsWidth):
    """A Static that tells its width."""


class SizedScroll(VerticalScroll, _TellsWidth):
    """A scrolling column that tells its width."""
