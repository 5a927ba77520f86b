"""In which order the blocks of a shard are done, and what comes before them.

Output blocks in file order; before a tensor's blocks, while the tensors ahead of it are written, its loading and
the passes it needs. So nobody waits long, and hashes can be taken in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from engine.merge.blocks import Block
from engine.merge.files import OpenFiles
from engine.merge.kernel import kernel
from engine.merge.layout import ShardPlan, TensorPlan, longer
from engine.merge.plan import Plan
from engine.merge.work import Work
from engine.weights.tensorfile import ITEM_SIZE

BLOCK_ELEMENTS: int | None = None  # None: what suits the kernel
COPY_BYTES = 1 << 20
LOOKAHEAD = 3  # tensors prepared before the one being written


@dataclass(frozen=True)
class Task:
    """A block of the output, or a block of a pass before it (`stage` > 0), or the loading of a tensor (no block)."""

    work: Work | None  # None: the tensor's bytes are copied
    tensor: TensorPlan
    block: Block | None
    stage: int = 0
    index: int = -1  # of the output's blocks, in file order

    @property
    def hashed(self) -> bool:
        """Whether its source bytes belong to the shard in order (a new head reads the embeddings again)."""
        assert self.block is not None
        inside = self.tensor.copied or self.block.first < self.tensor.source.rows
        return inside and self.tensor.source.name == self.tensor.target.name

    def span(self, target: bool) -> tuple[int, int]:
        """Absolute byte offset and length in the target or the source file."""
        assert self.block is not None
        info = self.tensor.target if target else self.tensor.source
        item = 1 if self.tensor.copied else ITEM_SIZE[info.dtype]
        return info.start + self.block.first * self.block.columns * item, self.block.elements * item


def block_elements() -> int:
    """Elements of a block: as many as suit the kernel in use."""
    return BLOCK_ELEMENTS or kernel().block_elements


def schedule(plan: Plan, shard: ShardPlan, files: OpenFiles, skip: int) -> Iterator[Task]:
    """Every task of a shard in an order in which nobody waits long: output blocks in file order, and before a
    tensor's blocks, while the tensors ahead of it are written, its loading and its passes.

    Args:
        skip: output blocks that are on disk already.
    """
    outputs: list[list[Task]] = [[] for _ in shard.tensors]
    works: list[Work | None] = []
    blocks: list[list[Block]] = []
    index = 0
    for place, tensor in enumerate(shard.tensors):
        own = list(blocks_of(tensor))
        inside = [b for b in own if tensor.copied or b.first < tensor.source.rows]
        blocks.append(inside)
        work = None if tensor.copied else Work(tensor, plan.recipe, files, len(inside))
        works.append(work)
        for block in own:
            if index >= skip:
                outputs[place].append(Task(work, tensor, block, 0, index))
            index += 1
    count = len(shard.tensors)
    for step in range(count + LOOKAHEAD):
        for place in range(max(0, step - LOOKAHEAD), min(step + 1, count)):  # the oldest tensor first
            work = works[place]
            behind = step - place
            if work is None or not outputs[place]:
                pass
            elif behind == 0:
                yield Task(work, shard.tensors[place], None)
            elif behind <= work.stages:
                yield from (Task(work, shard.tensors[place], block, behind) for block in blocks[place])
            if behind == LOOKAHEAD:
                yield from outputs[place]
                outputs[place], works[place], blocks[place] = [], None, []  # its factors are free to go


def output_tasks(shard: ShardPlan) -> Iterator[Task]:
    index = 0
    for tensor in shard.tensors:
        for block in blocks_of(tensor):
            yield Task(None, tensor, block, 0, index)
            index += 1


def blocks_of(tensor: TensorPlan) -> Iterator[Block]:
    """Blocks of whole rows that stay inside one expert, and on one side of where a longer table begins."""
    source, number = tensor.source, 0
    if tensor.copied:
        for first in range(0, source.nbytes, COPY_BYTES):
            yield Block(number, first, min(COPY_BYTES, source.nbytes - first), 1)
            number += 1
        return
    rows = tensor.target.rows
    edges = {0, rows, source.rows}
    edges |= {longer(part.change) for part in tensor.parts if longer(part.change) > source.rows}
    if len(source.shape) == 3:
        edges |= set(range(0, rows, source.shape[1]))
    ordered = sorted(edge for edge in edges if edge <= rows)
    step = max(1, block_elements() // max(1, source.columns))
    for begin, end in itertools.pairwise(ordered):
        for first in range(begin, end, step):
            yield Block(number, first, min(step, end - first), source.columns)
            number += 1
