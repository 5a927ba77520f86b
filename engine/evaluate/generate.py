"""Batched generation with a transformers model: left padding, finished rows make room for others. Needs torch.

Why not `model.generate`: every sample draws from its own random stream (seed and sample id), so its text does
not depend on what else is in the run; finished rows make room for the next; and the model's generation_config
(Qwen3 ships top_k 20) is never mixed in silently. Greedy output equals `model.generate` (a test).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from engine.errors import BadDataError, NotFiniteError
from engine.evaluate.config import Decoding

_REFILL = 0.25  # share of the slots that must be free before new prompts are read
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
    slots: int = 0,
) -> list[Generated]:
    """Answers to prompts (token ids). `keys` are the sample ids that name the random streams.

    slots: how many are written at the same time (0: all). As answers end, the next prompts in order take their
    places, so that a short answer does not wait for a long one. What is beside what depends on these prompts
    alone. Prompts of similar length, longest first, waste least.

    Raises BadDataError when a prompt fills the model's context, NotFiniteError, whose message is the key of the sample,
    when the model gives values that are not numbers.
    """
    window = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
    for prompt, key in zip(prompts, keys, strict=True):
        if not 0 < len(prompt) < window:
            raise BadDataError(
                f"sample {key}: its prompt has {len(prompt)} tokens, the model's context {window}"
            )
    slots = slots or len(prompts)
    streams = [stream(seed, key) for key in keys]
    new: list[list[int]] = [[] for _ in prompts]
    finish = ["length"] * len(prompts)

    def settle(rows: _Rows, logits: torch.Tensor) -> _Rows:
        """Draw a token for every row; the rows that go on."""
        finite = torch.isfinite(
            logits.amax(-1)
        )  # NaN or +inf anywhere in a row is its maximum; -inf is a masked token
        if not bool(finite.all()):
            raise NotFiniteError(keys[rows.index[int((~finite).nonzero()[0])]])
        tokens = pick(logits, decoding, [streams[i] for i in rows.index])
        keep = []
        for row, (index, token) in enumerate(zip(rows.index, tokens, strict=True)):
            if token in stops.ids:
                finish[index] = "stop"
                continue
            new[index].append(token)
            if stops.strings and ended(tokenizer, new[index], stops):
                finish[index] = "stop"
            elif len(new[index]) < min(decoding.max_new_tokens, window - len(prompts[index])):
                keep.append(row)
        return rows.select(keep)

    waiting = deque(range(len(prompts)))
    rows: _Rows | None = None
    while waiting or rows:
        free = slots - (len(rows.index) if rows else 0)
        if waiting and (not rows or (rows.can_join and free >= slots * _REFILL)):
            index = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            fresh, logits = _Rows.read(model, index, [prompts[i] for i in index])
            fresh = settle(fresh, logits)
            rows = fresh if not rows else rows.join(fresh) if fresh else rows
        elif rows:
            rows = settle(rows, rows.step(model, [new[i][-1] for i in rows.index]))
    return [
        Generated(answer_text(tokenizer, tokens, stops), finish[n], len(prompts[n]), len(tokens))
        for n, tokens in enumerate(new)
    ]


@dataclass
class _Rows:
    """Answers being written. cache: their keys and values, left-padded to one width; mask: 0 where padded.

    next: the position of the token that comes next, per row.
    """

    index: list[int]
    cache: Any
    mask: torch.Tensor
    next: torch.Tensor

    def __bool__(self) -> bool:
        return bool(self.index)

    @classmethod
    def read(cls, model: Any, index: list[int], prompts: list[Sequence[int]]) -> tuple[_Rows, torch.Tensor]:
        """Rows of these prompts, and the logits of what follows each (rows, vocabulary)."""
        width, device = max(len(prompt) for prompt in prompts), model.device
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return cls(index, output.past_key_values, mask, mask.sum(1, keepdim=True)), output.logits[
            :, -1
        ].float()

    def step(self, model: Any, tokens: list[int]) -> torch.Tensor:
        """Append a token to every row; the logits of what follows."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        output = model(
            input_ids=torch.tensor(tokens, device=model.device)[:, None], attention_mask=self.mask,
            position_ids=self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.cache, self.next = output.past_key_values, self.next + 1
        return output.logits[:, -1].float()

    def select(self, keep: list[int]) -> _Rows:
        """Only these rows; columns that are padding in all of them go."""
        if len(keep) == len(self.index) or not keep:
            return self if keep else _Rows([], None, self.mask, self.next)
        chosen = torch.tensor(keep, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        mask = self.mask[chosen]
        if self.can_join:
            padding = int(mask.argmax(1).min())
            mask = mask[:, padding:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]
        return _Rows([self.index[row] for row in keep], self.cache, mask, self.next[chosen])

    @property
    def can_join(self) -> bool:
        """Whether every layer keeps plain keys and values (no sliding window, no recurrent state)."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def join(self, other: _Rows) -> _Rows:
        """Both, the narrower one padded on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])

        def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            padded = [functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in (a, b)]
            return torch.cat(padded)

        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys, layer.values = both(layer.keys, more.keys), both(layer.values, more.values)
        masks = [functional.pad(rows.mask, (width - rows.mask.shape[1], 0)) for rows in (self, other)]
        return _Rows(
            self.index + other.index, self.cache, torch.cat(masks), torch.cat([self.next, other.next])
        )


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
