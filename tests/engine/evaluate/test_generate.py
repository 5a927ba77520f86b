"""Our batched loop against model.generate; sampling against the distribution it should follow."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from engine.errors import BadDataError
from engine.evaluate.config import Decoding
from engine.evaluate.generate import Stops, find_stops, generate, pick, stream
from engine.evaluate.likelihood import length_batches
from engine.evaluate.live import LiveModel
from engine.weights import Checkpoint

PROMPTS = [
    "What is asthma?",
    "Aspirin",
    "The patient was given 500 mg of paracetamol every 6 hours",
    "dose dose",
]


@pytest.fixture(scope="module")
def live(tiny_qwen3):
    return LiveModel(Checkpoint.open(tiny_qwen3), {}, "float32", "float32", "cpu")


def encode(live, texts=PROMPTS):
    return [live.tokenizer(text)["input_ids"] for text in texts]


def test_greedy_is_model_generate_one_by_one(live):
    """A batch of different lengths, rows ending at different times, equals each prompt alone in transformers."""
    prompts = encode(live)
    # tokens that some rows produce early: so that rows leave the batch at different steps
    free = [
        live.model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None)[
            0, len(p) :
        ]
        for p in prompts
    ]
    stops = frozenset({int(free[0][3]), int(free[2][7])})
    found = generate(
        live.model, live.tokenizer, prompts, "abcd", Decoding("g", max_new_tokens=12), 0, Stops(stops, ())
    )
    lengths = set()
    for tokens, answer in zip(free, found, strict=True):
        expected = [int(token) for token in tokens]
        end = next((n for n, token in enumerate(expected) if token in stops), None)
        assert answer.raw == live.tokenizer.decode(expected[:end])
        assert answer.finish == ("length" if end is None else "stop")
        assert answer.new_tokens == (12 if end is None else end)
        lengths.add(answer.new_tokens)
    assert len(lengths) > 1


def test_a_sample_draws_the_same_whatever_is_beside_it(live):
    prompts, decoding = encode(live), Decoding("t", temperature=1.0, top_p=0.9, max_new_tokens=10)
    stops = Stops(frozenset(), ())
    together = generate(live.model, live.tokenizer, prompts, "abcd", decoding, 42, stops)
    for n in range(4):
        alone = generate(live.model, live.tokenizer, [prompts[n]], "abcd"[n], decoding, 42, stops)
        assert alone[0].raw == together[n].raw
    other = generate(live.model, live.tokenizer, prompts, "abcd", decoding, 43, stops)
    assert [a.raw for a in other] != [a.raw for a in together]


def test_stop_strings_that_are_not_one_token_end_the_answer(live):
    """llama3's mark on a ChatML tokenizer is several tokens; the text is cut where it begins."""
    assert find_stops(live.tokenizer, live.model, ("<|im_end|>", "<|eot_id|>")).strings == ("<|eot_id|>",)
    assert live.tokenizer.eos_token_id in find_stops(live.tokenizer, live.model, ()).ids
    prompt = encode(live)[:1]
    free = generate(
        live.model, live.tokenizer, prompt, "a", Decoding("g", max_new_tokens=20), 0, Stops(frozenset(), ())
    )
    mark = free[0].raw[8:11]
    cut = generate(
        live.model,
        live.tokenizer,
        prompt,
        "a",
        Decoding("g", max_new_tokens=20),
        0,
        Stops(frozenset(), (mark,)),
    )
    assert cut[0].raw == free[0].raw.partition(mark)[0]
    assert cut[0].finish == "stop" and cut[0].new_tokens < 20


def test_sampling_follows_temperature_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def shares(decoding):
        draws = Counter(pick(logits.expand(1000, 4).clone(), decoding, [stream(n, "x") for n in range(1000)]))
        return [draws[token] / 1000 for token in range(4)]

    assert shares(Decoding("t", temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.06)
    flat = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 0.5
    assert shares(Decoding("t", temperature=2.0)) == pytest.approx((flat / flat.sum()).tolist(), abs=0.06)
    assert shares(Decoding("k", temperature=1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.06)
    # .5 + .3 < .9 <= .5 + .3 + .15: three tokens stay
    assert shares(Decoding("p", temperature=1.0, top_p=0.9))[3] == 0
    assert shares(Decoding("p", temperature=1.0, top_p=0.5)) == [1, 0, 0, 0]
    assert pick(logits, Decoding("g"), []) == [0]


def test_a_prompt_longer_than_the_context_is_named(live):
    with pytest.raises(BadDataError, match=r"sample q7.*256"):
        generate(live.model, live.tokenizer, [[5] * 300], ["q7"], Decoding("g"), 0, Stops(frozenset(), ()))
    window = generate(
        live.model, live.tokenizer, [[5] * 250], ["q"], Decoding("g"), 0, Stops(frozenset(), ())
    )
    assert window[0].new_tokens <= 6


def test_batches_hold_everything_once_and_stay_in_budget():
    lengths = [5, 90, 40, 7, 7, 200, 3]
    batches = length_batches(lengths, 3, tokens=100)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 100
