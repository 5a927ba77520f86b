"""Adapter folders as the verifier reads them: B, A and the scale for each base tensor.

Written apart from engine/weights/adapter.py on purpose; only raw tensors are read through shared code.
PEFT's definition (Hu et al. 2021, arXiv 2106.09685; rsLoRA arXiv 2312.03732):
dW = s * B @ A with s = alpha / r, or alpha / sqrt(r) when `use_rslora`; A is (r, in), B is (out, r).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadAdapterError
from engine.merge.verify.rounding import Float32Array
from engine.weights.adapter import refuse_unsupported
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorFile, TensorInfo, read_rows

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Delta:
    """One adapter's change of one base tensor: scale * left @ right in the orientation the base stores."""

    label: str
    tensor: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    stored_transposed: bool  # fan_in_fan_out: the base holds (in, out), so the delta is (B A)^T = A^T B^T

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        out, inside = self.b.shape[0], self.a.shape[1]
        return (inside, out) if self.stored_transposed else (out, inside)

    def factors(self) -> tuple[Float32Array, Float32Array]:
        """left (rows, r) and right (r, columns) as float32, unscaled.

        Raises BadAdapterError when one holds NaN or infinity.
        """
        a, b = read_rows(self.a), read_rows(self.b)
        for info, values in ((self.a, a), (self.b, b)):
            if not np.isfinite(values).all():
                raise BadAdapterError(
                    f"{info.file}: {info.name} holds NaN or infinity", "the training run diverged"
                )
        if self.stored_transposed:
            return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return b, a


def read_deltas(label: str, folder: Path) -> dict[str, Delta]:
    """The deltas of one PEFT LoRA folder by base tensor name.

    Raises:
        BadAdapterError: not a LoRA folder, a kind whose delta is not scale * B A, or keys that do not pair.
    """
    config = _config(folder)
    refuse_unsupported(folder, config)
    if not (folder / WEIGHTS).is_file():
        raise BadAdapterError(
            f"{folder / WEIGHTS} is missing", "an adapter folder has config and safetensors"
        )
    file = TensorFile.open(folder / WEIGHTS)
    halves: dict[tuple[str, str], TensorInfo] = {}
    for key, info in file.tensors.items():
        module, part = _split_key(file.path, key)
        if (module, part) in halves:
            raise BadAdapterError(f"{file.path}: two {part} for {module}", "remove one of them")
        if len(info.shape) != 2 or not info.is_float:
            raise BadAdapterError(f"{file.path}: {key} is {info.dtype} {list(info.shape)}, expected a matrix")
        halves[module, part] = info
    deltas = {}
    for module in dict.fromkeys(module for module, _ in halves):
        a, b = halves.get((module, "A")), halves.get((module, "B"))
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise BadAdapterError(
                f"{file.path}: A and B of {module} do not belong together "
                f"(A {list(a.shape) if a else 'missing'}, B {list(b.shape) if b else 'missing'})"
            )
        scale = _scale(folder / CONFIG, config, module, a.shape[0])
        deltas[module + ".weight"] = Delta(
            label, module + ".weight", a, b, scale, bool(config.get("fan_in_fan_out"))
        )
    if not deltas:
        raise BadAdapterError(f"{file.path} holds no LoRA factors")
    return deltas


def check_fit(deltas: dict[str, Delta], base: Checkpoint) -> None:
    """Every delta must have its tensor in the base, with its shape. Raises BadAdapterError naming both."""
    for name, delta in deltas.items():
        tensor = base.tensors.get(name)
        if tensor is None:
            raise BadAdapterError(
                f"{delta.a.file}: {name} is not a tensor of {base.folder}",
                "this adapter belongs to another base",
            )
        if tensor.shape != delta.shape:
            raise BadAdapterError(
                f"{delta.a.file}: the delta of {name} is {list(delta.shape)}, and the tensor in {base.folder} "
                f"is {list(tensor.shape)}",
                "this adapter belongs to another base",
            )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadAdapterError(f"{path} cannot be read: {error}", f"an adapter folder has {CONFIG}") from error
    if not isinstance(config, dict):
        raise BadAdapterError(f"{path} should hold a JSON object")
    return config


def _split_key(path: Path, key: str) -> tuple[str, str]:
    """("model.layers.0.mlp.up_proj", "A") from base_model.model.model.layers.0.mlp.up_proj.lora_A.weight."""
    name = key.removeprefix("base_model.model.")
    for part in ("A", "B"):
        module, found, rest = name.partition(f".lora_{part}")
        # the rest names the adapter at most ("", ".weight", ".default.weight")
        if found and module and rest in ("", ".weight", ".default", ".default.weight"):
            return module, part
    raise BadAdapterError(
        f"{path}: {key} is not lora_A or lora_B of a linear layer", "its delta is not scale * B A"
    )


def _scale(path: Path, config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r (or alpha / sqrt(r)); the rank is that of the stored A, which the config must not contradict."""
    alpha = _pattern(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    said = _pattern(path, config, "rank_pattern", module, config.get("r"))
    if said != rank:
        raise BadAdapterError(
            f"{path}: says rank {said} for {module}, and its A has {rank} rows",
            "weights and config do not belong together",
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
        raise BadAdapterError(
            f"{path}: lora_alpha for {module} should be a positive number, and is {alpha!r}"
        )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(path: Path, config: dict[str, Any], name: str, module: str, default: Any) -> Any:
    """PEFT's rule (peft.utils.other.get_pattern_key): the first key that is the name, or ends it after a dot."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise BadAdapterError(f"{path}: {name} should be an object, and is {patterns!r}")
    for key, value in patterns.items():
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
                return value
        except re.error as error:
            raise BadAdapterError(f"{path}: {name} key {key!r} is no regular expression: {error}") from error
    return default
