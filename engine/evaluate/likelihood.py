"""Log-likelihoods of given tokens under a model: the base of perplexity and multiple choice. Needs torch.

Sequences are right-padded in length-sorted batches. With causal attention padding on the right changes nothing
before it, so no mask is passed; logits are made only at the positions that are scored. Several continuations of
one context (`shared_logprobs`) read its keys and values from one pass over it.
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
    ids = torch.tensor(_padded(sequences, width), device=model.device)
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


@torch.inference_mode()
def shared_logprobs(
    model: Any, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[list[float]]]:
    """log P(token | all before it) in nats for each token of each of a context's continuations.

    answers[i][k]: token ids of continuation k of context i, non-empty. One pass over the contexts gives the first
    token of every continuation; where some have more, a second pass reads the kept keys and values of its context.
    Where that would save less than half of the tokens (long options of short questions), every continuation goes
    through the model with its own copy of the context, which is quicker then and needs no mask.
    """
    more = any(len(answer) > 1 for group in answers for answer in group)
    if more and not _worth_sharing(contexts, answers):
        pairs = [(context, a) for context, group in zip(contexts, answers, strict=True) for a in group]
        flat = iter(continuation_logprobs(model, pairs))
        return [[next(flat) for _ in group] for group in answers]
    width = max(len(context) for context in contexts)
    last = [len(context) - 1 for context in contexts]
    positions = sorted(set(last))
    output = model(
        input_ids=torch.tensor(_padded(contexts, width), device=model.device),
        use_cache=more,
        logits_to_keep=torch.tensor(positions, device=model.device),
    )
    found: list[list[list[float]]] = []
    for row, group in enumerate(answers):
        logprobs = torch.log_softmax(output.logits[row, positions.index(last[row])].float(), dim=-1)
        firsts = logprobs[torch.tensor([answer[0] for answer in group], device=logprobs.device)]
        found.append([[x] for x in firsts.tolist()])
    if more:
        _add_rest(model, output.past_key_values, [len(context) for context in contexts], answers, found)
    return found


def _add_rest(
    model: Any,
    cache: Any,
    lengths: Sequence[int],
    answers: Sequence[Sequence[Sequence[int]]],
    found: list[list[list[float]]],
) -> None:
    """Append the log-likelihoods of the second and later tokens; `cache` holds the right-padded contexts."""
    flat = [(i, k) for i, group in enumerate(answers) for k, answer in enumerate(group) if len(answer) > 1]
    steps = max(len(answers[i][k]) for i, k in flat) - 1
    device = model.device
    owner = torch.tensor([i for i, _ in flat], device=device)
    cache.batch_select_indices(owner)
    inputs = torch.tensor(_padded([answers[i][k][:-1] for i, k in flat], steps), device=device)
    length = torch.tensor(lengths, device=device)[owner][:, None]
    width = cache.get_seq_length()
    seen = (torch.arange(width, device=device)[None] < length).long()
    logits = model(
        input_ids=inputs,
        attention_mask=torch.cat([seen, torch.ones_like(inputs)], 1),  # what pads an answer comes after it
        position_ids=length + torch.arange(steps, device=device)[None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    for row, (i, k) in enumerate(flat):
        rest = list(answers[i][k][1:])
        logprobs = torch.log_softmax(logits[row, : len(rest)].float(), dim=-1)
        found[i][k] += logprobs.gather(1, torch.tensor(rest, device=device)[:, None])[:, 0].tolist()


def _worth_sharing(contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether passes over contexts and continuations hold at most half the tokens of all pairs written out."""
    counts = [len(context) for context in contexts]
    rest = sum(len(answer) for group in answers for answer in group)
    whole = sum(count * len(group) for count, group in zip(counts, answers, strict=True)) + rest
    return 2 * (sum(counts) + rest) <= whole


def _padded(sequences: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    return [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences]
