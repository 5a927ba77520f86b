"""A list of one-line rows that stay where they are while their numbers change.

Each row has a key; `show` keeps the highlighted key, updates rows in place when the keys are the same, and
lets the owner draw every row for the current width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from textual import events
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

Row = TypeVar("Row")


class RowList(OptionList, Generic[Row]):
    """Rows of one type, drawn by `draw(row, width)`; an empty list shows `empty` instead."""

    DEFAULT_CSS = """
    RowList { border: none; padding: 0; background: transparent; height: 1fr; scrollbar-size-vertical: 1; }
    RowList:focus { border: none; background-tint: transparent 0%; }
    RowList > .option-list--option { padding: 0 1; }
    RowList > .option-list--option-disabled { color: $faint; }
    """

    def __init__(
        self,
        draw: Callable[[Row, int], Content],
        key: Callable[[Row], str],
        empty: Content | str = "",
        *,
        id: str | None = None,
    ) -> None:
        super().__init__(id=id, markup=False)
        self._draw_row, self._key_of = draw, key
        self.empty = empty
        self.rows: tuple[Row, ...] = ()
        self._keys: list[str] | None = None

    @property
    def current(self) -> Row | None:
        """The highlighted row."""
        index = self.highlighted
        return self.rows[index] if index is not None and index < len(self.rows) else None

    def show(self, rows: Sequence[Row]) -> None:
        """Show these rows; the highlight stays on the same key, else on the same line."""
        before = self.current
        kept, line = (self._key_of(before) if before is not None else None), self.highlighted
        self.rows = tuple(rows)
        keys = [self._key_of(row) for row in rows]
        if keys == self._keys and keys:
            self._redraw()
            return
        self._keys = keys
        width = self.room
        if not rows:
            self.set_options([Option(self.empty, disabled=True)] if self.empty else [])
            return
        self.set_options([Option(self._draw_row(row, width)) for row in rows])
        if kept in keys:
            self.highlighted = keys.index(kept)
        else:
            self.highlighted = min(line or 0, len(keys) - 1)

    def choose(self, key: str) -> None:
        """Highlight the row with this key, if it is there."""
        if self._keys and key in self._keys:
            self.highlighted = self._keys.index(key)

    @property
    def room(self) -> int:
        """Cells for a row."""
        return max(10, self.scrollable_content_region.width - 2)

    def _redraw(self) -> None:
        width = self.room
        for index, row in enumerate(self.rows):
            drawn = self._draw_row(row, width)
            if self.get_option_at_index(index).prompt != drawn:
                self.replace_option_prompt_at_index(index, drawn)

    def on_resize(self, event: events.Resize) -> None:
        if self.rows:
            self._redraw()
