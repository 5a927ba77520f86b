"""Multiple choice: prompts, what may follow them, and scores. Called by prompts.py, rows.py and execute.py.

Three ways of scoring, always named, because the way moves results more than most merges do:

`letters`   no chat template; the options are listed, and of " A", " B", ... the likeliest is chosen.
`options`   no chat template; the question alone, and the whole option text that is likeliest is chosen;
            `accuracy_norm` divides each log-likelihood by the option's length in characters (the harness' acc_norm).
`generated` the question as a chat turn that asks for one letter; letters.py reads the answer.

The first two have the prompts of lm-evaluation-harness 0.4.13 (tests/peers/test_harness.py runs it): `style` says
which of its tasks is followed. Question and Answer stay English whatever the questions' language, as there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.errors import BadDataError
from engine.evaluate.data import Sample

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# style -> (before the question, between question and options); "" is medqa's
STYLES = {
    "": ("Question: ", "\n"),
    "medqa": ("Question: ", "\n"),
    "pubmedqa": ("Question: ", "\n"),
    "medmcqa": ("Question: ", "\nChoices:\n"),
    "mmlu": ("", "\n"),
}
INSTRUCTIONS = {
    "en": "Output only the final answer letter ({letters}). Output a single letter only.",  # the paper's
    "zh": "只输出最终答案的字母（{letters}），不要输出其他任何内容。",
}
# options that name others by letter or place: in another order they would say something else
_BOUND = re.compile(
    r"\b(?:of|from) (?:the )?(?:above|below|these)\b|\b[A-F]\s*(?:and|or|&|,|/|\+)\s*[A-F]\b"
    r"|[A-F]\s*[和与及或、+]\s*[A-F]|(?:以上|上述|前述)(?:都|均|皆|全|各|选项|答案|两|三|所有|无)"
)


def choice_prompt(sample: Sample, scoring: str, style: str = "", description: str = "") -> str:
    """The context that is scored, without the space and the letter or option that may follow.

    `[description][Abstract: context\\n]Question: q\\n[A. ..\\nB. ..\\n]Answer:`; style `medmcqa` has a line
    `Choices:` before the options, `mmlu` no `Question: ` and no white space around the question. The harness puts a
    task's description (MMLU: "The following are multiple choice questions (with answers) about anatomy.\\n\\n")
    directly in front.
    """
    before, between = STYLES[style]
    question = sample.prompt.strip() if style == "mmlu" else sample.prompt
    abstract = f"Abstract: {sample.context}\n" if sample.context else ""
    listed = between + _listed(sample) if scoring == "letters" else ""
    return f"{description}{abstract}{before}{question}{listed}\nAnswer:"


def continuations(sample: Sample, scoring: str) -> list[str]:
    """What may follow the prompt, one per option, each beginning with a space."""
    if scoring == "letters":
        return [f" {letter}" for letter in LETTERS[: len(sample.options)]]
    return [f" {option}" for option in sample.options]


def generated_prompt(sample: Sample, language: str = "en", instruction: str = "") -> str:
    """What a chat model is asked: `[context\\n\\n]question\\n\\nA. ..\\nB. ..\\n\\ninstruction`.

    instruction: "" is the built-in one of the language; `{letters}` in it becomes the letters there are (A/B/C).
    """
    letters = "/".join(LETTERS[: len(sample.options)])
    asked = (instruction or INSTRUCTIONS[language]).replace("{letters}", letters)
    context = f"{sample.context}\n\n" if sample.context else ""
    return f"{context}{sample.prompt}\n\n{_listed(sample)}\n\n{asked}"


def shuffled(sample: Sample, seed: int) -> Sample:
    """The sample with its options in an order drawn from (seed, id) alone; `answer` follows its option.

    Options are sorted by SHA-256 of seed, id and place. A sample whose options speak of each other ("all of the
    above", "A and C") keeps its order.
    """
    if any(_BOUND.search(option) for option in sample.options):
        return sample

    def drawn(place: int) -> bytes:
        return hashlib.sha256(f"{seed}\n{sample.id}\n{place}".encode()).digest()

    order = sorted(range(len(sample.options)), key=drawn)
    return replace(
        sample, options=tuple(sample.options[place] for place in order), answer=order.index(sample.answer)
    )


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

    pairs[i][k]: context and continuation tokens of option k. A context is computed once for all its options.
    """
    from engine.evaluate.likelihood import shared_logprobs  # torch: prompts are made without it

    contexts: list[Sequence[int]] = []
    answers: list[list[Sequence[int]]] = []
    for options in pairs:
        for n, (context, continuation) in enumerate(options):
            if n == 0 or context != contexts[-1]:  # almost never: a tokenizer that merges over the border
                contexts.append(context)
                answers.append([])
            answers[-1].append(continuation)
    sums = iter([sum(found) for group in shared_logprobs(model, contexts, answers) for found in group])
    return [[next(sums) for _ in options] for options in pairs]


def best(scores: Sequence[float]) -> int:
    """Index of the highest score; the first of equals."""
    return max(range(len(scores)), key=lambda k: (scores[k], -k))


def _listed(sample: Sample) -> str:
    lettered = zip(LETTERS, sample.options, strict=False)
    return "\n".join(f"{letter}. {option}" for letter, option in lettered)
