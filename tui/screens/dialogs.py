"""Small dialogs over a screen: pick one of a list, confirm, and the command line of an action. Esc closes all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from tui.safe_text import plain
from tui.widgets.keybar import KeyBar


class PickScreen(ModalScreen[str | None]):
    """Pick one of `choices` (value, words); returns the value, or None after Esc."""

    BINDINGS = [Binding("escape", "close", "close")]

    def __init__(
        self, title: str, choices: Sequence[tuple[str, str | Content]], current: str | None = None
    ) -> None:
        super().__init__()
        self.heading = title
        self.choices = tuple(choices)
        self.current = current

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(plain(self.heading)), classes="title")
            options = [
                Option(words if isinstance(words, Content) else Content(plain(words)))
                for _, words in self.choices
            ]
            yield OptionList(*options, markup=False, compact=True)
            yield Static(Content("⏎ choose   esc close"), classes="keys")

    def on_mount(self) -> None:
        values = [value for value, _ in self.choices]
        self.query_one(OptionList).highlighted = values.index(self.current) if self.current in values else 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self.choices[event.option_index][0])

    def action_close(self) -> None:
        self.dismiss(None)


class PickSeveralScreen(ModalScreen[tuple[str, ...] | None]):
    """Pick any number of `choices` (value, words); returns the values in their order, or None after Esc."""

    BINDINGS = [
        Binding("space", "mark", "mark", priority=True),
        Binding("enter", "take", "take them", priority=True),
        Binding("escape", "close", "close"),
    ]

    def __init__(self, title: str, choices: Sequence[tuple[str, str]], chosen: Sequence[str]) -> None:
        super().__init__()
        self.heading, self.choices, self.marked = title, tuple(choices), set(chosen)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(plain(self.heading)), classes="title")
            yield OptionList(*map(self._line, self.choices), markup=False, compact=True)
            yield Static(Content("space marks   ⏎ take them   esc close"), classes="keys")

    def _line(self, choice: tuple[str, str]) -> Content:
        value, words = choice
        mark = ("✓ ", "bold $success") if value in self.marked else ("· ", "$faint")
        return Content.assemble(mark, plain(words))

    def action_mark(self) -> None:
        options = self.query_one(OptionList)
        if options.highlighted is not None:
            choice = self.choices[options.highlighted]
            self.marked ^= {choice[0]}
            options.replace_option_prompt_at_index(options.highlighted, self._line(choice))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.action_mark()  # a click

    def action_take(self) -> None:
        self.dismiss(tuple(value for value, _ in self.choices if value in self.marked))

    def action_close(self) -> None:
        self.dismiss(None)


class ConfirmScreen(ModalScreen[bool]):
    """A question that is answered with y or n; Esc means no."""

    BINDINGS = [
        Binding("y", "answer(True)", "yes"),
        Binding("n", "answer(False)", "no"),
        Binding("escape", "answer(False)", "no", show=False),
    ]

    def __init__(self, question: str, detail: str = "") -> None:
        super().__init__()
        self.question, self.detail = question, detail

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(plain(self.question)), classes="title")
            if self.detail:
                yield Static(Content(plain(self.detail, lines=True)))
            yield Static(Content("y yes   n no"), classes="keys")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class CommandScreen(ModalScreen[None]):
    """The command line that does what the screen would do, and where it was put."""

    BINDINGS = [Binding("escape,enter,c", "close", "close")]

    def __init__(self, line: str, path: Path | None) -> None:
        super().__init__()
        self.line, self.path = line, path

    def compose(self) -> ComposeResult:
        where = f"Written to {self.path}." if self.path else "It could not be written to a file."
        with Vertical(classes="dialog"):
            yield Static(Content("The same as a command"), classes="title")
            yield Static(Content(plain(self.line)))
            yield Static(
                Content(
                    f"\nSent to the terminal's clipboard (OSC 52; tmux drops it unless set-clipboard is on).\n{where}"
                ),
                classes="faint",
            )
            yield Static(Content("esc close"), classes="keys")

    def action_close(self) -> None:
        self.dismiss(None)


class TextScreen(ModalScreen[None]):
    """A long text to read, made of plain content; scrolls."""

    BINDINGS = [
        Binding("escape,enter,q", "close", "close"),
        Binding("left,p", "turn(-1)", "previous"),
        Binding("right,n", "turn(1)", "next"),
    ]
    DEFAULT_CSS = """
    TextScreen .dialog { width: 94%; height: 90%; max-height: 90%; }
    TextScreen VerticalScroll { height: 1fr; }
    """

    def __init__(self, title: str, pages: Sequence[Content]) -> None:
        super().__init__()
        self.heading, self.pages, self.page = title, tuple(pages), 0

    def compose(self) -> ComposeResult:
        from textual.containers import VerticalScroll

        with Vertical(classes="dialog"):
            yield Static(classes="title", id="heading")
            with VerticalScroll():
                yield Static(id="text")
            yield KeyBar()

    def on_mount(self) -> None:
        self._show()

    def _show(self) -> None:
        count = f"   {self.page + 1} of {len(self.pages)}" if len(self.pages) > 1 else ""
        self.query_one("#heading", Static).update(Content(plain(self.heading) + count))
        self.query_one("#text", Static).update(
            self.pages[self.page] if self.pages else Content("nothing here")
        )

    def action_turn(self, by: int) -> None:
        if self.pages:
            self.page = min(len(self.pages) - 1, max(0, self.page + by))
            self._show()

    def action_close(self) -> None:
        self.dismiss(None)
