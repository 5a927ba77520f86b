"""Home answers: where am I, what is running, what next? A newcomer is led along the way."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from tui import actions, guide
from tui.actions import Action
from tui.parts import job_line, merge_mark, weights_content
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.snapshots import JobFeed, JobRow, Overview
from tui.text import cut, fit, parameters, size
from tui.widgets.sized import SizedStatic

STEP_WORDS = {
    "base": "base", "adapters": "adapters", "merge": "merge", "verify": "verified", "chat": "chat",
    "evaluate": "evaluate",
}  # fmt: skip


LATEST_TALL = 3  # merges shown where there is room


class HomeScreen(MedScreen):
    NAME = "home"
    CSS_PATH = "home.tcss"
    QUESTION = "Home: where am I, what is running, what next?"
    BINDINGS = [
        Binding("enter", "go", "do it"),
        Binding("d", "demo", "make the demo"),
        Binding("r", "report", "report", tooltip="of the latest merge"),
        Binding("u", "reread", "read again", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._step: guide.NextStep | None = None

    def body(self) -> ComposeResult:
        with VerticalScroll(can_focus=False):
            yield Static(id="next")
            yield Static(id="way")
            yield SizedStatic(id="running")
            yield Static(id="latest")
            yield Static(id="here")

    def on_mount(self) -> None:
        self.query_one("#next", Static).update(
            Content.assemble(
                ("Reading the workspace …", "bold"), "\n", (plain(str(self.med.backend.root)), "$faint")
            )
        )

    def show_workspace(self, overview: Overview) -> None:
        self._draw(overview)

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        live = [job for job in jobs if not job.final]
        width = self.size.width - 16
        lines = [job_line(job, width) for job in live[:4]]
        words = Content("\n").join(lines) if lines else Content.styled("nothing", "$faint")
        self._part("running", "Running", words)
        if self.med.overview:
            self._draw(self.med.overview)

    def _draw(self, overview: Overview) -> None:
        selection = self.med.selection
        step = self._step = guide.next_step(overview, selection, self.med.jobs)
        key = "" if step.go == "jobs" else "   ⏎"
        self.query_one("#next", Static).update(
            Content.assemble(
                ("Next\n", "$faint"),
                (step.words, "bold"),
                (key, "bold $primary"),
                "\n",
                (step.reason, "$faint"),
            )
        )
        self._way(overview)
        self._latest(overview)
        self._here(overview)
        self.refresh_bindings()

    def _way(self, overview: Overview) -> None:
        done = guide.done_steps(overview, self.med.selection)
        parts, here = [], True
        for step in guide.STEPS:
            if done[step]:
                parts.append(Content.styled(f"✓ {STEP_WORDS[step]}", "$success"))
            else:
                parts.append(
                    Content.styled(f"{'●' if here else '○'} {STEP_WORDS[step]}", "bold" if here else "$faint")
                )
                here = False
        self.query_one("#way", Static).update(Content.styled("   ", "$faint").join(parts))

    def _latest(self, overview: Overview) -> None:
        if not overview.merges:
            self._part("latest", "Latest", Content.styled("no merge yet", "$faint"))
            return
        shown = overview.merges[: LATEST_TALL if self.size.height >= 30 else 1]
        width = min(40, max(len(row.name) for row in shown))
        lines = [
            Content.assemble(
                (fit(row.name, width), "bold"),
                "   ",
                weights_content(dict(row.weights)),
                "   ",
                merge_mark(row),
            )
            for row in shown
        ]
        lines[0] += Content.assemble("   ", ("r", "bold $primary"), (" report", "$faint"))
        self._part("latest", "Latest", Content("\n").join(lines))

    def _here(self, overview: Overview) -> None:
        selection = self.med.selection
        lines = [Content.styled(cut(str(overview.root), self.size.width - 18), "")]
        base = overview.model(selection.base)
        if base:
            lines.append(
                Content.assemble(
                    ("base      ", "$faint"), cut(base.name, 60),
                    (f"   {base.dtype.lower()} · {parameters(base.parameters)} · {size(base.nbytes)}", "$faint"),
                )
            )  # fmt: skip
        adapters = [Content.assemble(("adapters  ", "$faint"), f"{len(overview.adapters)}")]
        for label, path in selection.labels().items():
            row = overview.adapter(path)
            if row:
                adapters.append(
                    Content.assemble((f"   {label.upper()} ", f"bold ${label}"), (cut(row.name, 24), ""))
                )
        lines.append(Content("").join(adapters))
        verified = sum(1 for row in overview.merges if row.verdict and row.verdict.ok)
        counts = f"{len(overview.merges)} ({verified} verified)" if overview.merges else "0"
        lines.append(
            Content.assemble(
                ("merges    ", "$faint"), counts, ("   gguf ", "$faint"), str(len(overview.ggufs)),
                ("   runs ", "$faint"), str(len(overview.runs)), ("   jobs ", "$faint"), str(len(self.med.jobs)),
                ("   free ", "$faint"), size(overview.free),
            )
        )  # fmt: skip
        lines += [Content.styled(f"! {plain(problem)}", "$warning") for problem in overview.problems]
        self._part("here", "Here", Content("\n").join(lines))

    def _part(self, name: str, title: str, words: Content) -> None:
        self.query_one(f"#{name}", Static).update(Content.assemble((f"{title}\n", "$faint"), words))

    def command(self) -> Action | None:
        if self._step and self._step.go == "demo":
            return actions.demo(self.med.backend.root)
        return None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "demo":
            return bool(self._step and self._step.go == "demo")
        if action == "report":
            return bool(self.med.overview and self.med.overview.merges)
        return True

    def action_go(self) -> None:
        if self._step is None:
            return
        if self._step.go == "demo":
            self.action_demo()
        else:
            self.med.show(self._step.go)

    def action_demo(self) -> None:
        self.med.start_job(actions.demo(self.med.backend.root))

    def action_report(self) -> None:
        if self.med.overview and self.med.overview.merges:
            self.med.show_report(self.med.overview.merges[0].path)

    def action_reread(self) -> None:
        self.med.read_workspace()
