"""Log-likelihoods of given tokens under a model: the base of perplexity and multiple choice. Needs torch.

Sequences are right-padded in length-sorted batches. With causal attention padding on the right changes nothing
before it, so no mask is passed; logits are made only at the positions that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

TOKENS_PER_BATCH = 2048  # padded tokens: bounds logits to this times the vocabulary


def length_batches(
    lengths: Sequence[int], batch_size: int, tokens: int = TOKENS_PER_BATCH
) -> list[list[int]]:
    """Indices in batches of similar length, longest first; at most `batch_size` items and `tokens` padded tokens
    (one item is always allowed). Depends on the lengths only, so a resumed cell has the same batches."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and lengths[last[0]] * (len(last) + 1) <= tokens:
            last.append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def _logits_at(model: Any, sequences: Sequence[Sequence[int]], positions: Sequence[int]) -> torch.Tensor:
    """Logits (batch, len(positions), vocabulary) of right-padded sequences, only at these positions."""
    width = max(len(sequence) for sequence in sequences)
    padded = [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences]
    ids = torch.tensor(padded, device=model.device)
    keep = torch.tensor(positions, device=model.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits


def continuation_logprobs(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """log P(token | all before it) in nats for each token of each continuation, after its context.

    pairs: (context, continuation) token ids, both non-empty; one forward pass, float32 log-softmax.
    """
    sequences = [[*context, *continuation] for context, continuation in pairs]
    starts = [len(context) - 1 for context, _ in pairs]
    positions = sorted({p for s, (_, c) in zip(starts, pairs, strict=True) for p in range(s, s + len(c))})
    where = {position: column for column, position in enumerate(positions)}
    logits = _logits_at(model, sequences, positions)
    found = []
    for row, (start, (_, continuation)) in enumerate(zip(starts, pairs, strict=True)):
        columns = torch.tensor([where[start + k] for k in range(len(continuation))], device=logits.device)
        logprobs = torch.log_softmax(logits[row, columns].float(), dim=-1)
        targets = torch.tensor(list(continuation), device=logits.device)
        found.append([float(x) for x in logprobs.gather(1, targets[:, None])[:, 0]])
    return found


def next_token_logprobs(
    model: Any, contexts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log P(token | context) in nats for the candidate next tokens of each context; one forward pass."""
    last = [len(context) - 1 for context in contexts]
    positions = sorted(set(last))
    logits = _logits_at(model, contexts, positions)
    found = []
    for row, candidates in enumerate(tokens):
        logprobs = torch.log_softmax(logits[row, positions.index(last[row])].float(), dim=-1)
        found.append([float(logprobs[token]) for token in candidates])
    return found
