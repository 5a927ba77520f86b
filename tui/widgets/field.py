"""A one-line input without a frame. While it has the focus its own two keys are in the footer; Esc leaves it."""

from __future__ import annotations

from textual.binding import Binding
from textual.widgets import Input


class Field(Input):
    """An Input that Esc leaves (Textual's own keeps the focus), so that letters are keys again."""

    DEFAULT_CSS = """
    Field { border: none; height: 1; padding: 0; background: $panel; }
    Field:focus { border: none; background: $block-cursor-background; }
    """
    BINDINGS = [
        Binding("enter", "submit", "take it"),
        Binding("escape", "leave", "back to the keys"),
    ]

    def __init__(
        self, value: str = "", *, placeholder: str = "", id: str | None = None, digits: bool = False
    ) -> None:
        super().__init__(
            value, placeholder=placeholder, id=id, compact=True, restrict=r"\d*" if digits else None
        )

    def action_leave(self) -> None:
        """Give the focus away; the screen's letters work again."""
        self.screen.set_focus(None)
