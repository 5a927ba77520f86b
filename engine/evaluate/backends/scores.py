"""Log-likelihoods of given tokens under a GGUF file: contexts and what may follow them. Used by gguf.py alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.evaluate.backends.sequences import Piece, Sequences

MOST_SEQUENCES = 64  # in llama.cpp's memory at a time

# (context, what may follow it): token ids, all non-empty
Scored = tuple[Sequence[int], Sequence[Sequence[int]]]


def parts_of(groups: Sequence[tuple[int, Scored]]) -> Iterator[list[tuple[int, Scored]]]:
    """The groups of a batch in parts of at most MOST_SEQUENCES continuations (one group is always allowed)."""
    part: list[tuple[int, Scored]] = []
    count = 0
    for index, group in groups:
        if part and count + len(group[1]) > MOST_SEQUENCES:
            yield part
            part, count = [], 0
        part.append((index, group))
        count += len(group[1])
    if part:
        yield part


def logprobs_of(memory: Sequences, groups: Sequence[Scored]) -> list[list[list[float]]]:
    """log P(token | all before it) in nats for each token of each continuation of each group's context.

    A context is read once for all its continuations. Log-softmax of float32 logits, summed in float64.
    """
    found: list[list[list[float]]] = [[[] for _ in answers] for _, answers in groups]
    pieces: list[Piece] = []
    what: list[tuple[int, int]] = []  # (group, continuation; -1: the context) of each piece
    first = 0
    for number, (context, answers) in enumerate(groups):
        owners = tuple(range(first, first + len(answers)))
        first += len(answers)
        pieces.append(Piece(owners, 0, context, frozenset({len(context) - 1})))
        what.append((number, -1))
        for k, answer in enumerate(answers):
            if len(answer) > 1:
                inputs = answer[:-1]
                pieces.append(Piece((owners[k],), len(context), inputs, frozenset(range(len(inputs)))))
                what.append((number, k))
    for piece, index, logits in memory.read(pieces):
        number, k = what[piece]
        answers = groups[number][1]
        top = logits.max()
        total = float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
        if k < 0:
            for n, answer in enumerate(answers):
                found[number][n].append(float(logits[answer[0]]) - total)
        else:
            found[number][k].append(float(logits[answers[k][index + 1]]) - total)
    return found


def tokens_of(group: Scored) -> int:
    context, answers = group
    return len(context) + sum(len(answer) for answer in answers)
