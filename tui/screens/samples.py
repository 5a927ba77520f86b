"""The samples behind one number: a list, the chosen one beside it, and a second model's answer for comparison.

Opened from a cell of the evaluate screen; Esc goes back there. Drawing is in `samples_parts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Input, Static

from tui.exports import SAMPLE_FORMATS
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.dialogs import PickScreen
from tui.screens.labels import LabelScreen
from tui.screens.samples_parts import answers, filters, keeper, line, question, text_of
from tui.snapshots import SampleRow, SampleSet
from tui.text import cut
from tui.widgets.field import Field
from tui.widgets.longlist import LongList
from tui.widgets.sized import SizedScroll, WidthChanged

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow
    from tui.backend import Backend

AT_ONCE = 2000  # scores come in pieces, so that the first are seen soon


class SamplesScreen(MedScreen):
    TAB = "evaluate"
    NAME = "samples"
    CSS_PATH = "samples.tcss"
    QUESTION = "Samples: what did it really say?"
    BINDINGS = [
        Binding("d", "second", "second model", tooltip="beside it, differing words marked"),
        Binding("f", "only", "only …", tooltip="wrong, where two differ, one label"),
        Binding("slash", "find", "find", key_display="/"),
        Binding("t", "thought", "thought", tooltip="unfold think blocks"),
        Binding("p", "prompt", "prompt", tooltip="unfold it as sent"),
        Binding("l", "label", "correct label"),
        Binding("j,down", "move(1)", "next", show=False),
        Binding("k,up", "move(-1)", "previous", show=False),
        Binding("w", "swap", "swap the two models", show=False),
        Binding("e", "export", "export the samples in the list", show=False),
    ]

    def __init__(self, run: str, row: MetricRow, others: Sequence[MetricRow] = ()) -> None:
        super().__init__()
        self.run, self.row = run, row
        self.others = [other for other in others if other != row]
        self._first: SampleSet | None = None
        self._second: SampleSet | None = None
        self._second_row: MetricRow | None = None
        self._by_key: dict[str, SampleRow] = {}  # the second model's
        self._texts: list[str] = []  # what the text filter looks at, made when it is first used
        self._only = ""
        self._find = ""
        self._thought = self._prompt = False
        self._error = ""

    def body(self) -> ComposeResult:
        yield Static(id="head")
        with Horizontal(id="columns"):
            with Vertical(id="left"):
                yield Field(placeholder="part of a text", id="find")
                yield LongList[SampleRow](self._line, lambda row: row.key, id="list")
            with SizedScroll(id="right", can_focus=True):
                yield Static(id="question")
                with Horizontal(id="answers"):
                    yield Static(id="first")
                    yield Static(id="second")

    def on_mount(self) -> None:
        self.query_one("#find").display = False
        self.list.focus()
        self._show()
        self._read()

    @property
    def list(self) -> LongList[SampleRow]:
        return self.query_one("#list", LongList)

    @property
    def shown(self) -> SampleRow | None:
        """The sample under the cursor."""
        return self.list.current

    # ---- what comes in -------------------------------------------------------------------------------------

    def _read(self) -> None:
        run, row, backend = self.run, self.row, self.med.backend
        self.ask("samples", lambda: backend.samples(run, row))

    def _read_second(self) -> None:
        run, row, backend = self.run, self._second_row, self.med.backend
        if row is not None:
            self.ask("second", lambda: backend.samples(run, row))

    def answered(self, question: str, value: Any) -> None:
        if question == "samples":
            self._first, self._texts = value, []
            self._fill()
            self._score(0)
        elif question == "second":
            self._second = value
            self._by_key = {row.key: row for row in value.rows}
            self._fill()
            self._score_second()
        elif question == "scores":
            self._take_scores(*value)
        elif question == "second scores":
            self._take_second(*value)
        elif question == "correct":
            self._read()
            self._read_second()
        elif question == "export":
            self.notify(plain(f"written to {value}"), markup=False, timeout=8)

    def refused(self, question: str, message: str, hint: str) -> bool:
        if question != "samples":
            return False
        self._error = message
        self._show()
        return True

    def _score(self, start: int) -> None:
        """Ask for the scores (of probes: the labels) of the next samples."""
        found, backend, run = self._first, self.med.backend, self.run
        if found is not None and start < len(found.rows) and _unfinished(found):
            rows = found.rows[start : start + AT_ONCE]
            self.ask("scores", lambda: (found, start, _finished(backend, run, found, rows)))

    def _take_scores(self, of: SampleSet, start: int, done: Sequence[SampleRow]) -> None:
        found = self._first
        if found is None or len(found.rows) != len(of.rows) or found.model != of.model:
            return
        rows = (*found.rows[:start], *done, *found.rows[start + len(done) :])
        self._first = replace(found, rows=rows, score=found.score or found.scored_by)
        self._texts = []
        self._fill()
        self._score(start + len(done))

    def _score_second(self) -> None:
        found, backend, run = self._second, self.med.backend, self.run
        if found is not None and _unfinished(found):
            self.ask("second scores", lambda: (found, _finished(backend, run, found, found.rows)))

    def _take_second(self, of: SampleSet, done: Sequence[SampleRow]) -> None:
        if self._second is of:
            self._second = replace(of, rows=tuple(done), score=of.score or of.scored_by)
            self._by_key = {row.key: row for row in done}
            self._fill()

    # ---- showing -------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """The list with its filters."""
        if self._first is None:
            return
        rows: Sequence[SampleRow] = self._first.rows
        if self._find:
            if not self._texts:
                self._texts = [text_of(row) for row in rows]
            rows = [row for row, text in zip(rows, self._texts, strict=True) if self._find in text]
        if self._only:
            keep = keeper(self._only)
            rows = [row for row in rows if keep(row, self._by_key.get(row.key))]
        self.list.show(rows)
        self._show()

    def _line(self, row: SampleRow, width: int) -> Content:
        return line(row, self._by_key.get(row.key), self._second is not None, width)

    def on_long_list_moved(self) -> None:
        self.query_one("#right").scroll_home(animate=False)
        self._show()

    def on_width_changed(self, message: WidthChanged) -> None:
        self._show()

    def _show(self) -> None:
        self.query_one("#head", Static).update(self._head())
        row, right = self.shown, self.query_one("#right", SizedScroll)
        width = max(20, right.scrollable_content_region.width - 1)
        two = self._second is not None
        beside = two and width >= 60
        self.query_one("#answers").styles.layout = "horizontal" if beside else "vertical"
        second = self.query_one("#second", Static)
        second.display = two
        if row is None:
            self.query_one("#question", Static).update(self._nothing())
            self.query_one("#first", Static).update("")
            second.update("")
            self.refresh_bindings()
            return
        about = Content.styled(plain(row.id), "bold")
        category = dict(row.facts).get("category")
        about += Content.styled(plain(f"   {category}") if category else "", "$faint")
        asked = question(row, width, self._prompt)
        self.query_one("#question", Static).update(
            Content("\n").join([about, Content(""), asked, Content("")])
        )
        other = self._by_key.get(row.key)
        left, there = answers(row, other if two else None, width // 2 if beside else width, self._thought)
        self.query_one("#first", Static).update(self._named(self.row, row) + Content("\n") + left)
        if two and self._second_row is not None:
            missing = Content.styled("not asked this", "$faint")
            named = self._named(self._second_row, other)
            second.update(named + Content("\n") + (there if there is not None else missing))
        self.refresh_bindings()

    def _named(self, of: MetricRow, row: SampleRow | None) -> Content:
        """The head of an answer: the model, and whether it is right."""
        name = Content.styled(plain(of.model), "bold")
        same = self._second_row is None or (
            (self._second_row.template, self._second_row.decoding) == (self.row.template, self.row.decoding)
        )
        if not same:
            name += Content.styled(plain(f"  {of.template} {of.decoding}"), "$faint")
        if row is not None and row.right is not None:
            name += (
                Content.styled("  ✓ right", "$success")
                if row.right
                else Content.styled("  ✗ wrong", "$error")
            )
        if row is not None and row.score is not None and self._first is not None and self._first.score:
            name += Content.styled(f"  {plain(self._score_words(row.score))}", "$faint")
        return name

    def _score_words(self, value: float) -> str:
        from tui.screens.samples_parts import score

        name = self._first.score if self._first else ""
        if name == "ahead":
            return f"right option {score(abs(value))} nats {'ahead' if value >= 0 else 'behind'}"
        if name == "kept":
            return f"{value:.0%} of its instructions kept"
        from engine.evaluate.summary import METRICS

        return f"{METRICS[name].label if name in METRICS else name} {score(value)} alone"

    def _head(self) -> Content:
        row, found = self.row, self._first
        parts = [row.task, row.template, row.decoding]
        words = Content.assemble(
            (cut(row.model, 30), "bold"),
            (plain("   " + " · ".join(part for part in parts if part)), "$faint"),
        )
        if found is None:
            return words
        many = f"   {len(found.rows):,} samples"
        if len(self.list.rows) != len(found.rows):
            many = f"   {len(self.list.rows):,} of {len(found.rows):,} samples"
        words += Content.styled(many, "$faint")
        if self._only:
            told = dict(filters(found, self._second)).get(self._only, self._only)
            words += Content.styled(plain(f"   {told}"), "$primary")
        if found.by_hand:
            words += Content.styled(f"   {found.by_hand} corrected by hand", "$primary")
        return words

    def _nothing(self) -> Content:
        if self._error:
            return Content.styled(f"✗ {plain(self._error)}", "$error")
        if self._first is None:
            return Content("Reading the samples …")
        if self._find or self._only:
            return Content("No sample is like that; esc shows all.")
        return Content("Its rows are not there yet: they come when the cell is done.")

    # ---- keys ------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "label":
            return bool(self._first and self._first.labelled and self.shown)
        if action == "second":
            return bool(self.others)
        if action == "swap":
            return self._second is not None
        if action == "thought":
            row = self.shown
            other = self._by_key.get(row.key) if row else None
            return bool((row and row.thought) or (other and other.thought))
        return True

    def action_move(self, by: int) -> None:
        self.list.action_move(by)

    def action_thought(self) -> None:
        self._thought = not self._thought
        self._show()

    def action_prompt(self) -> None:
        self._prompt = not self._prompt
        self._show()

    def action_second(self) -> None:
        """Choose a second model, or none."""
        choices: list[tuple[str, str]] = [("-1", "none")] if self._second is not None else []
        for place, other in enumerate(self.others):
            setting = " ".join(part for part in (other.template, other.decoding) if part)
            choices.append((str(place), f"{other.model}   {setting}".rstrip()))

        def picked(place: str | None) -> None:
            if place is None:
                return
            self._second, self._by_key = None, {}
            self._second_row = self.others[int(place)] if int(place) >= 0 else None
            if self._only in ("differ", "lost", "won"):
                self._only = ""
            self._read_second()
            self._fill()

        self.app.push_screen(PickScreen(f"Beside {self.row.model}", choices), picked)

    def action_swap(self) -> None:
        if self._second is None or self._second_row is None or self._first is None:
            return
        before = self.row
        self.others = [before if other is self._second_row else other for other in self.others]
        self.row, self._second_row = self._second_row, before
        self._first, self._second = self._second, self._first
        self._by_key = {row.key: row for row in self._second.rows}
        self._texts = []
        self._fill()
        self._score(0)

    def action_only(self) -> None:
        if self._first is None:
            return

        def picked(name: str | None) -> None:
            if name is not None:
                self._only = name
                self._fill()

        self.app.push_screen(
            PickScreen("Which samples", filters(self._first, self._second), self._only), picked
        )

    def action_find(self) -> None:
        box = self.query_one("#find", Input)
        box.display = True
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._find = event.value.strip().lower()
        self._fill()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.list.focus()

    def on_descendant_blur(self) -> None:
        box = self.query_one("#find", Input)
        if box.display and not box.value and not box.has_focus:
            box.display = False

    def action_label(self) -> None:
        row, run, backend = self.shown, self.run, self.med.backend
        if row is None:
            return

        def picked(given: tuple[str | None, str] | None) -> None:
            if given is not None and (given[0] is not None or row.by_hand):
                label, note = given
                self.ask("correct", lambda: backend.correct(run, row, label, note))

        self.app.push_screen(LabelScreen(self.row.model, row.label, row.automatic, row.by_hand), picked)

    def action_export(self) -> None:
        """Write the samples in the list, of both models where there are two."""
        rows, backend = tuple(self.list.rows), self.med.backend
        sets: list[tuple[str, Sequence[SampleRow]]] = [(self.row.model, rows)]
        if self._second is not None:
            same = [self._by_key[row.key] for row in rows if row.key in self._by_key]
            sets.append((self._second.model, same))
        name = f"{self.row.run}-{self.row.task}-{self.row.model}"

        def picked(suffix: str | None) -> None:
            if suffix is not None:
                self.ask("export", lambda: backend.export_samples(name, sets, suffix))

        self.app.push_screen(PickScreen(f"Export {len(rows):,} samples as", SAMPLE_FORMATS), picked)

    def action_back(self) -> None:
        box = self.query_one("#find", Input)
        if box.display:
            box.value = ""
            box.display = False
            self.list.focus()
        elif self._only:
            self._only = ""
            self._fill()
        elif self._second is not None:
            self._second, self._second_row, self._by_key = None, None, {}
            self._fill()
        else:
            self.dismiss()


def _unfinished(found: SampleSet) -> bool:
    """Whether scores or labels are still to be made."""
    if found.labelled:
        return any(not row.label for row in found.rows)
    return bool(found.scored_by) and any(row.score is None for row in found.rows)


def _finished(backend: Backend, run: str, found: SampleSet, rows: Sequence[SampleRow]) -> list[SampleRow]:
    """The rows with their scores or labels; runs in a thread."""
    if found.labelled:
        return backend.labels(run, rows)
    scores = backend.scores(rows, found.scored_by)
    return [replace(row, score=value) for row, value in zip(rows, scores, strict=True)]
