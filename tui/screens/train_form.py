"""The settings of the next run: the form of the train screen. It makes the config that a run, an audit and a preview
are asked with; it starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Static

from tui.snapshots import DataFile, Overview
from tui.widgets.choice import Choice
from tui.widgets.field import Field
from tui.widgets.files import Files

LABEL = 16
KINDS = (("pt", "PT: plain text"), ("sft", "SFT: conversations"))
TEMPLATES = ("model", "chatml", "qwen3_nothink", "qwen3", "llama3")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt", ".md")
TEST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")
NOT_DATA = ("dataset_info.json",)  # says what columns mean; LLaMA-Factory's


@dataclass(frozen=True)
class Setting:
    """One line of the form: a key of TrainConfig, its words, what it does, and how it is read."""

    key: str
    words: str
    about: str
    read: type = str
    options: tuple[str, ...] = ()


YES_NO = ("no", "yes")
LEAKS = ("refuse", "drop", "allow")
REPEATS = ("keep", "exact", "near")
DTYPES = ("auto", "bfloat16", "float32")
ATTENTION = ("auto", "sdpa", "flash_attention_2", "eager")
SETTINGS: tuple[tuple[Setting, ...], ...] = (
    (
        Setting("epochs", "epochs", "Passes over the data.", float),
        Setting("max_steps", "max steps", "Stop after so many optimizer steps; 0: after all epochs.", int),
        Setting("learning_rate", "learning rate", "The highest one; it rises first and falls then.", float),
        Setting("rank", "rank", "r of the LoRA matrices.", int),
        Setting("alpha", "alpha", "Scale of the delta is alpha / rank.", float),
        Setting("cutoff", "cutoff tokens", "Length of a block; longer samples are cut.", int),
        Setting("batch_size", "batch size", "Blocks at once: what memory allows.", int),
        Setting("accumulation", "accumulation", "Batches in one optimizer step.", int),
    ),
    (
        Setting("held_out", "held out", "Rows kept for the held-out loss; below 1: a share of them.", float),
        Setting("eval_every", "evaluate every", "Steps between two held-out losses.", int),
        Setting("shots", "shots", "Train on so many rows only; 0: on all.", int),
        Setting("seed", "seed", "Of everything random in the run.", int),
    ),
    (
        Setting("on_leak", "on leaks", "Test rows in the data: refuse, drop them, or allow.", str, LEAKS),
        Setting("duplicates", "repeated rows", "Keep them, or drop exact or near repeats.", str, REPEATS),
        Setting("packing", "packing", "Several samples in a block; none sees another.", bool, YES_NO),
        Setting("train_on_prompt", "train prompts", "SFT: prompts carry loss too.", bool, YES_NO),
        Setting("mask_history", "mask history", "SFT: only the last answer carries loss.", bool, YES_NO),
    ),
    (
        Setting("dtype", "precision", "Of the frozen base; auto: bf16 on a GPU.", str, DTYPES),
        Setting("attention", "attention", "auto: the fastest that is right here.", str, ATTENTION),
        Setting("gradient_checkpointing", "recompute", "Gradient checkpointing: less memory, slower.", bool, YES_NO),
        Setting("processes", "processes", "0: one for each GPU.", int),
    ),
)  # fmt: skip
BY_KEY = {setting.key: setting for group in SETTINGS for setting in group}
ABOUT = {
    "base": "The frozen model below the adapter.",
    "kind": "Every token of plain text is trained, or the answers of conversations.",
    "preset": "Settings to start from; those below override it.",
    "data": "What it trains on. Enter: choose several.",
    "tests": "Test sets that must not be in the data: audited before training.",
    "template": "How turns are written for the model.",
    "name": "The adapter's folder below adapters/.",
}


class TrainForm(VerticalScroll, inherit_bindings=False):
    """The form. Posts `Changed` when what it says does, `BaseChosen` when the person takes another base."""

    BINDINGS = [
        Binding("up", "app.focus_previous", "previous setting", show=False),
        Binding("down", "app.focus_next", "next setting", show=False),
    ]

    @dataclass
    class Changed(Message):
        form: TrainForm

    @dataclass
    class BaseChosen(Message):
        path: str

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, can_focus=False)
        self._presets: dict[str, dict[str, Any]] = {}
        self._defaults: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}  # from the last time, until the files are known

    def compose(self) -> ComposeResult:
        yield Choice("base", (), id="base", label_width=LABEL)
        yield Choice("kind", KINDS, id="kind", label_width=LABEL)
        yield Choice("preset", (("", "none"),), id="preset", label_width=LABEL)
        yield Files("data", (), id="data", label_width=LABEL)
        yield Files("test sets", (), id="tests", label_width=LABEL)
        yield Choice("template", tuple((name, name) for name in TEMPLATES), id="template", label_width=LABEL)
        yield from self._line("name", "name", Field("my-pt", id="name"))
        for group in SETTINGS:
            yield Static(classes="gap")
            for setting in group:
                if setting.options:
                    options = tuple((option, option) for option in setting.options)
                    yield Choice(setting.words, options, id=setting.key, label_width=LABEL)
                else:
                    yield from self._line(setting.key, setting.words, Field(id=setting.key))

    def _line(self, key: str, words: str, field: Widget) -> ComposeResult:
        with Horizontal(classes="field", id=f"line-{key}"):
            yield Static(Content(words), classes="label")
            yield field

    # ---- filling ------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        return self.query_one("#kind", Choice).value

    @property
    def base(self) -> str:
        return self.query_one("#base", Choice).value

    @property
    def data(self) -> tuple[str, ...]:
        return self.query_one("#data", Files).chosen

    @property
    def tests(self) -> tuple[str, ...]:
        """The test sets, without a file that is trained on."""
        return tuple(path for path in self.query_one("#tests", Files).chosen if path not in self.data)

    def fill(self, presets: dict[str, dict[str, Any]], defaults: dict[str, Any]) -> None:
        """Offer these presets; `defaults` are the values of TrainConfig. Settings it does not know are hidden."""
        self._presets, self._defaults = presets, defaults
        for key, setting in BY_KEY.items():
            self.query_one(f"#{key}" if setting.options else f"#line-{key}").display = key in defaults
        self._fill_presets()
        self._restore()

    def _fill_presets(self) -> None:
        mine = [name for name, values in self._presets.items() if values.get("kind") == self.kind]
        mine.sort(key=lambda name: not name.startswith("demo"))
        self.query_one("#preset", Choice).set_options(
            [*((name, name) for name in mine), ("", "none")], value=mine[0] if mine else ""
        )
        self._fill_settings()

    def _preset_values(self) -> dict[str, Any]:
        return {**self._defaults, **self._presets.get(self.query_one("#preset", Choice).value, {})}

    def _fill_settings(self) -> None:
        values = self._preset_values()
        for key in BY_KEY:
            self._set(key, values.get(key))
        self.query_one("#template", Choice).value = str(values.get("template", "model"))
        sft_only = self.kind == "sft"
        for key in ("train_on_prompt", "mask_history"):
            self.query_one(f"#{key}").display = sft_only and key in self._defaults

    def _set(self, key: str, value: Any) -> None:
        setting = BY_KEY[key]
        if setting.options:
            words = ("yes" if value else "no") if setting.read is bool else str(value)
            choice = self.query_one(f"#{key}", Choice)
            choice.value = words if words in setting.options else setting.options[0]
        else:
            field = self.query_one(f"#{key}", Input)
            field.value = f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)

    def show_workspace(self, overview: Overview, base: str) -> None:
        """Offer what the workspace holds. What was chosen stays chosen where it is still there."""
        bases = [(row.path, row.name) for row in overview.usable_models]
        if base not in dict(bases):
            bases.insert(0, ("", "choose one" if bases else "none in bases/"))
        self.query_one("#base", Choice).set_options(bases, value=base)
        files = [file for file in overview.data if _suffix(file) in SUFFIXES and file.name not in NOT_DATA]
        files.sort(key=lambda file: ("train" not in file.name, self.kind not in file.name, file.name))
        data = self.query_one("#data", Files)
        chosen = data.chosen
        data.set_options([(file.path, file.name) for file in files], value=data.value)
        data.set_chosen(chosen if data.touched else _training(files, self.kind))
        self._offer_tests(files)
        self._restore()

    def _offer_tests(self, files: list[DataFile]) -> None:
        tests = self.query_one("#tests", Files)
        chosen = tests.chosen
        others = sorted((file for file in files if file.path not in self.data), key=lambda file: file.name)
        tests.set_options([(file.path, file.name) for file in others], value=tests.value)
        named = [file.path for file in others if _suffix(file) in TEST_SUFFIXES and "train" not in file.name]
        tests.set_chosen(chosen if tests.touched else named)

    # ---- the person changes something ---------------------------------------------------------------------

    def on_choice_changed(self, event: Choice.Changed) -> None:
        event.stop()
        key = event.choice.id
        if key == "base":
            self.post_message(self.BaseChosen(event.value))
        elif key == "kind":
            self._fill_presets()
            name = self.query_one("#name", Input)
            if name.value in ("my-pt", "my-sft"):
                name.value = f"my-{self.kind}"
            self.query_one("#data", Files).touched = False
        elif key == "preset":
            self._fill_settings()
        self.post_message(self.Changed(self))

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        self.post_message(self.Changed(self))

    def about(self) -> str:
        """What the setting with the focus does."""
        focused = self.screen.focused
        key = str(focused.id or "") if focused is not None and self in focused.ancestors else ""
        return ABOUT.get(key) or (BY_KEY[key].about if key in BY_KEY else "")

    # ---- what it says -------------------------------------------------------------------------------------

    def config(self, root: Path) -> dict[str, Any] | str:
        """The run's settings (what the preset says already left out), or why they make none."""
        if not self.base:
            return "choose a base first: put a model folder into bases/, or make the demo (1)"
        if not self.data:
            return "choose a data file first: f, then data; files belong into data/"
        name = self.query_one("#name", Input).value.strip()
        if not name or "/" in name or name.startswith("."):
            return "give the adapter a plain name"
        config: dict[str, Any] = {
            "kind": self.kind,
            "base": self.base,
            "data": list(self.data),
            "tests": list(self.tests),
            "output": str(root / "adapters" / name),
        }
        preset = self.query_one("#preset", Choice).value
        if preset:
            config["preset"] = preset
        known = self._preset_values()
        template = self.query_one("#template", Choice).value
        if template != known.get("template"):
            config["template"] = template
        for key, setting in BY_KEY.items():
            if key not in self._defaults:
                continue
            text = self._text(key)
            try:
                value = text == "yes" if setting.read is bool else setting.read(text)
            except ValueError:
                what = "a whole number" if setting.read is int else "a number"
                return f"{setting.words} should be {what}, and is {text!r}"
            if value != known.get(key):
                config[key] = value
        return config

    def _text(self, key: str) -> str:
        if BY_KEY[key].options:
            return self.query_one(f"#{key}", Choice).value
        return self.query_one(f"#{key}", Input).value.strip()

    # ---- between two starts of the app --------------------------------------------------------------------

    def keep(self) -> dict[str, Any]:
        """What the form says, to be given to `remember` the next time."""
        kept: dict[str, Any] = {key: self._text(key) for key in BY_KEY if key in self._defaults}
        for key in ("kind", "preset", "template"):
            kept[key] = self.query_one(f"#{key}", Choice).value
        kept["name"] = self.query_one("#name", Input).value
        for key in ("data", "tests"):
            files = self.query_one(f"#{key}", Files)
            kept[key] = list(files.chosen) if files.touched else None
        return kept

    def remember(self, kept: Mapping[str, Any]) -> None:
        """Say again what was kept, once presets and files are known."""
        self._kept = dict(kept)
        self._restore()

    def _restore(self) -> None:
        """Put back what was kept: the settings when the presets are known, the files when those are."""
        kept = self._kept
        if not kept or not self._defaults or not self.query_one("#data", Files).options:
            return
        self._kept = {}
        kind = self.query_one("#kind", Choice)
        if kept.get("kind") in dict(KINDS) and kept["kind"] != kind.value:
            kind.value = kept["kind"]
            self._fill_presets()
            data = self.query_one("#data", Files)
            files = [DataFile(path, words, 0) for path, words in data.options]
            data.set_chosen(_training(files, self.kind))
        preset = self.query_one("#preset", Choice)
        if kept.get("preset") in dict(preset.options):
            preset.value = kept["preset"]
            self._fill_settings()
        if kept.get("template") in TEMPLATES:
            self.query_one("#template", Choice).value = kept["template"]
        for key, setting in BY_KEY.items():
            text = kept.get(key)
            if isinstance(text, str) and (not setting.options or text in setting.options):
                if setting.options:
                    self.query_one(f"#{key}", Choice).value = text
                else:
                    self.query_one(f"#{key}", Input).value = text
        if isinstance(kept.get("name"), str):
            self.query_one("#name", Input).value = kept["name"]
        for key in ("data", "tests"):
            if isinstance(kept.get(key), list):
                box = self.query_one(f"#{key}", Files)
                box.set_chosen(map(str, kept[key]))
                box.touched = True


def _suffix(file: DataFile) -> str:
    return Path(file.name).suffix.lower()


def _training(files: list[DataFile], kind: str) -> list[str]:
    """The file that is meant: one whose name says it trains this kind, else one that says it trains."""
    for words in ((kind, "train"), ("train",)):
        named = [file.path for file in files if all(word in file.name for word in words)]
        if named:
            return named[:1]
    return []


def read_presets() -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The presets, and the defaults of TrainConfig. Imports the training package: called in a thread."""
    import dataclasses

    from training.config import TrainConfig
    from training.presets import PRESETS

    defaults = {
        item.name: item.default
        for item in dataclasses.fields(TrainConfig)
        if item.default is not dataclasses.MISSING
    }
    return dict(PRESETS), defaults
