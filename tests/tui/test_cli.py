"""The command line as a person meets it: help, exit codes, the README's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tui.cli import COMMANDS, build_parser, main
from tui.commands.common import amount, duration, labelled, progress_text, table
from tui.commands_doc import updated

ROOT = Path(__file__).parents[2]


def test_the_readme_lists_the_commands_as_they_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert updated(text) == text, "run: python -m tui.commands_doc README.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--workspace" in text and "--json" in text
    assert "examples:" in text


def test_no_command_shows_the_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands" in capsys.readouterr().out


def test_wrong_usage_exits_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2


def test_errors_are_json_when_json_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["jobs", "show", "nothing", "--json", "--workspace", str(tmp_path / "w")])
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert code == answer["exit_code"] == 2
    assert "nothing" in answer["error"] and "nothing" in captured.err


def test_labels_paths_and_weights() -> None:
    assert labelled("pt=a/b:0.3") == ("pt", "a/b", 0.3)
    assert labelled("pt=C:/x") == ("pt", "C:/x", None)
    assert labelled("pt=a=b:-1e-1") == ("pt", "a=b", -0.1)


def test_amounts_and_durations() -> None:
    assert [amount(n, "B") for n in (12, 3_400, 5_600_000, 7.8e9)] == ["12 B", "3 kB", "6 MB", "7.80 GB"]
    assert [duration(n) for n in (5, 600, 7500)] == ["5 s", "10 min", "2 h 05 min"]
    text = progress_text(
        {"done": 5e6, "total": 1e7, "unit": "B", "rate": 1e6, "eta_s": 5, "message": "x\x1b[2Jy"}
    )
    assert "50%" in text and "5 s left" in text and "\x1b" not in text


def test_tables_align_wide_characters() -> None:
    lines = table(["name", "n"], [["心肌", "1"], ["ab", "22"]]).split("\n")
    assert lines == ["name   n", "心肌   1", "ab    22"]
