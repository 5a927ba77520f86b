"""Planted leaks are found by the detector meant for them; unrelated rows are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BadDataError
from engine.jobs.events import EventWriter
from training.audit import job
from training.audit.detectors import Document, duplicates, leaks
from training.audit.text import Vocabulary, jaccard, ngrams, pieces, shingles, words

Write = Callable[[Path, list[dict[str, Any]]], Path]
QUESTION = (
    "A 54-year-old man comes to the clinic with crushing chest pain that spreads to the left arm and started two "
    "hours ago while he was shovelling snow; which drug should be given first to this patient?"
)


def prose(seed: int, length: int) -> str:
    """Random words of a made-up vocabulary: two seeds share no phrase of eight words."""
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(4000)}" for _ in range(length))


def found(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> set[tuple[int, int, str]]:
    vocabulary = Vocabulary()
    left = [Document.of("train", n, pieces(row), vocabulary) for n, row in enumerate(train)]
    right = [Document.of("test", n, pieces(row), vocabulary) for n, row in enumerate(test)]
    return {(match.left.row, match.right.row, match.detector) for match in leaks(left, right)}


def test_exact_after_normalising_and_only_for_real_texts() -> None:
    test = [
        {"question": QUESTION, "options": ["Aspirin", "Insulin"], "answer": 0},
        {"prompt": "Yes.", "reference": "No."},
    ]
    train = [
        {
            "instruction": QUESTION.upper().replace(",", " ").replace("-", "\u2010") + " ?!",
            "output": "Aspirin.",
        },
        {"instruction": "Yes", "output": "No"},  # too short to be a leak
        {"text": prose(1, 60)},
    ]
    assert {hit for hit in found(train, test) if hit[2] == "exact"} == {(0, 0, "exact")}
    assert not {hit for hit in found(train, test) if hit[0] != 0}


def test_near_duplicate_by_true_jaccard() -> None:
    original = prose(2, 120).split()
    edited, other = list(original), list(original)
    edited[60] = "changed"  # 5 of 116 shingles differ: J = 111/121 = .917
    for place in range(5, 120, 12):
        other[place] = "changed"  # J far below .8
    hits = found([{"text": " ".join(edited)}, {"text": " ".join(other)}], [{"text": " ".join(original)}])
    assert (0, 0, "near_duplicate") in hits and not {
        hit for hit in hits if hit[0] == 1 and hit[2] == "near_duplicate"
    }


@pytest.mark.parametrize("around", [50, 200, 2000])
def test_containment_finds_what_jaccard_cannot(around: int) -> None:
    train = [{"text": f"{prose(3, around)} {QUESTION} {prose(4, around)}"}, {"text": prose(5, 2 * around)}]
    hits = found(train, [{"prompt": QUESTION, "reference": "Aspirin"}])
    assert hits == {(0, 0, "containment_8"), (0, 0, "containment_13")}


def test_containment_needs_the_share_it_names() -> None:
    test = prose(6, 107).split()  # 100 8-grams
    for copied, expected in ((77, True), (76, False)):  # 70 and 69 of them
        hits = found([{"text": " ".join(test[:copied]) + " " + prose(7, 40)}], [{"text": " ".join(test)}])
        assert ((0, 0, "containment_8") in hits) == expected


def test_chinese_is_compared_character_by_character() -> None:
    question = "患者男性五十四岁胸痛两小时放射至左臂首选的药物是什么"
    hits = found(
        [{"text": "以下是一个病例。" + question + "？答案在后面。"}],
        [{"prompt": question, "reference": "阿司匹林"}],
    )
    assert hits == {(0, 0, "containment_8"), (0, 0, "containment_13")}


def test_duplicates_point_to_the_first_row() -> None:
    vocabulary = Vocabulary()
    text = prose(8, 80)
    edited = text.split()
    edited[40] = "changed"
    rows = [text, prose(9, 80), text.upper(), " ".join(edited)]
    matches = duplicates([Document.of("f", n, [row], vocabulary) for n, row in enumerate(rows)])
    assert [(m.left.row, m.right.row, m.detector) for m in matches] == [
        (2, 0, "exact"),
        (3, 0, "near_duplicate"),
    ]


@given(
    st.lists(st.sampled_from("abcde"), max_size=30),
    st.lists(st.sampled_from("abcde"), max_size=30),
    st.integers(1, 6),
)
def test_ngrams_and_jaccard_equal_sets_of_tuples(left: list[str], right: list[str], n: int) -> None:
    vocabulary = Vocabulary()

    def reference(text: list[str]) -> set[tuple[str, ...]]:
        size = min(n, len(text)) or 1
        return {tuple(text[k : k + size]) for k in range(len(text) - size + 1)}

    sets = [shingles(vocabulary.encode(text), n) for text in (left, right)]
    assert [len(item) for item in sets] == [len(reference(text)) for text in (left, right)]
    union = reference(left) | reference(right)
    expected = len(reference(left) & reference(right)) / len(union) if left and right else 0.0
    assert jaccard(*sets) == pytest.approx(expected)
    assert len(ngrams(vocabulary.encode(left), n)) == max(len(left) - n + 1, 0)


def test_words_are_normalised() -> None:
    assert words("Ｈeparin—5 000 IU/ml, snake_case β-blocker") == [
        "heparin", "5", "000", "iu", "ml", "snake", "case", "β", "blocker",
    ]  # fmt: skip
    assert words("胸痛 2小时") == ["胸", "痛", "2", "小", "时"]
    assert np.array_equal(Vocabulary().encode(["a", "b"]), Vocabulary().encode(["a", "b"]))


def test_job_reports_rows_from_zero_and_exits_with_one(tmp_path: Path, write_jsonl: Write) -> None:
    train = write_jsonl(
        tmp_path / "train.jsonl", [{"text": prose(1, 50)}, {"text": f"{QUESTION} {prose(2, 30)}"}]
    )
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": prose(3, 20)}, {"prompt": QUESTION}])
    result = job.run({"train": [str(train)], "test": [str(test)]}, EventWriter())
    assert result["exit_code"] == 1
    assert {(leak["train_row"], leak["test_row"]) for leak in result["leaks"]} == {(1, 1)}
    assert result["leaks"][0]["train_file"] == str(train) and result["leaks"][0]["score"] == 1.0
    assert result["counts"]["leaking_train_rows"] == 1
    clean = job.run({"train": [str(train)], "test": []}, EventWriter())
    assert (clean["exit_code"], clean["leaks"], clean["duplicates"]) == (0, [], [])


def test_broken_lines_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for content, message in (
        (b'{"text": "fine here"}\n\n{"text": \n', r"train\.jsonl, line 3: not valid JSON"),
        (b'{"text": "fine"}\n["a"]\n', r"train\.jsonl, line 2: expected an object, found list"),
        (b'{"id": "1"}\n', r"train\.jsonl, line 1: no text field"),
        (b'{"text": "caf\xe9"}\n', r"train\.jsonl, line 1: not valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadDataError, match=message):
            job.run({"train": [str(path)]}, EventWriter())
    with pytest.raises(BadDataError, match="cannot read"):
        job.run({"train": [str(tmp_path / "none.jsonl")]}, EventWriter())
