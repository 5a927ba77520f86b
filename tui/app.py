"""The app: seven screens on one workspace, their shared knowledge, and the workers that gather it.

`start.py` opens it. Everything that blocks runs in threads through `in_thread` and comes back as a message;
jobs are polled here, once for all screens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from textual.app import App
from textual.binding import Binding
from textual.notifications import SeverityLevel
from textual.screen import Screen
from textual.worker import get_current_worker

from engine.errors import MedmergeError
from tui import guide, remember
from tui.actions import Action
from tui.backend import Backend
from tui.messages import ActionFailed, JobsPolled, JobStarted, ShowScreen, WorkspaceRead
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.snapshots import JobFeed, JobRow, Overview, Selection
from tui.theme import THEMES, VARIABLE_DEFAULTS
from tui.widgets.topbar import SCREENS

if TYPE_CHECKING:
    from textual.command import Provider

POLL_SECONDS = 0.3
T = TypeVar("T")


def _home() -> Screen[None]:
    from tui.screens.home import HomeScreen

    return HomeScreen()


def _adapters() -> Screen[None]:
    from tui.screens.adapters import AdaptersScreen

    return AdaptersScreen()


def _merge() -> Screen[None]:
    from tui.screens.merge import MergeScreen

    return MergeScreen()


def _chat() -> Screen[None]:
    from tui.screens.chat import ChatScreen

    return ChatScreen()


def _train() -> Screen[None]:
    from tui.screens.train import TrainScreen

    return TrainScreen()


def _evaluate() -> Screen[None]:
    from tui.screens.evaluate import EvaluateScreen

    return EvaluateScreen()


def _jobs() -> Screen[None]:
    from tui.screens.jobs import JobsScreen

    return JobsScreen()


def _go_provider() -> type[Provider]:
    from tui.palette import GoProvider

    return GoProvider


def _action_provider() -> type[Provider]:
    from tui.palette import ActionProvider

    return ActionProvider


def _report_provider() -> type[Provider]:
    from tui.palette import ReportProvider

    return ReportProvider


def _theme_provider() -> type[Provider]:
    from tui.palette import ThemeProvider

    return ThemeProvider


def _import_screens() -> None:
    """Import what the other screens need, in a thread, so that the first visit to one does not wait for it."""
    import importlib

    for module in (
        "reading",
        "screens.adapters",
        "screens.merge",
        "screens.report",
        "screens.jobs",
        "screens.chat",
        "screens.train",
    ):
        importlib.import_module(f"tui.{module}")
    importlib.import_module("tui.screens.evaluate")


class MedmergeApp(App[None]):
    """medmerge-tui on one workspace, seen through a `Backend`."""

    TITLE = "medmerge"
    CSS_PATH = "app.tcss"
    COMMANDS = {_go_provider, _action_provider, _report_provider, _theme_provider}
    DEFAULT_MODE = "home"
    MODES: ClassVar[dict[str, str | Callable[[], Screen[None]]]] = {
        "home": _home, "adapters": _adapters, "merge": _merge, "chat": _chat, "train": _train,
        "evaluate": _evaluate, "jobs": _jobs,
    }  # fmt: skip
    BINDINGS = [
        *(
            Binding(str(i), f"show('{name}')", title, show=False)
            for i, (name, title) in enumerate(SCREENS, 1)
        ),
        Binding("left_square_bracket", "step(-1)", "previous screen", show=False, key_display="["),
        Binding("right_square_bracket", "step(1)", "next screen", show=False, key_display="]"),
        Binding("c", "copy_command", "copy as command", show=False),
        Binding("question_mark", "help", "help", key_display="?"),
        Binding("q", "quit", "quit", tooltip="jobs go on without the app"),
    ]

    def __init__(self, backend: Backend, selection: Selection | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.overview: Overview | None = None
        self.jobs: tuple[JobRow, ...] = ()
        self.feeds: dict[str, JobFeed] = {}
        self.selection = selection if selection is not None else remember.selection(backend.root)
        self.wanted: frozenset[str] = frozenset()  # ended jobs whose events a screen wants to see
        self._polling = False

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return VARIABLE_DEFAULTS

    def on_mount(self) -> None:
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = remember.theme(default=THEMES[0].name)
        self.theme_changed_signal.subscribe(self, lambda theme: remember.save_theme(theme.name))
        self.call_after_refresh(self._begin)

    def on_unmount(self) -> None:
        self.backend.close()

    def _begin(self) -> None:
        """After the first paint: read the workspace, then look after the jobs."""
        self.read_workspace()
        self.set_interval(POLL_SECONDS, self.poll_jobs)
        self.in_thread("getting ready", _import_screens, lambda _: None)

    # ---- workers: block in a thread, come back as a message -------------------------------------------

    def in_thread(
        self,
        what: str,
        work: Callable[[], T],
        done: Callable[[T], object],
        failed: Callable[[ActionFailed], object] | None = None,
    ) -> None:
        """Run `work` in a thread and pass its result to `done`, or its error to `failed` (which only post)."""
        failed = failed or self.post_message

        def run() -> None:
            worker = get_current_worker()
            try:
                value = work()
            except MedmergeError as error:
                failed(ActionFailed(what, error.message, error.hint))
            except (OSError, ImportError) as error:
                failed(ActionFailed(what, f"{type(error).__name__}: {error}"))
            else:
                if not worker.is_cancelled:
                    done(value)

        self.run_worker(run, name=what, group="reading", thread=True, exit_on_error=True)

    def read_workspace(self) -> None:
        base = self.selection.base
        self.in_thread(
            "reading the workspace",
            lambda: self.backend.overview(base),
            lambda overview: self.post_message(WorkspaceRead(overview)),
        )

    def poll_jobs(self) -> None:
        if self._polling:
            return
        self._polling = True
        wanted = self.wanted

        def poll() -> tuple[tuple[JobRow, ...], dict[str, JobFeed]]:
            try:
                return self.backend.poll_jobs(wanted)
            finally:
                self._polling = False

        def done(found: tuple[tuple[JobRow, ...], dict[str, JobFeed]]) -> None:
            jobs, feeds = found
            if jobs != self.jobs or feeds:
                self.post_message(JobsPolled(jobs, feeds))

        self.in_thread("reading the jobs", poll, done)

    def follow(self, *job_ids: str) -> None:
        """Read the events of these jobs too, even when they have ended."""
        self.wanted |= set(job_ids)

    def start_job(self, action: Action, prepare: Callable[[], None] | None = None) -> None:
        """Start a job and say so. `prepare` runs before it in the same thread (files the job or its command line
        needs)."""

        def start() -> JobRow:
            if prepare:
                prepare()
            return self.backend.start(action)

        self.in_thread(
            f"starting {action.kind}",
            start,
            lambda job: self.post_message(JobStarted(job)),
        )

    def cancel_job(self, job: JobRow) -> None:
        self.in_thread("cancelling", lambda: self.backend.cancel(job.id), lambda stopped: None)

    # ---- what workers said -------------------------------------------------------------------------------

    def on_workspace_read(self, message: WorkspaceRead) -> None:
        self.overview = message.overview
        chosen = guide.fill_selection(self.selection, message.overview)
        if chosen != self.selection:
            self.choose(chosen)
        else:
            self._tell()

    def on_jobs_polled(self, message: JobsPolled) -> None:
        ended_before = {job.id for job in self.jobs if job.final}
        known = {job.id for job in self.jobs}
        self.jobs = message.jobs
        self.feeds = {**self.feeds, **message.feeds}
        for job in message.jobs:
            if job.final and job.id in known - ended_before:
                self._ended(job)
        self._tell_jobs()

    def on_job_started(self, message: JobStarted) -> None:
        self.notify(plain(message.job.title), title="started", markup=False, timeout=3)
        if message.job.id not in {job.id for job in self.jobs}:
            self.jobs = (message.job, *self.jobs)
        self._tell_jobs()

    def _ended(self, job: JobRow) -> None:
        """A job ended while the app watched: say it unless all is well and seen, and read the disk anew."""
        severity: SeverityLevel = "error" if job.state in ("failed", "lost") else "information"
        word = {"lost": "lost: its process is gone"}.get(job.state, job.state)
        if job.state == "done" and job.exit_code:
            severity = "warning"
            word = {1: "the check said no", 4: "the check could not tell"}.get(job.exit_code, "done")
        text = plain(f"{job.title}: {word}" + (f". {job.error}" if job.error else ""))
        self.notify(text, severity=severity, markup=False, timeout=8 if severity != "information" else 4)
        self.read_workspace()

    def on_action_failed(self, message: ActionFailed) -> None:
        text = plain(message.message) + (f"\n→ {plain(message.hint)}" if message.hint else "")
        self.notify(text, title=plain(message.what), severity="error", markup=False, timeout=10)
        self._tell()

    def on_show_screen(self, message: ShowScreen) -> None:
        self.show(message.name)

    def _tell(self) -> None:
        for screen in self.screen_stack:
            if isinstance(screen, MedScreen):
                screen.tell()

    def _tell_jobs(self) -> None:
        for screen in self.screen_stack:
            if isinstance(screen, MedScreen):
                screen.tell_jobs()

    # ---- what the person does ---------------------------------------------------------------------------

    def choose(self, selection: Selection) -> None:
        """Change what is worked with; adapters are judged anew when the base changed."""
        changed_base = selection.base != self.selection.base
        self.selection = selection
        root = self.backend.root
        self.in_thread("remembering", lambda: remember.save_selection(root, selection), lambda _: None)
        if changed_base:
            self.read_workspace()
        self._tell()

    def choose_adapter(self, label: str, path: str) -> None:
        other = "sft" if label == "pt" else "pt"
        selection = replace(self.selection, **{label: path})
        if path and getattr(selection, other) == path:  # one adapter is not both
            selection = replace(selection, **{other: ""})
        self.choose(selection)

    def show(self, name: str) -> None:
        while len(self.screen_stack) > 1 and isinstance(self.screen, MedScreen):
            self.pop_screen()  # a report lies over the screen it was opened from
        if name != self.current_mode:
            self.switch_mode(name)

    def show_report(self, path: str) -> None:
        """Open the report of the merge in this folder over the current screen."""
        from tui.screens.report import ReportScreen

        if isinstance(self.screen, ReportScreen):
            self.pop_screen()
        self.push_screen(ReportScreen(path))

    def show_merge(self, weights: dict[str, float]) -> None:
        """Go to the merge screen with these weights set."""
        self.show("merge")
        screen = self.screen
        screen.call_after_refresh(screen.set_weights, weights)  # type: ignore[attr-defined]

    def action_show(self, name: str) -> None:
        self.show(name)

    def action_step(self, by: int) -> None:
        names = [name for name, _ in SCREENS]
        self.show(names[(names.index(self.current_mode) + by) % len(names)])

    def action_help(self) -> None:
        from tui.screens.help import HelpScreen

        self.push_screen(HelpScreen(self.screen))

    def action_copy_command(self) -> None:
        screen = self.screen
        action = screen.command() if isinstance(screen, MedScreen) else None
        if action is None or not action.command:
            self.notify("there is nothing to start here yet", timeout=3)
            return
        self.copy_command(action.command)

    def copy_command(self, line: str) -> None:
        """Show a command line; OSC 52 puts it in the clipboard where the terminal allows, a file always."""
        from tui.screens.dialogs import CommandScreen

        self.copy_to_clipboard(line)
        path: Path | None = remember.save_command(line)
        self.push_screen(CommandScreen(line, path))
