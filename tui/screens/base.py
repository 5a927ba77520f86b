"""What all screens share: the bar above, the keys below, and being told when something changed.

A screen overrides `body` (its widgets), `show_workspace` and `show_jobs` (what to do with new snapshots).
It is told when it comes to the front and whenever something changes while it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.screen import Screen

from tui.actions import Action
from tui.messages import Answer, Refusal
from tui.snapshots import JobFeed, JobRow, Overview
from tui.widgets.keybar import KeyBar
from tui.widgets.sized import WidthChanged
from tui.widgets.topbar import TopBar

if TYPE_CHECKING:
    from tui.app import MedmergeApp

T = TypeVar("T")


class MedScreen(Screen[None]):
    """A numbered screen. `NAME` is its mode; `action()` what `c` shows as a command line."""

    NAME = ""
    TAB = ""  # the numbered screen it belongs to, where that is another one
    AUTO_FOCUS = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (30, "-tall")]
    BINDINGS = [Binding("escape", "back", "back", show=False)]

    # what the help says this screen is for
    QUESTION = ""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[str, int] = {}

    @property
    def med(self) -> MedmergeApp:
        from tui.app import MedmergeApp

        assert isinstance(self.app, MedmergeApp)
        return self.app

    def compose(self) -> ComposeResult:
        yield TopBar(self.TAB or self.NAME)
        yield from self.body()
        yield KeyBar()

    def body(self) -> ComposeResult:
        yield from ()

    def show_workspace(self, overview: Overview) -> None:
        """The workspace was read, or the selection changed."""

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        """Jobs changed; `feeds` are those known so far."""

    def command(self) -> Action | None:
        """What this screen would start now, for "copy as command"; None when there is nothing to start."""
        return None

    def on_screen_resume(self) -> None:
        self.tell()

    def on_width_changed(self, message: WidthChanged) -> None:
        """Lines are made for a width: make them again."""
        self.tell()

    def tell(self) -> None:
        """Show what the app knows now."""
        if self.is_mounted and self.is_current:
            if self.med.overview is not None:
                self.show_workspace(self.med.overview)
            self.tell_jobs()

    def tell_jobs(self) -> None:
        """Show the jobs as the app knows them now."""
        if self.is_mounted and self.is_current:
            self.query_one(TopBar).show_jobs(self.med.jobs)
            self.show_jobs(self.med.jobs, self.med.feeds)

    def ask(self, question: str, work: Callable[[], T]) -> None:
        """Run blocking `work` in a thread; its result arrives in `answered(question, value)`.

        Asking the same question again makes earlier answers stale: they are dropped.
        """
        number = self._numbers[question] = self._numbers.get(question, 0) + 1
        self.med.in_thread(
            question,
            work,
            lambda value: self.post_message(Answer(question, number, value)),
            lambda error: self.post_message(Refusal(question, number, error)),
        )

    def on_answer(self, message: Answer) -> None:
        if message.number == self._numbers.get(message.question):
            self.answered(message.question, message.value)

    def on_refusal(self, message: Refusal) -> None:
        if message.number != self._numbers.get(message.question):
            return
        if not self.refused(message.question, message.failure.message, message.failure.hint):
            self.app.post_message(message.failure)

    def refused(self, question: str, message: str, hint: str) -> bool:
        """An `ask` that failed. True when the screen shows it itself; else a toast does."""
        return False

    def answered(self, question: str, value: Any) -> None:
        """The result of an `ask`."""

    def action_back(self) -> None:
        """Esc: home. (Out of an input first: see widgets.field.) Never out of the program."""
        if self.NAME != "home":
            self.med.show("home")
