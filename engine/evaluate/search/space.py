"""The space of a layer-wise search: one number per adapter and group of layers, as weights per tensor.

Layer l of n belongs to group floor(l * groups / n). With `kinds` a group has two numbers, attention and the rest.
Tensors before the layers (embeddings) go with the first group, those after them with the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import BadRecipeError
from engine.merge.selectors import layer_of, matches

DIGITS = 4  # weights are rounded to so many decimals before they are tried, so that a recipe shows them whole
_LAYER_PART = re.compile(r"^(.*?(?:layers|layer|h|blocks|block)\.\d+\.[^.]+)\.")

Point = tuple[float, ...]
TensorWeights = dict[str, dict[str, float]]  # label -> base tensor name -> weight


@dataclass(frozen=True)
class Dimension:
    """One number of a point: the weight of one adapter on some of its tensors."""

    label: str
    first: int  # layers first..last
    last: int
    kind: str  # "", "attention" or "rest"
    tensors: tuple[str, ...]

    @property
    def title(self) -> str:
        """ "pt layers 0-6 attention"."""
        return f"{self.label} layers {self.first}-{self.last} {self.kind}".rstrip()


@dataclass(frozen=True)
class Space:
    dimensions: tuple[Dimension, ...]

    def weights(self, point: Sequence[float]) -> TensorWeights:
        """The weight of every tensor of every adapter at a point."""
        found: TensorWeights = {}
        for dimension, value in zip(self.dimensions, point, strict=True):
            found.setdefault(dimension.label, {}).update(dict.fromkeys(dimension.tensors, float(value)))
        return found

    def uniform(self, weights: Mapping[str, float]) -> Point:
        """The point where every group has its adapter's one weight."""
        return rounded([weights[dimension.label] for dimension in self.dimensions])

    def selectors(self, point: Sequence[float]) -> dict[str, dict[str, float]]:
        """The same weights as a recipe writes them, {label: {selector: weight}}, later ones before earlier ones.

        A group of one number is "layers 0-6"; where kinds differ, the rest is named by globs layer by layer;
        tensors outside the layers by name.
        """
        found: dict[str, dict[str, float]] = {}
        places = sorted(
            zip(self.dimensions, point, strict=True), key=lambda item: item[0].kind == "rest"
        )  # so that the globs of the rest stand after the ranges they override
        ranges = {(d.label, d.first) for d in self.dimensions if d.kind != "rest"}
        for dimension, value in places:
            chosen = found.setdefault(dimension.label, {})
            inside = [name for name in dimension.tensors if layer_of(name) is not None]
            if dimension.kind == "rest" and (dimension.label, dimension.first) in ranges:
                chosen.update(dict.fromkeys((_glob(name) for name in inside), float(value)))
            elif inside:
                chosen[f"layers {dimension.first}-{dimension.last}"] = float(value)
            chosen.update({name: float(value) for name in dimension.tensors if layer_of(name) is None})
        return found


def make_space(tensors: Mapping[str, Iterable[str]], layers: int, groups: int, kinds: bool) -> Space:
    """The space of adapters whose tensors are `tensors[label]`, on a model of so many layers.

    A group that an adapter does not touch has no dimension. Raises BadRecipeError for more groups than layers, or
    fewer than two dimensions.
    """
    if groups > layers:
        raise BadRecipeError(f"search.groups is {groups}, and the model has {layers} layers")
    found: dict[tuple[str, int, str], list[str]] = {}
    for label, names in tensors.items():
        for name in names:
            layer = layer_of(name)
            if layer is None:
                layer = 0 if re.search(r"embed|wte|wpe", name) else layers - 1
            kind = ("attention" if matches("attention", name) else "rest") if kinds else ""
            found.setdefault((label, layer * groups // layers, kind), []).append(name)
    order = {label: n for n, label in enumerate(tensors)}
    dimensions = []
    for label, group, kind in sorted(found, key=lambda key: (order[key[0]], *key[1:])):
        inside = [layer for layer in range(layers) if layer * groups // layers == group]
        names = tuple(found[label, group, kind])
        dimensions.append(Dimension(label, inside[0], inside[-1], kind, names))
    if len(dimensions) < 2:
        raise BadRecipeError(
            "the search has one weight only: that is what a sweep is for", "raise search.groups"
        )
    return Space(tuple(dimensions))


def rounded(values: Sequence[float]) -> Point:
    return tuple(round(float(value), DIGITS) + 0.0 for value in values)  # + 0.0: no minus zero


def _glob(name: str) -> str:
    """ "model.layers.3.mlp.*" for a tensor of that part of that layer."""
    found = _LAYER_PART.match(name)
    return f"{found[1]}.*" if found else name
