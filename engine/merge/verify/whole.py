"""Changes that are no product of factors: tensors stored whole, biases, DoRA, and several changes at once.

See terms.py for what they are and for the protocols they follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.errors import BadAdapterError
from engine.merge.verify.bits import Rows, read_block
from engine.merge.verify.quick import Source, nothing
from engine.merge.verify.rounding import Array, Float32Array
from engine.merge.verify.terms import Computed, Delta, Exact, Loaded, LowRank, Part, Term, finite_rows
from engine.weights.tensorfile import TensorInfo


@dataclass(frozen=True)
class Whole:
    """X - W. `rows` says which row of X stands for each row of the base (-1: none, so no change)."""

    label: str
    tensor: str
    values: TensorInfo
    rows: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.rows is None:
            return self.values.shape
        return (len(self.rows), *self.values.shape[1:])

    @property
    def where(self) -> str:
        return f"{self.values.file}: {self.values.name}"

    def load(self, base: TensorInfo) -> Loaded:
        return _Difference(self.values, self.rows)


class _Difference:
    """X - W, read as it is needed. float32 rounds it once; a merge that sums X and W apart, in their sizes."""

    roundings = 1

    def __init__(self, values: TensorInfo, rows: Array | None) -> None:
        self.values, self.rows = values, rows

    largest = 0.0  # a difference is rounded once, in the same way by everyone

    def block(self, first: int, base: Rows) -> Part:
        if self.rows is None and self.values.rows >= first + len(base):
            return _DifferencePart(Rows.read(self.values, first, len(base)), base)
        return _DifferencePart(Rows.of(self._values(first, base)), base)

    def _values(self, first: int, base: Rows) -> Float32Array:
        if self.rows is None:
            return read_block(self.values, first, len(base)).reshape(base.values.shape)
        wanted = self.rows[first : first + len(base)]
        there = np.flatnonzero(wanted >= 0)
        found = base.values.copy()
        runs = np.split(there, np.flatnonzero(np.diff(wanted[there]) != 1) + 1) if there.size else []
        for run in runs:  # rows that follow each other in X are read at once
            read = read_block(self.values, int(wanted[run[0]]), run.size)
            found[run] = read.reshape(run.size, -1)
        return found


class _DifferencePart:
    def __init__(self, values: Rows, base: Rows) -> None:
        self.values, self.base = values, base

    @cached_property
    def dense(self) -> Float32Array:
        return np.asarray(self.values.values - self.base.values)

    @property
    def source(self) -> Source:
        return self.values.source

    def exact(self, where: Array) -> Exact:
        value = self.values.at(where) - self.base.at(where)
        return value, np.abs(value)


@dataclass(frozen=True)
class Bias:
    """scale * x added to a vector of the base."""

    label: str
    tensor: str
    values: TensorInfo
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def where(self) -> str:
        return f"{self.values.file}: {self.values.name}"

    def load(self, base: TensorInfo) -> Loaded:
        return LowRank(np.ones((1, 1), np.float32), finite_rows(self.values).reshape(1, -1), self.scale)


@dataclass(frozen=True)
class DoraDelta:
    """Weight-decomposed LoRA; `magnitude` holds one number for each output."""

    low_rank: Delta
    magnitude: TensorInfo

    @property
    def label(self) -> str:
        return self.low_rank.label

    @property
    def tensor(self) -> str:
        return self.low_rank.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low_rank.shape

    @property
    def where(self) -> str:
        return f"{self.magnitude.file}: {self.magnitude.name}"

    def load(self, base: TensorInfo) -> Loaded:
        return _Dora(self, base)


class _Dora:
    """factor * (W + s B A) - W with factor = m / norm, by row, or by column where the base stores (in, out)."""

    def __init__(self, term: DoraDelta, base: TensorInfo) -> None:
        self.low_rank = term.low_rank.load(base)
        self.by_column = term.low_rank.stored_transposed
        self.roundings = self.low_rank.roundings + 8
        magnitude = finite_rows(term.magnitude).reshape(-1).astype(np.float64)
        squares = np.zeros(base.columns if self.by_column else base.rows)
        step, largest = max(1, (1 << 16) // max(1, base.columns)), 0.0
        for first in range(0, base.rows, step):
            count = min(step, base.rows - first)
            values = read_block(base, first, count).astype(np.float64)
            largest = max(largest, float(np.abs(values).max()))
            left = self.low_rank.left[first : first + count].astype(np.float64)
            values += self.low_rank.scale * (left @ self.low_rank.right.astype(np.float64))
            if self.by_column:
                squares += np.einsum("rc,rc->c", values, values)
            else:
                squares[first : first + count] = np.einsum("rc,rc->r", values, values)
        norms = np.sqrt(squares)
        if not norms.all():
            raise BadAdapterError(f"{term.where}: the adapted weight has an output that is all zero")
        self.factor = magnitude / norms
        self.factor32 = self.factor.astype(np.float32)

        self.largest = float(np.abs(self.factor).max()) * (largest + self.low_rank.largest) + largest

    def block(self, first: int, base: Rows) -> Part:
        return _DoraPart(self, first, base)


class _DoraPart(Computed):
    def __init__(self, term: _Dora, first: int, base: Rows) -> None:
        self.product = term.low_rank.block(first, base)
        self.term, self.base = term, base
        self.dense = base.values + self.product.dense
        rows = slice(first, first + len(base))
        self.dense *= term.factor32 if term.by_column else term.factor32[rows, None]
        self.dense -= base.values

    def exact(self, where: Array) -> Exact:
        delta, size = self.product.exact(where)
        base, width = self.base.at(where), self.base.columns
        at = where % width if self.term.by_column else where // width + self.product.first
        factor = self.term.factor[at]
        return factor * (base + delta) - base, np.abs(factor) * (np.abs(base) + size) + np.abs(base)


@dataclass(frozen=True)
class Sum:
    """Several changes of one tensor by one adapter, each seen from the base."""

    terms: tuple[Term, ...]

    @property
    def label(self) -> str:
        return self.terms[0].label

    @property
    def tensor(self) -> str:
        return self.terms[0].tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def where(self) -> str:
        return self.terms[0].where

    def load(self, base: TensorInfo) -> Loaded:
        return _Added([term.load(base) for term in self.terms])


class _Added:
    def __init__(self, parts: Sequence[Loaded]) -> None:
        self.parts = parts
        self.roundings = max(part.roundings for part in parts) + len(parts)

    @property
    def largest(self) -> float:
        return sum(part.largest for part in self.parts)

    def block(self, first: int, base: Rows) -> Part:
        return _AddedPart([part.block(first, base) for part in self.parts])


class _AddedPart(Computed):
    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.dense = parts[0].dense.copy()
        for part in parts[1:]:
            self.dense += part.dense

    def exact(self, where: Array) -> Exact:
        pairs = [part.exact(where) for part in self.parts]
        return np.sum([p[0] for p in pairs], axis=0), np.sum([p[1] for p in pairs], axis=0)


@dataclass(frozen=True)
class Nothing:
    """No change: an end of a slerp that is the base itself."""

    label: str
    tensor: str
    shape: tuple[int, ...]
    where: str = ""

    def load(self, base: TensorInfo) -> Loaded:
        return _Zero()


class _Zero:
    roundings = 0
    largest = 0.0

    def block(self, first: int, base: Rows) -> Part:
        return Absent(base)


class Absent:
    """No change of a block."""

    def __init__(self, base: Rows) -> None:
        self.base = base

    @cached_property
    def dense(self) -> Float32Array:
        return np.zeros_like(self.base.values)

    @property
    def source(self) -> Source:
        return nothing(self.base.source)

    def exact(self, where: Array) -> Exact:
        return np.zeros(where.size), np.zeros(where.size)
