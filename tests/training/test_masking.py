"""Which tokens carry loss, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import templates
from engine.errors import BadDataError
from training.corpora import Sample
from training.masking import IGNORE, encode_conversation, encode_text, split_budget
from training.prepare import load_tokenizer

TURNS = (
    {"role": "system", "content": "You are careful."},
    {"role": "user", "content": "What is asthma?"},
    {"role": "assistant", "content": "A disease."},
    {"role": "user", "content": "And the dose?"},
    {"role": "assistant", "content": "500 mg."},
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def sample(*turns: dict[str, str], text: str = "") -> Sample:
    return Sample(Path("data.jsonl"), 7, text=text, messages=turns)


def trained_text(tokenizer: Any, encoded: Any) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE], skip_special_tokens=False)


def test_answers_with_their_end_mark_and_newline_are_trained(tokenizer: Any) -> None:
    encoded = encode_conversation(sample(*TURNS), tokenizer, templates.load("chatml"), 256)
    whole = (
        "<|im_start|>system\nYou are careful.<|im_end|>\n<|im_start|>user\nWhat is asthma?<|im_end|>\n"
        "<|im_start|>assistant\nA disease.<|im_end|>\n<|im_start|>user\nAnd the dose?<|im_end|>\n"
        "<|im_start|>assistant\n500 mg.<|im_end|>\n"
    )
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == whole
    assert trained_text(tokenizer, encoded) == "A disease.<|im_end|>\n500 mg.<|im_end|>\n"
    assert all(label in (IGNORE, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    trained_ends = [n for n, label in enumerate(encoded.labels) if label == end]
    assert [encoded.labels[n + 1] for n in trained_ends] == tokenizer.encode(
        "\n", add_special_tokens=False
    ) * 2


def test_mask_history_and_train_on_prompt(tokenizer: Any) -> None:
    chatml = templates.load("chatml")
    last = encode_conversation(sample(*TURNS), tokenizer, chatml, 256, mask_history=True)
    assert trained_text(tokenizer, last) == "500 mg.<|im_end|>\n"
    everything = encode_conversation(sample(*TURNS), tokenizer, chatml, 256, train_on_prompt=True)
    assert everything.labels == [IGNORE, *everything.ids[1:]]


def test_prompt_tokens_are_those_of_inference(tokenizer: Any) -> None:
    """The answer is tokenised apart: what precedes it is exactly what the prompt alone encodes to."""
    chatml = templates.load("chatml")
    for answer in ("\n\nA disease.", " with a space", "500"):
        encoded = encode_conversation(
            sample(TURNS[1], {"role": "assistant", "content": answer}), tokenizer, chatml, 256
        )
        prompt = tokenizer.encode(chatml.prompt([TURNS[1]]), add_special_tokens=False)
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.labels[: len(prompt)] == [IGNORE] * len(prompt)
        assert encoded.labels[len(prompt)] == encoded.ids[len(prompt)]


def test_think_blocks_are_trained_or_prefilled(tokenizer: Any) -> None:
    pair = sample(TURNS[1], TURNS[2])
    empty = "<think>\n\n</think>\n\n"
    trained = {
        name: trained_text(tokenizer, encode_conversation(pair, tokenizer, templates.load(name), 256))
        for name in ("qwen3_nothink", "qwen3", "qwen3_empty_think")
    }
    answer = "A disease.<|im_end|>\n"
    assert trained == {"qwen3_nothink": answer, "qwen3": empty + answer, "qwen3_empty_think": answer}


@pytest.mark.parametrize(
    ("source", "target", "budget", "expected"),
    [
        (1000, 1000, 2048, (1000, 1000)),
        (3000, 500, 2048, (1548, 500)),  # a short target is kept whole
        (500, 3000, 2048, (500, 1548)),  # a short source is kept whole
        (3000, 3000, 2048, (1024, 1024)),  # otherwise in proportion
        (6000, 2000, 2000, (1500, 500)),
        (10, 10, 0, (0, 0)),
    ],
)
def test_truncation_shares_the_cutoff(
    source: int, target: int, budget: int, expected: tuple[int, int]
) -> None:
    assert split_budget(source, target, budget) == expected


def test_long_conversations_are_shortened_never_over(tokenizer: Any) -> None:
    chatml = templates.load("chatml")
    for cutoff in range(16, 120, 7):
        first = encode_conversation(sample(*TURNS), tokenizer, chatml, cutoff)
        last = encode_conversation(sample(*TURNS), tokenizer, chatml, cutoff, mask_history=True)
        assert 0 < len(first.ids) <= cutoff and 0 < len(last.ids) <= cutoff
        assert last.trained > 0  # the last turn is served first


def test_pt_trains_all_but_the_first_token_and_ends_in_eos(tokenizer: Any) -> None:
    encoded = encode_text(sample(text="Asthma is a disease."), tokenizer, eos=2)
    assert encoded.ids[-1] == 2 and encoded.labels == [IGNORE, *encoded.ids[1:]]
    assert tokenizer.decode(encoded.ids[:-1]) == "Asthma is a disease."


@pytest.mark.parametrize(
    "bad",
    [
        sample(text="so far<|im_end|>so good"),
        sample({"role": "user", "content": "hi<|im_start|>system"}, {"role": "assistant", "content": "x"}),
    ],
)
def test_control_tokens_in_texts_are_refused_with_their_line(tokenizer: Any, bad: Sample) -> None:
    with pytest.raises(BadDataError, match=r"data\.jsonl, line 7.*<\|im_"):
        if bad.text:
            encode_text(bad, tokenizer, eos=2)
        else:
            encode_conversation(bad, tokenizer, templates.load("chatml"), 64)
