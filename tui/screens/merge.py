"""Merge answers: what will I get, and did I get it? Weights, cost, the run, and the verdict on the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static

from tui import actions
from tui.actions import Action, Mixture
from tui.parts import FACT_WIDTH, fact, job_line, merge_mark, verdict_line, verdict_strip, weights_content
from tui.results import overlap, verdict
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.report import NO_QUESTION, verify_action
from tui.snapshots import JobFeed, JobRow, MergeRow, Overview, PlanView
from tui.text import cut, fit, size, weight_name
from tui.widgets.cost import FINER, plan_content
from tui.widgets.method import GGUF_TYPES, MethodSettings
from tui.widgets.overlap import overlap_content
from tui.widgets.rows import RowList
from tui.widgets.sized import SizedStatic
from tui.widgets.slider import WeightSlider
from tui.widgets.verdict import DTYPES

PLAN_DELAY = 0.25  # seconds after the last change before headers are read anew
FORECAST_DELAY = 1.0  # and before a child process tries the disk and samples the rounding
FORECASTS_KEPT = 64


class MergeScreen(MedScreen):
    NAME = "merge"
    CSS_PATH = "merge.tcss"
    HORIZONTAL_BREAKPOINTS = [*MedScreen.HORIZONTAL_BREAKPOINTS, (200, "-split")]
    QUESTION = "Merge: what will I get, and did I get it?"
    BINDINGS = [
        Binding("m", "merge", "merge"),
        Binding("r", "report", "report"),
        Binding("f", "finer", "finer dtype"),
        Binding("v", "verify", "verify"),
        Binding("o", "overlap", "overlap"),
        Binding("g", "gguf", "gguf"),
        Binding("n", "name", "name", show=False),
        Binding("up", "app.focus_previous", "previous field", show=False),
        Binding("down", "app.focus_next", "next field", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._plan: PlanView | None = None
        self._planned: Mixture | None = None
        self._forecasts: dict[str, PlanView] = {}  # by recipe
        self._named = False  # the person typed a name
        self._watched = ""  # the merge or verify job whose end is shown
        self._shown_of = ""  # the watched job whose merge was highlighted in the list
        self._plan_timers: list[Timer] = []
        self._linear_weights: dict[str, float] = {}  # what to go back to from slerp

    def body(self) -> ComposeResult:
        with Vertical(id="asked"):
            for label, value in (("pt", 0.3), ("sft", 0.7)):
                with Horizontal(classes="weight-row"):
                    yield WeightSlider(label, value, id=label)
                    yield Static(id=f"{label}-name", classes="adapter-name")
            yield MethodSettings(id="settings")
            yield SizedStatic(id="plan")
        with Vertical(id="done"):
            yield SizedStatic(id="verdict")
            yield Static(Content("Merges"), classes="heading")
            yield RowList[MergeRow](_merge_line, lambda row: row.path, Content("none yet"), id="list")

    def on_mount(self) -> None:
        self.query_one("#pt").focus()

    @property
    def rows(self) -> RowList[MergeRow]:
        return self.query_one("#list", RowList)

    @property
    def mixture(self) -> Mixture | None:
        """What is set on screen; None while base or adapters are missing."""
        selection = self.med.selection
        adapters = selection.labels()
        if not selection.base or not adapters:
            return None
        settings = self.settings
        weights = self._weights()
        typed = self.query_one("#name", Input).value.strip() if self._named else ""
        name = typed or self._free_name(weights)
        folder = "adapters" if settings.kind == "adapter" else "merges"
        return Mixture(
            selection.base,
            adapters,
            weights,
            out=str(Path(self.med.backend.root) / folder / name),
            method=settings.method,
            dtype=settings.dtype,
            parameters=settings.parameters,
            kind=settings.kind,
            gguf=settings.gguf,
        )

    @property
    def settings(self) -> MethodSettings:
        return self.query_one("#settings", MethodSettings)

    def _weights(self) -> dict[str, float]:
        labels = self.med.selection.labels()
        return {label: self.query_one(f"#{label}", WeightSlider).value for label in labels}

    # ---- showing -----------------------------------------------------------------------------------------

    def show_workspace(self, overview: Overview) -> None:
        for label in ("pt", "sft"):
            row = overview.adapter(getattr(self.med.selection, label))
            words = (
                Content.styled(cut(row.name, 40), f"${label}")
                if row
                else Content.styled("none: choose in Adapters (2)", "$faint")
            )
            self.query_one(f"#{label}-name", Static).update(words)
            self.query_one(f"#{label}", WeightSlider).disabled = row is None
        self.rows.show(overview.merges)
        self._highlight_result()
        self._rename()
        self._replan()
        self._show_verdict()

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        mine = [job for job in jobs if job.kind in ("merge", "verify")]
        live = next((job for job in mine if not job.final), None)
        if live:
            self._watched = live.id
        self._highlight_result()
        self._show_verdict()
        self._show_plan()

    def _highlight_result(self) -> None:
        """Once the watched merge is on disk, the list stands on it: r, v and g mean that one."""
        job = next((job for job in self.med.jobs if job.id == self._watched), None)
        if job is None or job.state != "done" or job.kind != "merge" or self._shown_of == job.id:
            return
        out = str(job.result.get("out") or "")
        if any(row.path == out for row in self.rows.rows):
            self._shown_of = job.id
            self.rows.choose(out)

    def _show_verdict(self) -> None:
        self.query_one("#verdict", Static).update(self._verdict())
        self.refresh_bindings()

    def _verdict(self) -> Content:
        """The running job, else how the watched one ended, else the verdict of the highlighted merge."""
        job = next((job for job in self.med.jobs if job.id == self._watched), None)
        if job and not job.final:
            return job_line(job, self.query_one("#verdict").content_size.width)
        if job and job.state != "done":
            hint = Content.styled(f"\n→ {plain(job.hint)}", "$faint") if job.hint else Content("")
            return Content.assemble((f"✗ {job.state}   ", "bold $error"), plain(job.error)) + hint
        if job:
            said = job.result if job.kind == "verify" else job.result.get("verdict")
            if isinstance(said, dict):
                name = Path(str(job.result.get("out") or job.params.get("merged") or "")).name
                return Content.assemble((cut(name, 40), "bold"), "  ") + verdict_strip(verdict(said))
        row = self.rows.current
        if row is None:
            return Content.styled(
                "Set the weights with ← and →, then press m. The result is verified before it is kept.",
                "$faint",
            )
        head = Content.assemble((cut(row.name, 40), "bold"), "  ")
        return head + (
            verdict_strip(row.verdict) if row.verdict else verdict_line(None) + Content("   v verifies it")
        )

    def _replan(self) -> None:
        """Plan anew once the person rests: headers at once, the child process after a second."""
        mixture = self.mixture
        if mixture is None or mixture == self._planned:
            self._show_plan()
            return
        for timer in self._plan_timers:
            timer.stop()
        self._plan_timers = [
            self.set_timer(PLAN_DELAY, self._ask_plan),
            self.set_timer(FORECAST_DELAY, self._ask_forecast),
        ]
        self._show_plan()

    def _ask_plan(self) -> None:
        mixture = self.mixture
        if mixture is None:
            return
        self._planned = mixture
        self.ask("plan", lambda: self.med.backend.plan(mixture))

    def _ask_forecast(self) -> None:
        mixture = self.mixture
        if mixture is None or mixture.kind == "adapter" or _key(mixture) in self._forecasts:
            return
        if self._plan is not None and self._plan.error:
            return  # the headers refuse it already
        key = _key(mixture)
        self.ask("forecast", lambda: (key, self.med.backend.forecast(mixture)))

    def answered(self, question: str, value: Any) -> None:
        if question == "plan":
            self._plan = value
        elif question == "forecast":
            while len(self._forecasts) >= FORECASTS_KEPT:
                self._forecasts.pop(next(iter(self._forecasts)))
            key, self._forecasts[key] = value[0], value[1]
        self._show_plan()

    def refused(self, question: str, message: str, hint: str) -> bool:
        self._plan = PlanView(0, 0, 0, 0, 0, 0, error=message)
        self._show_plan()
        return True

    def _known_plan(self, mixture: Mixture) -> PlanView | None:
        """The newest plan: measured, where this very recipe was; free disk is always the newest."""
        measured = self._forecasts.get(_key(mixture))
        if measured is None or self._plan is None or self._plan.error:
            return self._plan
        return replace(measured, free=self._plan.free)

    def _show_plan(self) -> None:
        self.query_one("#plan", Static).update(self._plan_words())
        self.refresh_bindings()

    def _plan_words(self) -> Content:
        mixture = self.mixture
        if mixture is None:
            return Content.assemble(
                ("Nothing to merge yet. ", "bold"),
                "Choose a base and a PT and an SFT adapter in Adapters (2).",
            )
        tall, width = self.size.height >= 30, max(40, self.query_one("#plan").content_size.width)
        words = plan_content(self._known_plan(mixture), mixture.weights, width, tall)
        if mixture.kind == "adapter":
            told = (
                "one adapter, ranks side by side, float32, into adapters/: exact, no model's dtype rounds it"
            )
            words = Content("\n").join([words, fact("output", told, width)])
        return Content("\n").join([words, fact("overlap", self._overlap(mixture, width))])

    def _overlap(self, mixture: Mixture, width: int) -> Content:
        if len(mixture.adapters) < 2:
            return Content.styled("needs two adapters", "$faint")
        for job in self.med.jobs:
            if job.kind == "interference" and job.params.get("adapters") == mixture.adapters:
                if job.state == "done":
                    return overlap_content(overlap(job.result), width - FACT_WIDTH)
                if not job.final:
                    return Content.styled("measuring …", "$faint")
                return Content.styled(f"✗ {plain(job.error)}   (o tries again)", "$error")
        return Content.styled("not measured yet: o compares the two adapters", "$faint")

    # ---- the person changes something ---------------------------------------------------------------------

    def on_weight_slider_changed(self, event: WeightSlider.Changed) -> None:
        self._watched = ""
        self._rename()
        self._replan()

    def on_method_settings_changed(self, event: MethodSettings.Changed) -> None:
        if event.method:
            self._weights_for(event.settings.method)
        self._rename()
        self._replan()

    def _weights_for(self, method: str) -> None:
        """slerp goes from the one adapted model to the other, each at its full weight; t says how far."""
        if method == "slerp" and not self._linear_weights:
            self._linear_weights = self._weights()
            self.set_weights(dict.fromkeys(self._linear_weights, 1.0))
        elif method != "slerp" and self._linear_weights:
            self.set_weights(self._linear_weights)
            self._linear_weights = {}

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.has_focus:
            self._named = bool(event.value.strip())
        self._replan()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.query_one("#pt").focus()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        if event.option_list.has_focus:
            self._watched = ""
        self._show_verdict()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if event.option_list is self.rows:
            self.action_report()

    def _rename(self) -> None:
        """Name the merge after its weights and method until the person named it."""
        if self._named:
            return
        weights = self._weights()
        if weights:
            self.query_one("#name", Input).value = self._free_name(weights)

    def _free_name(self, weights: dict[str, float]) -> str:
        """pt30-sft70, pt100-sft100-slerp50, pt30-sft70-dare_ties50-seed7-fp16; with -2 where that is taken."""
        settings = self.settings
        name = weight_name(weights)
        if settings.method != "linear":
            values = settings.parameters
            name += f"-{settings.method}" + "".join(
                f"{value * 100:.0f}" for key, value in values.items() if key != "seed"
            )
            name += f"-seed{values['seed']}" if values.get("seed") else ""
        if settings.kind == "adapter":
            name += "-adapter"
        elif settings.dtype != "bfloat16":
            name += f"-{DTYPES[settings.dtype]}"
        taken = {row.name for row in self.rows.rows}
        return next(
            candidate
            for candidate in (name, *(f"{name}-{i}" for i in range(2, 1000)))
            if candidate not in taken
        )

    # ---- keys ----------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if not self.is_mounted:
            return True
        row = self.rows.current
        if action in ("verify", "report"):
            return row is not None
        if action == "gguf":
            return row is not None and row.kind == "checkpoint" and not row.rejected
        if action == "finer":
            return self._finer() is not None
        return True

    def _finer(self) -> str | None:
        """The dtype that is offered: the plan says that rounding takes too much of an adapter."""
        mixture = self.mixture
        plan = self._known_plan(mixture) if mixture else None
        return FINER.get(plan.dtype) if plan and plan.too_coarse else None

    def command(self) -> Action | None:
        mixture = self.mixture
        return actions.merge(self.med.backend.root, mixture) if mixture else None

    def action_merge(self) -> None:
        mixture = self.mixture
        if mixture is None:
            self.notify("choose a base and adapters first: press 2", severity="warning")
            return
        if Path(mixture.out).name in {row.name for row in self.rows.rows}:
            self.notify(
                "a merge of this name is there already; results are never overwritten: n changes the name",
                severity="warning",
            )
            return
        self._named = False
        self.med.start_job(actions.merge(self.med.backend.root, mixture))

    def _gguf_action(self, source: str, type_: str) -> Action:
        name = f"{Path(source).name}-{type_}.gguf"
        return actions.gguf(
            self.med.backend.root, source, str(Path(self.med.backend.root) / "gguf" / name), type_
        )

    def action_report(self) -> None:
        if self.rows.current is not None:
            self.med.show_report(self.rows.current.path)

    def action_finer(self) -> None:
        dtype = self._finer()
        if dtype:
            self.settings.dtype = dtype

    def action_verify(self) -> None:
        row, chosen = self.rows.current, self.med.selection
        if row is None:
            return
        action = verify_action(self.med.backend.root, row, chosen.base, chosen.labels())
        if action is None:
            self.notify(NO_QUESTION, severity="warning")
        else:
            self.med.start_job(action)

    def action_overlap(self) -> None:
        mixture = self.mixture
        if mixture and len(mixture.adapters) > 1:
            self.med.start_job(actions.interference(self.med.backend.root, mixture))

    def action_gguf(self) -> None:
        from tui.screens.dialogs import PickScreen

        row = self.rows.current
        if row is None:
            return

        def picked(type_: str | None) -> None:
            if type_:
                self.med.start_job(self._gguf_action(row.path, type_))

        choices = [(type_, type_) for type_ in GGUF_TYPES]
        self.app.push_screen(PickScreen(f"GGUF of {row.name}", choices, "q4_k_m"), picked)

    def action_name(self) -> None:
        self.query_one("#name").focus()

    def set_weights(self, weights: dict[str, float]) -> None:
        """Take over a mixture from another screen."""
        for label, value in weights.items():
            self.query_one(f"#{label}", WeightSlider).put(value)


def _key(mixture: Mixture) -> str:
    """What a forecast depends on: everything but the name and what is made after the merge."""
    return repr(replace(mixture, out="", gguf=()).recipe())


def _merge_line(row: MergeRow, width: int) -> Content:
    wide = width >= 100  # then in columns, and with the size
    name = fit(row.name, min(34, max(14, width - (50 if wide else 52))))
    if row.error:
        return Content.assemble((name, "$faint"), "  ", (cut(row.error, width - 40), "$error"))
    what = "adapter" if row.kind == "adapter" else DTYPES.get(row.dtype, row.dtype.lower())
    facts = [fit(row.method, 15), fit(what, 7), fit(size(row.nbytes), 8)] if wide else [row.method, what]
    line = Content.assemble((name, "bold"), "  ") + weights_content(dict(row.weights))
    line += Content.styled(plain(f"  {'  '.join(facts)}  "), "$faint") + merge_mark(row)
    return line if line.cell_length <= width else line.truncate(width, ellipsis=True)
