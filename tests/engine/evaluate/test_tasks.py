"""Task files and presets: what they resolve to, how they fail, and the real files they are for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import BadRecipeError
from engine.evaluate.choice import choice_prompt
from engine.evaluate.data import read_data, read_task
from engine.evaluate.tasks import PRESETS, Task, load_task, parse_task, preset_path
from engine.evaluate.values import Checker
from tui.cli import main

SHARED = Path(os.environ.get("MEDMERGE_SHARED_DATA") or "no-reference-data")


def parse(raw: Any, *roots: Path) -> Task:
    return parse_task(raw, Checker("sweep.yaml", roots), "tasks[0]")


def write(path: Path, raw: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task file beside its data: what a user adds."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.csv").write_text("message,short\nI have a cough since May,Why do I cough?\n")
    task = {"name": "mine", "kind": "generation", "data": "mine.csv", "prompt": "Shorten: {message}"}
    write(tmp_path / "tasks" / "mine.yaml", {**task, "columns": {"reference": "short"}})
    return tmp_path


def test_one_yaml_and_one_data_file_make_a_task(folder):
    task = parse("tasks/mine.yaml", folder)
    assert task.data == folder / "tasks" / "mine.csv"
    (sample,) = read_task(task)
    assert sample.prompt == "Shorten: I have a cough since May" and sample.reference == "Why do I cough?"
    assert load_task(folder / "tasks" / "mine.yaml") == task
    other = parse({"use": "tasks/mine.yaml", "name": "short", "limit": 1, "system": "Be brief."}, folder)
    assert (other.name, other.limit, other.system, other.prompt) == ("short", 1, "Be brief.", task.prompt)


def test_columns_are_merged_and_the_rest_replaced(folder):
    use = "tasks/mine.yaml"
    task = parse({"use": use, "columns": {"id": "message"}, "where": {"short": "x"}}, folder)
    assert task.columns == {"reference": "short", "id": "message"} and task.where == {"short": "x"}
    assert parse({"use": use, "columns": {"reference": None, "id": "short"}}, folder).columns == {
        "id": "short"
    }


def test_a_preset_needs_only_data(folder):
    task = parse({"use": "medqa", "data": "tasks/mine.csv"}, folder)
    assert (task.name, task.style, task.answers) == ("medqa", "medqa", "letter")
    assert parse("xstest").data.name == "xstest.jsonl" and len(read_task(parse("xstest"))) == 450


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"use": "medqa"}, r"tasks\[0\].data is missing(?s:.)*phrases_no_exclude_test.jsonl"),
        (
            {"use": "medq", "data": "x"},
            r"use is 'medq', which is neither a preset nor a .yaml(?s:.)*mean medqa",
        ),
        ("tasks/none.yaml", r"tasks\[0\].use is tasks/none.yaml, which does not exist"),
        ("tasks/mine.csv", r"neither a preset nor a .yaml file"),
        ({"use": "tasks/mine.yaml", "limt": 3}, r"tasks\[0\].limt is not a known key(?s:.)*limit"),
        ({"use": "tasks/mine.yaml", "data": "tasks"}, r"data is tasks, which is a folder"),
        ({"use": "tasks/mine.yaml", "data": "probes/xtest"}, r"no probe set(?s:.)*probes/xstest"),
        ({"use": "tasks/mine.yaml", "prompt": "a { b"}, r"prompt has '\{' at character 3"),
        ({"use": "tasks/mine.yaml", "prompt": "a {} b"}, r"prompt has '\{\}' at character 3"),
        ({"use": "tasks/mine.yaml", "scoring": "options"}, r"scoring has no meaning for a generation task"),
        ({"use": "tasks/mine.yaml", "style": "mmlu"}, r"style has no meaning for a generation"),
        (
            {"use": "tasks/mine.yaml", "columns": {"answer": "short"}},
            r"columns.answer has no meaning for a gen",
        ),
        (
            {"use": "tasks/mine.yaml", "columns": {"refrence": "x"}},
            r"columns.refrence is not a known(?s:.)*reference",
        ),
        (
            {"use": "tasks/mine.yaml", "columns": {"reference": ["a", "b"]}},
            r"columns.reference should be text",
        ),
        ({"use": "tasks/mine.yaml", "columns": {"reference": {"valeu": "x"}}}, r"valeu is not a known key"),
        ({"use": "tasks/mine.yaml", "where": ["x"]}, r"where should be a mapping"),
        ({"use": "tasks/mine.yaml", "where": {"short": []}}, r"where.short should be a value or a list"),
        ({"use": "tasks/mine.yaml", "replace": {"short": "x"}}, r"replace.short should be a mapping"),
        ({"use": "tasks/mine.yaml", "half": "val"}, r"half is 'val', and should be one of all, dev, test"),
        ({"use": "tasks/mine.yaml", "limit": 0}, r"limit should be a whole number of at least 1"),
        ({"use": "tasks/mine.yaml", "header": "no"}, r"header should be true or false"),
        ({"use": "medqa", "data": "tasks/mine.csv", "shuffle": -1}, r"shuffle should be a whole number"),
        (
            {"use": "medqa", "data": "tasks/mine.csv", "instruction": "x"},
            r"instruction has no meaning unless",
        ),
        (
            {"use": "pubmedqa", "data": "tasks/mine.csv", "columns": {"options": {"value": [True, "no"]}}},
            r"quotes",
        ),
        (
            {"use": "medqa", "data": "tasks/mine.csv", "columns": {"options": ["a"]}},
            r"should be 2 to 26 columns",
        ),
        (
            {"name": "a", "kind": "chat", "data": "tasks/mine.csv"},
            r"kind is 'chat', and should be one of gener",
        ),
        ({"name": "a", "kind": "probes"}, r"data is missing"),
        (7, r"tasks\[0\] should be a mapping, and is 7"),
    ],
)
def test_mistakes_are_named(raw, message, folder):
    with pytest.raises(BadRecipeError, match=message) as error:
        parse(raw, folder)
    assert str(error.value).startswith("sweep.yaml: tasks[0]") and error.value.exit_code == 2


def test_a_mistake_in_a_task_file_names_that_file(folder):
    bad = write(folder / "tasks" / "bad.yaml", {"name": "bad", "kinde": "generation"})
    with pytest.raises(BadRecipeError, match="kinde is not a known key") as error:
        parse("tasks/bad.yaml", folder)
    assert str(error.value).startswith(str(bad))


def test_a_task_file_that_leads_back_to_itself(folder):
    write(folder / "a.yaml", {"use": "b.yaml"})
    write(folder / "b.yaml", {"use": "a.yaml"})
    with pytest.raises(BadRecipeError, match=r"use leads back to itself: a.yaml -> b.yaml -> a.yaml"):
        parse("a.yaml", folder)
    write(folder / "a.yaml", {"use": "./a.yaml"})
    with pytest.raises(BadRecipeError, match="leads back to itself"):
        parse("a.yaml", folder)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_but_for_their_data(name, folder):
    task = load_task(name, data=folder / "tasks" / "mine.csv")
    assert task.name == name and task.about and task.origin and task.licence
    assert preset_path(name).read_text().isascii()


# the real files

COUNTS = {
    "medqa": ("medqa_usmle/phrases_no_exclude_test.jsonl", 1273, 1273),
    "medmcqa": ("medmcqa/dev.json", 4183, 4183),
    "pubmedqa": ("pubmedqa/ori_pqal.json", 1000, 1000),
    "pubmedqa_answers": ("pubmedqa/ori_pqal.json", 1000, 1000),
    "mmlu_anatomy": ("mmlu_med/anatomy_test.csv", 135, 135),
    "mmlu_clinical_knowledge": ("mmlu_med/clinical_knowledge_test.csv", 265, 265),
    "mmlu_college_biology": ("mmlu_med/college_biology_test.csv", 144, 144),
    "mmlu_college_medicine": ("mmlu_med/college_medicine_test.csv", 173, 173),
    "mmlu_medical_genetics": ("mmlu_med/medical_genetics_test.csv", 100, 100),
    "mmlu_professional_medicine": ("mmlu_med/professional_medicine_test.csv", 272, 272),
    "cmexam": ("cmexam/val.xlsx", 6811, 6600),
    "medquad": ("medquad/medquad.jsonl", 16407, 16407),
    "ifeval": ("ifeval/input_data.jsonl", 541, 541),
}


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("set MEDMERGE_SHARED_DATA to the folder of reference data")
    return SHARED / name


@pytest.mark.shared_data
@pytest.mark.parametrize("name", COUNTS)
def test_presets_read_the_published_files(name):
    file, rows, kept = COUNTS[name]
    found = read_data(load_task(name, data=shared(file)))
    assert (found.rows, len(found.samples), found.skipped) == (rows, kept, 0)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "folder", "rows"), [("mts_dialog", "mts_dialog", 1701), ("aci_bench", "aci_bench", 207)]
)
def test_clinical_presets_read_all_splits(name, folder, rows):
    """Every file of the set, and each reference is the file's own text (read by the csv module)."""
    import csv

    files = [path for path in sorted(shared(folder).glob("*.csv")) if "metadata" not in path.name]
    count = 0
    for path in files:
        samples = read_task(load_task(name, data=path))
        with path.open(encoding="utf-8", newline="") as file:
            raw = list(csv.DictReader(file))
        column = {"mts_dialog": "section_text", "aci_bench": "note"}[name]
        assert [s.reference for s in samples] == [row[column] for row in raw]
        assert all(row["dialogue"] in s.prompt for s, row in zip(samples, raw, strict=True))
        count += len(samples)
        if name == "mts_dialog":
            assert not [s.source for s in samples if s.source.isupper()]  # every header has words
    assert count == rows


@pytest.mark.shared_data
def test_what_presets_make_of_real_rows():
    medqa = read_task(load_task("medqa", data=shared("medqa_usmle/phrases_no_exclude_test.jsonl")))
    raw = [
        json.loads(line)
        for line in shared("medqa_usmle/phrases_no_exclude_test.jsonl").read_text().splitlines()
    ]
    assert all(s.options[s.answer] == row["answer"] for s, row in zip(medqa, raw, strict=True))
    medmcqa = read_task(load_task("medmcqa", data=shared("medmcqa/dev.json")))[0]
    assert medmcqa.id == "45258d3d-b974-44dd-a161-c3fccbdadd88"
    assert medmcqa.options[medmcqa.answer].startswith("Impulse through myelinated fibers is slower")
    pubmed = load_task("pubmedqa", data=shared("pubmedqa/ori_pqal.json"))
    first = read_task(pubmed)[0]
    assert first.id == "21645374" and first.options == ("yes", "no", "maybe") and first.answer == 0
    prompt = choice_prompt(first, pubmed.scoring, pubmed.style)
    assert prompt.startswith("Abstract: Programmed cell death") and prompt.endswith("cell death?\nAnswer:")
    mmlu = load_task("mmlu_anatomy", data=shared("mmlu_med/anatomy_test.csv"))
    prompt = choice_prompt(read_task(mmlu)[0], mmlu.scoring, mmlu.style, mmlu.description)
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nA lesion causing compression"
    )
    cmexam = read_task(load_task("cmexam", data=shared("cmexam/val.xlsx")))
    assert cmexam[0].options == ("原发病", "出血部位", "出血量", "在胃内停留时间", "以上均非")
    assert cmexam[0].answer == 2
    (odd,) = [
        s
        for s in cmexam
        if s.options[0] == "硫酸阿托品" and "丁溴东莨菪碱" in s.options and len(s.options) == 4
    ]
    assert odd.options[odd.answer] == "丁溴东莨菪碱"  # its letters are B to E, its answer E
    ifeval = read_task(load_task("ifeval", data=shared("ifeval/input_data.jsonl")))
    assert ifeval[0].id == "1000" and ifeval[0].instructions[2] == {
        "id": "length_constraints:number_words",
        "kwargs": {"relation": "at least", "num_words": 300},
    }


# the command


def test_the_command_lists_and_prints_presets(capsys):
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
    assert main(["tasks", "medqa"]) == 0
    assert capsys.readouterr().out == preset_path("medqa").read_text()
    assert main(["tasks", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["presets"]}
    assert listed["medqa"]["needs_data"] and not listed["xstest"]["needs_data"]
    assert main(["tasks", "medqaa"]) == 2 and "did you mean medqa?" in capsys.readouterr().err


def test_the_command_checks_a_task_and_a_config(folder, capsys):
    assert main(["tasks", "check", str(folder / "tasks" / "mine.yaml")]) == 0
    out = capsys.readouterr().out
    assert (
        "1 samples, of 1 rows" in out
        and "Shorten: I have a cough since May" in out
        and "Why do I cough?" in out
    )
    (folder / "base").mkdir()
    data = folder / "mc.jsonl"
    data.write_text('{"question": "Which?", "options": ["p", "q"], "answer": "B"}\n')
    config = {"base": "base", "tasks": ["tasks/mine.yaml", "xstest"]}
    config["tasks"].append({"name": "mc", "kind": "multiple_choice", "data": "mc.jsonl"})
    assert main(["tasks", "check", str(write(folder / "sweep.yaml", config)), "--json"]) == 0
    mine, xstest, mc = json.loads(capsys.readouterr().out)["tasks"]
    assert mine["rows"] == 1 and xstest["samples"] == 450
    assert mc["answers"] == {"B": 1} and mc["options"] == {"2": 1} and mc["majority"] == 1
    assert mc["first"]["prompt"] == "Question: Which?\nA. p\nB. q\nAnswer:"
    assert mc["prompt_characters"]["most"] == len(mc["first"]["prompt"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tasks", "check"], "check what?"),
        (["tasks", "check", "medqa"], "data is missing"),
        (["tasks", "check", "nowhere.yaml"], "does not exist"),
        (["tasks", "medqa", "--data", "x"], "--data goes with check"),
        (["tasks", "medqa", "pubmedqa"], "one is printed"),
        (["tasks", "medqa", "--schema", "task"], "stands alone"),
    ],
)
def test_wrong_usage_of_the_command(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_command_shows_bad_data_as_bad_input(folder, capsys):
    (folder / "tasks" / "mine.csv").write_text("message,short\nI have a cough,\n")
    assert main(["tasks", "check", str(folder / "tasks" / "mine.yaml")]) == 2
    assert "mine.csv line 2: reference is empty" in capsys.readouterr().err
