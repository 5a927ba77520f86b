"""The examples of docs/tasks.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from engine.evaluate.config import load_config
from engine.evaluate.data import Sample, read_task
from engine.evaluate.tasks import PRESETS, load_task
from engine.evaluate.tasks.parse import preset_values
from tui.cli import main

PAGE = Path(__file__).parents[3] / "docs" / "tasks.md"


@pytest.fixture(scope="module")
def examples() -> dict[str, str]:
    """The YAML of the page by the `name` in it ("config" for the list of tasks), and its CSV."""
    found = {}
    for language, block in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        name = yaml.safe_load(block).get("name", "config") if language == "yaml" else language
        found[name] = block
    return found


def test_the_five_minutes_work_as_written(examples, tmp_path, capsys):
    (tmp_path / "summaries.csv").write_text(examples["csv"])
    (tmp_path / "summaries.yaml").write_text(examples["summaries"])
    assert main(["tasks", "check", str(tmp_path / "summaries.yaml")]) == 0
    assert "one short question.\n    \n    I have had a cough since May" in capsys.readouterr().out
    (sample,) = read_task(load_task(tmp_path / "summaries.yaml"))
    assert sample.reference == "What causes a cough that lasts for months?"


def test_the_list_of_tasks_is_a_config(examples, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "tasks").mkdir()
    for name in ("qa.jsonl", "phrases_no_exclude_test.jsonl", "mts.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "tasks" / "mts.yaml").write_text("{use: mts_dialog, data: ../mts.csv}")
    (tmp_path / "sweep.yaml").write_text("base: base\n" + examples["config"])
    tasks = load_config(tmp_path / "sweep.yaml").tasks
    assert [task.name for task in tasks] == ["qa", "medqa", "mts_dialog", "mts_few", "xstest"]


def test_the_choice_examples_read_such_files(examples, tmp_path):
    (tmp_path / "exam.csv").write_text("question,a,b,c,d,right\nWhich?,p,q,r,s,4\n")
    (tmp_path / "exam.xlsx").write_text("")
    (tmp_path / "exam.yaml").write_text(examples["exam"])
    assert read_task(load_task(tmp_path / "exam.yaml", data=tmp_path / "exam.csv")) == [
        Sample("1", prompt="Which?", options=("p", "q", "r", "s"), answer=3)
    ]
    (tmp_path / "claims.jsonl").write_text(
        '{"claim": "It helps.", "evidence": "It did.", "verdict": "maybe"}\n'
    )
    (tmp_path / "claims.yaml").write_text(examples["claims"])
    assert read_task(load_task(tmp_path / "claims.yaml")) == [
        Sample("1", prompt="It helps.", context="It did.", options=("yes", "no", "maybe"), answer=2)
    ]


@pytest.mark.parametrize("name", [name for name in PRESETS if "data" in preset_values(name)])
def test_probe_presets_say_how_many_they_have(name):
    task = load_task(name)
    assert f"{len(read_task(task)):,} prompts" in task.origin
