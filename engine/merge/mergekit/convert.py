"""A mergekit config as a recipe document: the same merge, and a sentence for whatever has no meaning here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.merge.document import mapping, read_yaml, short
from engine.merge.mergekit.structure import Config, ModelRef
from engine.merge.mergekit.values import (
    Stretch,
    as_selectors,
    by_layer,
    conditions,
    stretch_of,
    value_at,
)
from engine.merge.selectors import layer_count
from engine.weights import Adapter, Checkpoint

_DARE = ("dare_linear", "dare_ties")


@dataclass(frozen=True)
class Imported:
    """A recipe document (absolute paths; `output` without a path, which mergekit takes on its command line)."""

    recipe: dict[str, Any]
    notes: tuple[str, ...]


def is_mergekit(document: object) -> bool:
    """Whether a parsed YAML document is a mergekit config rather than a recipe."""
    if not isinstance(document, dict):
        return False
    return "merge_method" in document or "slices" in document or isinstance(document.get("models"), list)


def read_mergekit(path: Path, places: Sequence[Path] = ()) -> Imported:
    """Read a mergekit YAML; relative paths are looked up from its folder, then in `places`.

    Raises BadRecipeError, BadModelError, BadAdapterError as `from_mergekit`.
    """
    return from_mergekit(read_yaml(path, "mergekit config"), str(path), [path.absolute().parent, *places])


def from_mergekit(document: object, where: str, places: Sequence[Path]) -> Imported:
    """The recipe that merges as a mergekit config says; `where` names the config in errors.

    Opens the models' and adapters' headers: filters and gradients are resolved against their tensors.

    Raises:
        BadRecipeError: not a mergekit config, or something that has no counterpart here, by its key.
        BadModelError, BadAdapterError: a model or adapter that cannot be read.
    """
    config = Config(document, where, places)
    entries = config.entries()
    reference = Checkpoint.open(entries[0].model)
    numbers = _Numbers(config, reference)
    recipe: dict[str, Any] = {"method": config.method}
    if config.adapters or config.method not in ("linear", "slerp"):
        recipe["base"] = str(entries[0].model)
        entries = [ref for ref in entries if ref.lora or not (config.adapters or ref == config.base)]
    recipe["adapters" if config.adapters else "models"] = numbers.listed(entries)
    if parameters := numbers.shared(entries):
        recipe["parameters"] = parameters
    if vocabulary := _vocabulary(config, reference.folder):
        recipe["vocabulary"] = vocabulary
    recipe["output"] = _output(config)
    return Imported(recipe, tuple(dict.fromkeys(config.notes)))


class _Numbers:
    """The parameters of a config, tensor by tensor, as numbers and selectors of a recipe."""

    def __init__(self, config: Config, reference: Checkpoint) -> None:
        self.config, self.reference = config, reference
        self.layers = layer_count(reference.tensors)
        whole = config.stretches[0]
        self.stretches = config.stretches
        if whole.end < 0:  # `models:` name no layers: one stretch of all
            self.stretches = [Stretch(0, self.layers, whole.shared, whole.sources)]
        elif config.stretches[-1].end != self.layers:
            raise BadRecipeError(
                f"{config.where}: the slices make {config.stretches[-1].end} layers, and {reference.folder} has "
                f"{self.layers}",
                "only slices that are the whole model in order can be merged here",
            )

    def listed(self, entries: Sequence[ModelRef]) -> dict[str, dict[str, Any]]:
        """The recipe's `adapters` or `models`."""
        divide, method = self._divides(), self.config.method
        found: dict[str, dict[str, Any]] = {}
        for ref in entries:
            label, names = _label(ref.lora or ref.model, found), self._names(ref)
            found[label] = {"path": str(ref.lora or ref.model)}
            if divide:
                shares = {name: self._share(ref, name) for name in names}
                found[label]["weight"] = by_layer(shares)
            elif method != "slerp":
                found[label]["weight"] = self._level(ref, "weight", names, label)
            if method in ("ties", *_DARE):
                found[label]["density"] = self._level(ref, "density", names, label, 1.0)
        return found

    def shared(self, entries: Sequence[ModelRef]) -> dict[str, Any]:
        """The recipe's `parameters`."""
        config, method = self.config, self.config.method
        if method == "slerp":
            touched = dict.fromkeys(name for ref in entries for name in self._names(ref))
            return {"t": self._level(None, "t", list(touched), "the merge")}
        if method == "linear":
            return {} if config.adapters or self._one("normalize", 1.0) else {"normalize": False}
        found: dict[str, Any] = {}
        if (scale := self._one("lambda", 1.0)) != 1.0:
            found["lambda"] = scale
        if method in ("ties", "dare_ties"):
            found["normalize"] = bool(self._one("normalize", float(method == "ties")))
        rescale = bool(self._one("rescale", float(method in _DARE)))
        if method == "ties" and rescale:
            raise BadRecipeError(
                f"{config.where}: rescale of trimmed deltas (to their old L1 norm) is not done here"
            )
        if method in _DARE:
            found["rescale"] = rescale
            how = (
                ", and rescales by 1/density as in the paper, not to the delta's old L1 norm"
                if rescale
                else ""
            )
            config.notes.append(f"DARE draws other elements than mergekit's torch.bernoulli{how}")
        if self._one("int8_mask", 0.0):
            config.notes.append("int8_mask has no meaning here: sign masks are never stored")
        return found

    def _names(self, ref: ModelRef) -> list[str]:
        """The tensors that an entry changes."""
        if ref.lora:
            return list(Adapter.open(ref.lora).match(self.reference))
        return [name for name, tensor in self.reference.tensors.items() if tensor.is_float]

    def _divides(self) -> bool:
        """Whether weights must be divided by their sum here, because the recipe's method does not."""
        config = self.config
        if config.method == "linear" and config.adapters:
            if not self._one("normalize", 1.0):
                raise BadRecipeError(
                    f"{config.where}: linear with normalize: false would scale the base by the sum of the weights",
                    "use task_arithmetic, which leaves the base as it is",
                )
            return True
        return config.method in ("task_arithmetic", "dare_linear") and bool(self._one("normalize", 0.0))

    def _share(self, ref: ModelRef, name: str) -> float:
        """The weight of a model at a tensor, divided by the sum of all; by 1 where a task method's sum is 0."""
        config = self.config
        counted = [other for other in config.models if config.method == "linear" or other != config.base]
        total = sum(self._at(other, "weight", name) for other in counted)
        if abs(total) < 1e-8:
            if config.method == "linear":
                raise BadRecipeError(f"{config.where}: the weights at {name} sum to 0: there is no mean")
            total = 1.0
        return self._at(ref, "weight", name) / total

    def _level(
        self,
        ref: ModelRef | None,
        parameter: str,
        names: Sequence[str],
        label: str,
        default: float | None = None,
    ) -> Any:
        """A parameter of one model (None: of the merge) at some tensors, as a number or selectors."""
        wanted = {name: self._at(ref, parameter, name, default) for name in names}
        if len(self.stretches) > 1:
            return by_layer(wanted)
        tried = conditions(self.stretches[0].scopes(ref), parameter, self.config.where)
        spec, unused = as_selectors(tried, wanted, self.layers, label, default)
        for text in unused:
            self.config.notes.append(
                f"{label}: {parameter} filter {text!r} matches no tensor that it changes"
            )
        return spec

    def _at(self, ref: ModelRef | None, parameter: str, name: str, default: float | None = None) -> float:
        where, stretch = self.config.where, stretch_of(self.stretches, name)
        value = value_at(conditions(stretch.scopes(ref), parameter, where), name, stretch.depth(name))
        value = default if value is None else value
        if value is None:
            raise BadRecipeError(
                f"{where}: {ref or 'the merge'} has no {parameter} at {name}",
                f"give `{parameter}:` in its parameters, or a last entry without a filter",
            )
        return value

    def _one(self, parameter: str, default: float) -> float:
        """A parameter that is one number for the whole merge."""
        values = {self._at(None, parameter, name, default) for name in self.reference.tensors}
        if len(values) > 1:
            raise BadRecipeError(
                f"{self.config.where}: {parameter} differs by tensor, and is one number here"
            )
        return values.pop()


def _vocabulary(config: Config, reference: Path) -> str | None:
    """The recipe's `vocabulary` for mergekit's tokenizer keys, None for its default."""
    source = config.document.get("tokenizer_source")
    if config.document.get("tokenizer") is not None:
        block = mapping(config.document["tokenizer"], f"{config.where}: tokenizer")
        for key in ("tokens", "pad_to_multiple_of"):
            if block.get(key):
                raise BadRecipeError(f"{config.where}: tokenizer.{key} has no counterpart here")
        source = block.get("source", "union")
    if config.document.get("chat_template"):
        config.notes.append("chat_template is not applied: the merge keeps the base's")
    if source is None:
        return None
    known = source == "base" or (
        source != "union" and config.ref(source, f"{config.where}: tokenizer_source").model == reference
    )
    if not known:
        raise BadRecipeError(
            f"{config.where}: tokenizer_source {short(source)} has no counterpart here",
            f"the merge has the tokenizer of {reference}: `tokenizer_source: base`",
        )
    if config.adapters:
        return None
    config.notes.append(
        "tokenizer_source base: rows of tokens that every model has are merged by token, all others are the "
        "base's; mergekit also merges those that only some of the models have"
    )
    return "intersection"


def _output(config: Config) -> dict[str, Any]:
    work, out = (
        None if config.document.get(key) is None else str(config.document[key]).removeprefix("torch.")
        for key in ("dtype", "out_dtype")
    )
    if work and work != "float32" and config.method not in ("linear", "slerp"):
        config.notes.append(f"dtype {work}: mergekit sums in {work}; here sums are float32, rounded once")
    elif out and work and work != out:
        config.notes.append(f"dtype {work} has no meaning here: sums are float32, rounded once to {out}")
    return {"dtype": out or work} if out or work else {}


def _label(path: Path, taken: Mapping[str, Any]) -> str:
    """A label from the folder's name, letters a recipe allows, told apart by a number."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name).lstrip("_.-")[:56] or "model"
    number, label = 1, name
    while label in taken:
        number += 1
        label = f"{name}-{number}"
    return label
