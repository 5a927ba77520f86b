"""Blocks of several documents whose tokens do not see each other.

A block holds token ids, labels and position ids that restart at 0 with every document. Given no attention mask,
transformers 5 derives a block-diagonal causal mask from those restarts; an all-ones mask would switch that off,
so `collate` never makes one (tests/training/test_packing.py compares the logits with the documents alone).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.masking import IGNORE, Encoded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Block:
    """One row of a batch: three lists of the same length."""

    ids: list[int]
    labels: list[int]
    positions: list[int]

    @classmethod
    def of(cls, documents: Sequence[Encoded]) -> Block:
        return cls(
            [token for document in documents for token in document.ids],
            [label for document in documents for label in document.labels],
            [position for document in documents for position in range(len(document.ids))],
        )


def cut_stream(documents: Sequence[Encoded], size: int) -> list[Block]:
    """PT: documents one after the other, cut every `size` tokens.

    A document that crosses a border goes on in the next block as a document of its own: its first token there
    carries no loss, since what precedes it is not in the block. The last block may be shorter.
    """
    blocks: list[Block] = []
    current: list[Encoded] = []
    room = size
    for document in documents:
        start = 0
        while start < len(document.ids):
            end = min(start + room, len(document.ids))
            labels = document.labels[start:end]
            current.append(Encoded(document.ids[start:end], [IGNORE, *labels[1:]]))
            room -= end - start
            start = end
            if room == 0:
                blocks.append(Block.of(current))
                current, room = [], size
    if current:
        blocks.append(Block.of(current))
    return blocks


def pack_whole(documents: Sequence[Encoded], size: int) -> list[Block]:
    """SFT: whole documents into blocks of at most `size` tokens, best fit, longest first (greedy knapsack).

    Ties keep the given order, so the result depends on nothing but the input. Raises ValueError for a document
    longer than `size` (masking shortens them before).
    """
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index].ids))
    contents: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, block), sorted
    for index in order:
        length = len(documents[index].ids)
        if length > size:
            raise ValueError(f"document of {length} tokens does not fit into a block of {size}")
        place = bisect.bisect_left(spaces, (length, -1))
        if place < len(spaces):
            free, block = spaces.pop(place)
        else:
            free, block = size, len(contents)
            contents.append([])
        contents[block].append(index)
        bisect.insort(spaces, (free - length, block))
    return [Block.of([documents[index] for index in sorted(content)]) for content in contents]


def one_each(documents: Sequence[Encoded]) -> list[Block]:
    """No packing: every document is a block."""
    return [Block.of([document]) for document in documents]


def collate(blocks: Sequence[Block], pad: int) -> dict[str, torch.Tensor]:
    """int64 tensors (batch, longest): input_ids, labels, position_ids; no attention_mask, on purpose.

    Padding stands on the right as a document of its own (positions restart), with labels IGNORE.
    """
    import torch

    longest = max(len(block.ids) for block in blocks)

    def padded(parts: Sequence[list[int]], value: int | None) -> torch.Tensor:
        rows = []
        for part in parts:
            missing = longest - len(part)
            rows.append(part + (list(range(missing)) if value is None else [value] * missing))
        return torch.tensor(rows, dtype=torch.long)

    return {
        "input_ids": padded([block.ids for block in blocks], pad),
        "labels": padded([block.labels for block in blocks], IGNORE),
        "position_ids": padded([block.positions for block in blocks], None),
    }
