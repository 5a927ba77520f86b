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
from tests.conftest import build_model

PROMPTS = [
    "What is asthma?",
    "Aspirin",
    "The patient was given 500 mg of paracetamol every 6 hours",
    "dose dose",
]


@pytest.fixture(scope="module")
def live(tiny_qwen3):
    return LiveModel(Checkpoint.open(tiny_qwen3), {}, "float32", "float32", "cpu")


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A model with weights so large that its text does not repeat itself."""
    folder = tmp_path_factory.mktemp("models") / "lively"
    build_model("qwen3", folder, seed=5, initializer_range=0.3)
    return LiveModel(Checkpoint.open(folder), {}, "float32", "float32", "cpu")


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


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_freed_places_are_taken_and_every_answer_is_still_generates_own(slots, lively):
    """Prompts of many lengths, answers that end at many lengths, fewer places than prompts."""
    texts = [word * n for n, word in enumerate(["dose ", "fever ", "Aspirin is ", "asthma "] * 3, 1)]
    prompts = encode(lively, texts)
    free = [
        lively.model.generate(torch.tensor([p]), max_new_tokens=16, do_sample=False, eos_token_id=None)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    stops = frozenset(tokens[n % 14 + 1] for n, tokens in enumerate(free[::2]))
    keys = [str(n) for n in range(len(prompts))]
    decoding = Decoding("g", max_new_tokens=16)
    found = generate(lively.model, lively.tokenizer, prompts, keys, decoding, 0, Stops(stops, ()), slots)
    for tokens, answer in zip(free, found, strict=True):
        end = next((n for n, token in enumerate(tokens) if token in stops), None)
        assert answer.raw == lively.tokenizer.decode(tokens[:end])
        assert answer.finish == ("length" if end is None else "stop")
        assert answer.new_tokens == (16 if end is None else end)
    assert len({answer.new_tokens for answer in found}) > 3


def test_no_more_rows_than_places_are_ever_in_the_model(live, monkeypatch):
    seen = []
    forward = type(live.model).forward

    def watching(self, input_ids=None, **given):
        seen.append(len(input_ids))
        return forward(self, input_ids=input_ids, **given)

    monkeypatch.setattr(type(live.model), "forward", watching)
    prompts = encode(live) * 3
    keys = [str(n) for n in range(12)]
    generate(
        live.model,
        live.tokenizer,
        prompts,
        keys,
        Decoding("g", max_new_tokens=5),
        0,
        Stops(frozenset(), ()),
        4,
    )
    assert max(seen) == 4 and seen.count(4) == 3 * 5


def test_sampled_answers_do_not_hang_on_the_places(live):
    prompts, decoding = encode(live) * 2, Decoding("t", temperature=1.0, top_p=0.9, max_new_tokens=10)
    keys, stops = [str(n) for n in range(8)], Stops(frozenset(range(0, 384, 9)), ())
    texts = [
        [a.raw for a in generate(live.model, live.tokenizer, prompts, keys, decoding, 42, stops, slots)]
        for slots in (0, 3, 5)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][:4] != texts[0][4:]  # same prompts, other streams


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
