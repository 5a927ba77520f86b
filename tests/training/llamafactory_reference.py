"""LLaMA-Factory's supervised encoding, written again from its source for comparison. Used by the masking tests.

Source: hiyouga/LLaMA-Factory (Apache-2.0, Copyright 2025 the LlamaFactory team), commit
ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30: src/llamafactory/data/processor/{supervised,pretrain,processor_utils}.py
and src/llamafactory/data/template.py. Shortened to text without tools and images; every rule and the order of the
steps are theirs. Nothing of the program under test is imported here.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

IGNORE_INDEX = -100
Slots = list[Any]  # a text, or {"bos_token"} / {"eos_token"}


def infer_seqlen(source_len: int, target_len: int, cutoff_len: int) -> tuple[int, int]:
    if target_len * 2 < cutoff_len:  # truncate source
        max_target_len = cutoff_len
    elif source_len * 2 < cutoff_len:  # truncate target
        max_target_len = cutoff_len - source_len
    else:  # truncate both
        max_target_len = int(cutoff_len * (target_len / (source_len + target_len)))
    new_target_len = min(max_target_len, target_len)
    max_source_len = max(cutoff_len - new_target_len, 0)
    return min(max_source_len, source_len), new_target_len


@dataclass
class PlainTemplate:
    """template.py, class Template."""

    format_user: Slots
    format_assistant: Slots
    format_system: Slots
    format_prefix: Slots
    efficient_eos: bool = False
    preserve_thinking: bool = False

    def _ids(self, tokenizer: Any, elements: Slots) -> list[int]:
        token_ids: list[int] = []
        for elem in elements:
            if isinstance(elem, str):
                if elem:
                    token_ids += tokenizer.encode(elem, add_special_tokens=False)
            elif "bos_token" in elem and tokenizer.bos_token_id is not None:
                token_ids += [tokenizer.bos_token_id]
            elif "eos_token" in elem and tokenizer.eos_token_id is not None:
                token_ids += [tokenizer.eos_token_id]
        return token_ids

    @staticmethod
    def _apply(slots: Slots, content: str) -> Slots:
        return [slot.replace("{{content}}", content, 1) if isinstance(slot, str) else slot for slot in slots]

    def _encode(self, tokenizer: Any, messages: list[dict[str, str]], system: str) -> list[list[int]]:
        encoded_messages = []
        for i, message in enumerate(messages):
            elements: Slots = []
            if i == 0:
                elements += self.format_prefix
                if system:
                    elements += self._apply(self.format_system, system)
            slots = self.format_user if message["role"] == "user" else self.format_assistant
            elements += self._apply(slots, message["content"])
            encoded_messages.append(self._ids(tokenizer, elements))
        return encoded_messages

    def encode_multiturn(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str, discarding_history_cot: bool
    ) -> list[tuple[list[int], list[int]]]:
        encoded = self._encode(tokenizer, messages, system)
        return [(encoded[i], encoded[i + 1]) for i in range(0, len(encoded), 2)]


@dataclass
class ReasoningTemplate(PlainTemplate):
    """template.py, class ReasoningTemplate."""

    enable_thinking: bool | None = True
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")

    def remove_thought(self, content: str) -> str:
        first, last = (re.escape(word) for word in self.thought_words)
        return re.sub(re.compile(f"{first}(.*?){last}", re.DOTALL), "", content).lstrip("\n")

    def encode_multiturn(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str, discarding_history_cot: bool
    ) -> list[tuple[list[int], list[int]]]:
        messages = deepcopy(messages)
        if self.enable_thinking is False:  # remove all cot
            for i in range(1, len(messages), 2):
                messages[i]["content"] = self.remove_thought(messages[i]["content"])
        if discarding_history_cot:
            for i in range(1, len(messages) - 2, 2):  # preserve the last cot
                messages[i]["content"] = self.remove_thought(messages[i]["content"])
        encoded = self._encode(tokenizer, messages, system)
        turn_indices = [len(messages) - 2] if discarding_history_cot else range(0, len(messages), 2)
        thought = tokenizer.encode("".join(self.thought_words), add_special_tokens=False)
        for i in turn_indices:
            if (
                self.thought_words[0].strip() not in messages[i + 1]["content"]
                and self.thought_words[1].strip() not in messages[i + 1]["content"]
            ):  # add empty cot
                if not self.enable_thinking:  # do not compute loss
                    encoded[i] += thought
                else:  # do compute loss
                    encoded[i + 1] = thought + encoded[i + 1]
        return [(encoded[i], encoded[i + 1]) for i in range(0, len(encoded), 2)]


CHATML_SLOTS: dict[str, Slots] = {
    "format_user": ["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"],
    "format_assistant": ["{{content}}<|im_end|>\n"],
    "format_system": ["<|im_start|>system\n{{content}}<|im_end|>\n"],
    "format_prefix": [],
}
LLAMA3_SLOTS: dict[str, Slots] = {
    "format_user": [
        "<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ],
    "format_assistant": ["{{content}}<|eot_id|>"],
    "format_system": ["<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>"],
    "format_prefix": [{"bos_token"}],
}

# our name -> (their template, what makes it)
TEMPLATES: dict[str, PlainTemplate] = {
    "qwen3_nothink": PlainTemplate(**CHATML_SLOTS),
    "chatml": PlainTemplate(**CHATML_SLOTS),
    "llama3": PlainTemplate(**LLAMA3_SLOTS),
    "qwen3": ReasoningTemplate(**CHATML_SLOTS, enable_thinking=True),
    "qwen3_empty_think": ReasoningTemplate(**CHATML_SLOTS, enable_thinking=False),
}


def encode_data_example(
    template: PlainTemplate,
    tokenizer: Any,
    messages: list[dict[str, str]],
    cutoff_len: int,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> tuple[list[int], list[int]]:
    """supervised.py, SupervisedDatasetProcessor._encode_data_example; a first system turn is taken off as in
    converter.py."""
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    input_ids: list[int] = []
    labels: list[int] = []
    discarding_history_cot = mask_history and not template.preserve_thinking
    encoded_pairs = template.encode_multiturn(tokenizer, messages, system, discarding_history_cot)
    total_length = len(input_ids) + (1 if template.efficient_eos else 0)
    if mask_history:
        encoded_pairs = encoded_pairs[::-1]  # high priority for last turns
    for turn_idx, (source_ids, target_ids) in enumerate(encoded_pairs):
        if total_length >= cutoff_len:
            break
        source_len, target_len = infer_seqlen(len(source_ids), len(target_ids), cutoff_len - total_length)
        source_ids = source_ids[:source_len]
        target_ids = target_ids[:target_len]
        total_length += source_len + target_len
        if train_on_prompt:
            source_label = source_ids
        elif template.efficient_eos and turn_idx != 0:
            source_label = [tokenizer.eos_token_id] + [IGNORE_INDEX] * (source_len - 1)
        else:
            source_label = [IGNORE_INDEX] * source_len
        if mask_history and turn_idx != 0:  # train on the last turn only
            target_label = [IGNORE_INDEX] * target_len
        else:
            target_label = target_ids
        if mask_history:  # reversed sequences
            input_ids = source_ids + target_ids + input_ids
            labels = source_label + target_label + labels
        else:
            input_ids += source_ids + target_ids
            labels += source_label + target_label
    if template.efficient_eos:
        input_ids += [tokenizer.eos_token_id]
        labels += [tokenizer.eos_token_id]
    return input_ids, labels


def encode_pretrain(tokenizer: Any, text: str) -> list[int]:
    """pretrain.py: the document and EOS as one text; the labels are the ids."""
    return list(tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"])
