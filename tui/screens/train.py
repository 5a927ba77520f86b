"""Train answers: is it learning? One big plot of loss over steps, the runs behind it, and a form that starts the next.

The form is in `train_form.py`, what is drawn of runs and audits in `train_parts.py`, how runs on disk and jobs become
one list in `tui/training_runs.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import OptionList, Static

from tui import actions, remember
from tui.actions import Action
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.dialogs import ConfirmScreen, TextScreen
from tui.screens.train_form import TrainForm, read_presets
from tui.screens.train_parts import audit_words, leak_page, run_line, runs_header, status, strip
from tui.snapshots import JobFeed, JobRow, Overview, Points, PreviewView, TrainRun
from tui.text import smooth
from tui.training_runs import AuditView, RunView, audit_of, give_colours, views
from tui.widgets.plot import PlotPanel, Series, resting_end
from tui.widgets.rows import RowList
from tui.widgets.samples import SamplePreview
from tui.widgets.sized import SizedStatic, WidthChanged

OVERLAID = 4  # runs in the plot before the person chooses
SMOOTHING = {"off": 0.0, "light": 0.8, "strong": 0.96}  # how much of the mean before stays with every point


class RunList(RowList[RunView]):
    """The runs. `touched`: the person moved in it; before that it follows the newest one."""

    touched = False

    def action_cursor_up(self) -> None:
        self.touched = True
        super().action_cursor_up()

    def action_cursor_down(self) -> None:
        self.touched = True
        super().action_cursor_down()

    def on_click(self) -> None:
        self.touched = True

    def on_resize(self, event: events.Resize) -> None:
        super().on_resize(event)
        self.post_message(WidthChanged())  # the header above is made for the same width


class TrainScreen(MedScreen):
    NAME = "train"
    CSS_PATH = "train.tcss"
    QUESTION = "Train: is it learning?"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide"), (160, "-huge")]
    BINDINGS = [
        Binding("t", "train", "train"),
        Binding("x", "cancel", "stop"),
        Binding("r", "resume", "resume"),
        Binding("f", "form", "settings"),
        Binding("p", "preview", "preview"),
        Binding("u", "audit", "audit"),
        Binding("space", "overlay", "run in the plot or not", key_display="space", show=False),
        Binding("l", "log", "log axis"),
        Binding("s", "smooth", "smoothing"),
        Binding("v", "leaks", "leaks found", show=False),
        Binding("up", "app.focus_previous", "previous field", show=False),
        Binding("down", "app.focus_next", "next field", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._on_disk: tuple[TrainRun, ...] = ()
        self._read_for: object = None  # the overview for which runs were read last
        self._read_once = False  # colours go by the order of all runs: none is given before they are known
        self._colours: dict[str, str] = {}
        self._overlay: dict[str, bool] = {}
        self._smoothed: dict[str, tuple[Points, float, Points]] = {}
        self._wanted = ""  # the run to select once it is in the list
        self._log = False
        self._smoothing = "light"
        self._audit = AuditView()
        self._previewed: dict[str, Any] | None = None
        self._keep: dict[str, Any] = {}

    def body(self) -> ComposeResult:
        with Horizontal(id="columns"):
            with Vertical(id="side"):
                yield TrainForm(id="form")
                yield Static(id="about")
                yield SizedStatic(id="audit")
            with Vertical(id="main"):
                yield PlotPanel("loss", "step", id="plot")
                yield SizedStatic(id="numbers")
                yield Static(id="status")
                yield Static(id="runs-head")
                yield RunList(self._run_line, lambda run: run.key, id="runs")
            yield SamplePreview(id="preview")

    def on_mount(self) -> None:
        self._show_about()
        root = self.med.backend.root
        self.ask("presets", read_presets)
        self.ask("notes", lambda: remember.notes(root, "train"))
        self.run_list.focus()

    @property
    def form(self) -> TrainForm:
        return self.query_one("#form", TrainForm)

    @property
    def run_list(self) -> RunList:
        return self.query_one("#runs", RunList)

    @property
    def runs(self) -> tuple[RunView, ...]:
        """All runs there are, newest first."""
        return self.run_list.rows

    @property
    def selected(self) -> RunView | None:
        return self.run_list.current

    # ---- what comes in -------------------------------------------------------------------------------------

    def answered(self, question: str, value: Any) -> None:
        if question == "presets":
            self.form.fill(*value)
            self._show_audit()
        elif question == "notes":
            self._recall(value)
        elif question == "runs":
            self._on_disk, self._read_once = value, True
            self._draw()
        elif question == "preview":
            kind, view = value
            assert isinstance(view, PreviewView)
            self.query_one(SamplePreview).show_preview(view, kind)

    def refused(self, question: str, message: str, hint: str) -> bool:
        if question == "runs":
            self._read_once = True
            self._draw()
        if question != "preview":
            return False
        self.query_one(SamplePreview).show_error(message, hint)
        return True

    def _recall(self, notes: dict[str, Any]) -> None:
        """Go on where the last start of the app left the screen."""
        self._log = notes.get("log") is True
        if notes.get("smoothing") in SMOOTHING:
            self._smoothing = notes["smoothing"]
        for key, shown in (notes.get("overlay") or {}).items():
            self._overlay.setdefault(str(key), bool(shown))
        if isinstance(notes.get("form"), dict):
            self.form.remember(notes["form"])
        self._draw()

    def show_workspace(self, overview: Overview) -> None:
        self.form.show_workspace(overview, self.med.selection.base)
        self._read_runs(overview)
        self.query_one(SamplePreview).redraw()
        self._draw()

    def _read_runs(self, overview: Overview) -> None:
        if overview is not self._read_for:
            self._read_for = overview
            self.ask("runs", self.med.backend.train_runs)

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        on_disk = {run.path for run in self._on_disk if run.curves}
        told = [job for job in jobs if job.kind == "train" and str(job.params.get("run")) not in on_disk]
        self.med.follow(*(job.id for job in told))
        self._draw()

    # ---- showing -------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        runs = views(self._on_disk, self.med.jobs, self.med.feeds) if self._read_once else ()
        give_colours(self._colours, runs)
        for run in reversed(runs):  # a new run is in the plot; of those from before, the newest few
            if run.key not in self._overlay and run.curves:
                newest = [one.key for one in runs if one.curves][:OVERLAID]
                self._overlay[run.key] = run.live or run.key in newest
        self.run_list.show(runs)
        self._select(runs)
        self.run_list.display = self.query_one("#runs-head").display = bool(runs)
        self._draw_selected()
        self._show_audit()

    def _select(self, runs: tuple[RunView, ...]) -> None:
        """Select the run that was just started; before the person chooses one, that which runs, or the newest."""
        if self._wanted and any(run.key == self._wanted for run in runs):
            self.run_list.choose(self._wanted)
            self._wanted = ""
        elif runs and not self.run_list.touched:
            self.run_list.choose(next((run.key for run in runs if run.live), runs[0].key))

    def _draw_selected(self) -> None:
        run = self.selected
        width = self.query_one("#numbers").size.width or 70
        self.query_one("#numbers", Static).update(strip(run, width))
        self.query_one("#status", Static).update(status(run, width))
        self.query_one("#runs-head", Static).update(runs_header(self.run_list.room))
        self._draw_plot()
        self.refresh_bindings()

    def _draw_plot(self) -> None:
        plot = self.query_one("#plot", PlotPanel)
        selected = self.selected
        shown = [run for run in self.runs if self._overlay.get(run.key) and run is not selected]
        shown = [*([selected] if selected else []), *shown]
        series = [one for run in shown for one in self._series(run, run is selected)]
        limits = None
        if (
            selected and selected.live and selected.curves
        ):  # its steps are looked at: others as far as those go
            limits = (0.0, resting_end(selected.step, selected.total))
            series = [replace(one, points=_until(one.points, limits[1])) for one in series]
        smoothed = {"light": "smoothed", "strong": "strongly smoothed"}.get(self._smoothing, "")
        note = ", ".join(filter(None, ("log axis" if self._log else "", smoothed)))
        plot.say_when_empty(self._empty())
        plot.show(series, note=note, x_limits=limits, log=self._log)

    def _series(self, run: RunView, on_top: bool) -> list[Series]:
        """The run's loss and, as points, its held-out loss; with smoothing the steps of the selected one behind."""
        colour, keep = self._colours[run.key], SMOOTHING[self._smoothing]
        found = []
        loss = run.curves.get("loss", ())
        held_out = run.curves.get("eval_loss", ())
        if held_out:
            found.append(Series("held out", held_out, colour, marker="●", line=False, named=on_top))
        if loss:
            found.insert(0, Series(run.name, self._smooth(run.key, loss, keep) if keep else loss, colour))
            if keep and on_top:
                found.append(Series(run.name, loss, colour, faded=True, named=False))
        return found

    def _smooth(self, key: str, loss: Points, keep: float) -> Points:
        """The mean of a loss; that of a curve which did not change is not computed again."""
        kept = self._smoothed.get(key)
        if kept is None or kept[0] is not loss or kept[1] != keep:
            kept = self._smoothed[key] = (loss, keep, smooth(loss, keep))
        return kept[2]

    def _empty(self) -> Content:
        if self.selected and self.selected.live:
            return Content("The first loss comes with the first step.")
        if not self.form.base:
            return Content(
                "A base model is needed first: the demo brings one (1),\nor put a model folder into bases/."
            )
        key = "bold $primary"
        return Content.assemble(
            "No run to show yet.\n\n", ("p", key), " shows the samples as the model will see them\n",
            ("u", key), " looks for test rows in the data\n", ("t", key), " trains with the settings",
            (" (f)" if self.has_class("-narrow") else "", "$faint"),
        )  # fmt: skip

    def _run_line(self, run: RunView, width: int) -> Content:
        return run_line(run, width, self._colours.get(run.key, "other"), self._overlay.get(run.key, False))

    def _show_audit(self) -> None:
        form, overview = self.form, self.med.overview
        modified = {file.path: file.modified for file in overview.data} if overview else {}
        self._audit = audit_of(form.data, form.tests, self.med.jobs, self.runs, modified)
        box = self.query_one("#audit", Static)
        words = audit_words(self._audit, box.size.width or 38, bool(form.tests), bool(form.data))
        box.update(words)
        self._make_room(len(words.wrap(max(10, box.size.width or 38))))

    def _show_about(self) -> None:
        """What the setting with the focus does."""
        about, key = self.form.about(), "bold $primary"
        words = [("f", key), (" changes settings   ", "$faint"), ("c", key), (" as command", "$faint")]
        self.query_one("#about", Static).update(
            Content.styled(about, "$faint") if about else Content.assemble(*words)
        )

    def on_descendant_focus(self) -> None:
        self._show_about()

    def on_descendant_blur(self) -> None:
        self._show_about()

    def _make_room(self, audit_lines: int) -> None:
        """The form is as high as its settings, and scrolls where the lines below it need the room."""
        below = audit_lines + (1 if self.has_class("-short") else 2) + (0 if self.has_class("-short") else 3)
        self.form.styles.max_height = max(6, self.query_one("#side").size.height - below)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self._draw_selected()

    # ---- the form ------------------------------------------------------------------------------------------

    def on_train_form_changed(self, event: TrainForm.Changed) -> None:
        if self.med.overview:
            self.form.show_workspace(self.med.overview, self.med.selection.base)
        self._show_audit()
        self._keep = self.form.keep()

    def on_train_form_base_chosen(self, event: TrainForm.BaseChosen) -> None:
        self.med.choose(replace(self.med.selection, base=event.path))

    def _config(self) -> dict[str, Any] | None:
        """What the form says; where it makes no run, that is said."""
        config = self.form.config(self.med.backend.root)
        if isinstance(config, str):
            self.notify(plain(config), severity="warning", markup=False)
            return None
        self._keep = self.form.keep()
        self._save_notes()
        return config

    def _save_notes(self) -> None:
        root, notes = self.med.backend.root, self._notes()
        self.med.in_thread("remembering", lambda: remember.save_notes(root, "train", notes), lambda _: None)

    def _notes(self) -> dict[str, Any]:
        notes: dict[str, Any] = {
            "log": self._log,
            "smoothing": self._smoothing,
            "overlay": dict(self._overlay),
        }
        return {**notes, "form": self._keep} if self._keep else notes

    def on_screen_suspend(self) -> None:
        self._save_notes()

    def on_unmount(self) -> None:
        remember.save_notes(self.med.backend.root, "train", self._notes())

    # ---- keys ----------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if not self.is_mounted:
            return True
        if action == "cancel":
            return self._to_stop() is not None
        if action == "resume":
            return bool(self.selected and self.selected.resumable)
        if action == "overlay":
            return len(self.runs) > 1
        if action == "leaks":
            return bool(self._audit.found)
        return True

    def command(self) -> Action | None:
        """The training as set, with its config file written: the line works as it stands."""
        config = self.form.config(self.med.backend.root)
        if isinstance(config, str):
            return None
        actions.write_config(self.med.backend.root, config)
        return actions.train(self.med.backend.root, config)

    def action_train(self) -> None:
        config = self._config()
        if config is None:
            return
        name = Path(config["output"]).name
        overview = self.med.overview
        run_is_there = any(run.key.rpartition("/")[2] == name and run.state != "failed" for run in self.runs)
        if run_is_there or (overview and any(Path(row.path).name == name for row in overview.adapters)):
            self.notify(
                f"{name} is there already, and results are never overwritten: give it another name",
                severity="warning",
                markup=False,
            )
            self._open_form("#name")
            return
        root = self.med.backend.root
        action = actions.train(root, config)
        self._wanted = str(action.params["run"])
        self._close()
        self.med.start_job(action, prepare=lambda: actions.write_config(root, config))

    def action_resume(self) -> None:
        run = self.selected
        if run and run.resumable:
            self._wanted = run.key
            self.med.start_job(actions.resume(self.med.backend.root, {"run": run.key, "config": run.config}))

    def _to_stop(self) -> JobRow | None:
        """The selected run where it is running, else the newest that is."""
        selected = [self.selected] if self.selected else []
        return next((run.job for run in (*selected, *self.runs) if run.live), None)

    def action_cancel(self) -> None:
        job = self._to_stop()
        if job is None:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.med.cancel_job(job)

        self.app.push_screen(
            ConfirmScreen(
                f"Stop “{job.title}”?", "Its last step is kept as a checkpoint; r goes on from there."
            ),
            answered,
        )

    def action_audit(self) -> None:
        form = self.form
        if not form.data:
            self.notify("choose a data file first: f, then data", severity="warning")
            return
        self.med.start_job(actions.audit(self.med.backend.root, list(form.data), list(form.tests)))

    def action_leaks(self) -> None:
        if self._audit.found:
            self.app.push_screen(TextScreen("Test rows in the data", [leak_page(self._audit)]))

    def action_preview(self) -> None:
        """Open the samples, or read them anew when the settings are others; with nothing new, close them."""
        config = self._config()
        if config is None:
            return
        if self.has_class("preview-open") and config == self._previewed:
            self._close()
            return
        self.remove_class("form-open")
        self.add_class("preview-open")
        self._previewed = config
        panel, kind = self.query_one(SamplePreview), config["kind"]
        panel.show_words("Reading the first samples as the model will see them …")
        panel.query_one("SizedScroll").focus()
        self.ask("preview", lambda: (kind, self.med.backend.preview(config)))

    def action_form(self) -> None:
        if self.has_class("form-open"):
            self._close()
        else:
            self._open_form("#kind")

    def _open_form(self, field: str) -> None:
        self.remove_class("preview-open")
        self.add_class("form-open")
        self.call_after_refresh(self.query_one(field).focus)

    def _close(self) -> None:
        """Back to the curves."""
        self.remove_class("form-open", "preview-open")
        self._previewed = None
        self.run_list.focus()

    def action_back(self) -> None:
        if self.has_class("form-open") or self.has_class("preview-open"):
            self._close()
        else:
            super().action_back()

    def action_overlay(self) -> None:
        run = self.selected
        if run:
            self._overlay[run.key] = not self._overlay.get(run.key, False)
            self.run_list.show(self.runs)
            self._draw_plot()

    def action_log(self) -> None:
        self._log = not self._log
        self._draw_plot()

    def action_smooth(self) -> None:
        names = list(SMOOTHING)
        self._smoothing = names[(names.index(self._smoothing) + 1) % len(names)]
        self._draw_plot()


def _until(points: Points, end: float) -> Points:
    return (
        points if not points or points[-1][0] <= end else tuple(point for point in points if point[0] <= end)
    )
