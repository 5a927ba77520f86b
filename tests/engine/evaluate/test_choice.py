"""Prompts as they are published, and options in another order."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.evaluate.choice import choice_prompt, continuations, generated_prompt, shuffled
from engine.evaluate.data import Sample

SAMPLE = Sample("a", prompt="Which drug?", options=("aspirin", "insulin a", "x", "y"), answer=1)
YES_NO = Sample("b", prompt="Is it?", options=("yes", "no", "maybe"), answer=0, context="A trial.")
LISTED = "A. aspirin\nB. insulin a\nC. x\nD. y"


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("", f"Question: Which drug?\n{LISTED}\nAnswer:"),
        ("medqa", f"Question: Which drug?\n{LISTED}\nAnswer:"),
        ("medmcqa", f"Question: Which drug?\nChoices:\n{LISTED}\nAnswer:"),
        ("mmlu", f"Which drug?\n{LISTED}\nAnswer:"),
    ],
)
def test_letters_prompts(style: str, expected: str) -> None:
    """The harness' own code is run beside these in tests/peers/test_harness.py."""
    assert choice_prompt(SAMPLE, "letters", style) == expected
    assert choice_prompt(SAMPLE, "letters", style, "About drugs.\n\n") == "About drugs.\n\n" + expected
    assert continuations(SAMPLE, "letters") == [" A", " B", " C", " D"]


def test_options_prompts() -> None:
    for style in ("", "pubmedqa"):
        assert choice_prompt(YES_NO, "options", style) == "Abstract: A trial.\nQuestion: Is it?\nAnswer:"
    assert continuations(YES_NO, "options") == [" yes", " no", " maybe"]


def test_generated_prompt_is_the_papers() -> None:
    assert generated_prompt(SAMPLE) == (
        f"Which drug?\n\n{LISTED}\n\n"
        "Output only the final answer letter (A/B/C/D). Output a single letter only."
    )
    assert generated_prompt(YES_NO) == (
        "A trial.\n\nIs it?\n\nA. yes\nB. no\nC. maybe\n\n"
        "Output only the final answer letter (A/B/C). Output a single letter only."
    )
    assert generated_prompt(SAMPLE, "zh").endswith(
        f"{LISTED}\n\n只输出最终答案的字母（A/B/C/D），不要输出其他任何内容。"
    )
    assert generated_prompt(YES_NO, "en", "One of {letters}.").endswith("C. maybe\n\nOne of A/B/C.")


def test_another_order_keeps_the_answer_and_hangs_on_seed_and_id_alone() -> None:
    samples = [
        Sample(f"q{n}", prompt="?", options=("right", "b", "c", "d"), answer=0, source="s")
        for n in range(400)
    ]
    mixed = [shuffled(sample, 7) for sample in samples]
    assert [shuffled(sample, 7) for sample in reversed(samples)] == mixed[::-1]
    assert [shuffled(sample, 8).options for sample in samples] != [sample.options for sample in mixed]
    for before, after in zip(samples, mixed, strict=True):
        assert after.options[after.answer] == "right"
        assert sorted(after.options) == sorted(before.options)
        assert (after.id, after.prompt, after.source) == (before.id, before.prompt, before.source)
    places = Counter(sample.answer for sample in mixed)
    assert min(places.values()) > 70  # 100 each expected, standard deviation 8.7
    assert len({sample.options for sample in mixed}) == 24


@pytest.mark.parametrize(
    "option",
    ["All of the above", "None of the above", "Both A and B", "A, C", "以上都是", "以上均不正确", "A和B"],
)
def test_options_that_speak_of_others_stay_where_they_are(option: str) -> None:
    for n in range(20):
        sample = Sample(f"q{n}", prompt="?", options=("x", "y", "z", option), answer=3)
        assert shuffled(sample, 1) == sample


def test_doubled_options_keep_the_right_one() -> None:
    """Two options may have the same text; the answer is a place, not a text."""
    sample = Sample("q", prompt="?", options=("x", "x", "y"), answer=1)
    places = {shuffled(sample, seed).answer for seed in range(60)}
    assert places == {0, 1, 2}
    assert all(shuffled(sample, seed).options[shuffled(sample, seed).answer] == "x" for seed in range(60))
