"""Think traces of every shape."""

from __future__ import annotations

import pytest

from engine.evaluate.think import ends_open, split_think


@pytest.mark.parametrize(
    ("text", "opened", "kind", "thought", "answer"),
    [
        ("Take aspirin.", False, "none", "", "Take aspirin."),
        ("<think>\nhm\n</think>\n\nTake it.", False, "closed", "hm", "Take it."),
        ("<think>\n\n</think>\n\nTake it.", False, "empty", "", "Take it."),
        ("<think>I cannot help with", False, "unclosed", "I cannot help with", ""),
        ("hm</think>Yes", False, "closed", "hm", "Yes"),  # the opening was cut off
        ("hm</think>Yes", True, "closed", "hm", "Yes"),  # the prompt ended in <think>
        ("still thinking", True, "unclosed", "still thinking", ""),
        ("A <think>b</think> c <think>d", False, "unclosed", "b\nd", "A  c"),
        ("<think>b</think>c<think> </think>d", False, "closed", "b", "cd"),
        ("", False, "none", "", ""),
    ],
)
def test_split(text, opened, kind, thought, answer):
    found = split_think(text, opened)
    assert (found.kind, found.thought, found.answer) == (kind, thought, answer)


def test_prompts_that_leave_it_open():
    assert ends_open("<|im_start|>assistant\n<think>\n")
    assert not ends_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not ends_open("<|im_start|>assistant\n")
