"""What to measure next: models, tasks, decoding; how much that is, and its command. Opened from the evaluate screen.

The choice becomes a config in `tui/evaluating.py`; it is written to WORKSPACE/configs and read back by the engine
before a job is started. Dismissed with the job to start, or None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from engine.template_check import Trained
from tui import actions, remember
from tui.actions import Action
from tui.evaluating import DECODINGS, KIND_WORDS, LINES, Wish, config_of, counted, problem
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.snapshots import Overview, TaskOffer
from tui.text import cut
from tui.widgets.choice import Choice, Several
from tui.widgets.field import Field
from tui.widgets.files import Files

LABEL = 16
TEMPLATES = ("model", "chatml", "qwen3_nothink", "qwen3", "llama3")
HERE = "these settings"
OWN = ("temperature", "top_p", "top_k")  # fields of a decoding of one's own
ABOUT = {
    "config": "These settings, or a config file as it stands.",
    "base": "A base with the two adapters chosen (2), or a finished merge as it is.",
    "models": "Alone: the base, the PT adapter at weight 1, the SFT adapter at weight 1.",
    "line": "Mixtures from SFT alone to PT alone; a grid varies both weights.",
    "ggufs": "GGUF files, run through llama.cpp on the same items: what quantisation costs.",
    "tasks": "Data files known by their rows or name, task files (YAML), probe sets that come along.",
    "templates": "How turns are written. Several make a table of weights by template.",
    "decoding": "Greedy, the paper's grid (0.2/0.7, 0.6/0.8, 0.95/0.7 and greedy), or your own.",
    "temperature": "0 is greedy.",
    "top_p": "Only the likeliest tokens that together have this probability.",
    "top_k": "Only so many likeliest tokens; 0: no limit.",
    "max_tokens": "The longest answer.",
    "seeds": "Of drawn answers; several with spaces between make the spread visible.",
    "limit": "So many rows of every task, spread over its file; 0: all.",
    "name": "The run's folder below runs/.",
}


class Tasks(Files):
    """The data sets chosen, by name."""

    DEFAULT_CSS = "Tasks { height: 1; }"

    @property
    def words(self) -> str:
        names = [words.partition("  ")[0] for value, words in self.options if value in self.chosen]
        return ", ".join(names) or "none"


class EvaluateFormScreen(MedScreen):
    TAB = "evaluate"
    NAME = "new evaluation"
    CSS_PATH = "evaluate_form.tcss"
    QUESTION = "New evaluation: what is to be measured?"
    BINDINGS = [
        Binding("s", "start", "start"),
        Binding("c", "app.copy_command", "as command"),
        Binding("up", "app.focus_previous", "previous setting", show=False),
        Binding("down", "app.focus_next", "next setting", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._offers: tuple[TaskOffer, ...] = ()
        self._read_for: object = None
        self._kept: dict[str, Any] | None = None  # from the last time, until the tasks are known
        self._warned: tuple[object, list[str]] = (None, [])
        self._named = False  # the person gave the name
        self._ready = False

    def body(self) -> ComposeResult:
        with VerticalScroll(id="form", can_focus=False):
            yield Choice("from", (("", HERE),), id="config", label_width=LABEL)
            with Vertical(id="settings"):
                yield Choice("base", (), id="base", label_width=LABEL)
                yield Several("alone", (), id="models", label_width=LABEL)
                yield Choice("mixtures", LINES, "5", id="line", label_width=LABEL)
                yield Files("GGUF files", (), id="ggufs", label_width=LABEL)
                yield Tasks("tasks", (), id="tasks", label_width=LABEL)
                yield Static(classes="gap")
                names = tuple((name, name) for name in TEMPLATES)
                yield Several("templates", names, "model", id="templates", label_width=LABEL)
                yield Choice("decoding", DECODINGS, id="decoding", label_width=LABEL)
                yield from self._line("temperature", "temperature", "0.7")
                yield from self._line("top_p", "top-p", "0.8")
                yield from self._line("top_k", "top-k", "0")
                yield from self._line("max_tokens", "max tokens", "64")
                yield from self._line("seeds", "seeds", "42")
                yield Static(classes="gap")
                yield from self._line("limit", "limit per task", "0")
            yield from self._line("name", "name", "my-sweep")
        yield Static(id="about")
        yield Static(id="sum")

    def _line(self, key: str, words: str, value: str) -> ComposeResult:
        field: Widget = Field(value, id=key)
        with Horizontal(classes="field", id=f"line-{key}"):
            yield Static(Content(words), classes="label")
            yield field

    def on_mount(self) -> None:
        root = self.med.backend.root
        self.ask("notes", lambda: remember.notes(root, "evaluate"))
        self.query_one("#config").focus()
        self._show()

    # ---- what comes in -------------------------------------------------------------------------------------

    def show_workspace(self, overview: Overview) -> None:
        selection = self.med.selection
        bases = [(row.path, row.name) for row in overview.usable_models]
        bases += [(row.path, f"merge {row.name}") for row in overview.merges if _whole(row)]
        self.query_one("#base", Choice).set_options(
            [*bases, ("", "none")], value=self._base(bases, selection.base)
        )
        self._offer_models()
        files = [(row.path, row.name) for row in overview.ggufs if row.kind == "model"]
        ggufs = self.query_one("#ggufs", Files)
        chosen = ggufs.chosen
        ggufs.set_options([(path, cut(name, 60)) for path, name in files])
        ggufs.set_chosen(chosen)
        ggufs.display = bool(files)
        if overview is not self._read_for:
            self._read_for, data = overview, overview.data
            self.ask("measurable", lambda: self.med.backend.measurable(data))
        self._show()

    def _base(self, bases: list[tuple[str, str]], chosen: str) -> str:
        """What stays chosen in the form: its own choice, else the app's."""
        now = self.query_one("#base", Choice).value
        return now if self._ready and (now in dict(bases) or not now) else chosen

    def _offer_models(self) -> None:
        """The adapters that are chosen decide which mixtures there are; a merge is measured as it is."""
        labels = self.labels
        models = self.query_one("#models", Several)
        options = [("base", "the base"), *((label, f"{label.upper()} alone") for label in labels)]
        chosen = [name for name in models.chosen if name in dict(options)]
        models.set_options(options)
        models.value = " ".join(chosen)
        models.set_class(not labels, "gone")
        models.display = bool(labels)
        self.query_one("#line", Choice).display = len(labels) == 2

    @property
    def labels(self) -> dict[str, str]:
        """The adapters that go onto the base of the form; none onto a merge."""
        overview, base = self.med.overview, self.query_one("#base", Choice).value
        is_model = overview is not None and overview.model(base) is not None
        return self.med.selection.labels() if is_model else {}

    def answered(self, question: str, value: Any) -> None:
        if question == "notes":
            self._kept = value
            self._restore()
        elif question == "measurable":
            self._take_offers(*value)
        elif question == "warnings":
            self._warned = value
            self._show()
        elif question == "start":
            self.dismiss(value)

    def _take_offers(self, offers: tuple[TaskOffer, ...], configs: tuple[tuple[str, str], ...]) -> None:
        self._offers = offers
        tasks = self.query_one("#tasks", Files)
        options = [(offer.path, self._offer_words(offer)) for offer in offers if not offer.error]
        chosen = tasks.chosen
        tasks.set_options(options, value=tasks.value)
        own = [offer.path for offer in offers if not offer.shipped]
        tasks.set_chosen(chosen if tasks.touched else own)
        config = self.query_one("#config", Choice)
        config.set_options([("", HERE), *((path, cut(name, 50)) for path, name in configs)])
        config.display = bool(configs)
        self._ready = True
        self._restore()
        self._show()

    def _offer_words(self, offer: TaskOffer) -> str:
        words = f"{offer.name}  {KIND_WORDS.get(offer.kind, offer.kind)}"
        words += f", {offer.rows:,} rows" if offer.rows else ""
        return words + (", comes with the program" if offer.shipped else "")

    # ---- what the form says --------------------------------------------------------------------------------

    @property
    def config_file(self) -> str:
        """The config file chosen instead of these settings, "" for these."""
        return self.query_one("#config", Choice).value

    def _text(self, key: str) -> str:
        return self.query_one(f"#{key}", Input).value.strip()

    def wish(self) -> Wish | str:
        """What is asked for, or why the fields make nothing."""
        numbers: dict[str, Any] = {}
        reads = {"temperature": float, "top_p": float, "top_k": int, "max_tokens": int, "limit": int}
        for key, read in reads.items():
            try:
                numbers[key] = read(self._text(key) or ("0" if key == "limit" else ""))
            except ValueError:
                what = "a whole number" if read is int else "a number"
                return f"{key.replace('_', ' ')} should be {what}, and is {self._text(key)!r}"
        try:
            seeds = tuple(
                dict.fromkeys(int(seed) for seed in re.split(r"[\s,]+", self._text("seeds")) if seed)
            )
        except ValueError:
            return f"seeds should be whole numbers, and are {self._text('seeds')!r}"
        labels = self.labels
        return Wish(
            self.query_one("#base", Choice).value,
            labels,
            self.query_one("#models", Several).chosen if labels else (),
            self.query_one("#line", Choice).value if len(labels) == 2 else "0",
            self.query_one("#ggufs", Files).chosen,
            self.query_one("#tasks", Files).chosen,
            self.query_one("#templates", Several).chosen,
            self.query_one("#decoding", Choice).value,
            seeds=seeds,
            **numbers,
        )

    def _checked(self) -> Wish | str:
        wish = self.wish()
        if isinstance(wish, str):
            return wish
        name = self._text("name")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            return "give the run a plain name: letters, digits, and . _ + - after the first"
        return problem(wish) or wish

    # ---- showing -------------------------------------------------------------------------------------------

    def _show(self) -> None:
        whole = bool(self.config_file)
        self.query_one("#settings").display = not whole
        own = self.query_one("#decoding", Choice).value
        for key in OWN:
            self.query_one(f"#line-{key}").display = own == "own"
        self.query_one("#line-seeds").display = own != "greedy"
        self._show_sum()
        self._show_about()

    def _show_sum(self) -> None:
        words = self._sum()
        self.query_one("#sum", Static).update(words)

    def _sum(self) -> Content:
        if self.config_file:
            name = Path(self.config_file).name
            return Content.assemble((plain(name), "bold"), ("  is measured as it stands", "$faint"))
        wish = self._checked()
        if isinstance(wish, str):
            return Content.styled(f"! {plain(wish)}", "$warning")
        models, cells, samples = counted(wish, self._offers)
        lines = [
            Content.assemble(
                (f"{models:,}", "bold"), (f" model{'s' * (models != 1)}   ", "$faint"), (f"{cells:,}", "bold"),
                (f" cell{'s' * (cells != 1)}   ", "$faint"), (f"{samples:,}", "bold"), (" samples", "$faint"),
            )
        ]  # fmt: skip
        where = actions.evaluation_file(Path(), self._text("name"))
        lines.append(Content.styled(plain(f"medmerge sweep {where}"), "$faint"))
        lines += [Content.styled(plain(f"! {words}"), "$warning") for words in self._warnings(wish)[:2]]
        return Content("\n").join(lines)

    def _warnings(self, wish: Wish) -> list[str]:
        """Templates other than the trained ones: asked for in a thread, shown when they are known."""
        overview = self.med.overview
        trained: list[Trained] = []
        for path in wish.adapters.values():
            row = overview.adapter(path) if overview else None
            if row is not None and row.trained is not None:
                trained.append(row.trained)
        about = (wish.base, tuple(trained), wish.templates)
        if self._warned[0] != about:
            self._warned = (about, [])
            backend, base, templates = self.med.backend, wish.base, wish.templates
            self.ask("warnings", lambda: (about, backend.template_warnings(base, trained, templates)))
        return self._warned[1]

    def _show_about(self) -> None:
        focused = self.focused
        key = str(focused.id or "") if focused is not None else ""
        self.query_one("#about", Static).update(Content.styled(ABOUT.get(key, ""), "$faint"))

    def on_descendant_focus(self) -> None:
        self._show_about()

    def on_choice_changed(self, event: Choice.Changed) -> None:
        event.stop()
        if event.choice.id == "base":
            self._offer_models()
        if event.choice.id == "config" and not self._named:
            stem = Path(event.value).stem if event.value else "my-sweep"
            self.query_one("#name", Input).value = stem
        self._show()

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if event.input.id == "name" and event.input.has_focus:
            self._named = True
        self._show_sum()

    # ---- between two times ---------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Put back what was chosen the last time, once notes and tasks are both known."""
        kept = self._kept
        if not self._ready or kept is None:
            return
        self._kept = None
        for key in ("base", "line", "decoding"):
            choice = self.query_one(f"#{key}", Choice)
            if kept.get(key) in dict(choice.options) and not (key == "base" and not kept[key]):
                choice.value = kept[key]
        self._offer_models()
        for key in ("models", "templates"):
            several = self.query_one(f"#{key}", Several)
            if isinstance(kept.get(key), list):
                several.value = " ".join(name for name in kept[key] if name in dict(several.options))
        for key in ("tasks", "ggufs"):
            files = self.query_one(f"#{key}", Files)
            if isinstance(kept.get(key), list):
                files.set_chosen(map(str, kept[key]))
                files.touched = key == "ggufs" or bool(files.chosen)
        for key in (*OWN, "max_tokens", "limit"):
            if isinstance(kept.get(key), int | float):
                self.query_one(f"#{key}", Input).value = f"{kept[key]:g}"
        if isinstance(kept.get("seeds"), list):
            self.query_one("#seeds", Input).value = " ".join(str(seed) for seed in kept["seeds"])
        self._show()

    def _keep(self, wish: Wish) -> None:
        root, values = self.med.backend.root, _notes(wish)
        self.med.in_thread(
            "remembering", lambda: remember.save_notes(root, "evaluate", values), lambda _: None
        )

    # ---- keys ------------------------------------------------------------------------------------------------

    def command(self) -> Action | None:
        """The run as set, with its config file written: the line works as it stands."""
        root = self.med.backend.root
        path = Path(self.config_file) if self.config_file else None
        if path is None:
            wish = self._checked()
            if isinstance(wish, str):
                return None
            path = actions.write_evaluation(root, self._text("name"), config_of(wish, self._offers))
        return Action("sweep", "", command=actions.command(root, "sweep", path))

    def action_start(self) -> None:
        backend, name = self.med.backend, self._text("name")
        if self.config_file:
            path = Path(self.config_file)
            self.ask("start", lambda: backend.read_sweep(path))
            return
        wish = self._checked()
        if isinstance(wish, str):
            self.notify(plain(wish), severity="warning", markup=False)
            return
        self._keep(wish)
        config = config_of(wish, self._offers)
        self.ask("start", lambda: backend.write_sweep(name, config))

    def action_back(self) -> None:
        self.dismiss(None)


def _whole(row: Any) -> bool:
    return row.kind == "checkpoint" and not row.error and not row.rejected


def _notes(wish: Wish) -> dict[str, Any]:
    kept = asdict(wish)
    del kept["adapters"]
    return {
        key: list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
        for key, value in kept.items()
    }
