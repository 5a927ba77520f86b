"""Samples to token ids and labels: which tokens carry loss.

Labels stand at the position of the token they name (the shift happens in the loss); IGNORE carries no loss.
The first token of every document is IGNORE, since in a packed block its predecessor is another document's.
Source of the SFT rules: LLaMA-Factory's supervised processor (train_on_prompt, mask_history, proportional
truncation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import BadDataError
from engine.templates import Template
from training.corpora import Sample

IGNORE = -100


class Encoder(Protocol):
    """A tokenizer as this module needs it (transformers' PreTrainedTokenizerBase fits)."""

    all_special_tokens: list[str]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one document, equally long."""

    ids: list[int]
    labels: list[int]

    def __post_init__(self) -> None:
        if self.ids and len(self.ids) != len(self.labels):
            raise ValueError("ids and labels differ in length")

    @property
    def trained(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def refuse_control_text(sample: Sample, tokenizer: Encoder) -> None:
    """Raise BadDataError when a text holds a special token's spelling, which would become the token itself."""
    texts = [sample.text, *(turn["content"] for turn in sample.messages)]
    for token in tokenizer.all_special_tokens:
        if any(token in text for text in texts):
            raise BadDataError(
                f"{sample.place}: the text holds {token!r}, a control token of this model",
                "remove or respell it: inside a text it would start or end a turn",
            )


def encode_text(sample: Sample, tokenizer: Encoder, eos: int) -> Encoded:
    """PT: the document, then EOS; every token but the first carries loss. No chat template."""
    refuse_control_text(sample, tokenizer)
    ids = [*tokenizer.encode(sample.text, add_special_tokens=False), eos]
    return Encoded(ids, [IGNORE, *ids[1:]])


def split_budget(source: int, target: int, budget: int) -> tuple[int, int]:
    """How many tokens of source and target fit into `budget`, in LLaMA-Factory's way.

    Targets shorter than half the budget keep all they have; sources likewise; else both in proportion.
    """
    if source + target <= budget:
        return source, target
    if target * 2 < budget:
        most = budget
    elif source * 2 < budget:
        most = budget - source
    else:
        most = int(budget * (target / (source + target)))
    kept_target = min(most, target)
    return min(max(budget - kept_target, 0), source), kept_target


def encode_conversation(
    sample: Sample,
    tokenizer: Encoder,
    template: Template,
    cutoff: int,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> Encoded:
    """SFT: the rendered conversation; answers carry loss, prompts do not (unless `train_on_prompt`).

    Prompt and answer are tokenised apart, as they are at inference. `mask_history` leaves the loss to the last
    answer only. Over-long samples are shortened turn by turn with `split_budget`; with `mask_history` the last
    turn is served first, otherwise the first one. Turns for which nothing is left are dropped.
    """
    refuse_control_text(sample, tokenizer)
    segments = template.segments(sample.messages)
    encoded = [tokenizer.encode(segment.text, add_special_tokens=False) for segment in segments]
    pairs = list(zip(encoded[::2], encoded[1::2], strict=True))
    order = range(len(pairs) - 1, -1, -1) if mask_history else range(len(pairs))
    kept: dict[int, tuple[list[int], list[int]]] = {}
    room = cutoff
    for index in order:
        source, target = pairs[index]
        keep_source, keep_target = split_budget(len(source), len(target), room)
        if room <= 0 or keep_target == 0:
            break
        kept[index] = (source[:keep_source], target[:keep_target])
        room -= keep_source + keep_target
    ids: list[int] = []
    labels: list[int] = []
    for index in sorted(kept):
        source, target = kept[index]
        answer_counts = not mask_history or index == len(pairs) - 1
        ids += source + target
        labels += source if train_on_prompt and answer_counts else [IGNORE] * len(source)
        labels += target if answer_counts else [IGNORE] * len(target)
    if labels:
        labels[0] = IGNORE
    return Encoded(ids, labels)


def total(documents: Sequence[Encoded]) -> tuple[int, int]:
    """(processed tokens, trained tokens)."""
    return sum(len(item.ids) for item in documents), sum(item.trained for item in documents)
