"""`?`: every key that works on the screen below, made from its bindings. Nothing here is written twice."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Static

from tui.screens.base import MedScreen


class HelpScreen(ModalScreen[None]):
    BINDINGS = [Binding("escape,question_mark,q,enter", "close", "close")]
    DEFAULT_CSS = """
    HelpScreen .dialog { height: auto; }
    HelpScreen VerticalScroll { height: auto; max-height: 100%; }
    """

    def __init__(self, below: Screen[object]) -> None:
        super().__init__()
        self.below = below

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            if isinstance(self.below, MedScreen):
                yield Static(Content(self.below.QUESTION), classes="title")
            with VerticalScroll():
                yield Static(self.table())
            yield Static(Content("esc close"), classes="keys")

    def table(self) -> Content:
        """Keys of the screen, then of what it holds, then those that work everywhere."""
        groups: list[tuple[str, list[Binding]]] = [("here", _bindings_of(self.below))]
        seen: set[type[Widget]] = set()
        for widget in self.below.query("*"):
            kind = type(widget)
            own = [binding for binding in _bindings_of(widget) if binding.description]
            if widget.focusable and own and kind not in seen and kind.__module__.startswith("tui."):
                seen.add(kind)
                groups.append((_words(kind.__name__), own))
        groups.append(("everywhere", [*_bindings_of(self.app), Binding("ctrl+p", "", "all commands")]))
        lines: list[Content] = []
        for title, bindings in groups:
            rows = _rows(self.app, bindings)
            if rows:
                lines += [Content.styled(title, "bold $faint"), *rows, Content("")]
        return Content("\n").join(lines[:-1])

    def action_close(self) -> None:
        self.dismiss(None)


def _bindings_of(node: object) -> list[Binding]:
    found: list[Binding] = []
    for kind in type(node).__mro__:
        if kind.__module__.startswith("tui."):
            found += list(Binding.make_bindings(vars(kind).get("BINDINGS", [])))
    return [binding for binding in found if binding.description]


def _rows(app: object, bindings: list[Binding]) -> list[Content]:
    from textual.app import App

    assert isinstance(app, App)
    by_action: dict[str, tuple[list[str], str]] = {}
    for binding in bindings:
        keys, _ = by_action.setdefault(binding.action, ([], ""))
        keys.append(app.get_key_display(binding))
        words = binding.description + (f" ({binding.tooltip})" if binding.tooltip else "")
        by_action[binding.action] = (keys, words)
    return [
        Content.assemble("  ", (f"{' '.join(keys):<14}", "bold $primary"), words)
        for keys, words in by_action.values()
    ]


def _words(name: str) -> str:
    """WeightSlider → "weight slider"."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()
