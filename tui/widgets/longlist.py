"""A list of any number of one-line rows: only the lines on screen are drawn. Used by the samples screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from textual import events
from textual.binding import Binding
from textual.content import Content
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual

Row = TypeVar("Row")


class LongList(ScrollView, Generic[Row], can_focus=True):
    """Rows drawn by `draw(row, width)`; posts `Moved` when another one is under the cursor."""

    COMPONENT_CLASSES = {"longlist--cursor"}
    DEFAULT_CSS = """
    LongList { height: 1fr; scrollbar-size: 1 1; background: transparent; }
    LongList > .longlist--cursor { background: $block-cursor-blurred-background; }
    LongList:focus > .longlist--cursor { background: $block-cursor-background; color: $block-cursor-foreground; }
    """
    BINDINGS = [
        Binding("up,k", "move(-1)", "previous", show=False),
        Binding("down,j", "move(1)", "next", show=False),
        Binding("pageup", "page(-1)", "page up", show=False),
        Binding("pagedown", "page(1)", "page down", show=False),
        Binding("home,g", "end(-1)", "first", show=False),
        Binding("end,G", "end(1)", "last", show=False),
    ]

    @dataclass
    class Moved(Message):
        index: int

    def __init__(
        self, draw: Callable[[Row, int], Content], key: Callable[[Row], str], *, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self._draw_row, self._key_of = draw, key
        self.rows: Sequence[Row] = ()
        self.index = 0

    @property
    def current(self) -> Row | None:
        return self.rows[self.index] if self.index < len(self.rows) else None

    @property
    def room(self) -> int:
        return max(8, self.scrollable_content_region.width)

    def show(self, rows: Sequence[Row]) -> None:
        """Show these rows; the cursor stays on the same key, else on the same line."""
        before = self.current
        key = self._key_of(before) if before is not None else None
        self.rows = rows
        place = next((n for n, row in enumerate(rows) if self._key_of(row) == key), None) if key else None
        self.index = min(self.index, max(0, len(rows) - 1)) if place is None else place
        self.virtual_size = Size(self.room, len(rows))
        self.refresh()
        self._follow()
        self.post_message(self.Moved(self.index))

    def choose(self, index: int) -> None:
        index = min(max(0, index), max(0, len(self.rows) - 1))
        if index != self.index:
            before, self.index = self.index, index
            self.refresh_line(before)
            self.refresh_line(index)
            self._follow()
            self.post_message(self.Moved(index))

    def _follow(self) -> None:
        self.scroll_to_region(Region(0, self.index, 1, 1), animate=False, force=True)

    def action_move(self, by: int) -> None:
        self.choose(self.index + by)

    def action_page(self, by: int) -> None:
        self.choose(self.index + by * max(1, self.scrollable_content_region.height - 1))

    def action_end(self, by: int) -> None:
        self.choose(len(self.rows) if by > 0 else 0)

    def on_resize(self, event: events.Resize) -> None:
        self.virtual_size = Size(self.room, len(self.rows))
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        self.choose(self.scroll_offset.y + event.y)

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self.refresh()

    def render_line(self, y: int) -> Strip:
        index, width = self.scroll_offset.y + y, self.room
        if index >= len(self.rows):
            return Strip.blank(self.size.width, self.rich_style)
        content = self._draw_row(self.rows[index], width)
        here = index == self.index
        style = self.get_visual_style("longlist--cursor") if here else self.visual_style
        strips = Visual.to_strips(self, content, width, 1, style, pad=True)
        return strips[0].adjust_cell_length(width, style.rich_style) if strips else Strip.blank(width)
