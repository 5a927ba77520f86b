"""Task data in every format and every broken way: the error names file, line or row, what was found and wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BadDataError
from engine.evaluate.data import Sample, read_data, read_task
from engine.evaluate.halves import half_of
from engine.evaluate.tasks.options import read_options
from engine.evaluate.tasks.prompt import columns_in, fill
from engine.evaluate.tasks.task import Task

ROWS = [
    {"nr": "a", "ask": 'Say "hi", {x}', "gold": "Hi.\nYou.", "note": "为什么"},
    {"nr": "b", "ask": "Two\tthree", "gold": "Five", "note": "x"},
    {"nr": "c", "ask": "Four", "gold": "Six", "note": "y"},
]
COLUMNS = {"id": "nr", "prompt": "ask", "reference": "gold"}


def generation(path: Path, **fields: Any) -> Task:
    return Task("t", "generation", path, columns=fields.pop("columns", COLUMNS), **fields)


def choice(path: Path, **fields: Any) -> Task:
    return Task("t", "multiple_choice", path, **fields)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_xlsx(path: Path, rows: list[dict[str, Any]]) -> None:
    """A workbook by hand: the smallest that a reader takes."""
    import zipfile
    from xml.sax.saxutils import escape

    def cell(value: Any) -> str:
        if isinstance(value, int | float):
            return f"<c><v>{value}</v></c>"
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(str(value))}</t></is></c>'

    lines = [list(rows[0]), *[list(row.values()) for row in rows]]
    sheet = "".join(f"<row>{''.join(cell(value) for value in line)}</row>" for line in lines)
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    docs = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    sheet_type = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" '
        f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml"'
        f' ContentType="{sheet_type}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
        f'ContentType="{sheet_type}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{docs}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{docs}"><sheets><sheet name="s" sheetId="1" r:id="r1"/>'
        "</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{docs}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{sheet}</sheetData></worksheet>',
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda path: write_jsonl(path, ROWS),
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "csv": lambda path: pl.DataFrame(ROWS).write_csv(path),
    "tsv": lambda path: pl.DataFrame(ROWS).write_csv(path, separator="\t"),
    "parquet": lambda path: pl.DataFrame(ROWS).write_parquet(path),
    "xlsx": lambda path: write_xlsx(path, ROWS),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_samples(ending, tmp_path):
    path = tmp_path / f"data.{ending}"
    WRITERS[ending](path)
    wanted = [Sample(row["nr"], prompt=row["ask"], reference=row["gold"]) for row in ROWS]
    assert read_task(generation(path)) == wanted


def test_json_documents(tmp_path):
    """A mapping of rows gives ids from its keys; JSON lines may be called .json."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps({row["nr"]: {k: v for k, v in row.items() if k != "nr"} for row in ROWS}))
    columns = {"prompt": "ask", "reference": "gold"}
    assert [s.id for s in read_task(generation(path, columns=columns))] == ["a", "b", "c"]
    write_jsonl(path, ROWS)
    assert [s.id for s in read_task(generation(path))] == ["a", "b", "c"]
    write_jsonl(path, ROWS[:1])
    assert [s.id for s in read_task(generation(path))] == ["a"]


def test_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbfnr,ask,gold\r\na,"x\r\ny",z\r\n')
    assert read_task(generation(path)) == [Sample("a", prompt="x\r\ny", reference="z")]


def test_row_numbers_are_ids_that_where_does_not_change(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "x", "of": n % 2} for n in range(6)])
    assert [s.id for s in read_task(Task("t", "perplexity", path))] == list("123456")
    found = read_data(Task("t", "perplexity", path, where={"of": 1}))
    assert [s.id for s in found.samples] == ["2", "4", "6"] and found.notes == ["where keeps 3 of 6 rows"]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"n": 3}, ["2"]),
        ({"n": "3"}, ["2"]),
        ({"n": [1, 3]}, ["1", "2"]),
        ({"ok": True}, ["1"]),
        ({"n": None}, ["3"]),
        ({"n": [None, 1], "ok": "no"}, ["3"]),
    ],
)
def test_where_on_text_columns(where, kept, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,n,ok\nx,1,True\ny,3,no\nz,,no\n")
    assert [s.id for s in read_task(Task("t", "perplexity", path, where=where))] == kept


def test_where_compares_numbers_as_numbers(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "x", "n": 3.0}, {"text": "y", "n": 3.5}])
    assert [s.id for s in read_task(Task("t", "perplexity", path, where={"n": 3}))] == ["1"]


def test_cells_of_parquet_that_are_no_text(tmp_path):
    """NaN is how pandas writes an empty cell; bytes are refused, not shown as b'...'."""
    path = tmp_path / "d.parquet"
    pl.DataFrame({"text": ["x", "y"], "n": [1.0, float("nan")]}).write_parquet(path)
    assert [s.id for s in read_task(Task("t", "perplexity", path, where={"n": None}))] == ["2"]
    found = read_task(Task("t", "perplexity", path, columns={"text": "n"}, empty="skip"))
    assert [s.prompt for s in found] == ["1"]
    pl.DataFrame({"text": [b"x"]}).write_parquet(path)
    with pytest.raises(BadDataError, match="row 1: column 'text' holds bytes"):
        read_task(Task("t", "perplexity", path))


# prompts


def test_a_prompt_is_filled_and_what_is_in_the_data_is_not_interpreted(tmp_path):
    rows = [{"a": "{b} {{c}} %s", "b": ["one", "two"], "n": 3, "gold": "g"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    task = generation(path, columns={"reference": "gold"}, prompt="{{{a}}} [{b}] {n} {{x}}")
    assert read_task(task)[0].prompt == "{{b} {{c}} %s} [one\ntwo] 3 {x}"


def test_replaced_words_are_for_prompts_and_fields_and_where_sees_the_file(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"h": "GENHX", "d": "x", "gold": "g"}])
    task = generation(
        path, columns={"reference": "gold", "source": "h"}, prompt="{h}: {d}",
        where={"h": "GENHX"}, replace={"h": {"GENHX": "history"}},
    )  # fmt: skip
    assert read_task(task) == [Sample("1", source="history", prompt="history: x", reference="g")]


@given(st.dictionaries(st.text("abc", min_size=1), st.text(), min_size=1, max_size=4), st.text("xy{}"))
def test_filling_is_plain_replacement(values, words):
    literal = words.replace("{", "{{").replace("}", "}}")
    prompt = literal + "".join(f"{{{name}}}{literal}" for name in values)
    assert columns_in(prompt) == list(values)
    assert fill(prompt, values.__getitem__) == words + "".join(values[name] + words for name in values)


# multiple choice


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        ({}, {"options": ["p", "q", "r"], "answer": 2}),
        ({}, {"options": ["p", "q", "r"], "answer": "C"}),
        ({}, {"options": ["p", "q", "r"], "answer": "c"}),
        ({}, {"options": ["p", "q", "r"], "answer": "r"}),
        ({}, {"options": ["p", "q", "r"], "answer": "2"}),
        ({"answers": "index1"}, {"options": ["p", "q", "r"], "answer": 3}),
        ({}, {"options": {"A": "p", "B": "q", "C": "r"}, "answer": "C"}),
        ({}, {"options": {"B": "p", "C": "q", "E": "r"}, "answer": "E"}),
        ({}, {"options": "A p\nB q\nC r", "answer": "C"}),
        ({}, {"options": "A p\\nB q\\nC r", "answer": "C"}),
        ({}, {"options": "(A) p\n(B) q\n(C) r", "answer": "C"}),
        ({}, {"options": '["p", "q", "r"]', "answer": "C"}),
        ({"columns": {"options": ["x", "y", "z"]}}, {"x": "p", "y": "q", "z": "r", "answer": "C"}),
        (
            {"columns": {"options": ["x", "y", "z", "w"]}},
            {"x": "p", "y": "q", "z": "r", "w": "", "answer": "C"},
        ),
        ({"columns": {"options": {"value": ["p", "q", "r"]}}}, {"answer": "r"}),
    ],
)
def test_options_and_answers_in_all_their_ways(fields, row, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "Which?", **row}])
    assert read_task(choice(path, **fields)) == [
        Sample("1", prompt="Which?", options=("p", "q", "r"), answer=2)
    ]


def test_an_option_may_go_on_in_the_next_line():
    found = read_options("A one\nmore of it\nB two")
    assert found.texts == ("one\nmore of it", "two") and found.letters == "AB"


def test_a_header_may_be_missing(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('"Which, then?",p,q,B\n')
    columns = {"question": "column_1", "options": ["column_2", "column_3"], "answer": "column_4"}
    found = read_task(choice(path, header=False, columns=columns))
    assert found == [Sample("1", prompt="Which, then?", options=("p", "q"), answer=1)]


def test_instructions_of_two_layouts(tmp_path):
    rules = ({"id": "punctuation:no_comma", "kwargs": {}},)
    rows = [
        {"id": 7, "prompt": "x", "instructions": ["punctuation:no_comma"], "kwargs": [{"n": None}]},
        {"id": 8, "prompt": "x", "instructions": list(rules), "kwargs": []},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    assert [s.instructions for s in read_task(Task("t", "instructions", path))] == [rules, rules]


# halves and limits


def test_halves_part_the_samples_by_id_and_come_before_the_limit(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": f"q{n}", "text": "x"} for n in range(40)])
    ids = {
        half: [s.id for s in read_task(Task("t", "perplexity", path, half=half))] for half in ("dev", "test")
    }
    assert ids["dev"] == [f"q{n}" for n in range(40) if half_of(f"q{n}") == "dev"]
    assert sorted(ids["dev"] + ids["test"]) == sorted(f"q{n}" for n in range(40))
    few = [s.id for s in read_task(Task("t", "perplexity", path, half="dev", limit=3))]
    assert few == [ids["dev"][k * len(ids["dev"]) // 3] for k in range(3)]
    turned = write_jsonl(tmp_path / "e.jsonl", [{"id": f"q{n}", "text": "y"} for n in reversed(range(60))])
    assert set(ids["dev"]) <= {s.id for s in read_task(Task("t", "perplexity", turned, half="dev"))}


# bad data

GOOD = {"question": "Which?", "options": ["p", "q"], "answer": 0}


@pytest.mark.parametrize(
    ("fields", "rows", "message"),
    [
        (
            {},
            [GOOD, {**GOOD, "answer": 2}],
            r"line 2: answer should be the index .*\(0 to 1\), and is 2.*index1",
        ),
        (
            {},
            [{**GOOD, "answer": "C"}],
            r"line 1: answer is 'C', and should be the letter of an option \(A, B\)",
        ),
        ({}, [{**GOOD, "answer": "AB"}], r"answer is 'AB', which is not the text of an option"),
        ({"answers": "index1"}, [{**GOOD, "answer": 0}], r"\(1 to 2\), and is 0"),
        ({"answers": "letter"}, [{**GOOD, "answer": 1}], r"should be a letter, and is 1"),
        ({}, [GOOD, {**GOOD, "answer": "A"}], r"number in some rows and text in others(?s:.)*answers: index"),
        ({}, [{**GOOD, "answer": 1.0}], r"holds 1.0, which is neither a whole number nor text"),
        ({}, [{**GOOD, "answer": ["p"]}], r"holds \['p'\], which is neither a whole number nor text"),
        ({"answers": "index"}, [{**GOOD, "answer": "--1"}], r"line 1: answer should be the index .*is '--1'"),
        ({"answers": "index"}, [{**GOOD, "answer": "9" * 5000}], r"line 1: answer should be the index"),
        ({}, [{**GOOD, "options": ["B", "A"], "answer": "A"}], r"could be read as letter and as text"),
        ({}, [{**GOOD, "options": ["2", "0", "1"], "answer": "1"}], r"could be read as index and as text"),
        ({"answers": "text"}, [{**GOOD, "options": ["p", "p"], "answer": "p"}], r"is the text of 2 options"),
        ({}, [{**GOOD, "options": ["p"]}], r"line 1: options should be a list of 2 to 26"),
        ({}, [{**GOOD, "options": ["p", ""]}], r"options should be a list of 2"),
        ({}, [{**GOOD, "options": ["", "p"]}], r"option A: every option should be text with something"),
        ({}, [{**GOOD, "options": ["p", 3]}], r"holds 3 as option B, which should be text"),
        ({}, [{**GOOD, "options": {"x": "p", "y": "q"}}], r"keys x, y, which should be letters in order"),
        ({}, [{**GOOD, "options": "p\nq"}], r"line 'p' does not begin with a letter"),
        (
            {},
            [GOOD, {**GOOD, "options": ["p", "q", "r"]}],
            r"2 in line 1, 3 in line 2(?s:.)*mixed_options: true",
        ),
        (
            {},
            [{k: v for k, v in GOOD.items() if k != "answer"}],
            r"line 1: 'answer' is missing(?s:.)*columns: question",
        ),
        (
            {"columns": {"question": "qestion"}},
            [GOOD],
            r"no column 'qestion', which columns.question (?s:.)*question\?",
        ),
        ({"prompt": "{quest}"}, [GOOD], r"no column 'quest', which prompt names(?s:.)*question"),
        ({"where": {"answr": 1}}, [GOOD], r"no column 'answr', which where names(?s:.)*answer"),
        ({"where": {"answer": 7}}, [GOOD], r"where leaves none of its 1 rows"),
        ({}, [{**GOOD, "question": "\ud800"}], r"line 1: question holds half of a surrogate pair"),
        ({}, [{**GOOD, "id": 1.5}], r"id should be text, and is 1.5"),
        ({}, [{**GOOD, "id": " "}], r"id is empty"),
        ({}, [{**GOOD, "id": "a"}, GOOD], r"line 2: 'id' is missing"),
        ({}, [{**GOOD, "id": "a"}, {**GOOD, "id": "a"}], r"line 2: id 'a' was used in line 1 already"),
        ({}, [{**GOOD, "question": {"x": 1}}], r"question should be text, and is \{'x': 1\}"),
    ],
)
def test_bad_choices(fields, rows, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadDataError, match=message) as error:
        read_task(choice(path, **fields))
    assert str(path) in str(error.value) and error.value.exit_code == 2


def test_empty_references_are_an_error_or_skipped_and_counted(tmp_path):
    rows = [{"prompt": "x", "reference": word} for word in ("a", "", None, " ", "b")]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(
        BadDataError, match=r"line 2: reference is empty \(so are texts in line 3, line 4\)(?s:.)*empty: skip"
    ):
        read_task(generation(path, columns={}))
    found = read_data(generation(path, columns={}, empty="skip"))
    assert [s.id for s in found.samples] == ["1", "5"] and found.skipped == 3
    assert found.notes == ["3 rows skipped, because a text in them is empty"]
    write_jsonl(path, rows[1:4])
    with pytest.raises(BadDataError, match="all 3 rows are skipped"):
        read_task(generation(path, columns={}, empty="skip"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", b"x", r"the ending .txt(?s:.)*known: .jsonl"),
        ("d", b"x", r"the ending \(none\)"),
        ("d.jsonl", b"\x00\x01", r"is a binary file \(a zero byte in line 1\)"),
        ("d.csv", b"text\nok\n\xb2\xa1\n", r"line 3 is not UTF-8 \(byte 0xb2\)(?s:.)*iconv"),
        ("d.csv", "text\nx".encode("utf-16"), r"is UTF-16 text"),
        ("d.csv", b"text,b\nx\n", r"line 2 has 1 fields, and the header has 2"),
        ("d.csv", b'text,b\n"x,1\n', r"line 2 is not valid CSV"),
        ("d.csv", b"text,text\nx,y\n", r"column 'text' stands twice"),
        ("d.csv", b"text,b\n", r"holds no samples"),
        ("d.tsv", b"text\tb\nx,1\n", r"line 2 has 1 fields"),
        ("d.json", b"{", r"line 1 is not JSON"),
        ("d.json", b"[1]", r"row 1 should be a JSON object"),
        ("d.json", b'{"a": [1]}', r"should be a list of rows, or a mapping of ids"),
        ("d.json", b"[" * 100_000, r"not JSON: nested too deeply"),
        ("d.jsonl", b'{"text": "x", "text": "y"}', r"line 1 is not JSON: key 'text' stands twice"),
        ("d.jsonl", b'{"text": "x"}\n{"text": "y",}\n', r"line 2 is not JSON"),
        ("d.jsonl", b"\n \n", r"holds no samples"),
        ("d.parquet", b"PAR1", r"is not a Parquet file"),
        ("d.xlsx", b"PK", r"is not an xlsx workbook"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadDataError, match=message) as error:
        read_task(Task("t", "perplexity", path))
    assert str(path) in str(error.value)


def test_a_half_that_leaves_nothing(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": "q", "text": "x"}])
    other = {"dev": "test", "test": "dev"}[half_of("q")]
    with pytest.raises(BadDataError, match=f"none of its 1 samples is in the {other} half"):
        read_task(Task("t", "perplexity", path, half=other))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instructions": ["punctuation:no_coma"], "kwargs": [{}]}, r"line 1: .*no_coma(?s:.)*no_comma"),
        ({"instructions": ["punctuation:no_comma"], "kwargs": []}, r"1 instructions have 0 kwargs"),
        ({"instructions": "x", "kwargs": []}, r"instructions should be a list"),
        ({"instructions": [3], "kwargs": [{}]}, r"should have a name"),
        ({"instructions": [], "kwargs": []}, r"instructions is empty"),
    ],
)
def test_bad_instructions(row, message, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "x", **row}])
    with pytest.raises(BadDataError, match=message):
        read_task(Task("t", "instructions", path))


def test_a_missing_xlsx_reader_is_named(tmp_path, monkeypatch):
    import sys

    write_xlsx(tmp_path / "d.xlsx", ROWS)
    monkeypatch.setitem(sys.modules, "fastexcel", None)
    with pytest.raises(BadDataError, match=r"needs the package fastexcel(?s:.)*medmerge-tui\[xlsx\]"):
        read_task(generation(tmp_path / "d.xlsx"))
