"""Where the tensors of the output lie: one plan for each tensor and each shard, every offset known beforehand.

Where dtype, shapes and names stay, a shard's header is the input's own, byte for byte; otherwise the new header
is laid out here: another dtype, a longer table of tokens, a head of its own where the base shares its embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import BadAdapterError
from engine.merge.inputs import MERGEABLE_DTYPES
from engine.merge.recipe import DTYPES, Recipe
from engine.merge.vocabulary import Rows, is_table
from engine.weights import LoraFactor, TensorFile, TensorInfo
from engine.weights.changes import Change, Replacement, Sum
from engine.weights.tensorfile import ITEM_SIZE, encode_header

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """One entry's share in one tensor. `change` None: the entry is the reference there, its delta is 0."""

    label: str
    weight: float  # as it counts: after normalize, and times lambda where the method is linear
    change: Change | None
    density: float = 1.0
    rows: Rows | None = None  # vocabulary tables: the row of each of our tokens in the entry's, -1 for none

    @property
    def factor(self) -> LoraFactor:
        """The low-rank pair. Raises BadAdapterError where the change is another kind."""
        if not isinstance(self.change, LoraFactor):
            raise BadAdapterError(f"adapter {self.label}: its change is no low-rank pair")
        return self.change


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: where it is read, where it is written, what is done (nothing: copied)."""

    source: TensorInfo
    target: TensorInfo
    parts: tuple[Part, ...] = ()
    base_weight: float = 1.0  # what the reference counts before the parts: 1, or a sum of weights
    t: float = 0.5  # slerp only

    @property
    def copied(self) -> bool:
        """Its bytes are the input's: nothing is added and the dtype stays."""
        same = self.source.dtype == self.target.dtype and self.source.shape == self.target.shape
        return not self.parts and same and self.base_weight == 1.0


@dataclass(frozen=True)
class ShardPlan:
    """One output file: same name as the input shard. `header` is the 8 length bytes and the JSON."""

    source: TensorFile
    name: str
    header: bytes
    tensors: tuple[TensorPlan, ...]
    size: int


@dataclass(frozen=True)
class Layout:
    """Where the tensors of the output lie."""

    recipe: Recipe
    parts: dict[str, tuple[Part, ...]]
    base_weights: dict[str, float]
    t: dict[str, float]
    untied: bool
    has_head: bool  # the input stores a head already, though it says it shares it

    def shard(self, shard: TensorFile) -> ShardPlan:
        """The output file of one input file, in the same order, with a head of its own where one is needed."""
        sources = [(tensor.name, tensor) for tensor in shard.tensors.values()]
        if self.untied and not self.has_head:
            sources += [(HEAD, tensor) for name, tensor in sources if name.endswith(EMBEDDINGS)]
        tensors = [(name, self._dtype(source), self._shape(name, source), source) for name, source in sources]
        same = len(sources) == len(shard.tensors) and all(
            dtype == source.dtype and shape == source.shape for _, dtype, shape, source in tensors
        )
        header = shard.header if same else encode_header([t[:3] for t in tensors], shard.metadata)
        path, position, planned = self.recipe.output / shard.path.name, len(header), []
        for name, dtype, shape, source in tensors:
            target = TensorInfo(name, dtype, shape, path, position, math.prod(shape) * ITEM_SIZE[dtype])
            planned.append(
                TensorPlan(
                    source,
                    target,
                    self.parts.get(name, ()),
                    self.base_weights.get(name, 1.0) if source.is_float else 1.0,
                    self.t.get(name, 0.5),
                )
            )
            position += target.nbytes
        return ShardPlan(shard, shard.path.name, header, tuple(planned), position)

    def _dtype(self, tensor: TensorInfo) -> str:
        wanted = DTYPES[self.recipe.dtype] if self.recipe.dtype else tensor.dtype
        return wanted if tensor.dtype in MERGEABLE_DTYPES else tensor.dtype

    def _shape(self, name: str, source: TensorInfo) -> tuple[int, ...]:
        """The source's shape, with the new tokens of adapters that save a longer table."""
        parts = [part for part in self.parts.get(name, ()) if part.rows is None]
        rows = [longer(part.change) for part in parts] if is_table(name) else []
        return (max([source.shape[0], *rows]), *source.shape[1:]) if rows else source.shape


def longer(change: Change | None) -> int:
    """How many rows a change has of a table saved whole, which may be more than the base has; 0 for others."""
    saved = change.parts if isinstance(change, Sum) else (change,)
    return max((part.shape[0] for part in saved if isinstance(part, Replacement) and part.shape), default=0)
