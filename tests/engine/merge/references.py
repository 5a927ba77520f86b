"""What a merge should be, computed with torch in float64 from the files, sharing no code with the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def load_model(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, whatever its shards."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def deltas(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """scale * B @ A and scale * |B| @ |A| in float64, by base tensor name (plain and rsLoRA, one rank)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    weights = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in weights.items():
        if ".lora_A." in key:
            b = weights[key.replace(".lora_A.", ".lora_B.")].double()
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            delta, size = scale * b @ a.double(), scale * b.abs() @ a.double().abs()
            found[name] = (delta.T, size.T) if config["fan_in_fan_out"] else (delta, size)
    return found


def assert_is_merge(
    merged: Path, base: Path, mixture: list[tuple[Path, Any]], dtype: torch.dtype | None = None
) -> None:
    """Every element is a right rounding of the float64 sum; untouched tensors keep their bytes.

    `mixture` pairs an adapter with its weight, or with a function of the tensor name. An element may be any
    value between round(v - e) and round(v + e), e bounding what float32 sums in any order may do:
    e = (terms + 4) * 2**-24 * (|W| + sum |w s| |B| |A|).
    """
    before, after = load_model(base), load_model(merged)
    assert before.keys() == after.keys()
    changes: dict[str, list[tuple[float, torch.Tensor, torch.Tensor, int]]] = {}
    for folder, weight in mixture:
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        for name, (delta, size) in deltas(folder).items():
            value = weight(name) if callable(weight) else weight
            changes.setdefault(name, []).append((value, delta, size, rank))
    for name, old in before.items():
        new = after[name]
        wanted = old.dtype if dtype is None else dtype
        assert new.dtype == wanted, name
        parts = [part for part in changes.get(name, []) if part[0] != 0]
        if not parts:
            assert _same_bytes(new, old if dtype is None or not old.is_floating_point() else old.to(dtype)), (
                name
            )
            continue
        exact = old.double() + sum(value * delta for value, delta, _, _ in parts)
        size = old.double().abs() + sum(abs(value) * size for value, _, size, _ in parts)
        error = (sum(rank for *_, rank in parts) + 4) * 2.0**-24 * size
        low, high = (exact - error).to(wanted).double(), (exact + error).to(wanted).double()
        wrong = (new.double() < low) | (new.double() > high)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are not right"


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
