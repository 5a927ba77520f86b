"""Presets against lm-evaluation-harness' own prompt code: every row of the published files gives the same text."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.evaluate.choice import choice_prompt
from engine.evaluate.data import read_task
from engine.evaluate.tasks import PRESETS, load_task

SHARED = Path(os.environ.get("MEDMERGE_SHARED_DATA") or "no-reference-data")
SUBJECTS = [name for name in PRESETS if name.startswith("mmlu_")]
Pairs = Iterable[tuple[dict[str, Any], int]]  # a row as the harness has it, and its right option

pytestmark = pytest.mark.shared_data


def harness_folder() -> Path:
    pytest.importorskip("jinja2")
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("lm-eval is not installed")
    return Path(found.origin).parent / "tasks"


def published(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("set MEDMERGE_SHARED_DATA to the folder of reference data")
    return SHARED / name


def prompt_code(file: str) -> Callable[[dict[str, Any]], str]:
    """`doc_to_text` of one of the harness' task modules."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, harness_folder() / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.doc_to_text


def same(preset: str, data: Path, rows: Pairs, words: Callable[[dict[str, Any]], str]) -> None:
    task = load_task(preset, data=data)
    for sample, (row, right) in zip(read_task(task), rows, strict=True):
        assert choice_prompt(sample, task.scoring, task.style, task.description) == words(row), sample.id
        assert sample.answer == right, sample.id


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_medqa():
    path = published("medqa_usmle/phrases_no_exclude_test.jsonl")
    rows = [
        (
            {
                "sent1": row["question"],
                **{f"ending{n}": row["options"][letter] for n, letter in enumerate("ABCD")},
            },
            "ABCD".index(row["answer_idx"]),
        )
        for row in lines(path)
    ]
    same("medqa", path, rows, prompt_code("medqa/preprocess_medqa.py"))


def test_medmcqa():
    path = published("medmcqa/dev.json")
    same("medmcqa", path, [(r, r["cop"] - 1) for r in lines(path)], prompt_code("medmcqa/utils_medmcqa.py"))


def test_pubmedqa():
    path = published("pubmedqa/ori_pqal.json")
    order = ["yes", "no", "maybe"]
    raw = json.loads(path.read_text(encoding="utf-8"))
    rows = [(row, order.index(row["final_decision"])) for row in raw.values()]
    same("pubmedqa", path, rows, prompt_code("pubmedqa/preprocess_pubmedqa.py"))


@pytest.mark.parametrize("preset", SUBJECTS)
def test_mmlu(preset):
    path = published(f"mmlu_med/{preset.removeprefix('mmlu_')}_test.csv")
    folder = harness_folder() / "mmlu" / "default"
    description = yaml.safe_load((folder / f"{preset}.yaml").read_text())["description"]
    template = yaml.safe_load((folder / "_default_template_yaml").read_text())["doc_to_text"]
    from jinja2 import Environment

    compiled = Environment().from_string(template)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [({"question": r[0], "choices": r[1:5]}, "ABCD".index(r[5])) for r in csv.reader(file)]
    same(preset, path, rows, lambda row: description + compiled.render(**row))
