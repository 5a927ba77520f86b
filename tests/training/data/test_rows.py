"""Files to rows: every format gives what independent writers wrote; what is broken is named with its place."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import polars
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadDataError
from training.data import encoded
from training.data.rows import data_files, read_rows

ROWS = [
    {"id": "1", "text": "Plain."},
    {"id": "2", "text": 'With "quotes", a comma,\ttab'},
    {"id": "3", "text": "Two\nlines and ünïcode 上消化道 🩺"},
    {"id": "4", "text": " spaces stay "},
]
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def values(path: Path, split: str = "auto") -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path, split=split)]


def jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def table(path: Path, **how: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"], **how)
        writer.writeheader()
        writer.writerows(ROWS)


def workbook(path: Path, sheets: dict[str, list[list[str]]]) -> None:
    """The least that is an .xlsx: inline strings."""
    with zipfile.ZipFile(path, "w") as pack:
        kinds = relations = listed = ""
        for n, (name, rows) in enumerate(sheets.items(), 1):
            cells = "".join(
                "<row>"
                + "".join(
                    f'<c t="inlineStr"><is><t xml:space="preserve">{escape(x)}</t></is></c>' for x in row
                )
                + "</row>"
                for row in rows
            )
            main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
            pack.writestr(
                f"xl/worksheets/sheet{n}.xml",
                f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
            )
            office = "application/vnd.openxmlformats-officedocument.spreadsheetml"
            kinds += (
                f'<Override PartName="/xl/worksheets/sheet{n}.xml" ContentType="{office}.worksheet+xml"/>'
            )
            rel = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
            relations += f'<Relationship Id="r{n}" Type="{rel}/worksheet" Target="worksheets/sheet{n}.xml"/>'
            listed += f'<sheet name="{name}" sheetId="{n}" r:id="r{n}" xmlns:r="{rel}"/>'
        package = "http://schemas.openxmlformats.org/package/2006"
        pack.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{package}/content-types"><Default Extension="rels" ContentType='
            f'"application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
            f'ContentType="{office}.sheet.main+xml"/>{kinds}</Types>',
        )
        pack.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
            f'Type="{rel}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        )
        pack.writestr("xl/workbook.xml", f'<workbook xmlns="{main}"><sheets>{listed}</sheets></workbook>')
        pack.writestr(
            "xl/_rels/workbook.xml.rels",
            f'<Relationships xmlns="{package}/relationships">{relations}</Relationships>',
        )


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": jsonl,
    "rows.ndjson": lambda path: polars.DataFrame(ROWS).write_ndjson(path),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "one-line.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8"),
    "lines.json": jsonl,
    "data.json": lambda path: path.write_text(json.dumps({"version": 2, "data": ROWS, "made": {"by": 1}})),
    "columns.json": lambda path: path.write_text(
        json.dumps({key: [row[key] for row in ROWS] for key in ("id", "text")})
    ),
    "keyed.json": lambda path: path.write_text(
        json.dumps({row["id"]: {"text": row["text"]} for row in ROWS})
    ),
    "rows.csv": table,
    "polars.csv": lambda path: polars.DataFrame(ROWS).write_csv(path),
    "quoted.csv": lambda path: table(path, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "rows.tsv": lambda path: table(path, delimiter="\t"),
    "rows.parquet": lambda path: polars.DataFrame(ROWS).write_parquet(path),
    "groups.parquet": lambda path: polars.DataFrame(ROWS).write_parquet(path, row_group_size=1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert [row.index for row in rows] == [0, 1, 2, 3] and {row.file for row in rows} == {path}


@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "lines.json", "rows.csv", "rows.tsv"])
@pytest.mark.parametrize("way", ["gz", "bom"])
def test_packed_and_with_a_byte_order_mark(tmp_path: Path, name: str, way: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = path.read_bytes()
    if way == "gz":
        path = path.with_name(f"{name}.gz")
        path.write_bytes(gzip.compress(data))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + data)
    assert values(path) == ROWS


@pytest.mark.skipif(importlib.util.find_spec("fastexcel") is None, reason="needs fastexcel")
def test_workbooks(tmp_path: Path) -> None:
    lines = [list(ROWS[0]), *([str(value) for value in row.values()] for row in ROWS)]
    workbook(tmp_path / "one.xlsx", {"Data": lines, "Empty": []})
    assert [str(row["text"]) for row in values(tmp_path / "one.xlsx")] == [row["text"] for row in ROWS]
    workbook(tmp_path / "two.xlsx", {"A": lines, "B": lines})
    with pytest.raises(BadDataError, match=r"2 sheets hold rows \(A, B\)"):
        values(tmp_path / "two.xlsx")
    (tmp_path / "bad.xlsx").write_bytes(b"PK nothing")
    with pytest.raises(BadDataError, match=r"bad.xlsx: not a readable"):
        values(tmp_path / "bad.xlsx")


def test_a_workbook_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workbook(tmp_path / "one.xlsx", {"Data": [["text"], ["a"]]})
    monkeypatch.setitem(sys.modules, "fastexcel", None)
    with pytest.raises(BadDataError) as caught:
        values(tmp_path / "one.xlsx")
    assert "pip install fastexcel" in caught.value.hint


def test_text_as_lines_paragraphs_and_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne\r\n two\r\n\r\n \r\n\r\nThree ü\n".encode())
    rows = list(read_rows(path))
    assert [(row.line, row.values["text"]) for row in rows] == [(1, "One\n two"), (6, "Three ü")]
    assert values(path, "paragraph") == values(path)
    assert [row.line for row in read_rows(path, split="line")] == [1, 2, 6]
    assert values(path, "document") == [{"text": "One\n two\n\n \n\nThree ü\n"}]
    with pytest.raises(BadDataError, match="split is 'page'"):
        read_rows(path, split="page")


def test_what_is_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "LARGEST", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_text("word " * 50 + "\n")
    assert len(values(path, "document")) == 1
    path.write_text(("word " * 50 + "\n") * 10_000)
    for split, hint in (("document", "split: paragraph"), ("paragraph", "split: line")):
        with pytest.raises(BadDataError, match="longer than 1 MB") as caught:
            values(path, split)
        assert hint in caught.value.hint
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * (2 << 20))
    with pytest.raises(BadDataError, match="line 1: longer than 1 MB"):
        values(path)


def test_a_folder_is_read_in_the_order_of_names_without_what_stands_beside(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("B one\n\nB two")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "C"}\n{"text": "D"}\n')
    (tmp_path / "a.md").write_text("A")
    for name in ("README.md", "LICENSE.txt", ".hidden.txt", "dataset_info.json", "picture.png"):
        (tmp_path / name).write_text("not data")
    rows = list(read_rows(tmp_path))
    assert [row.values["text"] for row in rows] == ["A", "B one\n\nB two", "C", "D"]
    assert [(row.index, row.line) for row in rows] == [(0, 1), (1, 1), (2, 1), (3, 2)]
    assert [row.values["text"] for row in read_rows(tmp_path, split="paragraph")][1:3] == ["B one", "B two"]
    (tmp_path / "z.csv").write_text("text\n")
    with pytest.raises(BadDataError, match=r"z\.csv holds no rows"):
        list(read_rows(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(BadDataError, match="holds no readable data file"):
        data_files(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.txt", b" \n\n", "holds no rows"),
        ("a.json", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"{}", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.parquet", b"", "is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', r"line 3: expected an object, found a list"),
        ("a.jsonl", b'[{"a": 1}]\n', r"line 1: expected an object, found a list"),
        ("a.jsonl", b'{"a": "\\ud800"}\n', r"line 1: \\ud800 is half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not valid JSON \(nested too deeply"),
        ("a.json", b'[{"a": 1},\n 2]', "record 2 should be an object, found a number"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', r"line 2: not valid JSON \(expected , or \], found '{'"),
        ("a.json", b'[\n{"a": 1},\n{"a": nul}]', r"line 3: not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a"', r"line 2: not valid JSON"),
        ("a.json", b'[{"a": 1}', r"not valid JSON \(expected , or \], the file ends"),
        ("a.json", b'[{"a": 1}]\n]', "more after the end"),
        ("a.json", b'[{"a": "\\udc00"}]', r"line 1: \\udc00 is half"),
        ("a.json", b"[" * 100_000, r"line 1: not valid JSON \(nested too deeply"),
        ("a.json", b'"text"', "expected a list of objects, found a text"),
        ("a.json", b'{"a": {"x": 1},\n "b": 2}', "'b' should be an object as before, found a number"),
        ("a.json", b'{\n"a": "x",\n"b": "y"}', "an object whose 'a' is a text"),
        ("a.json", b'{"a": [1], "b": [1, 2]}', "columns of different lengths"),
        ("a.json", b"{a: 1}", "expected a key in double quotes"),
        ("a.json", b"{", "not valid JSON"),
        ("a.csv", b"a,b\n1,2\n3\n", r"line 3: 1 fields, the header has 2 \(a, b\)"),
        ("a.csv", b'a,b\n"x\ny",2\n3,4,5\n', r"line 4: 3 fields"),
        ("a.csv", b"a,a\n1,2\n", "column name 'a' stands there twice"),
        ("a.csv", b'a,b\n"x,2\n3,4\n', r"line 2: not valid CSV"),
        ("a.tsv", b'a\tb\n"x"y\t2\n', r"line 2: not valid TSV"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.txt", b"good\n\nl\xe4uft\n", r"a\.txt, line 3: not UTF-8 \(byte 0xe4 at byte offset 7\)"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "\xe4"}\n', r"line 2: not UTF-8 \(byte 0xe4 at byte offset 18\)"),
        ("a.json", b'[{"a": "b"},\n{"a": "\xff"}]', r"line 2: not UTF-8 \(byte 0xff at byte offset 20\)"),
        ("a.csv", b"a,b\n1,\xe4\n", r"line 2: not UTF-8"),
        ("a.txt", "text".encode("utf-16"), r"line 1: UTF-16 \(byte offset 0\)"),
        ("a.json", "[]".encode("utf-32"), r"line 1: UTF-32"),
        ("a.docx", b"x", r"unknown format '\.docx'"),
        ("a.parquet.gz", b"x", r"unknown format '\.gz'"),
        ("a.txt.gz", b"plain", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "not a whole gzip file"),
    ],
)
def test_bad_files_are_named_with_their_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadDataError, match=message) as caught:
        values(path)
    assert str(path) in caught.value.message


def test_missing_files_and_mixed_encodings_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="does not exist"):
        read_rows(tmp_path / "a.txt")
    path = tmp_path / "a.csv"
    path.write_bytes("text\nä\n".encode() * 200_000 + b"\xe4\n")
    with pytest.raises(BadDataError, match=r"line 400001: not UTF-8 .* offset 1600000\)") as caught:
        values(path)
    assert "iconv -f" in caught.value.hint
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + '{"a": "ä"},\n'.encode() * 200_000 + b'{"a": "\xe4"}]')
    with pytest.raises(BadDataError, match=r"line 200001: not UTF-8 .* offset 2600008\)"):
        values(path)


def test_one_object_in_a_json_file_is_a_row_or_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": turns}, {"text": "one", "tags": ["a"]}):
        path.write_text(json.dumps(row))
        assert values(path) == [row]
    path.write_text(json.dumps({"x": [1, 2]}))
    assert values(path) == [{"x": 1}, {"x": 2}]
    path.write_text('{"7": {"id": "own", "text": "t"}}')
    assert values(path) == [{"id": "own", "text": "t"}]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
objects = st.dictionaries(st.text(max_size=5), json_values, max_size=4)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(found: object, wanted: object) -> bool:
    return json.dumps(found) == json.dumps(wanted)


@quick
@given(
    st.lists(objects, min_size=1, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans()
)
def test_json_in_any_chunks_is_what_json_loads_says(
    tmp_path: Path, rows: list[dict[str, Any]], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path / "a.json"
    try:
        data = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "CHUNK", chunk)
        assert same(values(path), json.loads(data))
        keyed = {str(n): {"id": n, **row} for n, row in enumerate(rows)}
        path.write_text(json.dumps(keyed, indent=indent))
        assert same(values(path), list(keyed.values()))


@quick
@given(st.lists(objects, min_size=1, max_size=3), st.integers(1, 9), st.data())
def test_json_cut_short_is_always_an_error(
    tmp_path: Path, rows: list[dict[str, Any]], chunk: int, data: st.DataObject
) -> None:
    text = json.dumps(rows)
    path = tmp_path / "a.json"
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "CHUNK", chunk)
        with pytest.raises(BadDataError):
            values(path)


@quick
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufeff")))
def test_text_splitting_loses_nothing_but_blank_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    text = text.replace("\r\n", "\n")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    filled = [line for line in lines if line.strip()]
    if not filled:
        with pytest.raises(BadDataError):
            values(path)
        return
    assert [row["text"] for row in values(path, "line")] == filled
    assert "\n".join(row["text"] for row in values(path)).split("\n") == filled
    assert values(path, "document") == [{"text": text}]
    for row in read_rows(path, split="paragraph"):
        assert lines[row.line - 1] == row.values["text"].split("\n")[0]
        assert row.line == 1 or not lines[row.line - 2].strip()


@quick
@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0")), min_size=2, max_size=2)
    )
)
def test_csv_is_what_the_csv_module_wrote(tmp_path: Path, rows: list[list[str]]) -> None:
    path = tmp_path / "a.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["a", "b"], *rows])
    path.write_bytes(text.getvalue().encode())
    if rows:
        assert values(path) == [{"a": a, "b": b} for a, b in rows]


MEMORY = """
import re, sys
from pathlib import Path
from training.data.rows import read_rows
peak = 0  # memory of its own: a mapped file's pages are the system's to drop
for row in read_rows(Path(sys.argv[1])):
    if row.index % 500 == 0:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(re.search(r"RssAnon:\\s*(\\d+) kB", status)[1]) // 1024)
print(row.index + 1, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    count, path = 60_000, tmp_path / name
    texts = [f"{n} " + "seven chars each or so " * 90 for n in range(count)]  # 125 MB
    if name == "a.txt":
        path.write_text("\n\n".join(texts))
    elif name == "a.json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif name == "a.csv":
        polars.DataFrame({"text": texts}).write_csv(path)
    else:
        polars.DataFrame({"text": texts}).write_parquet(
            path, compression="uncompressed", row_group_size=10_000
        )
    assert path.stat().st_size > 100 << 20
    del texts
    command = [sys.executable, "-c", MEMORY, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd())
    read, peak = map(int, result.stdout.split())
    assert read == count and peak < (150 if name == "a.parquet" else 60), peak


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared reference data are not here")
def test_every_shared_table_is_read() -> None:
    tables = [
        path for path in sorted(SHARED.rglob("*")) if path.suffix in (".csv", ".jsonl", ".json", ".parquet")
    ]
    not_tables = ("test_ground_truth.json", "tokenizer.json", "tokenizer_config.json")
    read = {path: values(path) for path in tables if path.name not in not_tables}
    assert read and all(len({tuple(row) for row in rows}) == 1 for rows in read.values() if len(rows[0]) < 5)
    assert len(read[SHARED / "medquad" / "medquad.jsonl"]) == 16407
    assert len(read[SHARED / "medmcqa" / "dev.json"]) == 4183  # JSON lines by content
    pubmedqa = read[SHARED / "pubmedqa" / "ori_pqal.json"]
    assert len(pubmedqa) == 1000 and pubmedqa[0]["id"] == "21645374"
    for path in tables:
        if path.name in not_tables:
            with pytest.raises(BadDataError, match=path.name):
                values(path)


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared reference data are not here")
@pytest.mark.skipif(importlib.util.find_spec("fastexcel") is None, reason="needs fastexcel")
def test_the_shared_workbook_is_read() -> None:
    rows = values(SHARED / "cmexam" / "val.xlsx")
    assert len(rows) == 6811 and list(rows[0]) == ["Question", "Options", "Answer", "Explanation"]
