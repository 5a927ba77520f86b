"""Evaluate answers: which mixture, and how sure are we? Curves of the sweep, the table, the samples behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import DataTable, Static

from tui import actions
from tui.actions import Action
from tui.metrics import View, cell_text, cell_words, columns_of, curves_of, groups_of, rows_of
from tui.parts import job_line
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.dialogs import PickScreen, TextScreen
from tui.snapshots import JobFeed, JobRow, Overview, RunRow, SampleRow
from tui.text import cut
from tui.widgets.plot import PlotPanel
from tui.widgets.sized import SizedStatic

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow

VIEWS: tuple[View, ...] = ("metrics", "refusals", "everything")


class EvaluateScreen(MedScreen):
    NAME = "evaluate"
    CSS_PATH = "evaluate.tcss"
    QUESTION = "Evaluate: which mixture, and how sure are we?"
    BINDINGS = [
        Binding("s", "samples", "samples", tooltip="or enter"),
        Binding("v", "view", "metrics/refusals"),
        Binding("o", "run", "run"),
        Binding("e", "sweep", "start a sweep"),
        Binding("x", "cancel", "cancel", show=False),
        Binding("p", "plots", "plots", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._run = ""  # path of the run shown
        self._chosen = False  # the person chose it; else the newest
        self._rows: tuple[MetricRow, ...] = ()
        self._view: View = "metrics"
        self._told = -1  # result rows of the live job when the table was read last
        self._drawn: object = None

    def body(self) -> ComposeResult:
        yield SizedStatic(id="run")
        with Horizontal(id="plots"):
            yield PlotPanel("BLEU", "PT weight", id="overlap")
            yield PlotPanel("perplexity", "PT weight", id="perplexity")
        yield Static(id="empty")
        yield DataTable(id="table", cursor_type="cell", zebra_stripes=False, header_height=2, cell_padding=1)
        yield Static(id="words")

    def on_mount(self) -> None:
        self.query_one("#table", DataTable).focus()
        self._draw()

    # ---- what is shown ---------------------------------------------------------------------------------------

    def _runs(self) -> list[RunRow]:
        overview = self.med.overview
        return [run for run in overview.runs if run.evaluation] if overview else []

    def show_workspace(self, overview: Overview) -> None:
        self._pick_run()
        self._read()

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        self._pick_run()
        live = self._live
        feed = feeds.get(live.id) if live and live.params.get("out") == self._run else None
        if feed is not None and len(feed.rows) != self._told:
            self._told = len(feed.rows)
            self._rows = rows_of(feed.rows)
            self._draw()
        self._head()
        self.refresh_bindings()

    def _pick_run(self) -> None:
        """Show the run that is being measured, else the newest sweep, unless the person chose one."""
        runs, live = self._runs(), self._live
        if self._chosen and any(run.path == self._run for run in runs):
            return
        wanted = str(live.params.get("out") or "") if live else ""
        if not wanted:
            best = max(runs, key=lambda run: (run.kind == "sweep", run.created), default=None)
            wanted = best.path if best else ""
        if wanted != self._run:
            self._run, self._rows, self._told = wanted, (), -1
            self._draw()

    @property
    def _live(self) -> JobRow | None:
        return next((job for job in self.med.jobs if job.kind in ("eval", "sweep") and not job.final), None)

    def _read(self) -> None:
        """Read the table of the run, unless its job is telling it row by row."""
        live, run = self._live, self._run
        if not run or (live and live.params.get("out") == run):
            return
        self.ask("table", lambda: (run, self.med.backend.table(run)))

    def answered(self, question: str, value: Any) -> None:
        if question == "table":
            run, rows = value
            if run == self._run:
                self._rows = rows
                self._draw()
        elif question == "samples":
            row, samples = value
            self._show_samples(row, samples)
        elif question == "sweep":
            self.med.start_job(value)

    def refused(self, question: str, message: str, hint: str) -> bool:
        if question != "table":
            return False
        self._rows = ()
        self._draw(error=message)
        return True

    def _head(self) -> None:
        live = self._live
        run = next((run for run in self._runs() if run.path == self._run), None)
        if live:
            words = job_line(live, self.size.width - 6)
        elif run:
            kind = "sweep" if run.kind == "sweep" else "evaluation"
            cells = f"{run.done} of {run.cells} cells" if run.done < run.cells else f"{run.cells} cells"
            words = Content.assemble(
                (f"{kind}  ", "$faint"),
                (cut(run.name, 50), "bold"),
                (f"   {cells}", "$faint"),
                (f"   {self._view}", "$faint"),
            )
        else:
            words = Content("")
        self.query_one("#run", Static).update(words)

    def _draw(self, error: str = "") -> None:
        self._head()
        curves = curves_of(self._rows)
        plots = self.query_one("#plots")
        plots.display = bool(curves)
        for name in ("overlap", "perplexity"):
            if name in curves:
                title, series = curves[name]
                self.query_one(f"#{name}", PlotPanel).show(series, title)
            self.query_one(f"#{name}").display = name in curves
        empty = self.query_one("#empty", Static)
        table = self.query_one("#table", DataTable)
        table.display = bool(self._rows)
        empty.display = not self._rows
        if not self._rows:
            words = Content.styled(f"✗ {plain(error)}", "$error") if error else self._empty()
            empty.update(words)
        self._fill(table)
        self._words()

    def _empty(self) -> Content:
        if self._live:
            return Content("The first rows come when the first cell is done.")
        if self._run:
            return Content("Reading the run …")
        if not self.med.selection.pt or not self.med.selection.sft:
            return Content("A sweep measures mixtures of two adapters: choose them first (2).")
        return Content.assemble(
            "Nothing measured yet. ", ("e", "bold $primary"), " starts a sweep from SFT alone to PT alone: it shows "
            "what each weight costs and gains, with intervals and floors.",
        )  # fmt: skip

    def _fill(self, table: DataTable[Any]) -> None:
        """Show the rows; the cursor stays on its cell, equal tables are left alone."""
        from rich.text import Text

        columns = columns_of(self._rows, self._view)
        groups = groups_of(self._rows)
        drawn = (columns, tuple(self._rows), self._view, self.app.theme)
        if drawn == self._drawn:
            return
        self._drawn = drawn
        cursor = table.cursor_coordinate
        table.clear(columns=True)
        settings = len({(group.template, group.decoding) for group in groups}) > 1
        table.add_column(Text("model"), key="model")
        if settings:
            table.add_column(Text("template\ndecoding"), key="setting")
        for column in columns:
            table.add_column(Text(f"{cut(column.task, 22)}\n{column.title}", justify="right"), key=column.key)
        for group in groups:
            cells: list[Any] = [Text(cut(group.model, 24))]
            if settings:
                cells.append(Text(plain(f"{group.template} {group.decoding}")))
            for column in columns:
                row = group.rows.get((column.task, column.metric))
                cells.append(Text(cell_text(row), justify="right", style=self._cell_style(row)))
            table.add_row(*cells, key=group.key)
        table.fixed_columns = 1
        if table.row_count:
            table.move_cursor(
                row=min(cursor.row, table.row_count - 1), column=max(1, min(cursor.column, len(columns)))
            )

    def _cell_style(self, row: MetricRow | None) -> str:
        variables = self.app.theme_variables
        if row is None or row.value is None:
            return variables["faint"]
        if row.at_floor or row.at_chance:
            return variables["warning"]
        return ""

    @property
    def selected(self) -> MetricRow | None:
        """The number under the cursor."""
        table = self.query_one("#table", DataTable)
        if not self._rows or not table.row_count:
            return None
        if not table.is_valid_coordinate(table.cursor_coordinate):
            return None
        keys = table.coordinate_to_cell_key(table.cursor_coordinate)
        columns = {column.key: column for column in columns_of(self._rows, self._view)}
        column = columns.get(str(keys.column_key.value))
        group = next((group for group in groups_of(self._rows) if group.key == keys.row_key.value), None)
        return group.rows.get((column.task, column.metric)) if column and group else None

    def _words(self) -> None:
        row = self.selected
        self.query_one("#words", Static).update(cell_words(row) if row else Content(""))

    def on_data_table_cell_highlighted(self, event: DataTable.CellHighlighted) -> None:
        self._words()

    def on_data_table_cell_selected(self, event: DataTable.CellSelected) -> None:
        self.action_samples()

    # ---- keys ------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("samples", "view"):
            return bool(self._rows)
        if action == "run" and self.is_mounted:
            return bool(self._runs())
        return True

    def action_samples(self) -> None:
        row, run = self.selected, self._run
        if row is not None:
            self.ask("samples", lambda: (row, self.med.backend.samples(run, row)))

    def _show_samples(self, row: MetricRow, samples: tuple[SampleRow, ...]) -> None:
        title = f"{row.model} · {row.task} · {row.info.label}"
        self.app.push_screen(TextScreen(title, [_sample_page(sample) for sample in samples]))

    def action_view(self) -> None:
        self._view = VIEWS[(VIEWS.index(self._view) + 1) % len(VIEWS)]
        self._draw()

    def action_plots(self) -> None:
        """Give the room of the plots to the table, and back."""
        self.toggle_class("no-plots")

    def action_run(self) -> None:
        choices = [
            (run.path, f"{run.name}   {run.kind}, {run.done} of {run.cells} cells") for run in self._runs()
        ]

        def picked(path: str | None) -> None:
            if path:
                self._run, self._chosen, self._rows = path, True, ()
                self._draw()
                self._read()

        self.app.push_screen(PickScreen("Which run", choices, self._run), picked)

    def command(self) -> Action | None:
        """The sweep that `e` offers first; one made for the chosen adapters is written, so the line works."""
        configs, overview, selection = self._configs(), self.med.overview, self.med.selection
        if not configs or overview is None:
            return None
        root = self.med.backend.root
        config = configs[0][0] or actions.write_sweep(root, selection.base, selection.labels(), overview.data)
        return Action("sweep", "", command=actions.command(root, "sweep", str(config)))

    def _configs(self) -> list[tuple[str, str]]:
        """Sweeps that can be started: (config file, words); "" stands for one made for the chosen adapters."""
        overview, selection = self.med.overview, self.med.selection
        if overview is None:
            return []
        found = [
            (file.path, file.name)
            for file in overview.data
            if "sweep" in file.name and file.name[-4:] == "yaml"
        ]
        if selection.base and selection.pt and selection.sft and actions.sweep_tasks(overview.data):
            names = " and ".join(Path(path).name for path in selection.labels().values())
            found.append(("", f"SFT alone to PT alone: {names}"))
        return found

    def action_sweep(self) -> None:
        configs = self._configs()
        if not configs:
            self.notify(
                "choose a base, PT and SFT (2), and put evaluation data into data/", severity="warning"
            )
        elif self._live:
            self.notify("a run is measuring already: x stops it", severity="warning")
        else:
            self.app.push_screen(PickScreen("Which sweep", configs), self._begin_sweep)

    def _begin_sweep(self, path: str | None) -> None:
        overview, selection, backend = self.med.overview, self.med.selection, self.med.backend
        if path is None or overview is None:
            return

        def read() -> Action:
            if path:
                return backend.read_sweep(Path(path))
            made = actions.write_sweep(backend.root, selection.base, selection.labels(), overview.data)
            return backend.read_sweep(made)

        self._chosen = False
        self.ask("sweep", read)

    def action_cancel(self) -> None:
        from tui.screens.dialogs import ConfirmScreen

        job = self._live
        if job is None:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.med.cancel_job(job)

        self.app.push_screen(ConfirmScreen(f"Stop “{job.title}”?", "Cells that are done stay."), answered)


def _sample_page(sample: SampleRow) -> Content:
    facts = "   ".join(f"{what} {value}" for what, value in sample.facts)
    parts = [
        Content.assemble((plain(sample.id), "bold"), "   ", (plain(facts), "$faint")),
        Content.styled("\nprompt as sent", "bold $faint"),
        Content(plain(sample.prompt, lines=True)),
        Content.styled("\noutput", "bold $faint"),
        Content(plain(sample.text, lines=True) or "(nothing)"),
    ]
    if sample.reference:
        parts += [Content.styled("\nreference", "bold $faint"), Content(plain(sample.reference, lines=True))]
    return Content("\n").join(parts)
