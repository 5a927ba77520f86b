"""`medmerge audit` as a person types it: the table, the examples, the exit code, one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tui.cli import main

Write = Callable[[Path, list[dict[str, Any]]], Path]


def test_table_examples_json_and_exit_codes(
    tmp_path: Path,
    corpus: ModuleType,
    write_jsonl: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writer = corpus.Writer(12)
    question = writer.english(30, 50) + " \x1b[31mred\x1b[0m"  # no escape sequence may reach the terminal
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [{"text": writer.english(50, 90)}, {"text": f"Before. {question} After that."}],
    )
    test = write_jsonl(tmp_path / "test.jsonl", [{"question": question}])
    clean = write_jsonl(tmp_path / "clean.jsonl", [{"question": writer.english(30, 50)}])
    monkeypatch.setenv("COLUMNS", "100")
    common = ["audit", "--workspace", str(tmp_path / "ws"), "--train", str(train)]
    assert main([*common, "--test", str(test), str(clean), "--clean", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert "LEAKS: 1 training rows hold 1 test rows" in shown and "\x1b" not in shown
    assert "train.jsonl row 1" in shown and "test.jsonl row 0" in shown and "«" in shown
    assert "1 rows kept, 1 dropped" in shown
    assert all(len(line) <= 100 for line in shown.splitlines() if not line.startswith("cleaned: "))
    assert main([*common, "--test", str(clean), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["leaks"] == [] and document["counts"]["rows"] == {str(train): 2, str(clean): 1}
    assert main([*common, "--test", str(clean), "--column", "question"]) == 2
    assert "no column 'question'; it has text" in capsys.readouterr().err
    assert main([*common, "--drop-duplicates", "exact"]) == 2
