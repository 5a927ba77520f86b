"""Each detector finds what it is for, at the threshold it names, and not more."""

from __future__ import annotations

import random
from typing import Any

import pytest

from training.audit.fields import Field, Reading, fields, source_ids
from training.audit.memory import leaks_between, repeats_within

QUESTION = (
    "A 54-year-old man comes to the clinic with crushing chest pain that spreads to the left arm and started two "
    "hours ago while he was shovelling snow; which drug should be given first to this patient?"
)


def prose(seed: int, length: int) -> str:
    """Random words of a made-up vocabulary: two seeds share no phrase."""
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(4000)}" for _ in range(length))


def found(
    train: list[dict[str, Any]], test: list[dict[str, Any]], **reading: Any
) -> set[tuple[int, int, str]]:
    return {hit[:3] for hit in leaks_between(train, test, Reading.of(**reading))}


def test_exact_after_normalising_and_only_for_real_texts() -> None:
    test = [
        {"question": QUESTION, "options": ["Aspirin", "Insulin"], "answer": 0},
        {"prompt": "Yes.", "reference": "No."},
        {
            "question": prose(2, 12) + "?",
            "opd": "All of the above.",
            "answer": "It is the one that is named here.",
        },
    ]
    disguised = QUESTION.upper().replace(",", " ").replace("-", "\u2010") + " ?!"
    train = [
        {"instruction": disguised, "output": "Aspirin."},
        {"instruction": "Yes", "output": "No"},  # too short to be a leak
        {"text": prose(1, 60)},
        {"question": "Which of these?", "opd": "All of the above"},
    ]
    assert {hit for hit in found(train, test) if hit[2] == "exact"} == {(0, 0, "exact")}
    assert not {hit for hit in found(train, test) if hit[0] != 0}


def test_near_duplicate_by_true_jaccard() -> None:
    original = prose(2, 120).split()
    edited, other = list(original), list(original)
    edited[60] = "changed"  # 5 of 116 shingles differ: J = 111/121 = .917
    for place in range(5, 120, 12):
        other[place] = "changed"  # J far below .8
    hits = leaks_between(
        [{"text": " ".join(edited)}, {"text": " ".join(other)}], [{"text": " ".join(original)}]
    )
    near = [hit for hit in hits if hit[2] == "near_duplicate"]
    assert [hit[:2] for hit in near] == [(0, 0)] and near[0][3] == pytest.approx(111 / 121)


@pytest.mark.parametrize("around", [50, 200, 2000])
def test_containment_finds_what_jaccard_cannot(around: int) -> None:
    train = [{"text": f"{prose(3, around)} {QUESTION} {prose(4, around)}"}, {"text": prose(5, 2 * around)}]
    assert found(train, [{"prompt": QUESTION, "reference": "Aspirin"}]) == {(0, 0, "containment_5")}
    longer = f"{QUESTION} {prose(6, 20)}"
    train[0]["text"] = f"{prose(3, around)} {longer} {prose(4, around)}"
    names = ("containment_5", "containment_8", "containment_13")
    assert found(train, [{"prompt": longer}]) == {(0, 0, name) for name in names}


@pytest.mark.parametrize(("n", "share", "name"), [(8, 0.5, "containment_8"), (13, 0.5, "containment_13")])
def test_containment_needs_the_share_it_names(n: int, share: float, name: str) -> None:
    test = prose(6, 99 + n).split()  # 100 n-grams
    for copied, expected in ((int(share * 100) + n - 1, True), (int(share * 100) + n - 2, False)):
        train = [{"text": " ".join(test[:copied]) + " " + prose(7, 40)}]
        hits = found(train, [{"text": " ".join(test)}])
        assert ((0, 0, name) in hits) == expected


def test_very_short_texts_are_found_word_for_word_inside_longer_ones() -> None:
    question = "What are the treatments for Alagille syndrome?"
    train = [
        {"text": f"{prose(1, 80)} {question} {prose(2, 80)}"},
        {"text": f"{prose(1, 80)} What are the treatments for Noonan syndrome? {prose(2, 80)}"},
    ]
    assert found(train, [{"question": question, "answer": prose(3, 9)}]) == {(0, 0, "containment_5")}
    assert found(train, [{"question": "And then?", "answer": prose(3, 9)}]) == set()


def test_an_answer_is_held_to_more_than_a_question() -> None:
    """Half of a short answer is a turn of phrase; half of a question is that question."""
    text = prose(4, 48)
    train = [{"text": f"{prose(5, 100)} {' '.join(text.split()[:32])} {prose(6, 100)}"}]
    assert found(train, [{"question": text, "answer": prose(7, 60)}])
    assert not found(train, [{"question": prose(7, 60), "answer": text}])


def test_chinese_is_compared_character_by_character() -> None:
    question = "患者男性五十四岁胸痛两小时放射至左臂首选的药物是什么"
    train = [
        {"text": "以下是一个病例。" + question + "？答案在后面。"},
        {"text": "患者男性五十四岁，发热三天。"},
    ]
    assert found(train, [{"prompt": question, "reference": "阿司匹林"}]) == {(0, 0, "containment_cjk_5")}


def test_source_ids() -> None:
    test = [
        {"PMID": 123, "text": prose(1, 30)},
        {"pubid": "77", "text": prose(2, 30)},
        {"id": "9", "text": prose(3, 30)},
    ]
    train = [
        {"pubmed_id": "123", "text": prose(4, 30)},
        {"pmid": 77.0, "text": prose(5, 30)},
        {"id": 9, "text": prose(6, 30)},
        {"question_id": 123, "text": prose(7, 30)},  # another kind of number
    ]
    ids = {(0, 0, "source_id"), (1, 1, "source_id")}
    assert found(train, test) == ids
    assert found(train, test, id_columns=["id"]) == ids | {(2, 2, "source_id")}


def test_templates_and_phrases_are_no_leaks() -> None:
    """An instruction of every row, and a phrase that many different training rows hold, say nothing about one row."""
    instruction = (
        "Answer the following question of a medical examination with one of the letters given below."
    )
    test = [{"instruction": instruction, "input": prose(100 + n, 40) + "?"} for n in range(20)]
    train = [{"instruction": instruction, "input": prose(200 + n, 40) + "?"} for n in range(20)]
    assert not found(train, test)
    phrase = prose(1, 36)
    partly = [{"text": f"{prose(300 + n, 30)} {phrase} {prose(400 + n, 30)}"} for n in range(12)]
    tested = [{"text": f"{phrase} {prose(2, 16)}"}]
    assert not found(partly, tested)
    assert len({hit[0] for hit in found(partly[:10], tested)}) == 10  # few enough to be copies
    assert len({hit[0] for hit in found(partly[:1] * 12, tested)}) == 12  # one leaked row, copied


def test_what_is_compared() -> None:
    def texts(row: dict[str, Any], column: str = "") -> list[Field]:
        return fields(row, Reading.of(column))

    assert texts({"text": "a b", "question": "c?", "id": "1"}) == [Field("a b")]
    assert texts({"q": "c?", "a": "Yes, d.", "url": "http://x.org/y", "n": 3, "pmid": "12"}) == [
        Field("c?", True),
        Field("Yes, d.", False),
    ]
    assert texts({"question": "c", "options": {"A": "x", "B": "y"}, "answer": "x"}) == [
        Field("c", True),
        Field("x", False, True),
        Field("y", False, True),
        Field("x", False, True),
    ]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert texts({"messages": turns}) == [Field("hello", True), Field("hi", False)]
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    assert texts({"conversations": said}) == [Field("hello", True), Field("hi", False)]
    assert texts({"text": "a b", "question": "c"}, "question") == [Field("c", True)]
    assert texts({"text": None, "n": 1}) == []
    assert source_ids({"Question-ID": 7, "id": 3, "pmid": None}, Reading()) == [("question_id", "7")]


def test_repeats_point_to_an_earlier_row() -> None:
    text = prose(8, 80)
    edited = text.split()
    edited[40] = "changed"
    rows = [text, prose(9, 80), text.upper(), " ".join(edited), "Yes.", "Yes.", " ".join(edited) + "!"]
    repeats = repeats_within([{"text": row} for row in rows])
    assert [(each.row, each.of, each.near) for each in repeats] == [
        (2, 0, False),
        (3, 0, True),
        (6, 3, False),
    ]
    assert repeats[1].score == pytest.approx(71 / 81)
