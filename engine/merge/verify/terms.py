"""What one adapter or model adds to one base tensor, W: the deltas of every kind, dense and by element.

    Delta        scale * B @ A, of a linear layer, or transposed (Conv1D, embeddings)          (out, in) or (in, out)
    ExpertDelta  one such product for each expert of a fused tensor                            (experts, rows, columns)
    Whole        X - W, X a tensor stored whole: of a model, of modules_to_save, a bias        any
    Bias         scale * x, PEFT's lora_bias                                                   (out,)
    DoraDelta    m / |W + s B A| (W + s B A) - W, norms over each output (arXiv 2402.09353)    as Delta
    Sum          several of them by one adapter on one tensor

`load` reads what is small, `block` computes rows: `dense` in float32, `exact` single elements in float64 with the
size their error is measured in. Any float32 evaluation of an element lies within `roundings` * 2^-24 * size of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.errors import BadAdapterError
from engine.merge.verify.bits import Rows
from engine.merge.verify.quick import DELTA, Source
from engine.merge.verify.rounding import Array, Float32Array, Float64Array
from engine.weights.tensorfile import TensorInfo, read_rows

Exact = tuple[Float64Array, Float64Array]  # deltas, sizes


class Part(Protocol):
    """A term's change of a block of rows."""

    @property
    def dense(self) -> Float32Array:
        """(rows, columns)"""
        ...

    @property
    def source(self) -> Source:
        """The same for the compiled loops."""
        ...

    def exact(self, where: Array) -> Exact:
        """Delta and size at flat positions of the block."""
        ...


class Loaded(Protocol):
    """A term ready to compute."""

    @property
    def roundings(self) -> int: ...
    @property
    def largest(self) -> float:
        """Bound of the sizes of all its elements (0 where every evaluation gives the same float32)."""
        ...

    def block(self, first: int, base: Rows) -> Part:
        """Rows `first` onwards, as many as `base`, the base's own there, has."""
        ...


class Term(Protocol):
    """A change by label. `shape` is that of the tensor it makes."""

    @property
    def label(self) -> str: ...
    @property
    def tensor(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def where(self) -> str:
        """The file and key, for errors."""
        ...

    def load(self, base: TensorInfo) -> Loaded: ...


def finite_rows(info: TensorInfo, first: int = 0, count: int | None = None) -> Float32Array:
    """A small tensor, or some of its rows, as float32. Raises BadAdapterError when it holds NaN or infinity."""
    values = read_rows(info, first, count)
    if not np.isfinite(values).all():
        raise BadAdapterError(f"{info.file}: {info.name} holds NaN or infinity", "the training run diverged")
    return values


@dataclass(frozen=True)
class Delta:
    """One adapter's low-rank change of one base tensor: scale * left @ right as the base stores it."""

    label: str
    tensor: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    stored_transposed: bool  # the base holds (in, out), so the delta is (B A)^T = A^T B^T
    expert: int = 0  # which of the `experts` whose factors A and B hold
    experts: int = 1
    rows: tuple[int, int] | None = None  # the rows of B that are this tensor's
    grouped: bool = False  # B's columns lie expert by expert (Unsloth), not rank by rank (PEFT)

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def shape(self) -> tuple[int, ...]:
        out, inside = self.b.shape[0], self.a.shape[1]
        out = out if self.rows is None else self.rows[1] - self.rows[0]
        return (inside, out) if self.stored_transposed else (out, inside)

    @property
    def where(self) -> str:
        return f"{self.a.file}: {self.a.name}"

    def factors(self) -> tuple[Float32Array, Float32Array]:
        """left (rows, r) and right (r, columns) as float32, unscaled.

        Raises BadAdapterError when one holds NaN or infinity.
        """
        a, b = finite_rows(self.a, self.expert * self.rank, self.rank), finite_rows(self.b)
        if self.rows is not None:
            b = b[slice(*self.rows)]
        if self.experts > 1:
            b = np.ascontiguousarray(b[:, _columns(self.expert, self.experts, self.rank, self.grouped)])
        if self.stored_transposed:
            return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return b, a

    def load(self, base: TensorInfo) -> LowRank:
        return LowRank(*self.factors(), self.scale)


class LowRank:
    """scale * left @ right, both in memory."""

    def __init__(self, left: Float32Array, right: Float32Array, scale: float) -> None:
        self.left, self.right, self.scale = left, right, scale
        self.scaled = (left.astype(np.float64) * scale).astype(np.float32)
        self.row_norms = abs(scale) * np.linalg.norm(left.astype(np.float64), axis=1)
        self.column_norms = np.linalg.norm(right.astype(np.float64), axis=0)
        self.roundings = right.shape[0] + 3

    @property
    def largest(self) -> float:
        """Bound of the sizes of all elements."""
        return float(self.row_norms.max(initial=0.0) * self.column_norms.max(initial=0.0))

    def block(self, first: int, base: Rows) -> Product:
        return Product(self, first, self.scaled[first : first + len(base)] @ self.right)


class Computed:
    """A part that is computed: its delta lies in memory."""

    dense: Float32Array

    @property
    def source(self) -> Source:
        return Source(self.dense.reshape(-1), DELTA)


class Product(Computed):
    """Some rows of a LowRank."""

    def __init__(self, term: LowRank, first: int, dense: Float32Array) -> None:
        self.term, self.first, self.dense = term, first, dense

    def exact(self, where: Array) -> Exact:
        term, width = self.term, self.dense.shape[1]
        rows, columns = where // width + self.first, where % width
        picked = term.left[rows].astype(np.float64)
        value = term.scale * np.einsum("nr,rn->n", picked, term.right[:, columns].astype(np.float64))
        return value, term.row_norms[rows] * term.column_norms[columns]


@dataclass(frozen=True)
class ExpertDelta:
    """Low-rank changes of a fused tensor in PEFT's `target_parameters` layout (peft.tuners.lora.ParamWrapper).

    A is (experts * r, in), expert by expert; B is (out, r * experts) with the expert running fastest, or slowest
    where `grouped`.
    """

    label: str
    tensor: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    experts: int
    stored_transposed: bool  # the base holds (experts, in, out)
    grouped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        out, inside = self.b.shape[0], self.a.shape[1]
        return (self.experts, inside, out) if self.stored_transposed else (self.experts, out, inside)

    @property
    def where(self) -> str:
        return f"{self.a.file}: {self.a.name}"

    def load(self, base: TensorInfo) -> Loaded:
        a, b = finite_rows(self.a), finite_rows(self.b)
        rank = a.shape[0] // self.experts
        parts = []
        for expert in range(self.experts):
            left = b[:, _columns(expert, self.experts, rank, self.grouped)]
            right = a[expert * rank : (expert + 1) * rank]
            if self.stored_transposed:
                left, right = right.T, left.T
            parts.append(LowRank(np.ascontiguousarray(left), np.ascontiguousarray(right), self.scale))
        return _Stacked(parts, self.shape[1])


def _columns(expert: int, experts: int, rank: int, grouped: bool) -> slice:
    return slice(expert * rank, (expert + 1) * rank) if grouped else slice(expert, None, experts)


class _Stacked:
    """Products one below the other: row i is row i % rows of product i // rows."""

    def __init__(self, parts: Sequence[LowRank], rows: int) -> None:
        self.parts, self.rows = parts, rows
        self.roundings = parts[0].roundings

    @property
    def largest(self) -> float:
        return max(part.largest for part in self.parts)

    def block(self, first: int, base: Rows) -> Part:
        pieces, row, end = [], first, first + len(base)
        while row < end:
            inside = row % self.rows
            count = min(self.rows - inside, end - row)
            pieces.append(self.parts[row // self.rows].block(inside, base.part(row - first, count)))
            row += count
        return pieces[0] if len(pieces) == 1 else _StackedPart(pieces)


class _StackedPart(Computed):
    """Rows of several products, one below the other."""

    def __init__(self, pieces: Sequence[Product]) -> None:
        self.pieces = pieces
        self.dense = np.concatenate([piece.dense for piece in pieces])
        self.ends = np.cumsum([piece.dense.size for piece in pieces])

    def exact(self, where: Array) -> Exact:
        value, size = np.empty(where.size), np.empty(where.size)
        which = np.searchsorted(self.ends, where, side="right")
        for i in np.unique(which):
            here, piece = which == i, self.pieces[i]
            value[here], size[here] = piece.exact(where[here] - (self.ends[i] - piece.dense.size))
        return value, size
