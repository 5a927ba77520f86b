"""Rows to samples in every layout; a row that is no sample is named with file, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars
import pytest

from engine.errors import BadDataError
from training.data.samples import Sample
from training.data.sources import Source, layouts, read_source

TURNS = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]
ALPACA = {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]]}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, kind: str = "sft", **how: Any) -> list[Sample]:
    return list(read_source(Source(str(path), **how), kind))


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in sample.messages]


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ({"messages": MESSAGES}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"messages": SHAREGPT}, {}),
        ({"conversations": MESSAGES}, {}),
        ({"chat": MESSAGES, "instruction": "?"}, {"columns": {"messages": "chat"}}),
        ({"messages": MESSAGES}, {"layout": "messages"}),
        ({"conversations": SHAREGPT}, {"layout": "sharegpt"}),
        (ALPACA, {}),
        (ALPACA, {"layout": "alpaca"}),
        (
            {"Q": "q2", "A": "a2", "H": [["q1", "a1"]]},
            {"columns": {"instruction": "Q", "output": "A", "history": "H"}},
        ),
        (
            {
                "messages": [
                    {"who": {"user": "patient", "assistant": "doctor"}[role], "said": text}
                    for role, text in TURNS
                ]
            },
            {
                "layout": "messages",
                "tags": {
                    "role_tag": "who",
                    "content_tag": "said",
                    "user_tag": "patient",
                    "assistant_tag": "doctor",
                },
            },
        ),
    ],
)
def test_every_layout_gives_the_same_conversation(
    tmp_path: Path, row: dict[str, Any], how: dict[str, Any]
) -> None:
    (sample,) = read(write(tmp_path, row), **how)
    assert turns(sample) == TURNS and (sample.line, sample.index, sample.text) == (1, 0, "")


def test_question_and_answer_columns(tmp_path: Path) -> None:
    for question, answer in (("prompt", "completion"), ("prompt", "response"), ("question", "answer")):
        path = write(tmp_path, {question: " q ", answer: "a\n"})
        assert turns(read(path)[0]) == [("user", " q "), ("assistant", "a\n")]  # untouched
    row = {"instruction": "q", "input": "more", "output": "a", "system": "s"}
    assert turns(read(write(tmp_path, row))[0]) == [("system", "s"), ("user", "q\nmore"), ("assistant", "a")]
    empty = {"instruction": "", "input": "more", "output": "a", "system": "", "history": None}
    assert turns(read(write(tmp_path, empty))[0]) == [("user", "more"), ("assistant", "a")]


def test_what_is_not_named_is_not_used(tmp_path: Path) -> None:
    """`system` of a medical table may be the cardiovascular one."""
    row = {"question": "q", "answer": "a", "system": "cardiovascular", "input": "x"}
    assert turns(read(write(tmp_path, row))[0]) == [("user", "q"), ("assistant", "a")]
    named = read(tmp_path / "rows.jsonl", columns={"system": "system", "input": "input"})
    assert turns(named[0]) == [("system", "cardiovascular"), ("user", "q\nx"), ("assistant", "a")]


def test_system_texts_of_turns_and_columns(tmp_path: Path) -> None:
    front = [{"role": "system", "content": "front"}, *MESSAGES]
    assert turns(read(write(tmp_path, {"messages": front, "system": "column"}))[0])[0] == ("system", "front")
    assert turns(read(write(tmp_path, {"messages": MESSAGES, "system": "column"}))[0])[0] == (
        "system",
        "column",
    )
    empty = [{"role": "system", "content": ""}, *MESSAGES]
    assert turns(read(write(tmp_path, {"messages": empty}))[0]) == TURNS


def test_texts(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": " a "}, {"text": "b", "more": 1})
    samples = read(path, "pt")
    assert [(sample.text, sample.line, sample.index) for sample in samples] == [(" a ", 1, 0), ("b", 2, 1)]
    assert read(write(tmp_path, {"body": "x"}), "pt", columns={"text": "body"})[0].text == "x"
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert [sample.text for sample in read(tmp_path / "a.txt", "pt")] == ["one", "two"]
    row = {"instruction": "q", "input": "more", "output": "a"}
    assert read(write(tmp_path, row), "pt", layout="alpaca")[0].text == "q\nmore"  # LLaMA-Factory's pt rule


def test_turns_of_a_parquet_file(tmp_path: Path) -> None:
    polars.DataFrame([{"messages": MESSAGES}, {"messages": MESSAGES[:2]}]).write_parquet(
        tmp_path / "a.parquet"
    )
    first, second = read(tmp_path / "a.parquet")
    assert turns(first) == TURNS and turns(second) == TURNS[:2]
    assert second.place == f"{tmp_path / 'a.parquet'}, record 2"


def test_the_layout_chosen_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    found = layouts(Source(str(tmp_path)), "sft")
    assert [str(layout) for layout in found.values()] == [
        "alpaca (instruction from question, output from answer)",
        "messages (messages, system)",
    ]
    assert len(read(tmp_path)) == 2


def one(role: str, content: Any, key: str = "messages") -> dict[str, Any]:
    return {key: [{"role": role, "content": content}, {"role": "assistant", "content": "a"}]}


GOOD = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize(
    ("kind", "row", "how", "message"),
    [
        ("pt", {"txt": "a", "n": 1}, {}, "'text' not found among the columns txt, n"),
        ("pt", {"text": " "}, {}, "'text' must be a text that is not empty, found ' '"),
        ("pt", {"text": 5}, {}, "'text' must be a text that is not empty, found 5"),
        ("pt", {"text": "a"}, {"columns": {"text": "body"}}, "'body' not found among the columns text"),
        ("pt", {"messages": MESSAGES}, {"layout": "messages"}, "cannot train kind pt"),
        (
            "pt",
            {"text": "a"},
            {"columns": {"output": "x"}},
            "'output' has no meaning for kind pt, layout text",
        ),
        ("sft", {"text": "a", "n": 1}, {}, "no columns known for kind sft; found text, n"),
        ("sft", {"text": "a"}, {"layout": "text"}, "layout text is for kind pt"),
        ("sft", {"question": "q"}, {}, "no columns known for kind sft; found question"),
        (
            "sft",
            {"instruction": "q", "output": ""},
            {},
            "'output' must be a text that is not empty, found ''",
        ),
        (
            "sft",
            {"instruction": "q", "output": None},
            {},
            "'output' must be a text that is not empty, found None",
        ),
        ("sft", {"instruction": " ", "output": "a"}, {}, "'instruction' must be a text that is not empty"),
        ("sft", GOOD | {"input": 3}, {}, "'input' must be a text, found 3"),
        ("sft", GOOD | {"history": "q1"}, {}, "'history' must be a list of pairs of texts, found a text"),
        ("sft", GOOD | {"history": [["q1"]]}, {}, "'history' item 1 should be a pair of texts"),
        (
            "sft",
            GOOD,
            {"columns": {"instruction": "Q"}},
            "'Q' not found among the columns instruction, output",
        ),
        (
            "sft",
            GOOD,
            {"columns": {"messages": "chat"}},
            "'chat' not found among the columns instruction, output",
        ),
        ("sft", GOOD, {"layout": "sharegpt"}, "'conversations' not found among the columns"),
        ("sft", {"messages": []}, {}, "'messages' must be a list of turns, found an empty list"),
        ("sft", {"messages": "x"}, {}, "'messages' must be a list of turns, found a text"),
        ("sft", {"messages": ["x"]}, {}, "turn 1: expected an object, found a text"),
        ("sft", {"messages": [{"role": "user"}]}, {}, "turn 1: no 'content', found role"),
        ("sft", one("doctor", "q"), {}, "turn 1: role 'doctor' is not one of user, assistant, system"),
        ("sft", one("tool", "q"), {}, "turn 1: role 'tool': tool turns are not trained here"),
        ("sft", one("user", [{"type": "text", "text": "q"}]), {}, "turn 1: content is a list of parts"),
        ("sft", one("user", None), {}, "turn 1: content must be a text, found None"),
        ("sft", one("user", ""), {}, "turn 1: the text of user is empty"),
        ("sft", one("assistant", "q"), {}, "turn 1: a turn of assistant, expected user"),
        ("sft", one("system", "q"), {}, "turn 2: a turn of assistant, expected user"),
        ("sft", {"messages": MESSAGES[:3]}, {}, "ends with a turn of user, expected assistant last"),
        ("sft", {"messages": [{"role": "system", "content": "s"}]}, {}, "has no turns of user and assistant"),
        ("sft", {"messages": [{"role": "system", "content": ""}]}, {}, "has no turns of user and assistant"),
        ("sft", {"messages": [*MESSAGES, *MESSAGES[:1], *MESSAGES[:2]]}, {}, "turn 6: a turn of user"),
        (
            "sft",
            {"messages": [MESSAGES[0], MESSAGES[1] | {"tool_calls": [{"function": {}}]}]},
            {},
            "turn 2: holds tool_calls",
        ),
        (
            "sft",
            {"conversations": [*SHAREGPT[:1], {"from": "function_call", "value": "f"}]},
            {},
            "turn 2: role 'function_call': tool turns are not trained here",
        ),
        (
            "sft",
            {"conversations": [{"from": "user", "value": "q"}, SHAREGPT[1]]},
            {},
            "turn 1: role 'user' is not one of human, gpt, system",
        ),
        (
            "sft",
            {"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]},
            {},
            "turn 2: the text of assistant",
        ),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, kind: str, row: dict[str, Any], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadDataError) as caught:
        read(write(tmp_path, row), kind, **how)
    assert message in caught.value.message and "rows.jsonl" in caught.value.message


def test_a_later_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, {"messages": MESSAGES})
    with pytest.raises(
        BadDataError, match=r"rows\.jsonl, line 2: 'instruction' not found among the columns messages"
    ):
        read(path)


def test_a_column_named_by_the_user_must_be_somewhere(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, GOOD | {"sys": "s"})
    how = {"instruction": "instruction", "output": "output", "system": "sys"}
    assert turns(read(path, columns=how)[1])[0] == ("system", "s")
    with pytest.raises(BadDataError, match=r"no row has a column 'sya', found instruction, output, sys"):
        read(path, columns=how | {"system": "sya"})
