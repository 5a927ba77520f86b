"""Batched generation with a transformers model: left padding, finished rows leave the batch. Needs torch.

Why not `model.generate`: every sample draws from its own random stream (seed and sample id), so its text does
not depend on what else is in the run; finished rows stop costing time; and the model's generation_config
(Qwen3 ships top_k 20) is never mixed in silently. Greedy output equals `model.generate` (a test).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import BadDataError
from engine.evaluate.config import Decoding

_TAIL = 24  # tokens decoded to look for stop strings that are not one token


@dataclass(frozen=True)
class Generated:
    """raw: the text without its stop mark, special tokens kept. finish: `stop` (a stop mark) or `length`."""

    raw: str
    finish: str
    prompt_tokens: int
    new_tokens: int  # the stop token not counted


@dataclass(frozen=True)
class Stops:
    """What ends an answer: token ids, and strings the tokenizer has no single token for."""

    ids: frozenset[int]
    strings: tuple[str, ...]


def find_stops(tokenizer: Any, model: Any, marks: Sequence[str]) -> Stops:
    """The template's stop marks, the tokenizer's EOS and the EOS ids of the model's generation config."""
    ids: set[int] = set()
    strings = []
    for mark in marks:
        token = tokenizer.convert_tokens_to_ids(mark)
        if token is not None and token != tokenizer.unk_token_id:
            ids.add(int(token))
        else:
            strings.append(mark)
    named = [tokenizer.eos_token_id]
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    named += eos if isinstance(eos, list) else [eos]
    ids |= {int(token) for token in named if token is not None}
    return Stops(frozenset(ids), tuple(strings))


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    decoding: Decoding,
    seed: int,
    stops: Stops,
) -> list[Generated]:
    """Answers of one batch of prompts (token ids). `keys` are the sample ids that name the random streams.

    Raises BadDataError when a prompt fills the model's context.
    """
    window = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
    for prompt, key in zip(prompts, keys, strict=True):
        if not 0 < len(prompt) < window:
            raise BadDataError(
                f"sample {key}: its prompt has {len(prompt)} tokens, the model's context {window}"
            )
    width = max(len(prompt) for prompt in prompts)
    device = model.device
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    streams = [stream(seed, key) for key in keys]
    new: list[list[int]] = [[] for _ in prompts]
    finish = ["length"] * len(prompts)
    alive = list(range(len(prompts)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    while alive:
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        tokens = pick(output.logits[:, -1].float(), decoding, [streams[i] for i in alive])
        keep = []
        for row, (index, token) in enumerate(zip(alive, tokens, strict=True)):
            if token in stops.ids:
                finish[index] = "stop"
                continue
            new[index].append(token)
            if stops.strings and ended(tokenizer, new[index], stops):
                finish[index] = "stop"
            elif len(new[index]) < min(decoding.max_new_tokens, window - len(prompts[index])):
                keep.append(row)
        if len(keep) < len(alive) and keep:
            chosen = torch.tensor(keep, device=device)
            cache.batch_select_indices(chosen)
            mask, positions = mask[chosen], positions[chosen]
        alive = [alive[row] for row in keep]
        ids = torch.tensor([[tokens[row]] for row in keep], device=device)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [
        Generated(answer_text(tokenizer, tokens, stops), finish[n], len(prompts[n]), len(tokens))
        for n, tokens in enumerate(new)
    ]


def stream(seed: int, key: str) -> torch.Generator:
    """The random stream of one sample: seeded by SHA-256 of seed and sample id, on the CPU."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def pick(logits: torch.Tensor, decoding: Decoding, streams: Sequence[torch.Generator]) -> list[int]:
    """The next token of each row of logits (rows, vocabulary).

    Temperature, then top-k, then top-p (the smallest set of likeliest tokens with at least that mass), then one
    uniform number of the row's stream against the cumulative probability.
    """
    if decoding.greedy:
        return [int(token) for token in logits.argmax(-1)]
    ordered, tokens = torch.sort(logits / decoding.temperature, dim=-1, descending=True, stable=True)
    if decoding.top_k:
        ordered[:, decoding.top_k :] = -torch.inf
    mass = torch.softmax(ordered, -1).double()
    if decoding.top_p < 1:
        mass[mass.cumsum(-1) - mass >= decoding.top_p] = 0
    cumulative = mass.cumsum(-1).cpu()
    drawn = []
    for row, generator in enumerate(streams):
        target = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[row, -1]
        last = int((mass[row] > 0).sum()) - 1
        place = min(int(torch.searchsorted(cumulative[row], target, right=True)), last)
        drawn.append(int(tokens[row, place]))
    return drawn


def ended(tokenizer: Any, tokens: list[int], stops: Stops) -> bool:
    """Whether an answer has come to a stop string."""
    tail = tokenizer.decode(tokens[-_TAIL:], clean_up_tokenization_spaces=False)
    return any(mark in tail for mark in stops.strings)


def answer_text(tokenizer: Any, tokens: list[int], stops: Stops) -> str:
    """The text of an answer's tokens before any stop string; special tokens are kept."""
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for mark in stops.strings:
        text = text.partition(mark)[0]
    return str(text)
