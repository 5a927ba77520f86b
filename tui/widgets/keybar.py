"""The footer: the keys of the moment, at most seven, made from the bindings themselves."""

from __future__ import annotations

from textual.binding import Binding
from textual.content import Content
from textual.events import Click
from textual.screen import Screen
from textual.widgets import Static

MAX_KEYS = 7


class KeyBar(Static):
    """One line of `key words`; the last keys give way first when the terminal is narrow."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    KeyBar { dock: bottom; height: 1; background: $panel; padding: 0 1; color: $faint; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._zones: list[tuple[int, int, str]] = []

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._changed)

    def _changed(self, screen: Screen[object]) -> None:
        self.refresh()

    def shown(self) -> list[Binding]:
        """The bindings of the footer: what is enabled and marked to be shown, one per action."""
        seen: dict[str, Binding] = {}
        for active in self.screen.active_bindings.values():
            if active.binding.show and active.enabled and active.binding.description:
                seen.setdefault(active.binding.action, active.binding)
        shown = list(seen.values())
        last = [binding for binding in shown if binding.action == "help"]  # help is always there
        return [binding for binding in shown if binding not in last][: MAX_KEYS - len(last)] + last

    def render(self) -> Content:
        width = self.content_size.width
        line, self._zones = Content(""), []
        for binding in self.shown():
            key = self.app.get_key_display(binding)
            gap = Content("   ") if len(line) else Content("")
            added = gap + Content.assemble((key, "bold $primary"), " ", binding.description)
            if line.cell_length + added.cell_length > width:
                break
            self._zones.append((line.cell_length, line.cell_length + added.cell_length, binding.key))
            line += added
        return line

    def on_click(self, event: Click) -> None:
        x = event.x - self.styles.padding.left
        for first, end, key in self._zones:
            if first <= x < end:
                self.app.simulate_key(key)
