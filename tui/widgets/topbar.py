"""The one line at the top: the screens by number, and what runs. Not focusable; a click switches."""

from __future__ import annotations

from textual.content import Content
from textual.events import Click
from textual.widgets import Static

from tui.messages import ShowScreen
from tui.snapshots import JobRow

SCREENS = (
    ("home", "Home"),
    ("adapters", "Adapters"),
    ("merge", "Merge"),
    ("chat", "Chat"),
    ("train", "Train"),
    ("evaluate", "Evaluate"),
    ("jobs", "Jobs"),
)


class TopBar(Static):
    """`1 Home  2 Adapters  …                ▸ 1 job 35%`; the current screen stands out."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    TopBar { dock: top; height: 1; background: $panel; padding: 0 1; color: $faint; }
    """

    def __init__(self, current: str) -> None:
        super().__init__()
        self.current = current
        self.jobs: tuple[JobRow, ...] = ()
        self._zones: list[tuple[int, int, str]] = []

    def show_jobs(self, jobs: tuple[JobRow, ...]) -> None:
        if jobs != self.jobs:
            self.jobs = jobs
            self.refresh()

    def render(self) -> Content:
        width = self.content_size.width
        named = width >= 74
        left, self._zones = Content(""), []
        for number, (name, title) in enumerate(SCREENS, 1):
            here = name == self.current
            words = f"{number} {title}" if named or here else str(number)
            self._zones.append((left.cell_length, left.cell_length + len(words), name))
            left += Content.styled(words, "bold $foreground" if here else "$faint") + Content("  ")
        right = self._live_words()
        space = width - left.cell_length - right.cell_length
        return left if space < 0 else left + Content(" " * space) + right

    def on_click(self, event: Click) -> None:
        x = event.x - self.styles.padding.left
        for first, end, name in self._zones:
            if first <= x < end:
                self.app.post_message(ShowScreen(name))

    def _live_words(self) -> Content:
        live = [job for job in self.jobs if not job.final]
        if not live:
            return Content("")
        first = live[0]
        percent = f" {first.fraction:4.0%}" if first.fraction is not None else ""
        return Content.styled(f"▸ {len(live)} job{'s' if len(live) > 1 else ''}{percent}", "$primary")
