"""The audit over files: formats, workers, clean-up, bad input, and the cleaned training set."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from engine.errors import BadDataError, BadInputError, TargetExistsError
from engine.jobs import JobSpec, JobStore, cancel, launch
from engine.jobs.events import EventWriter
from training.audit import chunks, job
from training.audit.report import audit_files, rows_to_drop

Write = Callable[[Path, list[dict[str, Any]]], Path]


@pytest.fixture
def planted(tmp_path: Path, corpus: ModuleType, write_jsonl: Write) -> tuple[Path, Path]:
    """300 training rows, 40 test rows: test rows 0-9 stand in training rows 20-29, rows 50 and 51 repeat row 49."""
    writer = corpus.Writer(11)
    tests = [writer.english(30, 90) for _ in range(40)]
    rows = [writer.english(30, 200) for _ in range(300)]
    for number in range(10):
        rows[20 + number] = f"{rows[20 + number]} {tests[number]} {writer.english(20, 60)}"
    rows[50] = rows[49].upper()
    rows[51] = " ".join(["other", *rows[49].split()])
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": row} for row in rows])
    return train, write_jsonl(tmp_path / "test.jsonl", [{"prompt": row} for row in tests])


def summary(result: dict[str, Any]) -> Any:
    return {key: result[key] for key in ("leaks", "duplicates", "phrases", "pairs", "counts", "examples")}


def test_job_reports_rows_from_zero_and_exits_with_one(planted: tuple[Path, Path]) -> None:
    train, test = planted
    events = EventWriter()
    result = job.run({"train": [str(train)], "test": [str(test)]}, events)
    assert result["exit_code"] == 1
    assert {(leak["train_row"], leak["test_row"]) for leak in result["leaks"]} == {
        (20 + n, n) for n in range(10)
    }
    assert {leak["detector"] for leak in result["leaks"]} >= {"containment_5", "containment_8"}
    assert (result["leaks"][0]["train_file"], result["leaks"][0]["test_file"]) == (str(train), str(test))
    assert [(r["row"], r["of_row"], r["detector"]) for r in result["duplicates"]] == [
        (50, 49, "exact"),
        (51, 49, "near_duplicate"),
    ]
    counts = result["counts"]
    assert (counts["leaking_train_rows"], counts["leaked_test_rows"]) == (10, 10)
    assert counts["rows"] == {str(train): 300, str(test): 40}
    (pair,) = result["pairs"]
    assert (pair["leaking_train_rows"], pair["detectors"]["containment_5"]) == (10, 10)
    example = result["examples"][0]
    marked = "".join(piece for piece, match in example["train"] if match)
    assert len(marked.split()) >= 20 and any(not match for _, match in example["train"])
    progress = [
        event.data for event in events.kept if event.type == "progress" and event.data["phase"] == "audit"
    ]
    assert progress[-1]["done"] == progress[-1]["total"] == train.stat().st_size
    clean = job.run({"train": [str(test)], "test": []}, EventWriter())
    assert (clean["exit_code"], clean["leaks"], clean["duplicates"]) == (0, [], [])


def test_results_depend_on_neither_workers_nor_cuts(
    planted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, test = planted
    wanted = summary(audit_files([train], [test], EventWriter(), workers=0))
    monkeypatch.setattr(chunks, "RANGE", 7_000)
    monkeypatch.setattr(chunks, "ENCODED", 3_000)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert summary(audit_files([train], [test], EventWriter(), workers=0)) == wanted
    assert summary(audit_files([train], [test], EventWriter(), workers=2, scratch=scratch)) == wanted
    assert not list(scratch.iterdir())


def test_every_format_gives_the_same_pairs(planted: tuple[Path, Path], tmp_path: Path) -> None:
    import polars

    train, test = planted
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    wanted = [
        {key: leak[key] for key in ("train_row", "test_row", "detector", "score")}
        for leak in audit_files([train], [test], EventWriter())["leaks"]
    ]
    polars.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
    polars.DataFrame(rows).write_csv(tmp_path / "t.csv")
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(train.read_bytes()))
    (tmp_path / "t.txt").write_text("\n\n".join(row["text"] for row in rows))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(train.read_bytes())
    for name in ("t.parquet", "t.csv", "t.json", "t.jsonl.gz", "t.txt", "folder"):
        found = audit_files([tmp_path / name], [test], EventWriter())["leaks"]
        assert [{key: leak[key] for key in wanted[0]} for leak in found] == wanted, name


def test_column_and_ids(tmp_path: Path, write_jsonl: Write) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    train = write_jsonl(tmp_path / "a.jsonl", [{"body": text, "note": "x", "ref": "7"}])
    test = write_jsonl(
        tmp_path / "b.jsonl", [{"body": "something else entirely here", "note": text, "ref": 7}]
    )

    def detectors(**how: Any) -> set[str]:
        return {leak["detector"] for leak in audit_files([train], [test], EventWriter(), **how)["leaks"]}

    assert "exact" in detectors() and detectors(column="body") == set()
    assert detectors(column="body", id_columns=["ref"]) == {"source_id"}
    with pytest.raises(BadDataError, match=r"no column 'bodi'; it has body, note, ref"):
        detectors(column="bodi")


def test_clean_writes_the_kept_lines_as_they_were(tmp_path: Path, planted: tuple[Path, Path]) -> None:
    train, test = planted
    lines = train.read_bytes().split(b"\n")[:-1]
    lines[0] = lines[0].replace(b'{"text"', b'{ "n": 1.50, "text" ')  # a line that no writer would write so
    train.write_bytes(b"\n".join(lines))
    csv = tmp_path / "more.csv"
    csv.write_text("text,n\nsome words that nothing else holds,1\n" + json.loads(lines[3])["text"] + ",2\n")
    params = {"train": [str(train), str(csv)], "test": [str(test)], "clean": str(tmp_path / "clean")}
    result = job.run({**params, "drop_duplicates": "near"}, EventWriter())
    assert result["exit_code"] == 1
    gone = {*range(20, 30), 50, 51}
    kept = [line for number, line in enumerate(lines) if number not in gone]
    assert (tmp_path / "clean" / "train.jsonl").read_bytes() == b"\n".join(kept)
    assert json.loads((tmp_path / "clean" / "more.jsonl").read_text()) == {
        "text": "some words that nothing else holds",
        "n": "1",
    }
    dropped = [json.loads(line) for line in (tmp_path / "clean" / "dropped.jsonl").read_text().splitlines()]
    assert {(Path(entry["file"]).name, entry["row"]) for entry in dropped} == {
        ("train.jsonl", row) for row in gone
    } | {("more.csv", 1)}
    assert (
        dropped[0]["test_row"] == 0 and dropped[0]["score"] == 1.0 and "containment" in dropped[0]["reason"]
    )
    assert json.loads((tmp_path / "clean" / "audit.json").read_text())["leaks"] == result["leaks"]
    assert result["cleaned"]["dropped"] == {"leaks": 10, "duplicates": 3}
    assert [file["rewritten"] for file in result["cleaned"]["files"]] == [False, True]
    with pytest.raises(TargetExistsError):
        job.run(params, EventWriter())
    again = job.run({"train": [str(tmp_path / "clean" / "train.jsonl")], "test": [str(test)]}, EventWriter())
    assert (again["exit_code"], again["duplicates"]) == (0, [])


def test_rows_to_drop(planted: tuple[Path, Path]) -> None:
    train, test = planted
    result = audit_files([train], [test], EventWriter())
    assert set(rows_to_drop(result)[str(train)]) == set(range(20, 30))
    assert set(rows_to_drop(result, leaks=False, duplicates="exact")[str(train)]) == {50}
    assert "row 49" in rows_to_drop(result, duplicates="near")[str(train)][51]
    assert rows_to_drop(result, leaks=False) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine here"}\n\n{"text": \n', r"data\.jsonl, line 3: not valid JSON"),
        (b'{"text": "fine"}\n["a"]\n', r"data\.jsonl, line 2: expected an object, found a list"),
        (b'{"text": "caf\xe9"}\n', r"data\.jsonl, line 1: not UTF-8"),
        (b'{"text": "fine"}\n{"text": "\\ud83d half"}\n', r"data\.jsonl, line 2: .*surrogate"),
        (b'{"id": "1", "n": 2}\n', r"data\.jsonl: no text to compare, its rows hold id \(str\), n \(int\)"),
        (b"", r"data\.jsonl is empty"),
        (b"\n\n", r"data\.jsonl holds no rows"),
    ],
)
def test_bad_input_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path, good = tmp_path / "data.jsonl", tmp_path / "good.jsonl"
    path.write_bytes(content)
    good.write_text('{"text": "all is well in here"}\n')
    for train, test in (([path], [good]), ([good], [path])):
        if test == [path] and not content:
            message = r"data\.jsonl holds no rows"
        with pytest.raises(BadDataError, match=message):
            audit_files(train, test, EventWriter(), scratch=tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"data.jsonl", "good.jsonl"}


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="does not exist"):
        job.run({"train": [str(tmp_path / "none.jsonl")]}, EventWriter())
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "all is well in here"}\n')
    with pytest.raises(BadInputError, match="nothing to write to"):
        job.run({"train": [str(path)], "drop_duplicates": "exact"}, EventWriter())
    with pytest.raises(BadInputError, match="given twice"):
        job.run({"train": [str(path), str(path)]}, EventWriter())


def test_a_broken_line_in_a_worker_is_the_same_error(planted: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = planted
    train.write_bytes(train.read_bytes() + b'{"text": \n')
    with pytest.raises(BadDataError, match=r"train\.jsonl, line 301"):
        audit_files([train], [test], EventWriter(), workers=1, scratch=tmp_path)
    assert not list(tmp_path.glob("medmerge-audit-*"))


def test_a_cancelled_job_leaves_nothing(planted: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = planted
    big = tmp_path / "big.jsonl"
    big.write_bytes(train.read_bytes() * 600)
    params = {"train": [str(big)], "test": [str(test)], "workers": 2, "clean": str(tmp_path / "clean")}
    view = launch(JobSpec(kind="audit", target="training.audit.job:run", params=params), tmp_path / "jobs")
    deadline = time.monotonic() + 60
    while not list(view.folder.glob("medmerge-audit-*/words-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(view.folder.glob("medmerge-audit-*/words-*"))
    assert cancel(view)
    final = JobStore(tmp_path / "jobs").get(view.id)
    assert (final.state, final.exit_code) == ("cancelled", 130)
    assert not list(view.folder.glob("medmerge-audit-*")) and not list(tmp_path.glob("clean*"))


def test_a_killed_audit_leaves_no_worker(planted: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = planted
    big = tmp_path / "big.jsonl"
    big.write_bytes(train.read_bytes() * 400)
    code = (
        "import sys; from pathlib import Path; from engine.jobs.events import EventWriter\n"
        "from training.audit.report import audit_files\n"
        "if __name__ == '__main__':\n"
        f"    audit_files([Path({str(big)!r})], [Path({str(test)!r})], EventWriter(), workers=2)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    root = str(Path(chunks.__file__).parents[2])
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": root})
    try:
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 30
        while len(children) < 2 and time.monotonic() < deadline:
            children = [
                child
                for child in psutil.Process(process.pid).children()
                if "spawn_main" in " ".join(child.cmdline())
            ]
            time.sleep(0.05)
        assert len(children) == 2
        time.sleep(1.5)  # they set themselves up
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    finally:
        process.kill()
