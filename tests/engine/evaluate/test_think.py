"""Think traces of every shape: labelled outputs, and what must hold for any text.

data/think_outputs.jsonl holds outputs written for this test, labelled by hand: {"id", "language", "kind", "case",
"text", "answer"}, `answer` being exactly what stands outside the trace. Rules were tuned on the dev half only.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.evaluate.halves import half_of
from engine.evaluate.reasoning import reasons_openly
from engine.evaluate.statistics import clopper_pearson
from engine.evaluate.think import KINDS, ends_open, split_think

OUTPUTS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "think_outputs.jsonl").read_text("utf-8").splitlines()
]
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "opened", "kind", "thought", "answer"),
    [
        ("Take aspirin.", False, "none", "", "Take aspirin."),
        ("<think>\nhm\n</think>\n\nTake it.", False, "closed", "hm", "Take it."),
        ("<think>\n\n</think>\n\nTake it.", False, "empty", "", "Take it."),
        ("<think>I cannot help with", False, "unclosed", "I cannot help with", ""),
        ("hm</think>Yes", False, "closed", "hm", "Yes"),  # the opening was cut off
        ("hm</think>Yes", True, "closed", "hm", "Yes"),  # the prompt ended in <think>
        ("<think>hm</think>Yes", True, "closed", "hm", "Yes"),  # it did, and the model opened it again
        ("still thinking", True, "unclosed", "still thinking", ""),
        ("", True, "unclosed", "", ""),
        ("A <think>b</think> c <think>d", False, "unclosed", "b\nd", "A  c"),
        ("<think>b</think>c<think> </think>d", False, "closed", "b", "cd"),
        ("<think> a <think> b </think> c </think> d", False, "closed", "a  b  c", "d"),
        ("<think>a</thi", False, "unclosed", "a", ""),
        ("Yes.<think", False, "unclosed", "", "Yes."),
        ("no end </thin", False, "unclosed", "no end", ""),
        ("Yes. <th", False, "none", "", "Yes. <th"),
        ("Okay, so the user asks", False, "untagged", "", "Okay, so the user asks"),
        ("<think></think>Okay, so the user asks", False, "empty", "", "Okay, so the user asks"),
        ("<thinking>a</thinking>b", False, "untagged", "", "<thinking>a</thinking>b"),
        ("<think>say `</think>` last</think>b", False, "closed", "say `</think>` last", "b"),
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
    assert not ends_open("<|im_start|>user\nWhat is <think> for?<|im_end|>\n<|im_start|>assistant\n")


def test_share_of_the_thought():
    assert split_think("<think>abc</think>d").share == 0.75
    assert split_think("<think>").share == 0 and split_think("<think>a").share == 1


def test_the_labelled_outputs_are_many_and_of_every_shape():
    assert len(OUTPUTS) >= 350 and len({row["id"] for row in OUTPUTS}) == len(OUTPUTS)
    assert len({row["text"] for row in OUTPUTS}) == len(OUTPUTS)
    kinds = Counter((half_of(row["id"]), row["kind"]) for row in OUTPUTS)
    assert all(kinds[half, kind] >= 14 for half in ("dev", "test") for kind in KINDS)
    assert sum(row["language"] == "zh" for row in OUTPUTS) >= len(OUTPUTS) * 0.3
    assert {"nested", "several", "quoted", "torn_open", "no_opening"} <= {row["case"] for row in OUTPUTS}


@pytest.mark.parametrize("row", OUTPUTS, ids=lambda row: row["id"])
def test_what_is_outside_is_exact(row):
    """Nothing is lost and nothing left over, whatever the shape; untagged reasoning stays where it is."""
    found = split_think(row["text"])
    assert found.answer == row["answer"]
    if row["kind"] in ("closed", "empty", "unclosed"):
        assert found.kind == row["kind"]
    else:
        assert found.kind in ("none", "untagged") and found.thought == ""


def rates(half):
    """{kind: (found and right, found, there)} in a half."""
    pairs = [(row["kind"], split_think(row["text"]).kind) for row in OUTPUTS if half_of(row["id"]) == half]
    return {
        kind: (
            sum(there == found == kind for there, found in pairs),
            sum(found == kind for _, found in pairs),
            sum(there == kind for there, _ in pairs),
        )
        for kind in KINDS
    }


@pytest.mark.parametrize("half", ["dev", "test"])
def test_precision_and_recall(half):
    for kind, (right, found, there) in rates(half).items():
        print(half, kind, f"precision {right}/{found}", f"recall {right}/{there}")
        if kind in ("closed", "empty", "unclosed"):
            assert right == found == there
        else:
            assert right / found >= 0.92 and right / there >= 0.9
            assert clopper_pearson(right, found)[0] > 0.75 and clopper_pearson(right, there)[0] > 0.75


plain = st.text(st.characters(blacklist_characters="<>`~\"'“‘「『《〈（([【«", blacklist_categories=["Cs"]))


@given(plain)
def test_text_without_tags_is_kept_whole(text):
    found = split_think(text)
    assert found.kind in ("none", "untagged") and found.answer == text.strip() and found.thought == ""


@given(st.text("<>/think \n`\"'a“”", max_size=60), st.booleans())
def test_any_text_is_split_without_losing_a_word(text, opened):
    """Whatever is written, every character but those of tags and outer space is in one of the two parts."""
    found = split_think(text, opened)
    assert found.kind in KINDS and found.answer == found.answer.strip()
    kept = Counter(found.thought + found.answer)
    assert not kept - Counter(text + "\n" * len(text))
    assert Counter(text)["a"] == kept["a"] and Counter(text)["`"] == kept["`"]


words = plain.filter(str.strip).map(lambda text: f" {text} ")


@given(st.lists(st.tuples(st.booleans(), words), max_size=6), st.booleans())
def test_blocks_and_answers_never_mix(parts, open_end):
    """Marked pieces inside and outside, in any order: the answer holds the outer ones only, in their order."""
    text, outer, inner = "", [], []
    for number, (thinks, piece) in enumerate(parts):
        mark = f"({'in' if thinks else 'out'}{number})"
        text += f"<think>{mark}{piece}</think>" if thinks else f"{mark}{piece}"
        (inner if thinks else outer).append(mark)
    if open_end:
        text += "<think>(in99)"
        inner.append("(in99)")
    found = split_think(text)
    assert all(mark in found.answer and mark not in found.thought for mark in outer)
    assert all(mark in found.thought and mark not in found.answer for mark in inner)
    assert [found.answer.index(mark) for mark in outer] == sorted(found.answer.index(mark) for mark in outer)
    assert found.kind == ("unclosed" if open_end else "closed" if inner else found.kind)
    again = split_think(found.answer)
    assert again.answer == found.answer and again.kind in ("none", "untagged")


def test_an_answer_can_hold_a_new_tag_only_where_a_block_stood_inside_one():
    """Why splitting twice may differ: what is left is text, and is not looked at again."""
    found = split_think("<thi<think>a</think>nk>b")
    assert found.answer == "<think>b" and split_think(found.answer).kind == "unclosed"


@pytest.mark.parametrize(
    "text", ["<think>" * 3000, "</think>" * 3000, "<think>a</think>b" * 2000, "```\n" + "<think>" * 1000]
)
def test_models_that_loop_are_split_in_time(text):
    assert split_think(text).kind in KINDS


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")
def test_answers_of_people_and_models_that_do_not_reason_are_not_flagged():
    """1,350 answers of three models and 5,000 written by people: at most 1 in 500 begins like a trace."""
    answers = []
    for path in sorted((SHARED / "xstest" / "model_completions").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            answers += [row["completion"] for row in csv.DictReader(file)]
    lines = (SHARED / "medquad" / "medquad.jsonl").read_text("utf-8").splitlines()
    answers += [json.loads(line)["answer"] or "" for line in lines[::3]]
    flagged = [text[:80] for text in answers if reasons_openly(text)]
    assert len(answers) > 6000 and len(flagged) <= len(answers) / 500, flagged
    assert all(split_think(text).answer == text.strip() for text in answers)
