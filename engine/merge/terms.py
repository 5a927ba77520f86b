"""What one entry adds to one tensor, ready to be computed block by block in float32."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from engine.errors import BadAdapterError
from engine.merge.blocks import Block, Buffers
from engine.merge.files import OpenFiles
from engine.merge.kernel import kernel
from engine.merge.kernel.plain import LARGEST, Buffer, Float32, Float64, Packed, widen
from engine.merge.layout import Part, TensorPlan
from engine.weights.changes import Addition, Dora, Experts, LoraFactor, Replacement, Sum, TokenRows
from engine.weights.tensorfile import ITEM_SIZE, TensorInfo, read_rows


@dataclass
class Loaded:
    """A part of a tensor with its factors in memory. `weight` starts as the part's, and slerp changes it."""

    part: Part
    source: TensorInfo
    files: OpenFiles
    weight: float
    packed: list[Packed] = field(default_factory=list)  # scale * B A, without the weight; one for each expert
    vector: Float32 | None = None  # Addition: scale * x; Dora: m
    column_norms: Float32 | None = None  # Dora on a transposed weight
    inner: list[Loaded] = field(default_factory=list)  # Sum: its parts
    sharp: bool = False  # into float32: X - W first, as (1 - w) W + w X would lose bits of a small change

    @property
    def dense(self) -> bool:
        """Whether its delta is no plain low-rank product."""
        return not isinstance(self.part.change, LoraFactor | Experts | None)

    @property
    def whole(self) -> bool:
        """Whether it is summed as w X, with the reference counting w less, instead of w (X - W)."""
        return isinstance(self.part.change, Replacement) and not self.sharp

    @property
    def needs_columns(self) -> bool:
        return isinstance(self.part.change, Dora) and self.part.change.low_rank.transposed

    def delta(self, block: Block, base: Buffer, out: Float32) -> None:
        """out = d on the block, float32, flat."""
        match self.part.change:
            case None:
                out[:] = 0.0
            case LoraFactor() | Experts():
                self._low_rank(block, out)
            case Replacement():
                values, dtype = self._whole(block, base)
                kernel().difference(values, dtype, base, self.source.dtype, out)
            case Addition():
                assert self.vector is not None
                out[:] = self.vector
            case TokenRows() as tokens:
                self._token_rows(tokens, block, base, out)
            case Dora():
                self._dora(block, base, out)
            case Sum():
                self.inner[0].delta(block, base, out)
                more = np.empty_like(out)
                for part in self.inner[1:]:
                    part.delta(block, base, more)
                    out += more

    def add_scaled(self, block: Block, base: Buffer, out: Float32, add: bool, buffers: Buffers) -> None:
        """out = (or +=) weight * X for a whole tensor (the reference then counts less), weight * d otherwise."""
        if self.whole:
            values, dtype = self._whole(block, base)
            kernel().scaled(values, dtype, self.weight, add, out)
            return
        own = buffers.values(block.elements)
        self.delta(block, base, own)
        kernel().scaled(own.view(np.uint8), "F32", self.weight, add, out)

    def column_squares(self, block: Block, base: Buffer, values: Float32) -> Float64:
        """Sum over the block's rows of (W + s B A)^2, float64 (columns,)."""
        self._low_rank(block, values)
        kernel().scaled(base, self.source.dtype, 1.0, True, values)
        return np.einsum("ij,ij->j", *(2 * [values.reshape(block.rows, block.columns).astype(np.float64)]))

    def set_columns(self, norms: Float64) -> None:
        self.column_norms = norms.astype(np.float32)

    def new_rows(self, block: Block) -> Float32:
        """Rows of a longer table that the reference does not have, flat float32: there it counts as 0."""
        out = np.empty(block.elements, np.float32)
        match self.part.change:
            case Replacement(values=info):
                raw = np.empty(block.elements * ITEM_SIZE[info.dtype], np.uint8)
                self.files.read(info, block.first * block.columns * ITEM_SIZE[info.dtype], raw)
                return widen(raw, info.dtype, block.elements)
            case Sum():
                out[:] = sum((part.new_rows(block) for part in self.inner), np.float32(0))
            case LoraFactor():
                self._low_rank(block, out)
            case _:
                out[:] = 0.0
        return out

    def _low_rank(self, block: Block, out: Float32) -> None:
        rows = self.packed[0].left.shape[0]
        kernel().low_rank(self.packed[block.first // rows], block.first % rows, block.rows, out)

    def _whole(self, block: Block, base: Buffer) -> tuple[Buffer, str]:
        """X on the block as bytes and their dtype; the reference's own row where a token is not there."""
        assert isinstance(self.part.change, Replacement)
        info = self.part.change.values
        size = block.columns * ITEM_SIZE[info.dtype]
        if self.part.rows is None:
            raw = np.empty(block.rows * size, np.uint8)
            self.files.read(info, block.first * size, raw)
            return raw, info.dtype
        values = widen(base, self.source.dtype, block.elements).reshape(block.rows, block.columns)
        wanted = self.part.rows[block.first : block.first + block.rows]
        row = np.empty(size, np.uint8)
        for i in np.flatnonzero(wanted >= 0):
            self.files.read(info, int(wanted[i]) * size, row)
            values[i] = widen(row, info.dtype, block.columns)
        return values.reshape(-1).view(np.uint8), "F32"

    def _token_rows(self, tokens: TokenRows, block: Block, base: Buffer, out: Float32) -> None:
        out[:] = 0.0
        size = ITEM_SIZE[self.source.dtype] * block.columns
        for place, row in enumerate(tokens.rows):
            inside = row - block.first
            if 0 <= inside < block.rows:
                values = read_rows(tokens.values, place, 1).reshape(-1)
                own = widen(base[inside * size : (inside + 1) * size], self.source.dtype, block.columns)
                out[inside * block.columns : (inside + 1) * block.columns] = values - own

    def _dora(self, block: Block, base: Buffer, out: Float32) -> None:
        """d = m / |V| * V - W with V = W + s B A, norms over each output (a row, or a column where transposed)."""
        assert self.vector is not None
        self._low_rank(block, out)
        kernel().scaled(base, self.source.dtype, 1.0, True, out)
        matrix = out.reshape(block.rows, block.columns)
        if self.needs_columns:
            assert self.column_norms is not None
            matrix *= self.vector / self.column_norms
        else:
            norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
            magnitude = self.vector[block.first : block.first + block.rows]
            matrix *= (magnitude / norms).astype(np.float32)[:, None]
        kernel().scaled(base, self.source.dtype, -1.0, True, out)


def load(part: Part, tensor: TensorPlan, files: OpenFiles, alone: bool) -> Loaded:
    """Read what a part stores. `alone`: its own product is needed, not only the stacked one of `stack`."""
    loaded = Loaded(part, tensor.source, files, part.weight, sharp=tensor.target.dtype == "F32" and not alone)
    match part.change:
        case Sum() as several:
            loaded.inner = [
                load(replace(part, change=change), tensor, files, alone=True) for change in several.parts
            ]
        case LoraFactor() as factor if alone:
            loaded.packed = [_pack(*factor.factors(files.stacked), factor.scale)]
        case Experts() as experts if alone:
            pairs = [experts.factors(expert, files.stacked) for expert in range(experts.experts)]
            loaded.packed = [_pack(*pair, experts.scale) for pair in pairs]
        case Addition() as addition:
            loaded.vector = (read_rows(addition.values).astype(np.float64) * addition.scale).astype(
                np.float32
            )
            loaded.vector = loaded.vector.reshape(-1)
        case Dora() as dora:
            loaded.packed = [_pack(*dora.low_rank.factors(files.stacked), dora.low_rank.scale)]
            loaded.vector = read_rows(dora.magnitude).reshape(-1)
    return loaded


def stack(parts: list[Loaded], tensor: TensorPlan) -> list[Packed]:
    """All low-rank parts with their weights as one product, or one for each expert; empty without any.

    weight * scale goes into the left factor in float64 and is rounded once to float32.
    """
    low = [p for p in parts if isinstance(p.part.change, LoraFactor | Experts) and p.weight != 0.0]
    if not low:
        return []
    experts = {p.part.change.experts for p in low if isinstance(p.part.change, Experts)}
    return [_stacked(low, tensor, expert) for expert in range(max(experts, default=1))]


def _stacked(parts: list[Loaded], tensor: TensorPlan, expert: int) -> Packed:
    left, right = [], []
    for part in parts:
        change = part.part.change
        assert isinstance(change, LoraFactor | Experts)
        kept = part.files.stacked
        one, other = change.factors(kept) if isinstance(change, LoraFactor) else change.factors(expert, kept)
        scaled = one.astype(np.float64) * (part.weight * change.scale)
        if np.abs(scaled).max(initial=0.0) > LARGEST["F32"]:
            raise BadAdapterError(
                f"{change.b.file}: weight {part.weight} makes {tensor.target.name} overflow",
                "choose a smaller weight",
            )
        left.append(scaled.astype(np.float32))
        right.append(other)
    return kernel().pack(np.hstack(left), np.vstack(right))


def _pack(left: Float32, right: Float32, scale: float) -> Packed:
    return kernel().pack((left.astype(np.float64) * scale).astype(np.float32), right)
