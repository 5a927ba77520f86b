"""Log-likelihoods against plain transformers, one sequence at a time; prompts against lm-evaluation-harness' text."""

from __future__ import annotations

import pytest
import torch

from engine.errors import BadDataError
from engine.evaluate.choice import best, choice_prompt, continuations, encode_pair, score_choices
from engine.evaluate.data import Sample
from engine.evaluate.likelihood import continuation_logprobs, shared_logprobs
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


CONTEXTS = [[5, 6, 7] * 9, [40] * 30, [9] * 21]


@pytest.mark.parametrize(
    "answers",
    [
        [[[1], [2], [3]], [[300], [1], [7]], [[5], [6]]],
        [[[1, 2], [2], [3, 4, 5]], [[300], [1, 9], [7]], [[5, 5, 5, 5], [6]]],  # the contexts are read once
        [[[1] * 40, [2] * 30], [[300] * 50, [1]], [[5], [6] * 9]],  # longer than the contexts: written out
    ],
)
def test_continuations_of_a_shared_context_equal_single_sequences(live, answers):
    found = shared_logprobs(live.model, CONTEXTS, answers)
    for context, group, logprobs in zip(CONTEXTS, answers, found, strict=True):
        for answer, one in zip(group, logprobs, strict=True):
            assert one == pytest.approx(alone(live.model, context, answer), abs=1e-4)


SAMPLE = Sample("a", prompt="Which drug?", options=("aspirin", "insulin a", "x", "y"), answer=1)


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
