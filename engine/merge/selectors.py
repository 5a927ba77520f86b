"""Numbers per tensor: `default`, `layers 0-9`, `attention`, `mlp` and glob names, resolved against tensors.

A selector is matched against the tensor name and the module name (the tensor name without `.weight`), whole
and case-sensitive, so `model.layers.1.*` never means layers 10 to 19. When several match one tensor, the one
written last wins; `default` is what no selector matched. A list of numbers is a gradient over depth: linear
interpolation from the first to the last layer (of the range, where the selector is one); tensors before the
layers have the first number, those after them the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from engine.errors import BadRecipeError

Level = float | tuple[float, ...]  # a number, or a gradient over depth
Spec = dict[str, Level]

DEFAULT = "default"
_LAYERS = re.compile(r"layers?\s+(\d+)(?:\s*-\s*(\d+))?")
_LAYER_OF = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_MODULE_KINDS = {
    "attention": re.compile(r"\.(?:self_attn|attn|attention|self_attention)\."),
    "mlp": re.compile(r"\.(?:mlp|feed_forward|ffn|block_sparse_moe)\."),
}
_FIRST = re.compile(r"embed|wte|wpe")  # tensors that come before the layers


def layer_of(tensor_name: str) -> int | None:
    """The layer number in a tensor name (`model.layers.12.mlp...` is 12), None outside the layers."""
    found = _LAYER_OF.search(tensor_name)
    return int(found[1]) if found else None


def layer_count(tensor_names: Iterable[str]) -> int:
    """How many layers the names count, 0 when there are none."""
    return max((number + 1 for name in tensor_names if (number := layer_of(name)) is not None), default=0)


def matches(selector: str, tensor_name: str) -> bool:
    """Whether one selector (not `default`) covers a tensor."""
    if selector in _MODULE_KINDS:
        return _MODULE_KINDS[selector].search(tensor_name) is not None
    layers = _LAYERS.fullmatch(selector.strip())
    if layers:
        number = layer_of(tensor_name)
        first, last = int(layers[1]), int(layers[2] or layers[1])
        return number is not None and first <= number <= last
    return fnmatchcase(tensor_name, selector) or fnmatchcase(tensor_name.removesuffix(".weight"), selector)


def matching(spec: Mapping[str, Level], tensor_name: str) -> list[str]:
    """The selectors of a spec that cover a tensor, in the order written; the last one wins over `default`."""
    return [selector for selector in spec if selector != DEFAULT and matches(selector, tensor_name)]


def check_selector(selector: str, where: str) -> None:
    """Raise BadRecipeError for a selector that can never mean anything."""
    layers = _LAYERS.fullmatch(selector.strip())
    if layers and layers[2] and int(layers[2]) < int(layers[1]):
        raise BadRecipeError(f"{where}: {selector!r} is an empty range", "write the smaller layer first")
    if not layers and re.match(r"layers?\b(?!\.)", selector):
        raise BadRecipeError(
            f"{where}: {selector!r} is not understood", 'layers are written "layers 0-9" or "layer 3"'
        )


def resolve(
    spec: Mapping[str, Level], tensor_names: Iterable[str], label: str, layers: int = 0, what: str = "weight"
) -> tuple[dict[str, float], dict[str, int]]:
    """The number of every tensor, and how many tensors each selector decided.

    Args:
        spec: selectors to numbers or gradients.
        tensor_names: the tensors the entry changes.
        label: whose they are, for errors ("pt").
        layers: how many layers the model has, for gradients.
        what: "weight", "density" or "t", for errors.

    Raises:
        BadRecipeError: a selector that matches none of these tensors, or a tensor without a number.
    """
    names = list(tensor_names)
    chosen: dict[str, float] = {}
    decided = dict.fromkeys(spec, 0)
    matched = dict.fromkeys(spec, False)
    for name in names:
        found = matching(spec, name)
        matched |= dict.fromkeys(found, True)
        if not found and DEFAULT not in spec:
            raise BadRecipeError(
                f"{label}: no selector gives {name} a {what}", f"add `default: NUMBER` to its {what}"
            )
        winner = found[-1] if found else DEFAULT
        chosen[name] = level_at(spec[winner], winner, name, layers)
        decided[winner] += 1
    for selector, hit in matched.items():
        if selector != DEFAULT and not hit:
            example = f"its tensors are named like {names[0]}" if names else "it changes no tensor"
            raise BadRecipeError(
                f"{label}: selector {selector!r} matches none of its {len(names)} tensors", example
            )
    return chosen, decided


def level_at(level: Level, selector: str, name: str, layers: int) -> float:
    """A number as it is; a gradient at the depth of a tensor, in float64."""
    if isinstance(level, float | int):
        return float(level)
    number = layer_of(name)
    if number is None:
        return level[0] if _FIRST.search(name) else level[-1]
    span = _LAYERS.fullmatch(selector.strip())
    first, last = (int(span[1]), int(span[2] or span[1])) if span else (0, layers - 1)
    depth = (number - first) / (last - first) if last > first else 0.0
    place = min(max(depth, 0.0), 1.0) * (len(level) - 1)
    below = min(int(place), len(level) - 2)
    part = place - below
    return (1 - part) * level[below] + part * level[below + 1]


def spec_to_document(spec: Spec) -> Any:
    """A spec as a recipe writes it: a plain number or list where there is only a default."""
    plain = {selector: list(level) if isinstance(level, tuple) else level for selector, level in spec.items()}
    return plain[DEFAULT] if list(plain) == [DEFAULT] else plain
