"""Train answers: is it learning? One big plot of loss over steps, and a form that starts the next run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Static

from tui import actions
from tui.actions import Action
from tui.parts import job_line
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.snapshots import AdapterDetail, JobFeed, JobRow, Overview
from tui.text import cut, smooth
from tui.widgets.choice import Choice
from tui.widgets.field import Field
from tui.widgets.plot import PlotPanel, Series
from tui.widgets.sized import SizedStatic

# key of training.config.TrainConfig, words on the form, how to read it
NUMBERS = (
    ("epochs", "epochs", float),
    ("learning_rate", "learning rate", float),
    ("rank", "rank", int),
    ("alpha", "alpha", int),
    ("cutoff", "cutoff tokens", int),
    ("accumulation", "accumulation", int),
    ("max_steps", "max steps (0: all)", int),
)
KINDS = (("pt", "PT: plain text"), ("sft", "SFT: conversations"))
TEMPLATES = ("model", "chatml", "qwen3_nothink", "qwen3", "llama3")
OVERLAID = 4
SMOOTH_FROM = 60  # steps


class TrainScreen(MedScreen):
    NAME = "train"
    CSS_PATH = "train.tcss"
    QUESTION = "Train: is it learning?"
    BINDINGS = [
        Binding("t", "train", "train"),
        Binding("f", "form", "settings"),
        Binding("x", "cancel", "cancel"),
        Binding("r", "resume", "resume"),
        Binding("up", "app.focus_previous", "previous field", show=False),
        Binding("down", "app.focus_next", "next field", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._presets: dict[str, dict[str, Any]] = {}
        self._defaults: dict[str, Any] = {}
        self._curves: dict[str, AdapterDetail] = {}
        self._tests_known = False

    def body(self) -> ComposeResult:
        with Horizontal(id="columns"):
            with VerticalScroll(id="form", can_focus=False):
                yield Choice(
                    "kind",
                    (("pt", "PT: plain text"), ("sft", "SFT: conversations")),
                    id="kind",
                    label_width=20,
                )
                yield Choice("preset", (("", "none"),), id="preset", label_width=20)
                yield Choice("data", (), id="data", label_width=20)
                yield Choice("tests", (("", "none"),), id="tests", label_width=20)
                yield Choice(
                    "template", tuple((name, name) for name in TEMPLATES), id="template", label_width=20
                )
                for key, words, _ in NUMBERS:
                    with Horizontal(classes="field"):
                        yield Static(Content(words), classes="label")
                        yield Field(id=key)
                with Horizontal(classes="field"):
                    yield Static(Content("name"), classes="label")
                    yield Field("my-pt", id="name")
                yield Static(id="base", classes="faint")
            with Vertical(id="right"):
                yield PlotPanel(
                    "loss (smoothed)", "step", "No run yet.  f the settings, t trains.", id="plot"
                )
                yield Static(id="numbers")
                yield SizedStatic(id="running")

    def on_mount(self) -> None:
        self.ask("presets", _read_presets)
        self.query_one("#kind").focus()

    @property
    def kind(self) -> str:
        return self.query_one("#kind", Choice).value

    # ---- showing -----------------------------------------------------------------------------------------

    def answered(self, question: str, value: Any) -> None:
        if question == "presets":
            self._presets, self._defaults = value
            self._fill_presets()
        elif isinstance(value, AdapterDetail):
            self._curves[value.path] = value
            self._draw()

    def _fill_presets(self) -> None:
        mine = [name for name, values in self._presets.items() if values.get("kind") == self.kind]
        mine.sort(key=lambda name: not name.startswith("demo"))
        self.query_one("#preset", Choice).set_options([(name, name) for name in mine])
        self._fill_numbers()

    def _fill_numbers(self) -> None:
        values = {**self._defaults, **self._presets.get(self.query_one("#preset", Choice).value, {})}
        for key, _, _ in NUMBERS:
            self.query_one(f"#{key}", Input).value = f"{values.get(key, '')}"
        self.query_one("#template", Choice).value = str(values.get("template", "model"))

    def show_workspace(self, overview: Overview) -> None:
        files = [file for file in overview.data if file.name.endswith(".jsonl")]
        training = sorted(
            files, key=lambda file: (self.kind not in file.name, "train" not in file.name, file.name)
        )
        self.query_one("#data", Choice).set_options([(file.path, file.name) for file in training])
        tests = [(file.path, file.name) for file in files if "train" not in file.name]
        self.query_one("#tests", Choice).set_options(
            [("*", f"all {len(tests)} others"), ("", "none"), *tests] if tests else [("", "none")],
            value=None if self._tests_known else "*",
        )
        self._tests_known = bool(tests)
        base = overview.model(self.med.selection.base)
        self.query_one("#base", Static).update(
            Content(f"base  {cut(base.name, 30)}") if base else Content("no base chosen: press 2, then b")
        )
        for path in self.med.selection.labels().values():
            if path not in self._curves:
                self._curves[path] = AdapterDetail(path)
                self.ask(f"curve {path}", lambda path=path: self.med.backend.detail(path))  # type: ignore[misc]
        self._draw()

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        mine = self._runs
        self.med.follow(*(job.id for job in mine))
        self._draw()
        live = next((job for job in mine if not job.final), None)
        if live:
            line = job_line(live, self.query_one("#running").size.width or 60)
        elif mine and mine[0].state == "failed":
            hint = f"\n→ {plain(mine[0].hint)}" if mine[0].hint else ""
            line = Content.styled(f"✗ {plain(mine[0].error)}{hint}", "$error")
        else:
            line = Content("")
        self.query_one("#running", Static).update(line)
        self.refresh_bindings()

    @property
    def _runs(self) -> list[JobRow]:
        """The newest training jobs."""
        return [job for job in self.med.jobs if job.kind == "train"][:OVERLAID]

    def _draw(self) -> None:
        series: list[Series] = []
        numbers = Content.styled("", "")
        shown_outputs = set()
        for age, job in enumerate(self._runs):
            feed = self.med.feeds.get(job.id)
            config = job.params.get("config") or {}
            if feed is None or not feed.curves.get("loss"):
                continue
            name = Path(str(config.get("output") or job.params.get("run") or job.title)).name
            shown_outputs.add(str(config.get("output")))
            kind = str(config.get("kind"))
            style = kind if kind in ("pt", "sft") else "primary"
            series += _loss_series(name, feed.curves["loss"], style, age > 0)
            if feed.curves.get("eval_loss"):
                series.append(
                    Series(
                        "held out", feed.curves["eval_loss"], style, age > 0, "●", line=False, named=age == 0
                    )
                )
            if not len(numbers):
                numbers = _strip(feed, job)
        for label, path in self.med.selection.labels().items():
            detail = self._curves.get(path)
            if detail and detail.curve and path not in shown_outputs:
                series += _loss_series(Path(path).name, detail.curve, label, bool(self._runs))
        self.query_one("#plot", PlotPanel).show(series)
        self.query_one("#numbers", Static).update(numbers)

    # ---- the form ------------------------------------------------------------------------------------------

    def on_choice_changed(self, event: Choice.Changed) -> None:
        if event.choice.id == "kind":
            self._fill_presets()
            name = self.query_one("#name", Input)
            if name.value in ("my-pt", "my-sft"):
                name.value = f"my-{self.kind}"
            if self.med.overview:
                data = self.query_one("#data", Choice)
                data.value = ""
                self.show_workspace(self.med.overview)
        elif event.choice.id == "preset":
            self._fill_numbers()

    def config(self) -> dict[str, Any] | str:
        """The run's settings as the form says, or why they make none."""
        selection = self.med.selection
        if not selection.base:
            return "choose a base first: press 2, then b"
        data = self.query_one("#data", Choice).value
        if not data:
            return "there is no data file: put .jsonl files into data/"
        name = self.query_one("#name", Input).value.strip()
        if not name or "/" in name or name.startswith("."):
            return "give the adapter a plain name"
        tests = self.query_one("#tests", Choice)
        if tests.value == "*":
            chosen = [value for value, _ in tests.options if value not in ("*", "")]
        else:
            chosen = [tests.value] if tests.value else []
        root = Path(self.med.backend.root)
        config: dict[str, Any] = {
            "kind": self.kind,
            "preset": self.query_one("#preset", Choice).value,
            "base": selection.base,
            "data": [data],
            "tests": [path for path in chosen if path != data],
            "template": self.query_one("#template", Choice).value,
            "output": str(root / "adapters" / name),
        }
        for key, words, kind in NUMBERS:
            text = self.query_one(f"#{key}", Input).value.strip()
            try:
                config[key] = kind(text)
            except ValueError:
                return f"{words} should be a number, and is {text!r}"
        return config

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if not self.is_mounted:
            return True
        if action == "cancel":
            return any(not job.final for job in self._runs)
        if action == "resume":
            return self._stopped() is not None
        return True

    def _stopped(self) -> JobRow | None:
        """The newest run, if it stopped before its end."""
        newest = next(iter(self._runs), None)
        return (
            newest
            if newest and newest.state in ("cancelled", "lost", "failed") and newest.params.get("run")
            else None
        )

    def command(self) -> Action | None:
        """The training as set, with its config file written: the line works as it stands."""
        config = self.config()
        if isinstance(config, str):
            return None
        actions.write_config(self.med.backend.root, config)
        return actions.train(self.med.backend.root, config)

    def action_train(self) -> None:
        config = self.config()
        if isinstance(config, str):
            self.notify(config, severity="warning", markup=False)
            return
        name = Path(config["output"]).name
        overview = self.med.overview
        if overview and any(row.name == name for row in overview.adapters):
            self.notify(
                f"an adapter named {name} is there already; results are never overwritten",
                severity="warning",
                markup=False,
            )
            self.query_one("#name").focus()
            return
        self.med.start_job(
            actions.train(self.med.backend.root, config),
            prepare=lambda: actions.write_config(self.med.backend.root, config),
        )

    def action_resume(self) -> None:
        job = self._stopped()
        if job:
            self.med.start_job(actions.resume(self.med.backend.root, job.params))

    def action_cancel(self) -> None:
        from tui.screens.dialogs import ConfirmScreen

        job = next((job for job in self._runs if not job.final), None)
        if job is None:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.med.cancel_job(job)

        self.app.push_screen(
            ConfirmScreen(f"Stop “{job.title}”?", "Its checkpoints stay; r goes on from the last one."),
            answered,
        )

    def action_form(self) -> None:
        form = self.query_one("#form")
        if self.has_class("-narrow"):
            self.toggle_class("form-open")
        if form.display:
            self.query_one("#kind").focus()


def _loss_series(name: str, points: tuple[tuple[float, float], ...], style: str, old: bool) -> list[Series]:
    """A loss as one curve; a noisy one (many steps) as its moving average, with the steps faint behind it."""
    if len(points) < SMOOTH_FROM:
        return [Series(name, points, style, old)]
    mean = Series(name, smooth(points), style, old)
    return [mean] if old else [mean, Series(name, points, style, faded=True, named=False)]


def _read_presets() -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    import dataclasses

    from training.config import PRESETS, TrainConfig

    defaults = {
        item.name: item.default
        for item in dataclasses.fields(TrainConfig)
        if item.default is not dataclasses.MISSING
    }
    return dict(PRESETS), defaults


def _strip(feed: JobFeed, job: JobRow) -> Content:
    """The strip of numbers of the newest run."""
    latest = feed.latest
    parts = [
        Content.assemble((f"{words} ", "$faint"), (f"{latest[key]:{form}}", "bold"))
        for key, words, form in (
            ("loss", "loss", ".3f"),
            ("eval_loss", "held out", ".3f"),
            ("lr", "lr", ".2e"),
            ("grad_norm", "grad", ".2f"),
            ("tok_s", "tok/s", ",.0f"),
            ("tokens", "tokens", ",.0f"),
        )
        if key in latest
    ]
    return Content("   ").join(parts)
