"""Weights per tensor: `default`, `layers 0-9`, and glob names, resolved against an adapter's own tensors.

A selector is matched against the tensor name and the module name (the tensor name without `.weight`), whole
and case-sensitive, so `model.layers.1.*` never means layers 10 to 19. When several match one tensor, the one
written last wins; `default` is what no selector matched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from engine.errors import BadRecipeError

DEFAULT = "default"
_LAYERS = re.compile(r"layers?\s+(\d+)(?:\s*-\s*(\d+))?")
_LAYER_OF = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


def layer_of(tensor_name: str) -> int | None:
    """The layer number in a tensor name (`model.layers.12.mlp...` is 12), None outside the layers."""
    found = _LAYER_OF.search(tensor_name)
    return int(found[1]) if found else None


def matches(selector: str, tensor_name: str) -> bool:
    """Whether one selector (not `default`) covers a tensor."""
    layers = _LAYERS.fullmatch(selector.strip())
    if layers:
        number = layer_of(tensor_name)
        first, last = int(layers[1]), int(layers[2] or layers[1])
        return number is not None and first <= number <= last
    return fnmatchcase(tensor_name, selector) or fnmatchcase(tensor_name.removesuffix(".weight"), selector)


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
    weights: Mapping[str, float], tensor_names: Iterable[str], label: str
) -> tuple[dict[str, float], dict[str, int]]:
    """The weight of every tensor of an adapter, and how many tensors each selector decided.

    Raises:
        BadRecipeError: a selector that matches none of the adapter's tensors, or a tensor without a weight.
    """
    names = list(tensor_names)
    chosen: dict[str, float] = {}
    decided = dict.fromkeys(weights, 0)
    matched = dict.fromkeys(weights, False)
    for name in names:
        winner = DEFAULT if DEFAULT in weights else None
        for selector in weights:
            if selector != DEFAULT and matches(selector, name):
                winner, matched[selector] = selector, True
        if winner is None:
            raise BadRecipeError(
                f"adapter {label}: no selector gives {name} a weight", "add `default: NUMBER` to its weights"
            )
        chosen[name] = weights[winner]
        decided[winner] += 1
    for selector, hit in matched.items():
        if selector != DEFAULT and not hit:
            raise BadRecipeError(
                f"adapter {label}: selector {selector!r} matches none of its {len(names)} tensors",
                f"its tensors are named like {names[0]}",
            )
    return chosen, decided
