"""What an adapter can do to one base tensor. Each change knows its own delta; all are read from disk by blocks.

    LoraFactor    delta = scale * B A, of a linear layer, or transposed (Conv1D, embedding)
    Experts       one LoraFactor for each expert of a fused (experts, rows, columns) tensor
    Replacement   delta = X - W, X a whole tensor saved with the adapter (modules_to_save, trained bias)
    Addition      delta = scale * x, x a vector saved with the adapter (lora_bias)
    Dora          delta = m / |W + s B A| * (W + s B A) - W, norms over each output's row; not linear in a weight

A weight w adds w * delta to the base tensor. For all but Dora that is what the weight means in PEFT, too; for
Dora it is the straight line between the base and the adapted weight, and whoever shows it says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.weights.tensorfile import Float32Array, TensorInfo, read_rows


@dataclass(frozen=True)
class LoraFactor:
    """One module's low-rank pair: delta = scale * B @ A, B (out, r), A (r, in), both as stored on disk."""

    module: str  # "model.layers.0.self_attn.q_proj"
    a: TensorInfo
    b: TensorInfo
    rank: int
    alpha: float
    scale: float
    transposed: bool = False  # the base stores (in, out): Conv1D, and embeddings as (vocabulary, width)
    tensor: str = ""  # the base tensor it changes; "" for the module's `.weight`

    @property
    def tensor_name(self) -> str:
        return self.tensor or f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base weight it fits, as stored there."""
        out, inside = self.b.shape[0], self.a.shape[1]
        return (inside, out) if self.transposed else (out, inside)

    def factors(self) -> tuple[Float32Array, Float32Array]:
        """L (rows, r) and R (r, columns), float32, unscaled: delta = scale * L @ R as the base stores it."""
        a, b = read_rows(self.a), read_rows(self.b)
        return (a.T, b.T) if self.transposed else (b, a)


@dataclass(frozen=True)
class Experts:
    """Low-rank changes of a fused tensor (experts, rows, columns), in PEFT's `target_parameters` layout."""

    module: str
    a: TensorInfo
    b: TensorInfo
    rank: int  # of each expert
    alpha: float
    scale: float
    experts: int
    transposed: bool
    tensor: str

    @property
    def tensor_name(self) -> str:
        return self.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        out, inside = self.b.shape[0], self.a.shape[1]
        return (self.experts, inside, out) if self.transposed else (self.experts, out, inside)

    def factors(self, expert: int) -> tuple[Float32Array, Float32Array]:
        """L (rows, r) and R (r, columns) of one expert, float32, unscaled."""
        a = read_rows(self.a, expert * self.rank, self.rank)
        b = np.ascontiguousarray(read_rows(self.b).reshape(-1, self.rank, self.experts)[:, :, expert])
        return (a.T, b.T) if self.transposed else (b, a)


@dataclass(frozen=True)
class Replacement:
    """A whole tensor X saved with the adapter. `shape` may have more rows than the base: new tokens."""

    module: str
    values: TensorInfo
    tensor: str

    @property
    def tensor_name(self) -> str:
        return self.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


@dataclass(frozen=True)
class Addition:
    """scale * x added to a vector of the base (PEFT's lora_bias: the bias of B)."""

    module: str
    values: TensorInfo
    scale: float
    tensor: str

    @property
    def tensor_name(self) -> str:
        return self.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


@dataclass(frozen=True)
class Dora:
    """Weight-decomposed LoRA (arXiv 2402.09353). `magnitude` has one number for each output."""

    low_rank: LoraFactor
    magnitude: TensorInfo

    @property
    def module(self) -> str:
        return self.low_rank.module

    @property
    def tensor_name(self) -> str:
        return self.low_rank.tensor_name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low_rank.shape


Change = LoraFactor | Experts | Replacement | Addition | Dora
