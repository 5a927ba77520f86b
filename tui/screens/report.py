"""The report of one merge: was it done as asked, which weights are really in it, what rounding took, and where.

Opened over any screen with a merge's folder; Esc goes back. What it shows is verification.json beside the merge,
or the newest verification that a job made of it since.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.content import Content
from textual.widgets import Static

from tui import actions
from tui.actions import Action
from tui.parts import fact, job_line, verdict_line, weights_content
from tui.results import verdict
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.snapshots import GgufRow, JobFeed, JobRow, MergeRow, Overview, VerdictView
from tui.text import cut, size
from tui.widgets.sized import SizedScroll
from tui.widgets.verdict import (
    DTYPES,
    findings_content,
    gauges_content,
    loss_content,
    marks_content,
    modules_content,
)

WORST_SHOWN = 10
SPLIT = 200  # columns from which the modules stand beside the numbers


class ReportScreen(MedScreen):
    NAME = "report"
    TAB = "merge"
    CSS_PATH = "report.tcss"
    QUESTION = "Report: is this merge what was asked, and what is really in it?"
    HORIZONTAL_BREAKPOINTS = [*MedScreen.HORIZONTAL_BREAKPOINTS, (SPLIT, "-split")]
    BINDINGS = [
        Binding("v", "verify", "verify again"),
        Binding("a", "all", "all modules"),
        Binding("n", "turn(1)", "next merge"),
        Binding("p", "turn(-1)", "previous merge", show=False),
        Binding("escape", "back", "back"),
    ]

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.whole = False  # every module instead of the worst
        self._kept: VerdictView | None = None
        self._asked_for: tuple[str, float] | None = None  # what `_kept` was read of
        self._made: tuple[str, VerdictView] | None = None  # of the job with this id

    def body(self) -> ComposeResult:
        with SizedScroll(id="scroll"):
            yield Static(id="report")
            yield Static(id="where")

    def on_mount(self) -> None:
        self.query_one("#scroll").focus()

    @property
    def row(self) -> MergeRow | None:
        return self.med.overview.merge(self.path) if self.med.overview else None

    # ---- what there is to show ---------------------------------------------------------------------------

    def show_workspace(self, overview: Overview) -> None:
        row = self.row
        if row is not None and self._asked_for != (row.path, row.created):
            self._asked_for, path = (row.path, row.created), row.path
            self._kept = None
            self.ask("report", lambda: self.med.backend.report(path))
        self._show()

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        self._show()

    def answered(self, question: str, value: Any) -> None:
        self._kept = value
        self._show()

    def _jobs(self) -> list[JobRow]:
        """The verify jobs of this merge, newest first."""
        return [
            job for job in self.med.jobs if job.kind == "verify" and job.params.get("merged") == self.path
        ]

    def _verdict(self) -> tuple[VerdictView | None, JobRow | None]:
        """The newest verdict, and the job it comes from (None: it lies beside the merge)."""
        row = self.row
        for job in self._jobs():
            if job.state == "done" and not job.params.get("manifest") and job.result:
                if row is not None and job.created < row.created:
                    break  # of an earlier merge that had this name
                if self._made is None or self._made[0] != job.id:
                    self._made = (job.id, verdict(job.result))
                return self._made[1], job
        return self._kept or (row.verdict if row else None), None

    def _show(self) -> None:
        row = self.row
        width = max(40, self.query_one("#scroll").content_size.width)
        width = width // 2 - 2 if self.size.width >= SPLIT else width
        if row is None:
            words, where = Content(f"There is no merge at {plain(self.path)} any more."), Content("")
        else:
            said, job = self._verdict()
            parts = [self._head(row, said, width), self._now(row, job, width)]
            parts += self._measured(row, said, width) if said is not None else []
            words = _spaced(parts)
            modules = (
                [self._modules(said, width)] if said is not None and (said.modules or said.worst) else []
            )
            where = _spaced([*modules, self._ggufs(row, width)])
        self.query_one("#report", Static).update(words)
        self.query_one("#where", Static).update(where)
        self.refresh_bindings()

    def _head(self, row: MergeRow, said: VerdictView | None, width: int) -> Content:
        if said is None:
            mark = verdict_line(None) + Content.styled("   v reads every element back and says", "$faint")
        else:
            sign, style, word = {
                True: ("✓", "$success", "verified"),
                False: ("✗", "$error", "not what was asked"),
                None: ("?", "$warning", "could not tell"),
            }[said.ok]
            mark = Content.styled(f"{sign} {word}", f"bold {style}")
        name = Content.assemble((cut(row.name, max(20, width - 30)), "bold"), "   ", mark)
        lines = [name]
        if said is not None and said.message:
            lines += Content(plain(said.message)).wrap(width)
        told = (
            [] if row.method == "linear" else row.parameters
        )  # its only one says that nothing is normalised
        parameters = "".join(f" · {plain(name)} {plain(value)}" for name, value in told)
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created))
        dtype = DTYPES.get(row.dtype, row.dtype.lower())
        what = "one adapter" if row.kind == "adapter" else dtype
        how = (plain(row.method) or "made elsewhere") + parameters
        lines.append(Content.styled(f"{how} · {what} · {size(row.nbytes)} · {made}", "$faint"))
        if row.adapters:
            onto = f" onto {plain(Path(row.base).name)}" if row.base else ""
            names = ", ".join(f"{label.upper()} {Path(path).name}" for label, path in row.adapters)
            lines += Content.styled(f"{plain(names)}{onto}", "$faint").wrap(width)
        if row.weights and (said is None or not said.found):
            lines.append(weights_content(dict(row.weights)))
        if row.rejected:
            lines += Content.styled(
                "The check refused it: it is kept for study under this name, and nothing has the name that was asked.",
                "$warning",
            ).wrap(width)
        if row.error:
            lines += Content.styled(plain(row.error), "$error").wrap(width)
        return Content("\n").join(lines)

    def _now(self, row: MergeRow, source: JobRow | None, width: int) -> Content:
        """The verification that runs, how the last one failed, and what the last check of files said."""
        lines = []
        newest = next(iter(self._jobs()), None)
        if newest is not None and not newest.final:
            lines.append(job_line(newest, width))
        elif newest is not None and newest.state != "done":
            lines += Content.styled(f"✗ verifying {newest.state}: {plain(newest.error)}", "$error").wrap(
                width
            )
            if newest.hint:
                lines += Content.styled(f"→ {plain(newest.hint)}", "$faint").wrap(width)
        files = next(
            (job for job in self._jobs() if job.state == "done" and job.params.get("manifest")), None
        )
        if files is not None:
            right = bool(files.result.get("ok"))
            words = Content.styled("✓ " if right else "✗ ", "$success" if right else "$error")
            lines.append(fact("files", words + Content(plain(str(files.result.get("message", "")))), width))
        if source is not None and source.finished:
            at = time.strftime("%Y-%m-%d %H:%M", time.localtime(source.finished))
            lines.append(Content.styled(f"read back again on {at} (job {plain(source.id)})", "$faint"))
        return Content("\n").join(lines)

    def _measured(self, row: MergeRow, said: VerdictView, width: int) -> list[Content]:
        parts = [findings_content(said, width)]
        if said.found:
            parts.append(marks_content(said, width, self.size.height >= 30))
        elif row.kind == "checkpoint" and row.method not in ("", "linear", "task_arithmetic", "soup"):
            words = f"{plain(row.method)} is not linear in the weights, so there are none to find: "
            parts.append(
                Content("\n").join(
                    Content.styled(words + "every element was computed again and compared.", "$faint").wrap(
                        width
                    )
                )
            )
        below = [gauges_content(said, width), loss_content(said, width)]
        parts.append(Content("\n").join(part for part in below if len(part)))
        return parts

    def _modules(self, said: VerdictView, width: int) -> Content:
        """The worst modules: those with wrong elements; where there are none, those that rounding took most of."""
        count, wrong = len(said.modules), sum(1 for module in said.modules if module.differing)
        worst, title = said.worst, "The modules farthest from what was asked"
        if not wrong:
            title = (
                "The modules that rounding takes most of" if said.found else "The modules that change least"
            )
            worst = tuple(sorted(said.modules, key=lambda m: -m.unchanged / (m.elements or 1)))
        room = max(WORST_SHOWN, self.size.height - 12) if self.size.width >= SPLIT else WORST_SHOWN
        if self.whole:
            title = f"All {count} modules"
        told = (
            f"   {wrong} of {count} have wrong elements"
            if wrong
            else f"   none of {count} has a wrong element"
        )
        shown = said.modules if self.whole else worst[:room]
        table = modules_content(shown, list(said.found), width)
        return Content.assemble((title, "bold"), (told, "$faint"), "\n") + table

    def _ggufs(self, row: MergeRow, width: int) -> Content:
        lines = []
        verdicts = self._gguf_verdicts()
        for file in self._beside(row):
            said = verdicts.get(file.path)
            mark = verdict_line(said) if said else Content.styled("○ not verified here", "$faint")
            name = cut(file.name, max(20, width - 40))
            line = Content.assemble((name, ""), (f"   {size(file.nbytes)}   ", "$faint")) + mark
            lines.append(line if line.cell_length <= width else line.truncate(width, ellipsis=True))
        if not lines:
            return Content("")
        return Content.styled("GGUF files\n", "bold") + Content("\n").join(lines)

    def _beside(self, row: MergeRow) -> list[GgufRow]:
        """Files named after this merge: NAME.gguf, NAME-TYPE.gguf, beside it or in gguf/."""
        named = re.compile(rf"{re.escape(row.name)}(-[a-z0-9_]+)?\.gguf")
        files = self.med.overview.ggufs if self.med.overview else ()
        return [file for file in files if named.fullmatch(file.name)]

    def _gguf_verdicts(self) -> dict[str, VerdictView]:
        """What jobs said of GGUF files, by path."""
        found: dict[str, VerdictView] = {}
        for job in reversed(self.med.jobs):  # the newest last, so that it counts
            made = [job.result] if job.kind == "gguf" else job.result.get("ggufs") or []
            for file in made if isinstance(made, list) else []:
                if isinstance(file, dict) and isinstance(file.get("verdict"), dict):
                    found[str(file.get("out"))] = verdict(file["verdict"])
        return found

    # ---- keys ----------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if not self.is_mounted:
            return True
        if action == "verify":
            return self.row is not None
        if action == "all":
            said = self._verdict()[0]
            return bool(said and len(said.modules) > WORST_SHOWN)
        if action == "turn":
            return bool(self.med.overview and len(self.med.overview.merges) > 1)
        return True

    def command(self) -> Action | None:
        row = self.row
        return (
            verify_action(self.med.backend.root, row, self.med.selection.base, self.med.selection.labels())
            if row
            else None
        )

    def action_verify(self) -> None:
        action = self.command()
        if action is None:
            self.notify(NO_QUESTION, severity="warning")
        else:
            self.med.start_job(action)

    def action_all(self) -> None:
        self.whole = not self.whole
        self._show()

    def action_turn(self, by: int) -> None:
        merges = self.med.overview.merges if self.med.overview else ()
        paths = [row.path for row in merges]
        if self.path in paths:
            self.path = paths[(paths.index(self.path) + by) % len(paths)]
            self._made = None
            self.query_one("#scroll", SizedScroll).scroll_home(animate=False)
            self.tell()

    def action_back(self) -> None:
        self.med.pop_screen()


def _spaced(parts: list[Content]) -> Content:
    """The parts that say something, an empty line between them."""
    return Content("\n\n").join(part for part in parts if len(part))


NO_QUESTION = (
    "it does not say what was asked; choose base and adapters in Adapters (2), and v says what is in there"
)


def verify_action(root: Path, row: MergeRow, base: str, adapters: dict[str, str]) -> Action | None:
    """The check this merge allows: against its manifest; of an adapter its files; else, of a merge made elsewhere,
    which weights of the chosen adapters are in it. None where there is nothing to ask."""
    if row.manifest:
        check = actions.check_files if row.kind == "adapter" else actions.verify
        return check(root, row.path)
    return actions.look_into(root, row.path, base, adapters) if base and adapters else None
