"""Planted leaks among clean text: every exact and embedded copy is found, 98% of the edited ones, and next to nothing
else. The planted rows are known, so recall and false alarms are counted, not estimated."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from training.audit.memory import leaks_between

Rows = list[dict[str, Any]]
KINDS = ("exact", "embedded", "substituted", "deleted", "inserted")
SHARED = Path(__file__).parents[4] / "shared" / "data"


def planted(
    writer: Any, tests: list[str], clean: list[str], around: Callable[[], str], chinese: bool
) -> tuple[Rows, list[tuple[str, int]]]:
    """(training rows, [(kind, test row) of each; ("clean", -1) for the rest]). Test row i is planted as KINDS[i % 5]
    where i is below five sixths of them, the rest is planted nowhere."""
    rows: list[tuple[str, str, int]] = [(text, "clean", -1) for text in clean]
    for number, text in enumerate(tests[: 5 * len(tests) // 6]):
        kind = KINDS[number % len(KINDS)]
        if kind == "exact":
            copy = writer.disguised(text) if not chinese else text.replace("，", " , ").replace("。", "\n")
        elif kind == "embedded":
            copy = f"{around()} {text} {around()}"
        else:
            joiner = "" if chinese else " "
            copy = joiner.join(writer.edited(list(text) if chinese else text.split(), kind))
            if number % 2:
                copy = f"{around()} {copy} {around()}"
        rows.append((copy, kind, number))
    random.Random(3).shuffle(rows)
    return [{"text": text} for text, _, _ in rows], [(kind, number) for _, kind, number in rows]


def alike(left: str, right: str) -> bool:
    """Published sets hold questions that are nearly the same: three quarters of the characters in the same order."""
    return difflib.SequenceMatcher(None, left, right, autojunk=False).ratio() >= 0.75


def check(train: Rows, plan: list[tuple[str, int]], tests: Rows) -> None:
    found = {(row, test) for row, test, _, _ in leaks_between(train, tests)}
    for kind in KINDS:
        wanted = {(row, test) for row, (planted_as, test) in enumerate(plan) if planted_as == kind}
        recall = len(wanted & found) / len(wanted)
        assert recall >= (1.0 if kind in ("exact", "embedded") else 0.98), (kind, recall)
    clean = [row for row, (kind, _) in enumerate(plan) if kind == "clean"]
    alarms = {
        row
        for row, test in found
        if plan[row][0] == "clean" and not alike(train[row]["text"], tests[test]["text"])
    }
    assert len(alarms) <= 0.002 * len(clean), len(alarms)


@pytest.mark.parametrize(("least", "most"), [(20, 40), (60, 300)])
def test_english(corpus: ModuleType, least: int, most: int) -> None:
    writer = corpus.Writer(7)
    tests = [writer.english(least, most) for _ in range(900)]
    clean = [writer.english(20, 300) for _ in range(2000)]
    train, plan = planted(writer, tests, clean, lambda: writer.english(50, 250), False)
    check(train, plan, [{"text": text} for text in tests])


def test_chinese(corpus: ModuleType) -> None:
    writer = corpus.Writer(8)
    tests = [writer.chinese(24, 160) for _ in range(900)]
    clean = [writer.chinese(20, 400) for _ in range(2000)]
    train, plan = planted(writer, tests, clean, lambda: writer.chinese(40, 300), True)
    check(train, plan, [{"text": text} for text in tests])


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_real_questions_among_real_answers(corpus: ModuleType) -> None:
    """MedQA's questions planted among MedQuAD's answers. None of them stands there by itself."""
    questions = [
        json.loads(line)["question"]
        for line in (SHARED / "medqa_usmle" / "phrases_no_exclude_test.jsonl").open(encoding="utf-8")
    ]
    tests = sorted({text for text in questions if len(text.split()) >= 20})[:900]
    rows = (json.loads(line) for line in (SHARED / "medquad" / "medquad.jsonl").open(encoding="utf-8"))
    answers = list(dict.fromkeys(row["answer"] for row in rows if row["answer"]))
    writer, rng = corpus.Writer(9), random.Random(4)
    train, plan = planted(writer, tests, answers[:4000], lambda: rng.choice(answers), False)
    check(train, plan, [{"text": text} for text in tests])


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_real_chinese_questions(corpus: ModuleType) -> None:
    """CMExam: questions of 24 characters or more (shorter ones: docs/audit.md) planted among others.

    Those that are nearly the same as published are no false alarms.
    """
    pytest.importorskip("fastexcel")
    from training.data.rows import read_rows

    rows = [row.values for row in read_rows(SHARED / "cmexam" / "val.xlsx")]
    random.Random(5).shuffle(rows)
    questions = sorted({row["Question"] for row in rows[:4000] if len(row["Question"] or "") >= 24})
    texts = sorted(
        {row["Question"] for row in rows[4000:] if len(row["Question"] or "") >= 10} - set(questions)
    )
    writer, rng = corpus.Writer(10), random.Random(6)
    train, plan = planted(writer, questions[:900], texts, lambda: rng.choice(texts), True)
    check(train, plan, [{"text": text} for text in questions[:900]])
