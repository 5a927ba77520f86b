"""How a merge is made, on two lines: the method with its own parameters, then what is written."""

from __future__ import annotations

from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, Static

from tui.widgets.choice import Choice, Several
from tui.widgets.field import Field
from tui.widgets.slider import WeightSlider

METHODS = (
    ("linear", "linear"),
    ("task_arithmetic", "task arithmetic"),
    ("slerp", "slerp"),
    ("ties", "ties"),
    ("dare_linear", "dare linear"),
    ("dare_ties", "dare ties"),
)
DTYPES = (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"))
KINDS = (("checkpoint", "checkpoint"), ("adapter", "adapter"))
GGUF_TYPES = ("q4_k_m", "q5_k_m", "q8_0", "f16", "bf16")
PARAMETERS = {
    "slerp": ("t",),
    "ties": ("density",),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "seed"),
}  # what is shown of engine.merge.recipe.METHODS


class MethodSettings(Vertical):
    """Posts `Changed` after any change. Parameters that the method does not have are not shown."""

    DEFAULT_CSS = """
    MethodSettings { height: auto; }
    MethodSettings > Horizontal { height: 1; }
    MethodSettings .label { width: auto; color: $faint; }
    MethodSettings WeightSlider { max-width: 48; margin-right: 3; }
    MethodSettings #seed { width: 12; }
    MethodSettings .off { display: none; }
    """

    @dataclass
    class Changed(Message):
        settings: MethodSettings
        method: bool = False  # another method, not only another number

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield Choice("method", METHODS, id="method")
            yield WeightSlider("t", 0.5, typed=(0.0, 1.0), id="t")
            yield WeightSlider("density", 0.5, typed=(0.0, 1.0), id="density")
            yield Static(Content("seed  "), classes="label", id="seed-label")
            yield Field(id="seed", digits=True)
        with Horizontal():
            yield Choice("dtype", DTYPES, id="dtype")
            yield Choice("output", KINDS, id="kind")
            yield Several("gguf", [(type_, type_) for type_ in GGUF_TYPES], id="gguf")
            yield Static(Content("name  "), classes="label")
            yield Field(id="name")

    def on_mount(self) -> None:
        self.query_one("#seed", Field).value = "0"
        self._arrange()

    @property
    def method(self) -> str:
        return self.query_one("#method", Choice).value

    @property
    def parameters(self) -> dict[str, float | int]:
        """The method's parameters as the recipe takes them."""
        found: dict[str, float | int] = {}
        for name in PARAMETERS.get(self.method, ()):
            if name == "seed":
                found[name] = int(self.query_one("#seed", Field).value or 0)
            else:
                found[name] = self.query_one(f"#{name}", WeightSlider).value
        return found

    @property
    def dtype(self) -> str:
        return self.query_one("#dtype", Choice).value

    @dtype.setter
    def dtype(self, value: str) -> None:
        self.query_one("#dtype", Choice).value = value
        self.post_message(self.Changed(self))

    @property
    def kind(self) -> str:
        return self.query_one("#kind", Choice).value

    @property
    def gguf(self) -> tuple[str, ...]:
        return () if self.kind == "adapter" else self.query_one("#gguf", Several).chosen

    def _arrange(self) -> None:
        shown = PARAMETERS.get(self.method, ())
        for name in ("t", "density", "seed"):
            self.query_one(f"#{name}").set_class(name not in shown, "off")
        self.query_one("#seed-label").set_class("seed" not in shown, "off")
        for name in ("dtype", "gguf"):  # a merged adapter is float32, and no GGUF is made of it here
            self.query_one(f"#{name}").disabled = self.kind == "adapter"

    def on_choice_changed(self, event: Choice.Changed) -> None:
        event.stop()
        self._arrange()
        self.post_message(self.Changed(self, method=event.choice.id == "method"))

    def on_weight_slider_changed(self, event: WeightSlider.Changed) -> None:
        event.stop()
        self.post_message(self.Changed(self))

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.id == "seed":
            event.stop()
            self.post_message(self.Changed(self))
