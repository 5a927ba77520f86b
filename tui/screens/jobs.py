"""Jobs answers: what is running, how far is it, and what did it say?"""

from __future__ import annotations

import time
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import OptionList, Static

from tui.actions import Action
from tui.parts import STATE_MARKS, job_line
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.dialogs import ConfirmScreen
from tui.snapshots import JobFeed, JobRow
from tui.text import duration, quantity, sparkline
from tui.widgets.rows import RowList

SCREEN_OF = {
    "merge": "merge", "verify": "merge", "gguf": "chat", "live": "chat", "train": "train", "eval": "evaluate",
    "sweep": "evaluate", "demo": "home",
}  # fmt: skip
EMPTY = """\
No jobs yet.

Merging, training and evaluating run as jobs: they go on when you quit, and are here when you come back."""


class JobsScreen(MedScreen):
    NAME = "jobs"
    CSS_PATH = "jobs.tcss"
    QUESTION = "Jobs: what is running, how far is it, and what did it say?"
    BINDINGS = [
        Binding("o", "open", "open its screen", tooltip="or enter"),
        Binding("x", "cancel", "cancel"),
        Binding("l", "log", "whole log"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._log = ("", "")  # job id, its process's own output

    def body(self) -> ComposeResult:
        yield RowList[JobRow](job_line, lambda job: job.id, Content(EMPTY), id="list")
        with VerticalScroll(id="detail-scroll", can_focus=True):
            yield Static(id="detail")

    def on_mount(self) -> None:
        self.rows.focus()

    @property
    def rows(self) -> RowList[JobRow]:
        return self.query_one("#list", RowList)

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        self.rows.show(jobs)
        self._show_detail()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self._show_detail()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.action_open()

    def _show_detail(self) -> None:
        job = self.rows.current
        if job is None:
            self.query_one("#detail", Static).update(Content(""))
            return
        self.med.follow(job.id)
        self.query_one("#detail", Static).update(self._detail(job, self.med.feeds.get(job.id)))
        self.refresh_bindings()

    def _detail(self, job: JobRow, feed: JobFeed | None) -> Content:
        mark, style = STATE_MARKS.get(job.state, ("?", "$faint"))
        lines = [
            Content.assemble(
                (plain(job.title), "bold"), "   ", (f"{mark} {job.state}", style), "   ", (job.id, "$faint")
            )
        ]
        facts = []
        if job.started and (job.finished or not job.final):
            end = job.finished or time.time()
            facts.append(f"{'took' if job.final else 'for'} {duration(end - job.started)}")
        if job.rate and not job.final:
            facts.append(f"{quantity(job.rate, job.unit)}/s")
        if job.eta_s is not None and not job.final:
            facts.append(f"{duration(job.eta_s)} left")
        if facts:
            lines.append(Content.styled(plain(" · ".join(facts)), "$faint"))
        if job.error:
            lines += [Content(""), Content.styled(plain(job.error, lines=True), "$error")]
            if job.hint:
                lines.append(Content.styled(f"→ {plain(job.hint)}", "$faint"))
        if feed and feed.curves.get("loss"):
            values = [value for _, value in feed.curves["loss"]]
            lines += [
                Content(""),
                Content.assemble(
                    ("loss  ", "$faint"),
                    (sparkline(values, 60, from_zero=False), "$primary"),
                    f"  {values[-1]:.3f}",
                ),
            ]
        if feed and feed.log:
            lines += [Content(""), *(_log_line(text) for text in feed.log[-30:])]
        if job.command:
            lines += [Content(""), Content.styled(plain(job.command), "$faint")]
        return Content("\n").join(lines)

    def answered(self, question: str, value: Any) -> None:
        from tui.screens.dialogs import TextScreen

        job_id, text = value
        words = plain(text, lines=True) or "It has printed nothing."
        self.app.push_screen(TextScreen(f"log of {job_id}", [Content(words)]))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "cancel" and self.is_mounted:
            job = self.rows.current
            return bool(job and not job.final)
        return True

    def action_open(self) -> None:
        job = self.rows.current
        if job:
            self.med.show(SCREEN_OF.get(job.kind, "home"))

    def action_cancel(self) -> None:
        job = self.rows.current
        if job is None or job.final:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.med.cancel_job(job)

        self.app.push_screen(
            ConfirmScreen(
                f"Cancel “{plain(job.title)}”?",
                "It stops and cleans up after itself. Training keeps its checkpoints, a sweep the rows it has.",
            ),
            answered,
        )

    def action_log(self) -> None:
        job = self.rows.current
        if job:
            job_id = job.id
            self.ask("log", lambda: (job_id, self.med.backend.log_tail(job_id)))

    def command(self) -> Action | None:
        job = self.rows.current
        return Action(job.kind, "", command=job.command) if job else None


def _log_line(text: str) -> Content:
    style = "$warning" if text.startswith("! ") else "$error" if text.startswith("✗ ") else ""
    return Content.styled(plain(text), style) if style else Content(plain(text))
