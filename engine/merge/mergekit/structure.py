"""What a mergekit config names: models, `model+lora` pairs, slices, parameter blocks. Read and checked, not yet used.

Called by convert.py. Formats: mergekit 0.1.5, `config.py` and `common.ModelReference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.merge.document import input_path, mapping, near, required, short
from engine.merge.mergekit.values import Stretch

# method -> (parameters of a model, parameters of the whole merge) that mergekit reads.
_TASK = (("weight", "density"), ("normalize", "rescale", "lambda", "int8_mask"))
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("weight",), ("normalize",)),
    "slerp": ((), ("t",)),
    "task_arithmetic": _TASK,
    "ties": _TASK,
    "dare_linear": _TASK,
    "dare_ties": _TASK,
}
KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "chat_template")  # fmt: skip


@dataclass(frozen=True)
class ModelRef:
    """`model` or `model+lora`, as folders."""

    model: Path
    lora: Path | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)


class Config:
    """A mergekit config, field by field. `notes` gathers what is said about it.

    Attributes:
        base: `base_model`, None where it is missing.
        models: every model of the merge, the base among them (mergekit adds it last).
        stretches: the slices; `models:` make one of all layers, whose end is -1 until the layers are counted.

    Raises BadRecipeError for what has no counterpart here, by its key.
    """

    def __init__(self, document: object, where: str, places: Sequence[Path]) -> None:
        self.document, self.where, self.places = mapping(document, where), where, places
        self.notes: list[str] = []
        self.models: list[ModelRef] = []
        self.stretches: list[Stretch] = []
        if self.document.get("modules"):
            raise BadRecipeError(f"{where}: modules (models of several parts) have no counterpart here")
        self.method = str(required(self.document, "merge_method", where))
        if self.method not in METHODS:
            raise BadRecipeError(
                f"{where}: merge_method {self.method} has no counterpart here{near(self.method, list(METHODS))}",
                f"both programs have {', '.join(METHODS)}",
            )
        raw_base = self.document.get("base_model")
        self.base = self.ref(raw_base, f"{where}: base_model") if raw_base is not None else None
        top = self._parameters(self.document, where)
        if self.document.get("slices"):
            self._read_slices(top)
        else:
            self._read_models(top)
        for key in self.document:
            if key not in KEYS:
                self.notes.append(f"{key} means nothing to mergekit either")

    @property
    def adapters(self) -> bool:
        """Whether adapters are merged onto one base, rather than whole models."""
        return any(ref.lora for ref in self.models)

    def entries(self) -> list[ModelRef]:
        """The models of the merge in order: the one that gives layout and tokenizer first."""
        entries = list(self.models)
        if self.method != "linear" and self.base is None:
            raise BadRecipeError(f"{self.where}: {self.method} needs `base_model:`")
        if self.method != "linear" and self.base not in entries:
            raise BadRecipeError(f"{self.where}: base_model {self.base} is no source of the slices")
        if self.base in entries:
            entries = [self.base, *[ref for ref in entries if ref != self.base]]
        if self.method == "slerp" and len(entries) != 2:
            raise BadRecipeError(f"{self.where}: slerp goes from base_model to one other model")
        loras = [ref for ref in entries if ref.lora]
        if loras:
            self._check_adapters(entries, loras)
        elif self.method not in ("linear", "slerp") and len(entries) == 1:
            raise BadRecipeError(f"{self.where}: no model beside the base", "name one under `models:`")
        return entries

    def _check_adapters(self, entries: Sequence[ModelRef], loras: Sequence[ModelRef]) -> None:
        under = {ref.model for ref in entries}
        plain = [ref for ref in entries if not ref.lora]
        if len(under) > 1:
            raise BadRecipeError(
                f"{self.where}: {loras[0]} beside models of another base ({', '.join(sorted(map(str, under)))})",
                "adapters are merged onto one base; merge each into its model first, then merge the models",
            )
        if self.method == "slerp" and plain:
            raise BadRecipeError(
                f"{self.where}: slerp between a base and base+adapter has no counterpart here",
                "it goes between base+adapter and base+adapter, or between two models",
            )
        if self.method not in ("linear", "slerp") and self.base is not None and self.base.lora:
            raise BadRecipeError(
                f"{self.where}: base_model {self.base} has an adapter of its own",
                "merge it into its base first, and name the result",
            )

    def _read_models(self, top: Mapping[str, Any]) -> None:
        sources = {}
        for index, raw in enumerate(self._list(self.document.get("models"), f"{self.where}: models")):
            place = f"{self.where}: models[{index}]"
            item = mapping(raw, place)
            self._odd(item, ("model", "parameters"), place)
            ref = self.ref(required(item, "model", place), f"{place}.model")
            if ref in sources:
                raise BadRecipeError(f"{place}: {ref} is listed twice", "add the weights, or copy the folder")
            sources[ref] = self._parameters(item, place, of_model=True)
        if self.base and self.base not in sources:  # mergekit adds it, last
            sources[self.base] = {}
        self._add_stretch(0, -1, (top,), sources)

    def _read_slices(self, top: Mapping[str, Any]) -> None:
        position = 0
        for index, raw in enumerate(self._list(self.document["slices"], f"{self.where}: slices")):
            place = f"{self.where}: slices[{index}]"
            item = mapping(raw, place)
            self._odd(item, ("sources", "parameters", "base_model"), place)
            if item.get("base_model") and self.ref(item["base_model"], f"{place}.base_model") != self.base:
                raise BadRecipeError(f"{place}: a base_model of its own has no counterpart here")
            sources, ends = {}, set()
            for number, source in enumerate(self._list(item.get("sources"), f"{place}.sources")):
                spot = f"{place}.sources[{number}]"
                source = mapping(source, spot)
                self._odd(source, ("model", "layer_range", "parameters"), spot)
                first, end = self._range(source.get("layer_range"), spot)
                if first != position:
                    raise BadRecipeError(
                        f"{spot}: layers {first} to {end} where layer {position} comes next",
                        "only slices that are the whole model in order can be merged here",
                    )
                ends.add(end)
                ref = self.ref(required(source, "model", spot), f"{spot}.model")
                if ref in sources:
                    raise BadRecipeError(f"{spot}: {ref} is listed twice")
                sources[ref] = self._parameters(source, spot, of_model=True)
            if len(ends) > 1:
                raise BadRecipeError(f"{place}: its sources have different numbers of layers")
            end = ends.pop()
            self._add_stretch(position, end, (self._parameters(item, place), top), sources)
            position = end

    def _add_stretch(
        self,
        start: int,
        end: int,
        shared: tuple[Mapping[str, Any], ...],
        sources: dict[ModelRef, dict[str, Any]],
    ) -> None:
        if self.base and sources.get(self.base) and self.method != "linear":
            self.notes.append(f"{self.base} is the base: its own parameters mean nothing to {self.method}")
        if self.models and set(sources) != set(self.models):
            raise BadRecipeError(
                f"{self.where}: the slices name different models: {', '.join(map(str, sources))}",
                "only slices that are the whole model in order can be merged here",
            )
        self.models = self.models or list(sources)
        self.stretches.append(Stretch(start, end, shared, sources))

    def _parameters(self, item: Mapping[str, Any], where: str, of_model: bool = False) -> dict[str, Any]:
        raw = item.get("parameters")
        given = mapping(raw if raw is not None else {}, f"{where}: parameters")
        own, shared = METHODS[self.method]
        for key in given:
            if of_model and key in shared:
                self.notes.append(
                    f"{where}: {key} is no parameter of one model; mergekit ignores it there, too"
                )
            elif key not in (*own, *shared):
                self.notes.append(
                    f"{where}: parameter {key} means nothing to {self.method}, in mergekit either"
                )
            elif key == "density" and self.method == "task_arithmetic":
                self.notes.append(f"{where}: density means nothing to task_arithmetic, in mergekit either")
        return given

    def _range(self, raw: object, where: str) -> tuple[int, int]:
        if not (
            isinstance(raw, list)
            and len(raw) == 2
            and all(type(end) is int for end in raw)
            and raw[0] < raw[1]
        ):
            raise BadRecipeError(f"{where}: layer_range should be [first, end], and is {short(raw)}")
        return raw[0], raw[1]

    def ref(self, raw: object, where: str) -> ModelRef:
        parts: list[Any]
        if isinstance(raw, dict):
            self._odd(raw, ("model", "lora"), where)
            parts = [raw.get("model"), raw.get("lora")]
            parts = [part.get("path") if isinstance(part, dict) else part for part in parts]
        else:
            parts = raw.split("+") if isinstance(raw, str) else [raw]
        if len(parts) > 2:
            raise BadRecipeError(f"{where}: {short(raw)} should be MODEL or MODEL+LORA")
        for part in parts:
            if isinstance(part, str) and "@" in part:
                raise BadRecipeError(
                    f"{where}: {short(part)} names a revision on the Hub", "give the folder that holds it"
                )
        paths = [input_path(part, where, self.places) for part in parts if part is not None]
        if not paths:
            raise BadRecipeError(f"{where} names no model: {short(raw)}")
        return ModelRef(*paths)

    def _list(self, raw: object, where: str) -> list[Any]:
        if not isinstance(raw, list) or not raw:
            raise BadRecipeError(f"{where} should be a list, and is {short(raw)}")
        return raw

    def _odd(self, item: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        for key in item:
            if key not in known and item[key] is not None:
                raise BadRecipeError(
                    f"{where}: {key} has no counterpart here", f"known keys: {', '.join(known)}"
                )
