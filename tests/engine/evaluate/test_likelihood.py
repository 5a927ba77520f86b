"""Log-likelihoods against plain transformers, one sequence at a time; prompts against lm-evaluation-harness' text."""

from __future__ import annotations

import pytest
import torch

from engine.errors import BadDataError
from engine.evaluate.choice import best, choice_prompt, continuations, encode_pair, score_choices
from engine.evaluate.data import Sample
from engine.evaluate.likelihood import continuation_logprobs, next_token_logprobs
from engine.evaluate.live import LiveModel
from engine.weights import Checkpoint


@pytest.fixture(scope="module")
def live(tiny_llama):
    return LiveModel(Checkpoint.open(tiny_llama), {}, "float32", "float32", "cpu")


def alone(model, context, continuation):
    """Summed log-likelihood of the continuation, the sequence by itself, every logit made."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(ids).logits[0].double(), -1)
    return [float(logprobs[len(context) - 1 + k, token]) for k, token in enumerate(continuation)]


def test_padded_batches_equal_single_sequences(live):
    pairs = [([5, 6, 7], [8, 9]), ([40] * 30, [41, 42, 43]), ([9], [300]), ([1, 2], list(range(100, 140)))]
    found = continuation_logprobs(live.model, pairs)
    for pair, logprobs in zip(pairs, found, strict=True):
        assert logprobs == pytest.approx(alone(live.model, *pair), abs=1e-4)


def test_next_tokens_equal_single_sequences(live):
    contexts, tokens = [[5, 6, 7], [40] * 30, [9]], [[1, 2, 3, 4], [300, 1, 7, 8], [5, 6, 7, 8]]
    for context, candidates, found in zip(
        contexts, tokens, next_token_logprobs(live.model, contexts, tokens), strict=True
    ):
        assert found == pytest.approx([alone(live.model, context, [t])[0] for t in candidates], abs=1e-4)


SAMPLE = Sample("a", prompt="Which drug?", options=("aspirin", "insulin a", "x", "y"), answer=1)


def test_prompts_are_the_harness_ones():
    assert (
        choice_prompt(SAMPLE, "letters")
        == "Question: Which drug?\nA. aspirin\nB. insulin a\nC. x\nD. y\nAnswer:"
    )
    assert continuations(SAMPLE, "letters") == [" A", " B", " C", " D"]
    yes_no = Sample("b", prompt="Is it?", options=("yes", "no", "maybe"), answer=0, context="A trial.")
    assert choice_prompt(yes_no, "options") == "Abstract: A trial.\nQuestion: Is it?\nAnswer:"
    assert continuations(yes_no, "options") == [" yes", " no", " maybe"]


@pytest.mark.parametrize("scoring", ["letters", "options"])
def test_option_scores_are_sums_over_the_option(scoring, live):
    samples = [SAMPLE, Sample("b", prompt="Is fever high? " * 6, options=("yes", "no"), answer=0)]
    pairs = [
        [encode_pair(live.tokenizer, choice_prompt(s, scoring), text) for text in continuations(s, scoring)]
        for s in samples
    ]
    for options, scores in zip(pairs, score_choices(live.model, pairs), strict=True):
        assert scores == pytest.approx([sum(alone(live.model, *pair)) for pair in options], abs=1e-3)


def test_a_continuation_begins_where_the_contexts_tokens_end(live):
    context, continuation = encode_pair(live.tokenizer, "Answer:", " fever is high")
    assert (
        live.tokenizer.decode(context) == "Answer:"
        and live.tokenizer.decode(continuation) == " fever is high"
    )
    with pytest.raises(BadDataError, match="no tokens of its own"):
        encode_pair(live.tokenizer, "Answer:", "")


def test_ties_go_to_the_first():
    assert best([-2.0, -1.0, -1.0]) == 1 and best([-1.0, -1.0]) == 0
