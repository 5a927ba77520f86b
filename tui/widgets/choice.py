"""One setting on one line: `dtype  bfloat16 ▾`. Left and right step through, Enter opens the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual import events
from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from tui.text import cut


class Choice(Widget, can_focus=True):
    """A choice of (value, words). Posts `Changed` when the person chose another one."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    Choice { height: 1; width: auto; min-width: 12; margin-right: 3; }
    Choice:focus { background: $block-cursor-background; }
    """
    BINDINGS = [
        Binding("left", "turn(-1)", "previous value", show=False),
        Binding("right", "turn(1)", "next value", show=False),
        Binding("enter,space", "pick", "list of values", show=False),
    ]

    value = reactive("", layout=True)

    @dataclass
    class Changed(Message):
        choice: Choice
        value: str

        @property
        def control(self) -> Choice:
            return self.choice

    def __init__(
        self,
        label: str,
        options: Sequence[tuple[str, str]],
        value: str = "",
        *,
        id: str | None = None,
        label_width: int = 0,
    ) -> None:
        super().__init__(id=id)
        self.label = label
        self.label_width = max(label_width, len(label) + 2)
        self.options = tuple(options)
        self.set_reactive(Choice.value, value or self._first())

    def _first(self) -> str:
        """The value where none is given."""
        return self.options[0][0] if self.options else ""

    def set_options(self, options: Sequence[tuple[str, str]], value: str | None = None) -> None:
        """Change what there is to choose from; keeps the value where it is still there. Posts nothing."""
        self.options = tuple(options)
        values = [option for option, _ in self.options]
        wanted = self.value if value is None else value
        self.value = wanted if wanted in values else (values[0] if values else "")
        self.refresh(layout=True)

    @property
    def words(self) -> str:
        return next((words for value, words in self.options if value == self.value), self.value)

    def render(self) -> Content:
        room = max(4, (self.size.width or 60) - self.label_width - 2)
        return Content.assemble(
            (f"{self.label:<{self.label_width}}", "$faint"),
            cut(self.words, room) if self.words else "none",
            (" ▾", "$faint"),
        )

    def get_content_width(self, container: object, viewport: object) -> int:
        return self.label_width + Content(self.words or "none").cell_length + 2

    def _choose(self, value: str | None) -> None:
        if value is not None and value != self.value:
            self.value = value
            self.post_message(self.Changed(self, value))

    def action_turn(self, by: int) -> None:
        values = [value for value, _ in self.options]
        if values:
            index = values.index(self.value) if self.value in values else 0
            self._choose(values[min(len(values) - 1, max(0, index + by))])

    def action_pick(self) -> None:
        from tui.screens.dialogs import PickScreen

        if self.options:
            self.app.push_screen(PickScreen(self.label, self.options, self.value), self._choose)

    def on_click(self, event: events.Click) -> None:
        self.focus()
        self.action_pick()


class Several(Choice):
    """Any number of the options, in their order: `gguf  q8_0 q4_k_m ▾`. `value` is their names with spaces between."""

    def _first(self) -> str:
        return ""

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(self.value.split())

    @property
    def words(self) -> str:
        return self.value or "none"

    def action_turn(self, by: int) -> None:
        """Left and right step through none and each one alone."""
        values = ["", *(value for value, _ in self.options)]
        index = values.index(self.value) if self.value in values else 0
        self._choose(values[min(len(values) - 1, max(0, index + by))])

    def action_pick(self) -> None:
        from tui.screens.dialogs import PickSeveralScreen

        def picked(values: tuple[str, ...] | None) -> None:
            self._choose(None if values is None else " ".join(values))

        self.app.push_screen(PickSeveralScreen(self.label, self.options, self.chosen), picked)
