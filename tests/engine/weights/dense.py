"""Deltas in plain float64 numpy, read with the safetensors library: the reference for `Adapter.changes`.

Knows the arithmetic of each change and nothing of how tensors were found: those are what is tested.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from engine.weights import Adapter, Checkpoint
from engine.weights.changes import (
    Addition,
    Change,
    Dora,
    ExpertFactor,
    Experts,
    LoraFactor,
    Replacement,
    Sum,
    TokenRows,
)
from engine.weights.tensorfile import TensorInfo

Array = npt.NDArray[np.float64]


def stored(info: TensorInfo) -> Array:
    """A tensor of a file, read by the safetensors library (torch knows bf16), as float64."""
    with safe_open(info.file, "pt") as file:
        return np.asarray(file.get_tensor(info.name).double().numpy())


def delta(change: Change, base: Array) -> Array:
    """What the change adds to `base`; of a resized table: what its rows become, minus base where it has rows."""
    if isinstance(change, ExpertFactor):
        left, right = change.factors()
        return change.scale * left.astype(np.float64) @ right.astype(np.float64)
    if isinstance(change, LoraFactor):
        product = change.scale * stored(change.b) @ stored(change.a)
        return product.T if change.transposed else product
    if isinstance(change, Experts):
        parts = []
        for expert in range(change.experts):
            left, right = change.factors(expert)
            parts.append(change.scale * left.astype(np.float64) @ right.astype(np.float64))
        return np.stack(parts)
    if isinstance(change, Replacement):
        new = stored(change.values)
        return new - grown(base, new.shape[0]) if new.ndim else new - base
    if isinstance(change, TokenRows):
        out = np.zeros_like(base)
        for i, row in enumerate(change.rows):
            out[row] = stored(change.values)[i] - base[row]
        return out
    if isinstance(change, Addition):
        return change.scale * stored(change.values)
    if isinstance(change, Dora):
        adapted = base + delta(change.low_rank, base)
        axis = 0 if change.low_rank.transposed else 1
        norm = np.sqrt((adapted**2).sum(axis=axis, keepdims=True))
        magnitude = np.expand_dims(stored(change.magnitude).reshape(-1), axis)
        return magnitude / norm * adapted - base
    assert isinstance(change, Sum)
    return np.asarray(sum(delta(part, base) for part in change.parts))


def grown(base: Array, rows: int) -> Array:
    """The base with zero rows added, as many as a resized table has more."""
    return (
        np.concatenate([base, np.zeros((rows - base.shape[0], *base.shape[1:]))])
        if rows > len(base)
        else base
    )


def merged(adapter_folder: Path, base_folder: Path) -> dict[str, Array]:
    """Every tensor of base + adapter in float64; both sides of tied embeddings where one is changed."""
    base, adapter = Checkpoint.open(base_folder), Adapter.open(adapter_folder)
    weights = {name: stored(info) for name, info in base.tensors.items()}
    changes = adapter.changes(base)
    if base.tied and changes.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    out = dict(weights)
    for name, change in changes.items():
        found = delta(change, weights[name])
        out[name] = grown(weights[name], len(found)) + found
    return out
