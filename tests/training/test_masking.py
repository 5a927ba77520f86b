"""Which tokens carry loss, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import templates
from engine.errors import BadDataError, BadRecipeError
from tests.conftest import build_tokenizer
from training.data.samples import Sample
from training.masking import (
    IGNORE,
    Encoded,
    check_marks,
    encode_conversation,
    encode_text,
    refuse_control_text,
    split_budget,
    why_untrained,
)

TURNS = (
    {"role": "system", "content": "You are careful."},
    {"role": "user", "content": "What is asthma?"},
    {"role": "assistant", "content": "A disease."},
    {"role": "user", "content": "And the dose?"},
    {"role": "assistant", "content": "500 mg."},
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


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


def test_tokens_whose_kind_only_the_vocabulary_tells_are_refused_too() -> None:
    """Llama 3 flags its marks as special in the vocabulary without listing them; a second first character as well."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<|eot_id|>", special=True), AddedToken("[PAD]", special=True), "<think>"]
    )
    for text in ("a <|eot_id|> b", "[PAD]"):
        with pytest.raises(BadDataError, match="control token"):
            refuse_control_text(sample(text=text), tokenizer)
    refuse_control_text(sample(text="<think> [pad] <|eot|>"), tokenizer)  # not special, or not a token


def test_a_template_whose_marks_are_no_tokens_is_refused(tokenizer: Any) -> None:
    assert check_marks(templates.load("chatml"), tokenizer) == ()
    with pytest.raises(
        BadRecipeError, match=r"llama3 writes <\|begin_of_text\|>, which is not a token of tiny"
    ):
        check_marks(templates.load("llama3"), tokenizer, "tiny")
    warnings = check_marks(templates.load("qwen3"), tokenizer)
    assert len(warnings) == 2 and "<think>" in warnings[0]
    endless = templates.from_jinja(
        "{% for turn in messages %}{{ turn.role + ': ' + turn.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        {"eos_token": "<|im_end|>"},
    )
    assert ["nothing teaches to stop" in text for text in check_marks(endless, tokenizer)] == [True]


def test_a_sample_without_a_trained_token_says_why(tokenizer: Any) -> None:
    chatml = templates.load("chatml")
    crowded = sample(
        {"role": "user", "content": "What is the dose? " * 120},
        {"role": "assistant", "content": "Six hours, for pain and fever."},
    )
    encoded = encode_conversation(crowded, tokenizer, chatml, 20)
    assert encoded.trained == 0 and len(encoded.ids) == 20
    assert encoded.cut == len(encode_conversation(crowded, tokenizer, chatml, 4096).ids) - 20
    reason = why_untrained(crowded, tokenizer, chatml, 20)
    assert "the answer has 1" in reason and "cutoff of 20" in reason
    assert why_untrained(crowded, tokenizer, chatml, 4096) == ""
    before = sample(*TURNS[1:3], *crowded.messages)
    assert "last answer" in why_untrained(before, tokenizer, chatml, 20, mask_history=True)
    assert why_untrained(before, tokenizer, chatml, 64) == ""  # the first answer is trained


def test_a_cut_is_counted(tokenizer: Any) -> None:
    whole = encode_conversation(sample(*TURNS), tokenizer, templates.load("chatml"), 256)
    assert whole.cut == 0
    short = encode_conversation(sample(*TURNS), tokenizer, templates.load("chatml"), len(whole.ids) - 3)
    assert short.cut == 3
    with pytest.raises(ValueError, match="differ in length"):
        Encoded([1, 2], [1])


def test_where_we_do_otherwise_than_llamafactory(tokenizer: Any) -> None:
    """Thoughts in another spelling do not survive a template that promises none, and the prefill is always there."""
    question = {"role": "user", "content": "What?"}
    empty = templates.load("qwen3_empty_think")
    for content, kept in (
        ("<think>quick</think> A disease.", " A disease."),
        ("Well. <think>\nhm\n</think>\n\nA disease.", "A disease."),
        ("<think>\nnever closed", "<think>\nnever closed"),
    ):
        pair = sample(question, {"role": "assistant", "content": content})
        encoded = encode_conversation(pair, tokenizer, empty, 256)
        assert trained_text(tokenizer, encoded) == kept + "<|im_end|>\n"
        prompt = tokenizer.encode(empty.prompt([question]), add_special_tokens=False)
        assert encoded.ids[: len(prompt)] == prompt


def test_short_conversations_are_encoded_fast_enough(tokenizer: Any) -> None:
    """A floor far below what is measured (benchmarks have the number): a slow path would be ten times slower."""
    import time

    pair = sample(*TURNS[1:3])
    chatml = templates.load("chatml")
    started = time.process_time()
    for _ in range(500):
        encode_conversation(pair, tokenizer, chatml, 256)
    assert 500 / (time.process_time() - started) > 1000
