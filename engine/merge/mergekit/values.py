"""What a parameter of a mergekit config is at each tensor, and the same as selectors of a recipe.

A mergekit setting is a number, a list of numbers (a gradient over the layers of its slice), or a list of
`{filter: TEXT, value: ...}` of which the first one wins whose text is part of the tensor's name. A setting that
says nothing about a tensor leaves it to the next wider scope: source, slice, whole config. Tensors outside the
layers are at the start of every gradient, the head, too; a slice of one layer is at its end (mergekit 0.1.5,
`config.evaluate_setting` and `plan.plan_slice`). Called by convert.py.
"""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import BadRecipeError
from engine.merge.document import number, short
from engine.merge.selectors import DEFAULT, layer_of, resolve

Value = float | tuple[float, ...]
Condition = tuple[str | None, Value]  # (part of a tensor's name, or None: every tensor; what it is there)
_BEFORE_LAYERS = re.compile(r"embed|wte|wpe")


@dataclass(frozen=True)
class Stretch:
    """Layers [start, end) that one slice makes; a config of whole models is one stretch of all layers."""

    start: int
    end: int
    shared: tuple[Mapping[str, Any], ...]  # `parameters` blocks, the narrowest scope first
    sources: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)  # the `parameters` of each model

    def scopes(self, model: Any = None) -> tuple[Mapping[str, Any], ...]:
        """The blocks to look in for a parameter of one model, or (None) of all of them together."""
        return self.shared if model is None else (self.sources[model], *self.shared)

    def depth(self, name: str) -> float:
        """Where a gradient is at this tensor, 0 to 1."""
        layer = layer_of(name)
        if layer is None:
            return 0.0
        return (layer - self.start) / (self.end - self.start - 1) if self.end - self.start > 1 else 1.0


def stretch_of(stretches: Sequence[Stretch], name: str) -> Stretch:
    """The slice that makes a tensor: embeddings belong to the first, final norm and head to the last."""
    layer = layer_of(name)
    if layer is None:
        return stretches[0] if _BEFORE_LAYERS.search(name) else stretches[-1]
    return next(stretch for stretch in stretches if stretch.start <= layer < stretch.end)


def conditions(scopes: Sequence[Mapping[str, Any]], parameter: str, where: str) -> list[Condition]:
    """The settings of a parameter in the order they are tried; what follows one for every tensor is left out.

    Raises BadRecipeError for anything that is no number, list of numbers or list of {filter, value}.
    """
    found: list[Condition] = []
    for scope in scopes:
        if scope.get(parameter) is None:
            continue
        raw = scope[parameter]
        several = isinstance(raw, list) and any(isinstance(item, dict) for item in raw)
        for item in raw if several else [raw]:
            text, value = None, item
            if isinstance(item, dict):
                _refuse_odd_keys(item, f"{where}.{parameter}")
                text, value = item.get("filter"), item.get("value")
            text = None if text in (None, "*") else text
            if text is not None and not isinstance(text, str):
                raise BadRecipeError(f"{where}.{parameter}: filter {short(text)} should be text")
            found.append((text, _value(value, f"{where}.{parameter}")))
            if text is None:
                return found
    return found


def value_at(tried: Sequence[Condition], name: str, depth: float) -> float | None:
    """A parameter at one tensor, None where no setting names it."""
    for text, value in tried:
        if text is None or text in name:
            return gradient(value, depth)
    return None


def gradient(value: Value, depth: float) -> float:
    """A number as it is; a list at `depth` 0 (first) to 1 (last), linear between its numbers, in float64."""
    if isinstance(value, float):
        return value
    place = depth * (len(value) - 1)
    below = int(place)
    above = min(len(value) - 1, below + 1)
    return (1 - (place - below)) * value[below] + (place - below) * value[above]


def as_selectors(
    tried: Sequence[Condition],
    wanted: Mapping[str, float],
    layers: int,
    label: str,
    default: float | None = None,
) -> tuple[Any, list[str]]:
    """`wanted` (tensor name -> number) as a recipe writes it, from the settings it came from; and filters unused.

    A recipe's last matching selector wins, mergekit's first filter, so their order turns round. Where a recipe
    reads a gradient otherwise (at the head and the norms), the tensor gets a selector of its own.
    """
    unused = [text for text, _ in tried if text and not any(text in name for name in wanted)]
    if len(set(wanted.values())) == 1:
        return next(iter(wanted.values())), unused
    spec: dict[str, Any] = {} if default is None else {DEFAULT: default}
    for text, value in reversed(tried):
        if text in unused:
            continue
        selector = DEFAULT if text is None else f"*{glob.escape(text)}*"
        spec.pop(selector, None)  # a filter written twice: the first one counts, so it goes to the end
        spec[selector] = value
    got = resolve({DEFAULT: math.nan, **spec}, wanted, label, layers)[0]
    spec |= {glob.escape(name): level for name, level in wanted.items() if got.get(name) != level}
    return {selector: list(v) if isinstance(v, tuple) else v for selector, v in spec.items()}, unused


def by_layer(wanted: Mapping[str, float]) -> Any:
    """`wanted` as selectors of its own: a default, ranges of layers that agree, and single tensors."""
    counts = Counter(wanted.values())
    default = counts.most_common(1)[0][0]
    if len(counts) == 1:
        return default
    spec: dict[str, Any] = {DEFAULT: default}
    layers: dict[int, set[float]] = {}
    for name, level in wanted.items():
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer, set()).add(level)
    whole = {layer: next(iter(levels)) for layer, levels in layers.items() if len(levels) == 1}
    runs: list[tuple[int, int, float]] = []
    for layer in sorted(layer for layer, level in whole.items() if level != default):
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == whole[layer]:
            runs[-1] = (runs[-1][0], layer, whole[layer])
        else:
            runs.append((layer, layer, whole[layer]))
    spec |= {f"layers {first}-{last}": level for first, last, level in runs}
    for name, level in wanted.items():
        if level != default and layer_of(name) not in whole:
            spec[glob.escape(name)] = level
    return spec


def _value(raw: object, where: str) -> Value:
    if not isinstance(raw, list):
        return _number(raw, where)
    if not raw:
        raise BadRecipeError(
            f"{where} is an empty list", "a gradient has a number for the first and last layer"
        )
    return tuple(_number(item, where) for item in raw)


def _number(raw: object, where: str) -> float:
    return float(raw) if isinstance(raw, bool) else number(raw, where)


def _refuse_odd_keys(item: Mapping[Any, Any], where: str) -> None:
    odd = [key for key in item if key not in ("filter", "value")]
    if odd or "value" not in item:
        raise BadRecipeError(f"{where}: {short(dict(item))} should have `value` and perhaps `filter`")
