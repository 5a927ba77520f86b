"""A PEFT adapter folder as a LoRA GGUF that llama.cpp can mix while it runs.

llama.cpp adds `scale * alpha / r * B @ A` with one alpha for the file and r from each tensor's shape, or
`scale * B @ A` when alpha is 0. An adapter whose modules have several scales (alpha_pattern, rank_pattern with
rsLoRA) therefore has its own scale multiplied into B, in float32, and alpha 0; otherwise B stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import engine
from engine.errors import BadAdapterError, BadRecipeError
from engine.gguf.architecture import Architecture
from engine.gguf.convert import SOURCE_KEY
from engine.gguf.tensors import PlannedTensor, gguf_name, heads_to_permute, permute_heads
from engine.gguf.writer import bytes_needed, new_file, write_gguf
from engine.jobs.events import EventWriter
from engine.template_check import of_adapter
from engine.weights import Adapter, Checkpoint, LoraFactor, TensorInfo
from engine.weights.tensorfile import Float32Array, read_rows

TYPES = ("f32", "f16")


def convert_adapter(folder: Path, base_folder: Path, out: Path, kind: str, events: EventWriter) -> None:
    """Write the adapter as a LoRA GGUF of type f32 or f16.

    Raises: BadRecipeError (another type), BadAdapterError (not an adapter, does not fit the base, changes
    what llama.cpp cannot adapt), TargetExistsError, NoSpaceError.
    """
    if kind not in TYPES:
        raise BadRecipeError(f"a LoRA GGUF cannot be {kind}", f"types: {', '.join(TYPES)}")
    adapter, base = Adapter.open(folder), Checkpoint.open(base_folder)
    architecture = Architecture.of(base)
    matched = adapter.match(base)
    alpha = common_alpha(matched)
    tensors = plan_factors(matched, architecture, folded=alpha is None)

    def metadata(writer: Any) -> None:
        import gguf

        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha or 0.0)
        writer.add_name(adapter.name)
        source = {
            "name": adapter.name,
            "sha256": adapter.sha256,
            "base": base.name,
            **of_adapter("", adapter).to_dict(),
            "writer": f"medmerge {engine.__version__}",
        }
        writer.add_string(SOURCE_KEY, json.dumps(source, sort_keys=True))

    with new_file(out, bytes_needed(tensors, kind), "a LoRA GGUF") as partial:
        write_gguf(partial, architecture.name, metadata, tensors, kind, events, phase="adapter")


def common_alpha(matched: dict[str, LoraFactor]) -> float | None:
    """The one alpha with alpha / r = scale for every module (float32-exact), or None when there is none.

    For rsLoRA (scale = alpha / sqrt(r)) this is alpha * sqrt(r).
    """
    wanted = {np.float32(factor.scale * factor.rank) for factor in matched.values()}
    if len(wanted) != 1:
        return None
    alpha = float(wanted.pop())
    return alpha if alpha > 0 else None


def plan_factors(
    matched: dict[str, LoraFactor], architecture: Architecture, folded: bool
) -> list[PlannedTensor]:
    """`NAME.lora_a` (r, in) and `NAME.lora_b` (out, r) of every module, B's rows permuted like the base's.

    `folded` multiplies each module's scale into its B.
    """
    planned = []
    for name, factor in matched.items():
        target = gguf_name(name)
        if target is None:
            raise BadAdapterError(f"{factor.b.file}: {factor.module} has no name in llama.cpp")
        if name == "model.embed_tokens.weight" or (name == "lm_head.weight" and architecture.tied):
            raise BadAdapterError(
                f"{factor.b.file}: llama.cpp cannot adapt {name} while it runs",
                "merge it instead: medmerge merge, then medmerge gguf",
            )
        if factor.transposed:
            raise BadAdapterError(
                f"{factor.b.file}: {factor.module} is fan_in_fan_out, which {architecture.name} is not"
            )
        heads = heads_to_permute(name, architecture)
        scale = factor.scale if folded else 1.0
        a, b = factor.a, factor.b
        planned.append(PlannedTensor(f"{target}.lora_a", a.shape, a.name, _whole(a)))
        planned.append(PlannedTensor(f"{target}.lora_b", b.shape, b.name, _whole(b, heads, scale)))
    return planned


def _whole(tensor: TensorInfo, heads: int = 0, scale: float = 1.0) -> Callable[[], Iterator[Float32Array]]:
    def read() -> Iterator[Float32Array]:
        rows = read_rows(tensor)
        if scale != 1:
            rows = rows * np.float32(scale)
        yield permute_heads(rows, heads) if heads else rows

    return read
