"""Merge answers: what will I get, and did I get it? Weights, cost, the run, and the verdict on the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container, Horizontal
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static

from tui import actions
from tui.actions import Action, Mixture
from tui.parts import fact, job_line, verdict_line, verdict_strip, weights_content
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.snapshots import JobFeed, JobRow, MergeRow, Overview, PlanView
from tui.text import cut, fit, size, weight_name
from tui.widgets.choice import Choice
from tui.widgets.field import Field
from tui.widgets.overlap import overlap_content
from tui.widgets.rows import RowList
from tui.widgets.sized import SizedStatic
from tui.widgets.slider import WeightSlider

METHODS = (("linear", "linear"), ("task_arithmetic", "task arithmetic"))
DTYPES = (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"))
GGUF_TYPES = ("q4_k_m", "q5_k_m", "q8_0", "f16", "bf16")
PLAN_DELAY = 0.25  # seconds after the last change before the plan is made anew


class MergeScreen(MedScreen):
    NAME = "merge"
    CSS_PATH = "merge.tcss"
    QUESTION = "Merge: what will I get, and did I get it?"
    BINDINGS = [
        Binding("m", "merge", "merge"),
        Binding("v", "verify", "verify"),
        Binding("o", "overlap", "overlap"),
        Binding("g", "gguf", "gguf"),
        Binding("n", "name", "name"),
        Binding("up", "app.focus_previous", "previous field", show=False),
        Binding("down", "app.focus_next", "next field", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._plan: PlanView | None = None
        self._plan_error = ""
        self._planned: Mixture | None = None
        self._named = False  # the person typed a name
        self._watched = ""  # the merge or verify job whose end is shown
        self._timer: Timer | None = None

    def body(self) -> ComposeResult:
        for label, value in (("pt", 0.3), ("sft", 0.7)):
            with Horizontal(classes="weight-row"):
                yield WeightSlider(label, value, id=label)
                yield Static(id=f"{label}-name", classes="adapter-name")
        with Container(id="settings"):
            with Horizontal(id="choices"):
                yield Choice("method", METHODS, id="method")
                yield Choice("dtype", DTYPES, id="dtype")
                yield Choice("then gguf", (("", "none"), *((t, t) for t in GGUF_TYPES)), id="then")
            with Horizontal(id="naming"):
                yield Static(Content("name "), classes="label")
                yield Field(id="name")
        yield SizedStatic(id="plan")
        yield Static(id="verdict")
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
        weights = {label: self.query_one(f"#{label}", WeightSlider).value for label in adapters}
        typed = self.query_one("#name", Input).value.strip() if self._named else ""
        name = typed or self._free_name(weights)
        return Mixture(
            selection.base,
            adapters,
            weights,
            out=str(Path(self.med.backend.root) / "merges" / name),
            method=self.query_one("#method", Choice).value,
            dtype=self.query_one("#dtype", Choice).value,
        )

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
        self._rename()
        self._replan()
        self._show_verdict()

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        mine = [job for job in jobs if job.kind in ("merge", "verify")]
        live = next((job for job in mine if not job.final), None)
        if live:
            self._watched = live.id
        self._show_verdict()
        self._show_plan()

    def _show_verdict(self) -> None:
        self.query_one("#verdict", Static).update(self._verdict())
        self.refresh_bindings()

    def _verdict(self) -> Content:
        """The running job, else how the watched one ended, else the verdict of the highlighted merge."""
        job = next((job for job in self.med.jobs if job.id == self._watched), None)
        if job and not job.final:
            return job_line(job, self.size.width - 6)
        if job and job.state != "done":
            hint = Content.styled(f"\n→ {plain(job.hint)}", "$faint") if job.hint else Content("")
            return Content.assemble((f"✗ {job.state}   ", "bold $error"), plain(job.error)) + hint
        if job:
            said = job.result if job.kind == "verify" else job.result.get("verdict")
            if isinstance(said, dict):
                from tui.reading import verdict

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
        mixture = self.mixture
        if mixture is None or mixture == self._planned:
            self._show_plan()
            return
        if self._timer:
            self._timer.stop()
        self._timer = self.set_timer(PLAN_DELAY, self._ask_plan)
        self._show_plan()

    def _ask_plan(self) -> None:
        mixture = self.mixture
        if mixture is None:
            return
        self._planned = mixture
        self.ask("plan", lambda: self.med.backend.plan(mixture))

    def answered(self, question: str, value: Any) -> None:
        self._plan = value
        self._show_plan()

    def refused(self, question: str, message: str, hint: str) -> bool:
        self._plan = PlanView(0, 0, 0, 0, 0, 0, error=message)
        self._show_plan()
        return True

    def _show_plan(self) -> None:
        self.query_one("#plan", Static).update(self._plan_words())

    def _plan_words(self) -> Content:
        mixture, plan = self.mixture, self._plan
        if mixture is None:
            return Content.assemble(
                ("Nothing to merge yet. ", "bold"),
                "Choose a base and a PT and an SFT adapter in Adapters (2).",
            )
        lines = []
        if plan is None:
            lines.append(fact("cost", "…"))
        elif plan.error:
            lines.append(Content.assemble(fact("cost", ""), (plain(plan.error), "$error")))
        else:
            cost = f"reads {size(plan.read)}   writes {size(plan.written)}   free {size(plan.free)}"
            if plan.memory:
                cost += f"   memory {size(plan.memory)}"
            if plan.seconds is not None:
                cost += f"   about {plan.seconds:.0f} s"
            words = Content(cost) if plan.fits else Content.styled(cost + "   not enough room", "$error")
            lines.append(fact("cost", words, self.size.width - 4))
            lines.append(fact("changes", f"{plan.touched} tensors; {plan.copied} copied as they are"))
            lines += [
                Content.assemble(
                    fact("", Content.styled(f"! {plain(warning)}", "$warning"), self.size.width - 4)
                )
                for warning in plan.warnings[:2]
            ]
        lines.append(fact("overlap", self._overlap(mixture)))
        return Content("\n").join(lines)

    def _overlap(self, mixture: Mixture) -> Content:
        if len(mixture.adapters) < 2:
            return Content.styled("needs two adapters", "$faint")
        for job in self.med.jobs:
            if job.kind == "interference" and job.params.get("adapters") == mixture.adapters:
                if job.state == "done":
                    from tui.reading import overlap

                    return overlap_content(overlap(job.result), self.size.width - 14, self.size.height >= 30)
                if not job.final:
                    return Content.styled("measuring …", "$faint")
                return Content.styled(f"✗ {plain(job.error)}   (o tries again)", "$error")
        return Content.styled("not measured yet: o compares the two adapters", "$faint")

    # ---- the person changes something ---------------------------------------------------------------------

    def on_weight_slider_changed(self, event: WeightSlider.Changed) -> None:
        self._watched = ""
        self._rename()
        self._replan()

    def on_choice_changed(self, event: Choice.Changed) -> None:
        self._replan()

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

    def _rename(self) -> None:
        """Name the merge after its weights until the person named it."""
        if self._named:
            return
        labels = self.med.selection.labels()
        weights = {label: self.query_one(f"#{label}", WeightSlider).value for label in labels}
        if weights:
            self.query_one("#name", Input).value = self._free_name(weights)

    def _free_name(self, weights: dict[str, float]) -> str:
        name = weight_name(weights)
        taken = {row.name for row in self.rows.rows}
        return next(
            candidate
            for candidate in (name, *(f"{name}-{i}" for i in range(2, 1000)))
            if candidate not in taken
        )

    # ---- keys ----------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("verify", "gguf") and self.is_mounted:
            return self.rows.current is not None
        return True

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
        gguf = self.query_one("#then", Choice).value
        follow = self._gguf_action(mixture.out, gguf) if gguf else None
        self.med.start_job(actions.merge(self.med.backend.root, mixture), follow=follow)

    def _gguf_action(self, source: str, type_: str) -> Action:
        name = f"{Path(source).name}-{type_}.gguf"
        return actions.gguf(
            self.med.backend.root, source, str(Path(self.med.backend.root) / "gguf" / name), type_
        )

    def action_verify(self) -> None:
        row = self.rows.current
        if row is None:
            return
        if not row.base or not row.adapters:
            self.notify(
                "it has no manifest that says what went in: use medmerge verify with --base and --adapter",
                severity="warning",
            )
            return
        if row.by_tensor:
            self.notify(
                "its weights differ by tensor: it was verified when it was merged; "
                "medmerge verify --manifest checks its files",
                severity="warning",
            )
            return
        mixture = Mixture(row.base, dict(row.adapters), dict(row.weights), out=row.path)
        self.med.start_job(actions.verify(self.med.backend.root, row.path, mixture))

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


def _merge_line(row: MergeRow, width: int) -> Content:
    name = fit(row.name, min(34, max(14, width - 50)))
    facts = f"  {row.method}  {row.dtype.lower()}  {size(row.nbytes)}   "
    if row.error:
        return Content.assemble((name, "$faint"), "  ", (cut(row.error, width - 40), "$error"))
    line = Content.assemble((name, "bold"), "  ") + weights_content(dict(row.weights))
    line += Content.styled(facts, "$faint") + verdict_line(row.verdict)
    return line if line.cell_length <= width else line.truncate(width, ellipsis=True)
