"""Labels given by hand: kept in a file of their own, through torn lines, two writers and changed answers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from engine.errors import BadInputError
from engine.evaluate import corrections

CELL = "c" * 16
ANSWERS = {"p0": "I can't help with that.", "p1": "<think>No!</think>Take it with food.", "p2": "你好"}


def key(sample: str, text: str) -> corrections.Key:
    return CELL, sample, hashlib.sha256(text.encode()).hexdigest()


def store(run: Path, answers: dict[str, str]) -> None:
    (run / "cells").mkdir(parents=True, exist_ok=True)
    rows = [{"id": name, "raw": raw, "opened": False} for name, raw in answers.items()]
    pl.DataFrame(rows).write_parquet(run / "cells" / f"{CELL}.parquet")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store(tmp_path / "run", ANSWERS)
    return tmp_path / "run"


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / corrections.FILE).read_text(encoding="utf-8").splitlines()]


def test_the_last_line_of_an_answer_wins_and_null_takes_it_back(run):
    assert corrections.load(run) == {}
    corrections.write(run, CELL, "p0", "partial")
    corrections.write(run, CELL, "p1", "refusal", note="阅读过")
    corrections.write(run, CELL, "p0", "compliance")
    first, second = key("p0", ANSWERS["p0"]), key("p1", "Take it with food.")
    assert corrections.load(run) == {first: "compliance", second: "refusal"}
    corrections.write(run, CELL, "p0", None)
    assert corrections.load(run) == {second: "refusal"}
    assert [line["label"] for line in lines(run)] == ["partial", "refusal", "compliance", None]
    assert [line["was"] for line in lines(run)] == ["refusal", "compliance", "refusal", "refusal"]
    assert lines(run)[1]["note"] == "阅读过"


def test_an_answer_that_changed_is_corrected_no_more(run):
    corrections.write(run, CELL, "p0", "partial")
    store(run, {**ANSWERS, "p0": "Sure, here it is."})
    assert key("p0", "Sure, here it is.") not in corrections.load(run)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_torn_by_a_kill_is_ignored_and_the_next_is_whole(run, cut):
    corrections.write(run, CELL, "p0", "partial")
    corrections.write(run, CELL, "p1", "refusal")
    path = run / corrections.FILE
    path.write_bytes(path.read_bytes()[:-cut])
    kept = {key("p0", ANSWERS["p0"]): "partial"}
    if cut == 1:  # only the line's end is missing: all that was said is there
        kept[key("p1", "Take it with food.")] = "refusal"
    assert corrections.load(run) == kept
    corrections.write(run, CELL, "p2", "safe_completion")
    assert corrections.load(run) == {**kept, key("p2", "你好"): "safe_completion"}


@pytest.mark.parametrize(
    "junk",
    [b"[]\n", b'{"cell": 1}\n', b"\xff\xfe\n", b'{"cell":"c","id":"p0","text_sha256":"x","label":"no"}\n'],
)
def test_lines_not_understood_are_skipped(run, junk):
    corrections.write(run, CELL, "p0", "partial")
    with (run / corrections.FILE).open("ab") as file:
        file.write(junk)
    assert corrections.load(run) == {key("p0", ANSWERS["p0"]): "partial"}


WRITER = """
import sys
from pathlib import Path
from engine.evaluate import corrections
for number in range(25):
    corrections.write(Path(sys.argv[1]), sys.argv[2], sys.argv[3], ("partial", "refusal")[number % 2], "x" * 3000)
"""


def test_two_writers_leave_whole_lines(run):
    root = Path(corrections.__file__).parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(run), CELL, name], cwd=root)
        for name in ("p0", "p1")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(lines(run)) == 50
    assert set(corrections.load(run).values()) == {"partial"}


@pytest.mark.parametrize(
    ("cell", "sample", "label", "said"),
    [
        (CELL, "p0", "refused", "no label"),
        (CELL, "p9", "refusal", "no answer 'p9'"),
        ("d" * 16, "p0", "refusal", "no finished cell"),
    ],
)
def test_what_cannot_be_corrected(run, cell, sample, label, said):
    with pytest.raises(BadInputError, match=said):
        corrections.write(run, cell, sample, label)
    assert not (run / corrections.FILE).exists()


def test_a_file_that_cannot_be_read_or_written_is_an_error(run):
    (run / corrections.FILE).mkdir()
    with pytest.raises(BadInputError, match="cannot read"):
        corrections.load(run)
    with pytest.raises(BadInputError, match="cannot write"):
        corrections.write(run, CELL, "p0", "partial")


def test_the_stamp_changes_with_the_corrections(run):
    assert corrections.stamp(run) == []
    corrections.write(run, CELL, "p0", "partial")
    before = corrections.stamp(run)
    corrections.write(run, CELL, "p0", None)
    assert before and corrections.stamp(run) != before
