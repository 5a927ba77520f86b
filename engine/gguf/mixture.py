"""A GGUF straight from a base and adapters: W + sum of weight * scale * B @ A in float32, rounded once.

No merged checkpoint is written. Against merging first, one rounding (to the checkpoint's dtype) is saved; the
recipe is resolved by engine.merge.plan, so selectors and refusals are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.gguf.convert import Conversion
from engine.merge.plan import Part, make_plan, refuse_broken_adapters
from engine.merge.recipe import parse
from engine.weights import TensorInfo
from engine.weights.tensorfile import Float32Array, read_rows


def plan_mixture(base: Path, adapters: dict[str, dict[str, Any]], out: Path, pre: str = "") -> Conversion:
    """A conversion of the merged weights. `adapters` maps labels to {"path", "weight"} as in a recipe.

    Raises BadRecipeError, BadModelError, BadAdapterError as a merge would.
    """
    document = {
        "base": str(base),
        "method": "linear",
        "adapters": adapters,
        "output": {"path": str(out)},
    }
    plan = make_plan(parse(document, "gguf", [Path.cwd()]))
    refuse_broken_adapters(plan)
    parts = {tensor.source.name: tensor.parts for tensor in plan.changed}
    described = {
        label: {"name": adapter.name, "sha256": adapter.sha256, "weight": plan.asked[label]}
        for label, adapter in plan.adapters.items()
    }

    def rows(tensor: TensorInfo, first: int, count: int) -> Float32Array:
        block = read_rows(tensor, first, count)
        for part in parts.get(tensor.name, ()):
            block += delta_rows(part, first, count)
        return block

    return Conversion.plan(base, pre, rows, described)


def delta_rows(part: Part, first: int, count: int) -> Float32Array:
    """Rows first : first + count of weight * scale * B @ A, float32, shape (count, in)."""
    factor = part.factor
    scale = np.float32(part.weight * factor.scale)
    if factor.transposed:  # the base stores (in, out): rows are columns of A
        a = read_rows(factor.a)[:, first : first + count]
        product = (scale * a.T) @ read_rows(factor.b).T
    else:
        product = (scale * read_rows(factor.b, first, count)) @ read_rows(factor.a)
    return product.astype(np.float32, copy=False)
