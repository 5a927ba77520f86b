"""Evaluate answers: which mixture, and how sure are we? Curves of the sweep, the table, the samples behind.

New runs are set up in `evaluate_form.py`, samples shown in `samples.py`; columns and words are in `tui/metrics.py`,
curves in `tui/curves.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import DataTable, Input, Static

from tui import actions
from tui.actions import Action
from tui.curves import PLOTS, curves_of, heat, is_grid
from tui.exports import TABLE_FORMATS
from tui.metrics import (
    VIEWS,
    WARNED,
    Column,
    Group,
    Order,
    View,
    cell_text,
    cell_words,
    columns_of,
    groups_of,
    marks,
    matching,
    ordered,
    rows_of,
)
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.dialogs import ConfirmScreen, PickScreen
from tui.screens.evaluate_parts import empty_words, head_words
from tui.snapshots import JobFeed, JobRow, Overview, RunRow
from tui.text import cut
from tui.widgets.field import Field
from tui.widgets.plot import PlotPanel
from tui.widgets.sized import SizedStatic

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow

ROOMS = ("both", "table", "plots")  # what has the room


class MetricTable(DataTable[Any]):
    """The table; Enter belongs to the screen, so that the footer can say what it does."""

    BINDINGS = [Binding("enter", "screen.samples", "samples", tooltip="behind the number under the cursor")]


class EvaluateScreen(MedScreen):
    NAME = "evaluate"
    CSS_PATH = "evaluate.tcss"
    QUESTION = "Evaluate: which mixture, and how sure are we?"
    BINDINGS = [
        Binding("n", "new", "new", tooltip="set up and start an evaluation"),
        Binding("v", "view", "view", tooltip="metrics, refusals, thinking, everything"),
        Binding("s", "sort", "sort", tooltip="by the column under the cursor"),
        Binding("p", "plots", "plots", tooltip="both, table only, plots only"),
        Binding("e", "export", "export", tooltip="the table in view"),
        Binding(
            "slash", "find", "find", key_display="/", show=False, tooltip="part of a model, task or metric"
        ),
        Binding("o", "run", "other run", show=False),
        Binding("r", "resume", "go on with a run that stopped", show=False),
        Binding("x", "cancel", "cancel", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._run = ""  # path of the run shown
        self._chosen = False  # the person chose it; else the newest
        self._rows: tuple[MetricRow, ...] = ()
        self._view: View = "metrics"
        self._order = Order()
        self._find = ""
        self._room = ROOMS[0]
        self._told = -1  # result rows of the live job when the table was read last
        self._drawn: object = None
        self._columns: tuple[Column, ...] = ()  # of the table as it is shown
        self._groups: list[Group] = []

    def body(self) -> ComposeResult:
        yield SizedStatic(id="run")
        yield Field(placeholder="part of a model, a task or a metric", id="find")
        with Horizontal(id="plots"):
            for name in PLOTS:
                yield PlotPanel(name, "PT", id=name)
        yield Static(id="heat")
        yield Static(id="empty")
        yield MetricTable(
            id="table", cursor_type="cell", zebra_stripes=False, header_height=2, cell_padding=1
        )
        yield Static(id="words")
        yield Static(id="marks")

    def on_mount(self) -> None:
        self.query_one("#find").display = False
        self.table.focus()
        self._draw()

    @property
    def table(self) -> DataTable[Any]:
        return self.query_one("#table", MetricTable)

    # ---- what is shown ---------------------------------------------------------------------------------------

    def _runs(self) -> list[RunRow]:
        overview = self.med.overview
        return [run for run in overview.runs if run.evaluation] if overview else []

    @property
    def shown_run(self) -> RunRow | None:
        return next((run for run in self._runs() if run.path == self._run), None)

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
            self._show_run(wanted)

    def _show_run(self, path: str) -> None:
        self._run, self._rows, self._told, self._order = path, (), -1, Order()
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
        elif question == "resume":
            self._chosen = False
            self.med.start_job(value)
        elif question == "export":
            self.notify(plain(f"written to {value}"), markup=False, timeout=8)

    def refused(self, question: str, message: str, hint: str) -> bool:
        if question != "table":
            return False
        self._rows = ()
        self._draw(error=message)
        return True

    def _head(self) -> None:
        column = next((column for column in self._columns if column.key == self._order.key), None)
        filtered = (len(self._groups), len(groups_of(self._rows))) if self._find else None
        words = head_words(
            self._live, self.shown_run, len(self._runs()), self._view, self._order, column, filtered,
            self.size.width - 4,
        )  # fmt: skip
        self.query_one("#run", Static).update(words)

    def _draw(self, error: str = "") -> None:
        empty, table = self.query_one("#empty", Static), self.table
        columns, groups = matching(columns_of(self._rows, self._view), groups_of(self._rows), self._find)
        self._columns, self._groups = columns, ordered(groups, self._order, columns)
        shown = bool(columns and groups)
        table.display = shown and self._room != "plots"
        empty.display = not shown
        if not shown:
            words = Content.styled(f"✗ {plain(error)}", "$error") if error else self._nothing()
            empty.update(words)
        self._fill(table)
        if table.display and self.focused is None:
            table.focus()  # it was hidden while it was empty
        self._head()
        self._draw_plots()
        self._words()
        self.refresh_bindings()

    def _nothing(self) -> Content:
        if self._rows and self._find:
            return Content("Nothing is called that; esc shows all.")
        if self._rows:
            return Content(f"This run measured nothing of {self._view}: v shows other numbers.")
        chosen = bool(self.med.selection.pt and self.med.selection.sft)
        return empty_words(self._live is not None, bool(self._run), chosen)

    def _fill(self, table: DataTable[Any]) -> None:
        """Show the rows; the cursor stays on its cell, equal tables are left alone."""
        from rich.text import Text

        drawn = (self._columns, tuple(self._rows), self._view, self.app.theme, self._order, self._find)
        if drawn == self._drawn:
            return
        self._drawn = drawn
        group, column = self._under_cursor
        line, place = table.cursor_row, table.cursor_column
        table.clear(columns=True)
        told = {(one.template, one.decoding) for one in self._groups}
        settings = len(told - {("", "")}) > 1
        faint = self.app.theme_variables["faint"]
        table.add_column(Text("model", style=faint), key="model")
        if settings:
            table.add_column(Text("template\ndecoding", style=faint), key="setting")
        for one in self._columns:
            sign = ("▾" if self._order.descending else "▴") if one.key == self._order.key else ""
            title = Text(
                f"{cut(one.task, 22)}\n{plain(one.title)} {sign}".rstrip(), justify="right", style=faint
            )
            table.add_column(title, key=one.key)
        for one_group in self._groups:
            name = Text(cut(one_group.model, 24))
            if one_group.warned:
                name.append(f" {WARNED}", style=self.app.theme_variables["warning"])
            cells: list[Any] = [name]
            if settings:
                cells.append(Text(plain(f"{one_group.template} {one_group.decoding}")))
            for one in self._columns:
                row = one_group.rows.get((one.task, one.metric))
                cells.append(Text(cell_text(row), justify="right", style=self._cell_style(row)))
            table.add_row(*cells, key=one_group.key)
        table.fixed_columns = 1
        self._put_cursor(table, group, column, line, place)

    def _put_cursor(
        self, table: DataTable[Any], group: Group | None, column: Column | None, line: int, place: int
    ) -> None:
        """Back to the cell it was on, else to the same place."""
        if not table.row_count:
            return
        rows = [one.key for one in self._groups]
        keys = [str(key.value) for key in table.columns]
        if group is not None and group.key in rows:
            line = rows.index(group.key)
        if column is not None and column.key in keys:
            place = keys.index(column.key)
        first = len(keys) - len(self._columns)
        table.move_cursor(row=min(max(line, 0), len(rows) - 1), column=min(max(first, place), len(keys) - 1))

    def _cell_style(self, row: MetricRow | None) -> str:
        variables = self.app.theme_variables
        if row is None or row.value is None:
            return variables["faint"]
        if row.at_floor or row.at_chance:
            return variables["warning"]
        return ""

    @property
    def _under_cursor(self) -> tuple[Group | None, Column | None]:
        table = self.table
        if not table.row_count or not table.is_valid_coordinate(table.cursor_coordinate):
            return None, None
        keys = table.coordinate_to_cell_key(table.cursor_coordinate)
        column = next((one for one in self._columns if one.key == keys.column_key.value), None)
        return next((one for one in self._groups if one.key == keys.row_key.value), None), column

    @property
    def selected(self) -> MetricRow | None:
        """The number under the cursor."""
        group, column = self._under_cursor
        return group.rows.get((column.task, column.metric)) if group and column else None

    def _words(self) -> None:
        row, (group, _) = self.selected, self._under_cursor
        words = cell_words(row) if row else Content.styled("not measured", "$faint") if group else Content("")
        self.query_one("#words", Static).update(words)
        told = [
            found
            for one in self._groups
            for column in self._columns
            if (found := one.rows.get((column.task, column.metric))) is not None
        ]
        self.query_one("#marks", Static).update(marks(told))

    def _draw_plots(self) -> None:
        """The curves of the setting under the cursor, or the grid of its metric where both weights vary."""
        box, grid = self.query_one("#plots"), self.query_one("#heat", Static)
        group, column = self._under_cursor
        row = self.selected
        flat = is_grid(self._rows)
        grid.display = flat and row is not None and self._room != "table"
        if flat and row is not None:
            grid.update(heat(self._rows, row, self.app.theme_variables, self.size.width - 6))
        curves = {} if flat or self._room == "table" else self._curves(group, column)
        box.display = bool(curves)
        alone = self._room == "plots"
        narrow = self.size.width < 100
        shown = list(curves) if alone else list(curves)[: 1 if narrow else 2]
        box.styles.layout = "vertical" if narrow else "horizontal"
        for name in PLOTS:
            panel = self.query_one(f"#{name}", PlotPanel)
            panel.display = name in shown
            if name in curves:
                one = curves[name]
                panel.show(one.series, one.title, y_limits=one.limits, x_limits=one.span)

    def _curves(self, group: Group | None, column: Column | None) -> dict[str, Any]:
        setting = (group.template, group.decoding) if group else ("", "")
        tasks = {column.metric: column.task} if column else {}
        return curves_of(self._rows, *setting, tasks=tasks)

    def on_data_table_cell_highlighted(self, event: DataTable.CellHighlighted) -> None:
        self._words()
        self._draw_plots()

    def on_data_table_cell_selected(self, event: DataTable.CellSelected) -> None:
        self.action_samples()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        column = next((one for one in self._columns if one.key == event.column_key.value), None)
        self._sort(column)

    # ---- keys ------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("samples", "view", "sort", "export", "plots"):
            return bool(self._rows)
        if not self.is_mounted:
            return True
        if action == "run":
            return bool(self._runs())
        if action == "resume":
            run = self.shown_run
            return bool(run and run.done < run.cells and self._live is None)
        if action == "cancel":
            return self._live is not None
        return True

    def action_samples(self) -> None:
        from tui.screens.samples import SamplesScreen

        row = self.selected
        if row is None or row.value is None or not self._run:
            return
        others = [one for one in self._rows if (one.task, one.metric) == (row.task, row.metric)]
        self.app.push_screen(SamplesScreen(self._run, row, others))

    def action_view(self) -> None:
        """The next view that this run has numbers for."""
        place = VIEWS.index(self._view)
        following = [*VIEWS[place + 1 :], *VIEWS[: place + 1]]
        self._view = next((view for view in following if columns_of(self._rows, view)), self._view)
        self._draw()

    def action_sort(self) -> None:
        self._sort(self._under_cursor[1])

    def _sort(self, column: Column | None) -> None:
        """By this column, best first; again: the other way round; again: by weight, as by the column of names."""
        row = next(
            (row for row in self._rows if column and (row.task, row.metric) == (column.task, column.metric)),
            None,
        )
        self._order = self._order.next(column.key, row.info.better) if column and row else Order()
        self._draw()

    def action_plots(self) -> None:
        """Both, the table alone, the plots alone."""
        plotted = is_grid(self._rows) or bool(curves_of(self._rows))
        rooms = ROOMS if plotted else ROOMS[:1]
        self._room = rooms[(rooms.index(self._room) + 1) % len(rooms)] if self._room in rooms else rooms[0]
        self.set_class(self._room == "plots", "only-plots")
        self._draw()

    def action_find(self) -> None:
        box = self.query_one("#find", Input)
        box.display = True
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._find = event.value.strip()
        self._draw()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.table.focus()

    def on_descendant_blur(self) -> None:
        box = self.query_one("#find", Input)
        if box.display and not box.value and not box.has_focus:
            box.display = False

    def action_back(self) -> None:
        box = self.query_one("#find", Input)
        if box.display:
            box.value = ""
            box.display = False
            self.table.focus()
        else:
            super().action_back()

    def action_run(self) -> None:
        choices = [
            (run.path, f"{run.name}   {run.kind}, {run.done} of {run.cells} cells") for run in self._runs()
        ]

        def picked(path: str | None) -> None:
            if path:
                self._chosen = True
                self._show_run(path)
                self._read()

        self.app.push_screen(PickScreen("Which run", choices, self._run), picked)

    def action_export(self) -> None:
        """Write the numbers in view, in the order they are shown."""
        backend = self.med.backend
        rows = [
            found
            for group in self._groups
            for column in self._columns
            if (found := group.rows.get((column.task, column.metric))) is not None
        ]
        name = f"{Path(self._run).name}-{self._view}"

        def picked(suffix: str | None) -> None:
            if suffix is not None:
                self.ask("export", lambda: backend.export_table(name, rows, suffix))

        self.app.push_screen(PickScreen(f"Export the {self._view} in view as", TABLE_FORMATS), picked)

    def command(self) -> Action | None:
        """The table shown as a command; before anything was measured, nothing."""
        run = self._run or next((run.path for run in self._runs()), "")
        return actions.report(self.med.backend.root, run) if run else None

    def action_new(self) -> None:
        from tui.screens.evaluate_form import EvaluateFormScreen

        if self._live:
            self.notify("a run is measuring already: x stops it", severity="warning")
            return

        def started(action: Action | None) -> None:
            if action is not None:
                self._chosen = False
                self.med.start_job(action)

        self.app.push_screen(EvaluateFormScreen(), started)

    def action_resume(self) -> None:
        run, backend = self._run, self.med.backend
        self.ask("resume", lambda: backend.resume_sweep(run))

    def action_cancel(self) -> None:
        job = self._live
        if job is None:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.med.cancel_job(job)

        words = "Cells that are done stay; r goes on with the rest."
        self.app.push_screen(ConfirmScreen(f"Stop “{job.title}”?", words), answered)
