"""Who answers in which pane: model processes shared by panes, conversations, and live preparation.

`ChatPort` is engine.chat.client.ChatModel as the app sees it (tests bring a fake one). A `Desk` keeps one
child per model file; panes on the same file share it and its one copy of the weights.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from engine.chat.protocol import Done, Failed, Loaded, Sampling, Token
    from engine.template_check import Trained

ADVICE = "{name} as template"  # how one is chosen on the chat screen


class ChatPort(Protocol):
    """A loaded model file with panes; see engine.chat.client.ChatModel."""

    @property
    def alive(self) -> bool: ...
    async def start(self) -> Loaded: ...
    async def open(self, pane: str, context: int = 0) -> int: ...
    async def set_scales(self, pane: str, scales: Mapping[str, float]) -> None: ...
    def ask(
        self,
        pane: str,
        messages: Sequence[Mapping[str, str]],
        template: str = "model",
        sampling: Sampling | None = None,
    ) -> AsyncIterator[Token | Done | Failed]: ...
    def stop(self, pane: str) -> None: ...
    async def close_pane(self, pane: str) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Source:
    """What a pane talks to: a GGUF, and for a live mixture the LoRA GGUFs by label."""

    path: str
    name: str
    adapters: tuple[tuple[str, str], ...] = ()

    @property
    def live(self) -> bool:
        return bool(self.adapters)


@dataclass
class Seat:
    """One pane: its source, weights and conversation."""

    pane: str
    source: Source | None = None
    weights: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    scaled: dict[str, float] | None = None  # what the child has


class Desk:
    """Keeps the model processes. All methods belong to the app's event loop."""

    def __init__(self, make: Callable[[Path, Mapping[str, Path]], ChatPort]) -> None:
        self._make = make
        self._models: dict[Source, ChatPort] = {}
        self._panes: dict[str, Source] = {}

    async def seat(self, pane: str, source: Source) -> ChatPort:
        """The model of this source, started, with the pane open in it. Raises what `start` raises."""
        model = self._models.get(source)
        if model is None:
            model = self._models[source] = self._make(
                Path(source.path), {label: Path(path) for label, path in source.adapters}
            )
        before = self._panes.get(pane)
        if before == source and model.alive:
            return model
        if before is not None and before != source:
            await self.leave(pane)
        if not model.alive:
            for other, there in list(self._panes.items()):
                if there == source:  # a child that died took these panes with it
                    del self._panes[other]
            await model.start()
        await model.open(pane)
        self._panes[pane] = source
        return model

    async def leave(self, pane: str) -> None:
        """Close a pane; the last one of a model ends its process."""
        source = self._panes.pop(pane, None)
        if source is None:
            return
        model = self._models[source]
        if source in self._panes.values():
            if model.alive:
                await model.close_pane(pane)
        else:
            del self._models[source]
            await model.close()

    def model(self, pane: str) -> ChatPort | None:
        source = self._panes.get(pane)
        return self._models.get(source) if source else None

    async def close(self) -> None:
        """End all processes."""
        models, self._models, self._panes = list(self._models.values()), {}, {}
        for model in models:
            await model.close()


def without_thoughts(text: str) -> str:
    """An answer as it goes back into the conversation: what stands after its think blocks."""
    from tui.widgets.stream import THINK

    return THINK.sub("", text).strip()


def template_warnings(
    template: str, base: str, adapters: Sequence[Trained], models: Sequence[str]
) -> list[str]:
    """What the template does not fit: adapters mixed into `base` ("" for none), and those merged into model files.

    Reads headers and small files: for a thread. What cannot be read is judged by name, or left to who loads it.
    """
    from engine import template_check
    from engine.gguf.trained import choose_for, trained_in

    inside = trained_in(Path(base)) if base else []
    said = template_check.warnings([*adapters, *inside], choose_for(template, Path(base)), ADVICE)
    for path in models:
        said += template_check.warnings(trained_in(Path(path)), choose_for(template, Path(path)), ADVICE)
    return list(dict.fromkeys(said))


def live_source(result: Mapping[str, Any]) -> Source | None:
    """The source a finished live preparation made, from the job's result: base and adapters as GGUF paths."""
    base, adapters = result.get("base"), result.get("adapters")
    if not isinstance(base, str) or not isinstance(adapters, dict):
        return None
    kind = Path(base).stem.rsplit("-", 1)[-1]  # .../NAME-HASH-TYPE.gguf
    return Source(base, f"live {kind}", tuple((str(label), str(path)) for label, path in adapters.items()))
