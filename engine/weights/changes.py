"""What an adapter can do to one base tensor. Each change knows its own delta; all are read from disk by blocks.

    LoraFactor    delta = scale * B A, of a linear layer, or transposed (Conv1D, embedding)
    ExpertFactor  the same for one expert's tensor, cut from factors that were trained for all experts as one
    Experts       one low-rank change for each expert of a fused (experts, rows, columns) tensor
    Replacement   delta = X - W, X a whole tensor saved with the adapter (modules_to_save, trained bias)
    TokenRows     delta = x_i - W_i for some rows i only (trainable_token_indices)
    Addition      delta = scale * x, x a vector saved with the adapter (lora_bias)
    Dora          delta = m / |W + s B A| * (W + s B A) - W, norms over each output's row; not linear in a weight
    Sum           several of them on one tensor: their deltas, each taken from W, add up

A weight w adds w * delta to the base tensor. For all but Dora that is what the weight means in PEFT, too; for
Dora it is the straight line between the base and the adapted weight, and whoever shows it says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.weights.stacked import StackedColumns
from engine.weights.tensorfile import ITEM_SIZE, Float32Array, TensorInfo, read_bytes, read_rows, widen


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

    def factors(self, stacked: StackedColumns | None = None) -> tuple[Float32Array, Float32Array]:
        """L (rows, r) and R (r, columns), float32, unscaled: delta = scale * L @ R as the base stores it.

        `stacked` keeps what experts share, for who takes many of them; a module by itself shares nothing.
        """
        a, b = read_rows(self.a), read_rows(self.b)
        return (a.T, b.T) if self.transposed else (b, a)


@dataclass(frozen=True)
class Experts:
    """Low-rank changes of a fused tensor (experts, rows, columns), in PEFT's `target_parameters` layout.

    A (experts * r, in) holds expert e in rows e * r ... ; B (out, r * experts) holds column k of expert e at
    k * experts + e (PEFT's `ParamWrapper.get_delta_weight`), or, where `grouped`, at e * r + k (Unsloth's own
    layout, told by `lora_B_layout: grouped_by_expert` in the config).
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    rank: int  # of each expert
    alpha: float
    scale: float
    experts: int
    transposed: bool  # the base stores (experts, in, out)
    tensor: str
    grouped: bool = False

    @property
    def tensor_name(self) -> str:
        return self.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        out, inside = self.b.shape[0], self.a.shape[1]
        return (self.experts, inside, out) if self.transposed else (self.experts, out, inside)

    def factors(
        self, expert: int, stacked: StackedColumns | None = None
    ) -> tuple[Float32Array, Float32Array]:
        """L (rows, r) and R (r, columns) of one expert, float32, unscaled."""
        a = read_rows(self.a, expert * self.rank, self.rank)
        if stacked is not None:
            b = stacked.of(self.b, expert, self.experts, self.grouped, 0, self.b.rows)
        else:
            columns = expert_slice(expert, self.rank, self.experts, self.grouped)
            b = expert_columns(self.b, 0, self.b.rows, columns)
        return (a.T, b.T) if self.transposed else (b, a)


def expert_slice(expert: int, rank: int, experts: int, grouped: bool) -> slice:
    """The columns of a stacked B (out, rank * experts) that are one expert's, in the order of its ranks."""
    return slice(expert * rank, (expert + 1) * rank) if grouped else slice(expert, None, experts)


def expert_columns(b: TensorInfo, first: int, count: int, columns: slice) -> Float32Array:
    """Some columns of rows `first : first + count`, float32; only what is taken is widened."""
    size = ITEM_SIZE[b.dtype]
    data = read_bytes(b, first * b.columns * size, count * b.columns * size)
    taken = np.frombuffer(data, f"<u{size}").reshape(count, b.columns)[:, columns]
    return widen(taken.tobytes(), b.dtype).reshape(taken.shape)


@dataclass(frozen=True)
class ExpertFactor(LoraFactor):
    """One expert's tensor where the base keeps experts apart and the adapter was trained on the fused ones.

    transformers 5 fuses `experts.3.gate_proj` and `experts.3.up_proj` into rows of `experts.gate_up_proj` when
    it loads them. L is rows `first_row ...` of the expert's B, R the expert's A; `a` and `b` are the stacked ones.
    """

    expert: int = 0
    experts: int = 1
    first_row: int = 0
    rows: int = 0
    grouped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.a.shape[1])

    def factors(self, stacked: StackedColumns | None = None) -> tuple[Float32Array, Float32Array]:
        """L (rows, r) and R (r, columns), float32, unscaled."""
        if stacked is not None:
            left = stacked.of(self.b, self.expert, self.experts, self.grouped, self.first_row, self.rows)
        else:
            columns = expert_slice(self.expert, self.rank, self.experts, self.grouped)
            left = expert_columns(self.b, self.first_row, self.rows, columns)
        return left, read_rows(self.a, self.expert * self.rank, self.rank)


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
class TokenRows:
    """Rows of an embedding trained alone: row `rows[i]` becomes row i of `values` (n, width).

    `shape` is the base tensor's own.
    """

    module: str
    values: TensorInfo
    rows: tuple[int, ...]
    tensor: str
    shape: tuple[int, ...]

    @property
    def tensor_name(self) -> str:
        return self.tensor


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


@dataclass(frozen=True)
class Sum:
    """Several changes of one tensor by one adapter, as an embedding saved whole and adapted by LoRA besides.

    delta = sum of the parts' deltas, each taken from the base's W; never holds a Dora. All have one shape.
    """

    parts: tuple[LoraFactor | Experts | Replacement | TokenRows | Addition, ...]

    @property
    def module(self) -> str:
        return self.parts[0].module

    @property
    def tensor_name(self) -> str:
        return self.parts[0].tensor_name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape


Change = LoraFactor | Experts | Replacement | TokenRows | Addition | Dora | Sum


def tensors_of(change: Change) -> Iterator[TensorInfo]:
    """Every tensor of the adapter's file that decides this change."""
    match change:
        case LoraFactor() | Experts():
            yield change.a
            yield change.b
        case Replacement() | TokenRows() | Addition():
            yield change.values
        case Dora():
            yield from tensors_of(change.low_rank)
            yield change.magnitude
        case Sum():
            for part in change.parts:
                yield from tensors_of(part)
