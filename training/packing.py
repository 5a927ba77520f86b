"""Blocks of several documents whose tokens do not see each other.

A block holds token ids, labels and position ids that restart at 0 with every document. Given no attention mask,
transformers 5 derives a block-diagonal causal mask from those restarts; an all-ones mask would switch that off,
so `collate` never makes one (tests/training/test_packing.py compares the logits with the documents alone).

The packers plan on lengths alone and make a block when it is asked for, so documents may lie on disk.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np

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


class Documents(Protocol):
    """Where blocks take their documents from (`training.tokens.TokenStore`, or `InMemory`)."""

    lengths: np.ndarray

    def piece(self, document: int, start: int, end: int) -> Encoded: ...


class InMemory:
    """Documents in a list."""

    def __init__(self, documents: Sequence[Encoded]) -> None:
        self._documents = documents
        self.lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)

    def piece(self, document: int, start: int, end: int) -> Encoded:
        whole = self._documents[document]
        return Encoded(whole.ids[start:end], whole.labels[start:end])


class Blocks(Sequence[Block]):
    """The planned blocks of an epoch: block i consists of pieces[first[i] : first[i + 1]].

    pieces: int64 (n, 3), each row a document and the range of its tokens; kept as their number.
    tokens: of each block.
    """

    def __init__(self, documents: Documents, pieces: np.ndarray, first: np.ndarray) -> None:
        self._documents, self._pieces, self._first = documents, pieces, first
        lengths = np.concatenate([[0], np.cumsum(pieces[:, 2] - pieces[:, 1])])
        self.tokens = lengths[first[1:]] - lengths[first[:-1]]
        self.pieces = len(pieces)

    def __len__(self) -> int:
        return len(self._first) - 1

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        parts = []
        for document, start, end in self._pieces[self._first[index] : self._first[index + 1]].tolist():
            piece = self._documents.piece(document, start, end)
            # What precedes the first token of a piece is not in the block: it carries no loss.
            parts.append(Encoded(piece.ids, [IGNORE, *piece.labels[1:]]) if start else piece)
        return Block.of(parts)


def _documents(
    documents: Documents | Sequence[Encoded], order: np.ndarray | None
) -> tuple[Documents, np.ndarray]:
    found = documents if hasattr(documents, "lengths") else InMemory(documents)  # type: ignore[arg-type]
    return found, np.arange(len(found.lengths)) if order is None else order  # type: ignore[union-attr,return-value]


def cut_stream(
    documents: Documents | Sequence[Encoded], size: int, order: np.ndarray | None = None
) -> Blocks:
    """PT: documents one after the other, cut every `size` tokens.

    A document that crosses a border goes on in the next block as a document of its own: its first token there
    carries no loss, since what precedes it is not in the block. The last block may be shorter. `order` (numbers
    of documents, repeats allowed) says which ones, all in their order by default.
    """
    source, order = _documents(documents, order)
    lengths = source.lengths[order]
    order, lengths = order[lengths > 0], lengths[lengths > 0]
    if not len(order):
        return Blocks(source, np.empty((0, 3), np.int64), np.zeros(1, np.int64))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    total = int(ends[-1])
    borders = np.unique(
        np.concatenate([starts, np.arange(0, total, size)])
    )  # where a piece begins in the stream
    owner = np.searchsorted(ends, borders, side="right")
    begin = borders - starts[owner]
    stop = np.append(borders[1:], total) - starts[owner]
    first = np.searchsorted(borders, np.arange(0, total, size))
    return Blocks(source, np.stack([order[owner], begin, stop], axis=1), np.append(first, len(borders)))


def pack_whole(
    documents: Documents | Sequence[Encoded], size: int, order: np.ndarray | None = None
) -> Blocks:
    """SFT: whole documents into blocks of at most `size` tokens, best fit, longest first (greedy knapsack).

    Ties keep the given order, so the result depends on nothing but the input. Raises ValueError for a document
    longer than `size` (masking shortens them before).
    """
    source, order = _documents(documents, order)
    lengths = source.lengths[order]
    contents: list[list[int]] = []
    rooms: dict[int, list[int]] = {}  # free tokens: blocks with so many, as a heap
    sizes: list[int] = []  # the keys of `rooms`, sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if length > size:
            raise ValueError(f"document of {length} tokens does not fit into a block of {size}")
        place = bisect.bisect_left(sizes, length)
        if place < len(sizes):
            free = sizes[place]
            block = heapq.heappop(rooms[free])
            if not rooms[free]:
                del rooms[free]
                sizes.pop(place)
        else:
            free, block = size, len(contents)
            contents.append([])
        contents[block].append(index)
        left = free - length
        if left not in rooms:
            rooms[left] = []
            bisect.insort(sizes, left)
        heapq.heappush(rooms[left], block)
    return _whole(source, order, [sorted(content) for content in contents])


def one_each(documents: Documents | Sequence[Encoded], order: np.ndarray | None = None) -> Blocks:
    """No packing: every document is a block."""
    source, order = _documents(documents, order)
    return _whole(source, order, [[index] for index in range(len(order))])


def _whole(source: Documents, order: np.ndarray, contents: list[list[int]]) -> Blocks:
    chosen = order[np.array([index for content in contents for index in content], dtype=np.int64)]
    pieces = np.stack([chosen, np.zeros_like(chosen), source.lengths[chosen]], axis=1)
    first = np.concatenate([[0], np.cumsum([len(content) for content in contents], dtype=np.int64)])
    return Blocks(source, pieces, first.astype(np.int64))


def collate(blocks: Sequence[Block], pad: int) -> dict[str, torch.Tensor]:
    """int64 tensors (batch, longest): input_ids, labels, position_ids; no attention_mask, on purpose.

    Padding stands on the right as a document of its own (positions restart), with labels IGNORE; `padding` (a
    scalar) says how many tokens of it there are.
    """
    import torch

    longest = max(1, *(len(block.ids) for block in blocks))

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
        "padding": torch.tensor(longest * len(blocks) - sum(len(block.ids) for block in blocks)),
    }
