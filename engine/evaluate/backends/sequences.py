"""Several token sequences in one llama.cpp context, read in few large batches. Used by gguf.py alone.

llama.cpp reads a batch of tokens of many sequences at once: that is what makes both a long prompt and many short
answers fast. Logits are made only where asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from engine.chat.runtime import LOG, Model
from engine.errors import ChildFailedError

BATCH = 512  # tokens llama.cpp reads at once
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """Tokens that go on in some sequences (one, or several that share them), from `position` on.

    logits: after which of the tokens the next one's logits are wanted (indices into `tokens`).
    """

    sequences: tuple[int, ...]
    position: int
    tokens: Sequence[int]
    logits: frozenset[int] = frozenset()


class Sequences:
    """The memory of up to `count` sequences of together `size` tokens. Not for concurrent use; close it."""

    def __init__(self, model: Model, count: int, size: int, threads: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = count
        settings.n_ctx = size
        settings.kv_unified = True  # sequences share what they have in common, and room goes to who needs it
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_outputs_max_per_seq = 0  # as many as a batch has tokens
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self.model, self.count, self.size = model, count, size
        LOG.last.clear()
        LOG.muted = True  # it warns of more room than one sequence may use
        try:
            self._context: Any = llama_cpp.llama_init_from_model(model._model, settings)
        finally:
            LOG.muted = False
        if not self._context:
            raise ChildFailedError(
                f"llama.cpp could not make room for {size} tokens of {count} sequences of {model.path.name}: "
                f"{LOG.reason() or 'no reason given'}",
                "not enough memory: a smaller batch_size, or shorter prompts and answers, need less",
            )
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, count)

    def close(self) -> None:
        """Free the memory."""
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def clear(self) -> None:
        """Forget everything: what is read next has its numbers, whatever was read before."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def forget(self, sequence: int) -> None:
        """Make room: this sequence is over."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), sequence, -1, -1)

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, int, Logits]]:
        """Read the pieces in order; gives (piece, index of the token, logits after it) where these were wanted.

        The logits are a view that is gone when the next ones come. Raises ChildFailedError when llama.cpp fails.
        """
        waiting: list[tuple[int, int]] = []  # (piece, token) of every place of the batch
        for number, piece in enumerate(pieces):
            for index in range(len(piece.tokens)):
                waiting.append((number, index))
                if len(waiting) == BATCH:
                    yield from self._decode(pieces, waiting)
                    waiting = []
        if waiting:
            yield from self._decode(pieces, waiting)

    def _decode(
        self, pieces: Sequence[Piece], places: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, Logits]]:
        batch = self._batch
        batch.n_tokens = len(places)
        wanted = []
        for place, (number, index) in enumerate(places):
            piece = pieces[number]
            batch.token[place] = piece.tokens[index]
            batch.pos[place] = piece.position + index
            batch.n_seq_id[place] = len(piece.sequences)
            for n, sequence in enumerate(piece.sequences):
                batch.seq_id[place][n] = sequence
            batch.logits[place] = index in piece.logits
            if index in piece.logits:
                wanted.append((number, index))
        LOG.last.clear()
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise ChildFailedError(
                f"llama.cpp could not read {len(places)} tokens with {self.model.path.name} (llama_decode gave {code})"
                + (f": {LOG.reason()}" if LOG.last else ""),
                "where memory is short, a smaller batch_size needs less",
            )
        if not wanted:
            return
        pointer = llama_cpp.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(pointer, shape=(len(wanted), self.model.vocabulary))
        for row, (number, index) in enumerate(wanted):
            yield number, index, rows[row]
