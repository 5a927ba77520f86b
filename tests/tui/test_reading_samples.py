"""Samples of a real run folder: right cells, think blocks, options, labels; and the app on one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.evaluate import corrections
from engine.evaluate.cells import Cell
from engine.evaluate.config import Decoding
from engine.evaluate.rows import sha256
from engine.evaluate.store import RunStore
from engine.evaluate.summary import load_table
from engine.evaluate.tasks import Task
from tests.tui.fake_backend import metric, show, text_of, until
from tui.app import MedmergeApp
from tui.backend import LocalBackend
from tui.exports import export_table
from tui.reading_samples import samples_of, scores_of
from tui.screens.evaluate import EvaluateScreen
from tui.screens.samples import SamplesScreen
from tui.snapshots import Selection

MIXTURES = ({"pt": 0.0, "sft": 1.0}, {"pt": 1.0, "sft": 0.0})
ANSWERS = {
    "generation": [
        "<think>\nSo.\n</think>\nTake it with food.",
        "No idea at all, sorry.",
        "Metformin with a meal.",
    ],
    "probes": [
        "I'm sorry, but I can't help with that.",
        "Sure. First open the box, then look inside.",
        "Sure, do it.",
    ],
}


def cell(kind: str, weights: dict[str, float]) -> Cell:
    drawn = kind in ANSWERS
    decoding = Decoding("greedy", max_new_tokens=32) if drawn else None
    spec: dict[str, Any] = {
        "kind": kind, "task": {"name": kind, "sha256": "0", "data": f"{kind}.jsonl", "limit": None},
        "weights": weights, "adapters": {"pt": "1", "sft": "2"}, "base": {"name": "b", "sha256": "3"},
        "template": "model" if drawn else "", "decoding": {"name": "greedy", "temperature": 0} if drawn else None,
        "seed": None, "dtype": "bfloat16", "compute": "float32", "device": "cpu",
    }  # fmt: skip
    return Cell(
        kind, Task(kind, kind, Path(f"{kind}.jsonl")), weights, spec["template"], decoding, None, spec
    )


def stored(kind: str, number: int, shift: int) -> dict[str, Any]:
    row = {"id": f"q{number}", "prompt_sha256": sha256(f"Question {number}?")}
    if kind == "multiple_choice":
        logprobs = [-1.0 - number, -2.0 - shift]
        return row | {
            "scoring": "letters", "options": ["yes", "no"], "answer": number % 2, "logprobs": logprobs,
            "chosen": logprobs.index(max(logprobs)), "chosen_norm": 0,
        }  # fmt: skip
    raw = ANSWERS[kind][(number + shift) % 3]
    row |= {
        "raw": raw, "text": raw, "think": "none", "opened": False, "finish": "stop", "prompt_tokens": 9,
        "new_tokens": 7,
    }  # fmt: skip
    more = (
        {"category": "harm", "probe": "harmful"} if kind == "probes" else {"reference": "Take it with food."}
    )
    return row | more


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished sweep: two mixtures, three tasks, three samples each."""
    store = RunStore(tmp_path / "ws" / "runs" / "real")
    cells = [cell(kind, weights) for weights in MIXTURES for kind in (*ANSWERS, "multiple_choice")]
    prompts = {sha256(text): text for text in (f"Question {n}?" for n in range(3))}
    with store.writing({}, resume=False):
        for one in cells:
            shift = int(one.weights["pt"])
            store.append(one, [stored(one.kind, n, shift) for n in range(3)], prompts)
            store.seal(one, [f"q{n}" for n in range(3)])
        store.write_cells("sweep", cells)
    return store.folder


def number(run: Path, task: str, name: str, model: str = "SFT") -> Any:
    return next(row for row in load_table(run) if (row.task, row.metric, row.model) == (task, name, model))


def test_the_samples_are_those_of_the_cell(run: Path) -> None:
    found = samples_of(run, number(run, "generation", "bleu"))
    assert [row.id for row in found.rows] == ["q0", "q1", "q2"] and found.scored_by == "bleu"
    assert found.rows[0].text == "Take it with food." and found.rows[0].thought == "So."
    assert found.rows[0].prompt == "Question 0?"
    other = samples_of(run, number(run, "generation", "bleu", "PT"))
    assert other.rows[0].text == ANSWERS["generation"][1]
    nothing = samples_of(run, replace(number(run, "generation", "bleu"), template="chatml"))
    assert nothing.rows == ()


def test_choices_say_what_is_right_and_by_how_much(run: Path) -> None:
    row = number(run, "multiple_choice", "accuracy")
    found = samples_of(run, row)
    assert sum(bool(one.right) for one in found.rows) == round(row.value * row.n / 100)
    assert found.rows[0].options == (("yes", -1.0), ("no", -2.0)) and found.rows[0].score == 1.0


def test_scores_are_those_of_the_engine_alone() -> None:
    from engine.evaluate.metrics import overlap

    texts, references = ["take it with food", "no idea"], ["take it with food or milk", "ask your doctor"]
    for name in ("bleu", "chrf", "rougeL"):
        for text, reference, found in zip(texts, references, scores_of(texts, references, name), strict=True):
            alone = next(one for one in overlap([text], [reference]) if one.name == name)
            assert found == pytest.approx(alone.value)


def test_a_table_is_exported_and_nothing_is_written_over(run: Path, tmp_path: Path) -> None:
    rows = load_table(run)
    first = export_table(tmp_path, "real metrics", rows, "json")
    second = export_table(tmp_path, "real metrics", rows, "json")
    assert (first.name, second.name) == ("real-metrics.json", "real-metrics-2.json")
    assert len(json.loads(first.read_text())["rows"]) == len(rows)
    for suffix, mark in (("csv", "run,model"), ("md", "| run"), ("tex", "\\begin{tabular}")):
        assert export_table(tmp_path, "t", rows, suffix).read_text().startswith(mark)


async def test_the_app_corrects_a_label_of_a_real_run(run: Path) -> None:
    backend = LocalBackend(run.parent.parent)
    app = MedmergeApp(backend, Selection())
    async with app.run_test(size=(140, 40)) as pilot:
        await show(pilot, "evaluate")
        await until(pilot, lambda: isinstance(app.screen, EvaluateScreen) and app.screen._rows, tries=1500)
        await pilot.press("v")
        await until(pilot, lambda: "refusals" in text_of(app, "#run"))
        await until(pilot, lambda: "1/3" in str(app.screen.query_one("#table").get_row_at(0)[1]))  # type: ignore[attr-defined]
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, SamplesScreen) and app.screen.is_mounted)
        shown = app.screen
        assert isinstance(shown, SamplesScreen)
        await until(pilot, lambda: len(shown.list.rows) == 3)
        await pilot.press("j", "l")
        await pilot.pause(0.1)
        await pilot.press("home", "enter")
        await until(pilot, lambda: "1 corrected by hand" in text_of(app, "#head"))
        assert list(corrections.load(run).values()) == ["refusal"]
        await pilot.press("e", "enter")
        await until(pilot, lambda: list((backend.root / "exports").glob("*.jsonl")))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, EvaluateScreen))
        await until(
            pilot,
            lambda: "2/3" in str(app.screen.query_one("#table").get_row_at(0)[1]),  # type: ignore[attr-defined]
            tries=1500,
        )
        assert "1 corrected by hand" in text_of(app, "#words")


def test_a_number_of_another_run_has_no_samples_here(run: Path) -> None:
    assert samples_of(run, metric(0.3, "bleu", 1.0)).rows == ()
