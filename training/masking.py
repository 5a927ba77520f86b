"""Samples to token ids and labels: which tokens carry loss. Called by `training.prepare` (a run and its preview).

Labels stand at the position of the token they name (the shift happens in the loss); IGNORE carries no loss.

The rules for conversations are LLaMA-Factory's (src/llamafactory/data/processor/supervised.py, data/template.py;
tests/training/llamafactory_reference.py has them written again, and tests compare ids and labels): prompts carry
no loss unless `train_on_prompt`; an answer carries loss up to and with its end mark and the line break behind it;
`mask_history` leaves the loss to the last answer and shows earlier ones as at inference; the cutoff is shared by
question and answer in proportion; prompt and answer (and an empty think block put before it) are tokenised apart.

Where we do otherwise, and why:
- The first token of a document is IGNORE, with `train_on_prompt` as well. In a packed block LLaMA-Factory predicts
  it from the last token of another sample; alone in a row the loss never reaches it.
- Packed samples may fill the whole cutoff. LLaMA-Factory cuts them to cutoff - 1, since it pads every block.
- A text that spells a control token is refused. LLaMA-Factory lets it become the token: a forged turn.
- `qwen3_empty_think` (`enable_thinking: false`) and earlier turns under `mask_history` lose a think block in any
  spelling, by the rule of Qwen3's own template: what follows the last `</think>` stays. LLaMA-Factory finds only
  `<think>\\n...\\n</think>\\n\\n`, keeps what stands before it, and takes line breaks off earlier answers without one.
  The empty block is prefilled before every answer, also before one with an unclosed `<think>` (there
  LLaMA-Factory leaves it out): inference always prefills it.
- No template here has `efficient_eos` (an end token in place of an end mark); none is needed for these models.
- Plain text (pt): the rest of a document goes on in the next block and the last block may be short.
  LLaMA-Factory drops an unfinished last block, and without packing all that lies behind the cutoff.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from engine.errors import BadDataError, BadRecipeError
from engine.templates import END_THINK, THINK, Segment, Template

if TYPE_CHECKING:
    from training.data.samples import Sample

IGNORE = -100
Pair = tuple[list[int], list[int]]  # the tokens of a prompt, and of the answer to it


class Encoder(Protocol):
    """A tokenizer as this module needs it (transformers' PreTrainedTokenizerBase fits)."""

    all_special_tokens: list[str]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def __call__(
        self, texts: list[str], *, add_special_tokens: bool, return_attention_mask: bool
    ) -> dict[str, list[list[int]]]: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one document, equally long; `cut` tokens of it were lost to the cutoff."""

    ids: list[int]
    labels: list[int]
    cut: int = 0

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise ValueError("ids and labels differ in length")

    @property
    def trained(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def check_marks(template: Template, tokenizer: Encoder, base: str = "this model") -> tuple[str, ...]:
    """Raise BadRecipeError when a control mark the template writes is no single token of this tokenizer.

    Returns warnings for what can be trained but rarely is meant: think tags of several tokens, and a template
    whose answers end without a mark that stops generation.
    """
    warnings = []
    for mark in template.marks():
        tokens = len(tokenizer.encode(mark, add_special_tokens=False))
        if tokens == 1:
            continue
        if mark in (THINK, END_THINK):
            warnings.append(f"template {template.name} writes {mark}, which {base} spells in {tokens} tokens")
            continue
        raise BadRecipeError(
            f"template {template.name} writes {mark}, which is not a token of {base} "
            f"(its tokenizer spells it in {tokens} tokens)",
            "choose the template of this model family, or `model`",
        )
    *_, last = template.segments([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    if not any(mark in last.text for mark in template.stop):
        warnings.append(f"template {template.name} ends answers without a stop mark: nothing teaches to stop")
    return tuple(warnings)


@functools.lru_cache(maxsize=8)
def _control(tokenizer: Encoder) -> tuple[re.Pattern[str], ...]:
    """Patterns of the spellings that this tokenizer turns into control tokens.

    One pattern a first character: `re` then searches for the common start, ten times as fast as in a mixed one.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spellings = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    ordered = sorted((text for text in spellings if text), key=lambda text: (text[0], -len(text), text))
    groups = groupby(ordered, key=lambda text: text[0])
    return tuple(re.compile("|".join(re.escape(text) for text in group)) for _, group in groups)


def refuse_control_text(sample: Sample, tokenizer: Encoder) -> None:
    """Raise BadDataError when a text holds a special token's spelling, which would become the token itself."""
    for pattern in _control(tokenizer):
        for text in (sample.text, *(turn["content"] for turn in sample.messages)):
            if found := pattern.search(text):
                raise BadDataError(
                    f"{sample.place}: the text holds {found.group()!r}, a control token of this model",
                    "remove or respell it: inside a text it would start or end a turn",
                )


def encode_text(sample: Sample, tokenizer: Encoder, eos: int) -> Encoded:
    """PT: the document, then EOS; every token but the first carries loss. No chat template."""
    refuse_control_text(sample, tokenizer)
    ids = [*tokenizer.encode(sample.text, add_special_tokens=False), eos]
    return Encoded(ids, [IGNORE, *ids[1:]])


def encode_texts(samples: Sequence[Sample], tokenizer: Encoder, eos: int) -> list[Encoded]:
    """`encode_text` of many documents in one call: a fast tokenizer shares them among the processor's cores."""
    for sample in samples:
        refuse_control_text(sample, tokenizer)
    texts = [sample.text for sample in samples]
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [Encoded([*ids, eos], [IGNORE, *ids[1:], eos] if ids else [IGNORE]) for ids in rows]


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

    `mask_history` leaves the loss to the last answer only. Over-long samples are shortened turn by turn with
    `split_budget`, the first turn served first; with `mask_history` the last one. Turns without room are dropped.
    A sample of which no token carries loss is returned as it is: `why_untrained` says how that came.
    """
    refuse_control_text(sample, tokenizer)
    pairs = _pairs(template.segments(sample.messages, last_only=mask_history), tokenizer)
    kept = _shorten(pairs, cutoff, last_first=mask_history)
    ids: list[int] = []
    labels: list[int] = []
    for index in sorted(kept):
        source, target = kept[index]
        counts = not mask_history or index == len(pairs) - 1
        ids += source + target
        labels += source if train_on_prompt and counts else [IGNORE] * len(source)
        labels += target if counts else [IGNORE] * len(target)
    if labels:
        labels[0] = IGNORE
    return Encoded(ids, labels, sum(len(source) + len(target) for source, target in pairs) - len(ids))


def why_untrained(
    sample: Sample, tokenizer: Encoder, template: Template, cutoff: int, *, mask_history: bool = False
) -> str:
    """Why no token of this sample's answers carries loss, in words that name the numbers; "" if some does."""
    pairs = _pairs(template.segments(sample.messages, last_only=mask_history), tokenizer)
    kept = _shorten(pairs, cutoff, last_first=mask_history)
    counted = pairs[-1:] if mask_history else pairs
    places = range(len(pairs) - len(counted), len(pairs))
    if any(kept[place][1] for place in places if place in kept):
        return ""
    if not any(target for _, target in counted):
        return "its answers have no tokens"
    source, target = counted[0]
    which = "last answer" if mask_history else "answer"
    return (
        f"the {which} has {len(target):,} tokens and the prompt before it {len(source):,}: shared in proportion, "
        f"the cutoff of {cutoff} leaves the answer none"
    )


def _pairs(segments: Sequence[Segment], tokenizer: Encoder) -> list[Pair]:
    """Each prompt with its answer, in tokens. Pieces are tokenised apart, as they are at inference."""
    pairs: list[Pair] = []
    for segment in segments:
        tokens = tokenizer.encode(segment.text, add_special_tokens=False)
        if segment.answer:
            pairs[-1][1].extend(tokens)
        else:
            pairs.append((tokens, []))
    return pairs


def _shorten(pairs: Sequence[Pair], cutoff: int, *, last_first: bool) -> dict[int, Pair]:
    """What fits into the cutoff, by the pair's place."""
    kept: dict[int, Pair] = {}
    room = cutoff
    for index in reversed(range(len(pairs))) if last_first else range(len(pairs)):
        if room <= 0:
            break
        source, target = pairs[index]
        keep_source, keep_target = split_budget(len(source), len(target), room)
        kept[index] = (source[:keep_source], target[:keep_target])
        room -= keep_source + keep_target
    return kept
