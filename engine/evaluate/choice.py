"""Multiple choice by log-likelihood, with the prompts of lm-evaluation-harness. No chat template.

`letters` (its mmlu and medqa style): the options are listed, and of " A", " B", ... the likeliest is chosen.
`options` (its pubmedqa style): the question alone, and the whole option text that is likeliest is chosen;
`accuracy_norm` divides each log-likelihood by the option's length in characters, as the harness' acc_norm.
The way of scoring moves results more than most merges do, so it is part of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import BadDataError
from engine.evaluate.data import Sample
from engine.evaluate.likelihood import continuation_logprobs, next_token_logprobs

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice_prompt(sample: Sample, scoring: str) -> str:
    """The context that is scored, as in lm-evaluation-harness: `[Abstract: c\\n]Question: q\\n[A. ..\\n]Answer:`."""
    lines = [f"Abstract: {sample.context}"] if sample.context else []
    lines.append(f"Question: {sample.prompt}")
    if scoring == "letters":
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options, strict=False)]
    return "\n".join([*lines, "Answer:"])


def continuations(sample: Sample, scoring: str) -> list[str]:
    """What may follow the prompt, one per option, each beginning with a space."""
    if scoring == "letters":
        return [f" {letter}" for letter in LETTERS[: len(sample.options)]]
    return [f" {option}" for option in sample.options]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and what follows it, cut where the context's own tokens end.

    As lm-evaluation-harness: both are tokenised together and split at the length of the context alone.
    """
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    if not 0 < start < len(whole):
        raise BadDataError(f"the continuation {continuation!r:.60} has no tokens of its own")
    return whole[:start], whole[start:]


def score_choices(model: Any, pairs: Sequence[Sequence[tuple[list[int], list[int]]]]) -> list[list[float]]:
    """Summed log-likelihood (nats) of every option of every sample in one batch.

    pairs[i][k]: context and continuation tokens of option k. When all continuations are one token after the same
    context (letters, yes/no) one forward pass per sample answers for all options.
    """
    one = all(len(cont) == 1 and ctx == options[0][0] for options in pairs for ctx, cont in options)
    if one:
        contexts = [options[0][0] for options in pairs]
        return next_token_logprobs(model, contexts, [[cont[0] for _, cont in options] for options in pairs])
    flat = [pair for options in pairs for pair in options]
    sums = iter([sum(logprobs) for logprobs in continuation_logprobs(model, flat)])
    return [[next(sums) for _ in options] for options in pairs]


def best(scores: Sequence[float]) -> int:
    """Index of the highest score; the first of equals."""
    return max(range(len(scores)), key=lambda k: (scores[k], -k))
