"""docs/tasks.md: its tables are those of the code, and its examples run as they stand."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from engine.evaluate.config import load_config
from engine.evaluate.data import Sample, read_task
from engine.evaluate.tasks import PRESETS, load_task
from engine.evaluate.tasks.doc import updated
from engine.evaluate.tasks.parse import preset_values
from tui.cli import main

PAGE = Path(__file__).parents[3] / "docs" / "tasks.md"


def test_the_tables_are_those_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text) == text, "run: python -m engine.evaluate.tasks.doc docs/tasks.md"


@pytest.fixture(scope="module")
def examples() -> dict[str, str]:
    """The page's YAML by the `name:` in it, and its CSV."""
    text = PAGE.read_text(encoding="utf-8")
    found = {}
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        raw = yaml.safe_load(block)
        found[raw.get("name", "config")] = block
    (table,) = re.findall(r"\n\n((?:    v?\w+,.*\n)+)", text)
    return {**found, "csv": textwrap.dedent(table)}


def test_the_five_minutes_work_as_written(examples, tmp_path, capsys):
    (tmp_path / "notes.csv").write_text(examples["csv"])
    (tmp_path / "plan.yaml").write_text(examples["plan"])
    assert main(["tasks", "check", str(tmp_path / "plan.yaml")]) == 0
    assert "Write the plan of this visit.\n    \n    Doctor: How is the knee?" in capsys.readouterr().out
    first, second = read_task(load_task(tmp_path / "plan.yaml"))
    assert (first.id, first.reference) == ("v1", "Ice, rest, see again in two weeks.")
    assert second.prompt.endswith("\n\nDoctor: Any fever? Patient: Since Monday, 39.")
    for name in ("phrases_no_exclude_test.jsonl", "texts.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "base").mkdir()
    (tmp_path / "sweep.yaml").write_text("base: base\n" + examples["config"])
    tasks = load_config(tmp_path / "sweep.yaml").tasks
    assert [task.name for task in tasks] == ["plan", "plan_dev", "medqa", "xstest", "mine"]
    assert (tasks[1].half, tasks[2].limit, tasks[2].shuffle) == ("dev", 200, 1)


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
