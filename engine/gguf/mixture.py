"""A GGUF straight from a base and adapters: W + sum of weight * scale * B @ A in float32, rounded once.

No merged checkpoint is written. Against merging first, one rounding (to the checkpoint's dtype) is saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadAdapterError, BadModelError, BadRecipeError
from engine.gguf.convert import Conversion
from engine.template_check import of_adapter
from engine.weights import Adapter, Checkpoint, LoraFactor, TensorInfo
from engine.weights.tensorfile import Float32Array, read_rows

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Mixture:
    """A linear merge that needs no checkpoint: W + sum over adapters of weight * delta.

    `weights`: by label one number, or a mapping of base tensor names to numbers (tensors not named: 0), as a
    plan resolves them. `asked` is what the person wrote, for the file's metadata; by default the weights.
    """

    base: Path
    adapters: Mapping[str, Path]
    weights: Mapping[str, float | Mapping[str, float]]
    asked: Mapping[str, Any] | None = None

    def weight(self, label: str, tensor: str) -> float:
        own = self.weights[label]
        return float(own.get(tensor, 0.0)) if isinstance(own, Mapping) else float(own)

    @property
    def uniform(self) -> dict[str, float] | None:
        """The weights by label where each is one number, else None."""
        numbers = {label: weight for label, weight in self.weights.items() if not isinstance(weight, Mapping)}
        return {k: float(w) for k, w in numbers.items()} if len(numbers) == len(self.weights) else None

    def by_tensor(self) -> dict[str, dict[str, float]]:
        """The weights of the labels that have several, by tensor."""
        return {label: dict(own) for label, own in self.weights.items() if isinstance(own, Mapping)}


def plan_mixture(mixture: Mixture, pre: str = "") -> Conversion:
    """A conversion of the merged weights.

    Raises: BadRecipeError (labels or weights that make no sense), BadModelError (a quantised base and what
    converting refuses), BadAdapterError (of another base, NaN, DoRA and other changes that are no scale * B A,
    tied embeddings), each by name.
    """
    if not mixture.adapters or set(mixture.adapters) != set(mixture.weights):
        raise BadRecipeError("a mixture needs adapters and a weight for each of them")
    base = Checkpoint.open(mixture.base)
    if base.config.get("quantization_config"):
        raise BadModelError(
            f"{base.folder / 'config.json'} has quantization_config: quantised weights cannot be merged exactly",
            "use the base before it was quantised",
        )
    parts: dict[str, list[tuple[LoraFactor, float]]] = {}
    described: dict[str, Any] = {}
    for label, path in mixture.adapters.items():
        adapter = Adapter.open(path)
        factors = adapter.match(base)
        _check(adapter, factors, base)
        for name, factor in factors.items():
            weight = mixture.weight(label, name)
            if not math.isfinite(weight):
                raise BadRecipeError(f"the weight of {label} is {weight} for {name}, which is no number")
            if weight:
                parts.setdefault(name, []).append((factor, weight))
        asked = (mixture.asked or {}).get(label, mixture.weights[label])
        asked = dict(asked) if isinstance(asked, Mapping) else asked
        described[label] = {
            "name": adapter.name, "sha256": adapter.sha256, "weight": asked, **of_adapter(label, adapter).to_dict(),
        }  # fmt: skip

    def rows(tensor: TensorInfo, first: int, count: int) -> Float32Array:
        block = read_rows(tensor, first, count)
        for factor, weight in parts.get(tensor.name, ()):
            block += delta_rows(factor, weight, first, count)
        return block

    return Conversion.plan(mixture.base, pre, rows, described)


def _check(adapter: Adapter, factors: Mapping[str, LoraFactor], base: Checkpoint) -> None:
    """Raise BadAdapterError for a change of tied embeddings, and for factors that hold NaN or infinity."""
    for name, factor in factors.items():
        if base.tied and name in _TABLES:
            raise BadAdapterError(
                f"{adapter.file.path}: changes {name}, and {base.folder} ties its embeddings",
                "merge it into a checkpoint first (medmerge merge), which unties them, then: medmerge gguf MERGE",
            )
        for info in (factor.a, factor.b):
            if not np.isfinite(read_rows(info)).all():
                raise BadAdapterError(
                    f"{info.file}: {info.name} holds NaN or infinity",
                    "this adapter is broken: train it again, or use an earlier checkpoint of its run",
                )


def delta_rows(factor: LoraFactor, weight: float, first: int, count: int) -> Float32Array:
    """Rows first : first + count of weight * scale * B @ A, float32, shape (count, in)."""
    scale = np.float32(weight * factor.scale)
    if factor.transposed:  # the base stores (in, out): rows are columns of A
        a = read_rows(factor.a)[:, first : first + count]
        product = (scale * a.T) @ read_rows(factor.b).T
    else:
        product = (scale * read_rows(factor.b, first, count)) @ read_rows(factor.a)
    return product.astype(np.float32, copy=False)
