"""A whole sweep on a tiny model: rows, resume, reuse, and tables that come from the rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadDataError, BadInputError, BadModelError, CancelledError, TargetExistsError
from engine.evaluate import job, parse_config
from engine.evaluate.store import RunStore
from engine.evaluate.summary import load_table, sweep_curve
from engine.jobs.events import EventWriter
from engine.weights import Adapter, Checkpoint
from engine.weights.identity import base_identity


def params(config: dict[str, Any], out: Path, resume: bool = False) -> dict[str, Any]:
    return {"config": parse_config(config).to_dict(), "out": str(out), "mode": "sweep", "resume": resume}


def rows_on_disk(run: Path) -> dict[str, list[dict[str, Any]]]:
    store = RunStore(run)
    return {c["hash"]: store.frame(c["hash"]).to_dicts() for c in store.cells()["cells"]}


def test_sweep_rows_table_and_events(sweep_config, tmp_path):
    events = EventWriter()
    result = job.run(params(sweep_config, tmp_path / "runs" / "a"), events)
    run = Path(result["run"])
    assert result["exit_code"] == 0 and result["cells"] == 15 and result["reused"] == 0
    rows = load_table(run)
    assert [row.to_dict() for row in rows] == result["rows"]
    found = {(row.model, row.task, row.metric): row for row in rows}
    assert {row.model for row in rows} == {"SFT", "PT30 SFT70", "PT"}
    accuracy = found["PT", "mc", "accuracy"]
    assert accuracy.n == 8 and accuracy.floor == 25 and accuracy.majority == pytest.approx(100 * 3 / 8)
    assert accuracy.versus == "SFT" and 0 <= accuracy.p <= 1
    assert found["SFT", "mc", "accuracy"].p is None
    assert found["PT", "safety/acts", "refusal_rate"].n == 2
    # three different models give three different perplexities
    assert len({row.value for row in rows if row.metric == "perplexity"}) == 3
    assert [point.x for point in sweep_curve(rows, "pt", "perplexity", "text")] == [0, 0.3, 1]
    # every row has its prompt, and is what the parquet says
    prompts = RunStore(run).prompts()
    for cell_rows in rows_on_disk(run).values():
        assert all(row["prompt_sha256"] in prompts for row in cell_rows)
    progress = [event.data for event in events.kept if event.type == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 3 * (8 + 8 + 8 + 4 + 8)
    live = [event.data for event in events.kept if event.type == "row"]
    assert {
        "model",
        "weights",
        "template",
        "decoding",
        "task",
        "metric",
        "value",
        "low",
        "high",
        "n",
        "floor",
    } <= set(live[0])
    # the mean of the parquet is the value in the table: a number can be traced to rows
    cells = RunStore(run).cells()["cells"]
    mc = next(
        c
        for c in cells
        if c["spec"]["kind"] == "multiple_choice" and c["spec"]["weights"] == {"pt": 1.0, "sft": 0.0}
    )
    right = [row["chosen"] == row["answer"] for row in RunStore(run).frame(mc["hash"]).to_dicts()]
    assert accuracy.value == pytest.approx(100 * sum(right) / len(right))


class Stop(EventWriter):
    """Cancels the job at the n-th progress event, as SIGTERM would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def progress(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise CancelledError("cancelled")


@pytest.mark.parametrize("after", [0, 5])
def test_interrupted_equals_uninterrupted(after, sweep_config, tmp_path):
    sweep_config["decoding"] = [{"name": "warm", "temperature": 1.0, "max_new_tokens": 6}]
    sweep_config["weights"] = [{"pt": 0.3, "sft": 0.7}]
    sweep_config["batch_size"] = 1
    whole, broken = tmp_path / "one" / "whole", tmp_path / "two" / "broken"
    job.run(params(sweep_config, whole), EventWriter())
    with pytest.raises(CancelledError):
        job.run(params(sweep_config, broken), Stop(after))
    torn = next((broken / "cells").glob("*.jsonl"))
    with torn.open("a") as file:
        file.write('{"id": "q1", "raw": "tor')  # a process killed while it wrote
    with pytest.raises(TargetExistsError):
        job.run(params(sweep_config, broken), EventWriter())
    job.run(params(sweep_config, broken, resume=True), EventWriter())
    assert rows_on_disk(broken) == rows_on_disk(whole)
    assert not list((broken / "cells").glob("*.jsonl"))


def test_equal_cells_are_reused_and_changed_ones_are_not(sweep_config, tmp_path):
    first = job.run(params(sweep_config, tmp_path / "runs" / "a"), EventWriter())
    again = job.run(params(sweep_config, tmp_path / "runs" / "b"), EventWriter())
    assert again["reused"] == first["cells"]
    assert [{**row, "run": ""} for row in again["rows"]] == [{**row, "run": ""} for row in first["rows"]]
    sweep_config["decoding"] = [{"name": "greedy", "max_new_tokens": 5}]
    changed = job.run(params(sweep_config, tmp_path / "runs" / "c"), EventWriter())
    assert changed["reused"] == 9  # references, multiple choice and perplexity know no decoding
    assert (
        RunStore(tmp_path / "runs" / "c").prompts().keys()
        == RunStore(tmp_path / "runs" / "a").prompts().keys()
    )


def test_resume_wants_the_same_config(sweep_config, tmp_path):
    sweep_config["weights"] = [{"sft": 1}]
    out = tmp_path / "runs" / "a"
    job.run(params(sweep_config, out), EventWriter())
    sweep_config["batch_size"] = 2
    with pytest.raises(BadInputError, match=r"config\.yaml differs"):
        job.run(params(sweep_config, out, resume=True), EventWriter())


def test_table_is_recomputed_when_it_is_not_of_these_rows(sweep_config, tmp_path):
    sweep_config["weights"] = [{"sft": 1}]
    run = Path(job.run(params(sweep_config, tmp_path / "a"), EventWriter())["run"])
    good = load_table(run)
    kept = json.loads((run / "table.json").read_text())
    kept["rows"][0]["value"] = 99.0
    kept["cells"] = kept["cells"][1:]
    (run / "table.json").write_text(json.dumps(kept))
    assert load_table(run) == good
    (run / "table.json").write_text("{")
    assert load_table(run) == good


def test_templates_and_base_that_were_not_trained_with_are_said(sweep_config, tiny_qwen3, tmp_path):
    identity = {"name": "tiny-qwen3", "sha256": "0" * 64, "shards": 1}
    folder = tmp_path / "sft"
    shutil.copytree(sweep_config["adapters"]["sft"], folder)
    note = {"kind": "sft", "template": "llama3", "template_text": None, "base": identity}
    (folder / "training.json").write_text(json.dumps(note))
    sweep_config |= {
        "adapters": {"sft": str(folder), "other": sweep_config["adapters"]["pt"]},
        "weights": [{"sft": 0.5, "other": 0.5}],
        "templates": ["llama3", "chatml"],
    }
    sweep_config["tasks"] = [task for task in sweep_config["tasks"] if task["kind"] == "probes"]
    events = EventWriter()
    result = job.run(params(sweep_config, tmp_path / "runs" / "a"), events)
    said = [event.data["message"] for event in events.kept if event.type == "warning"]
    assert result["warnings"] == said and len(said) == 5
    assert "trained with template llama3, and template chatml is used: choose templates: [llama3]" in said[1]
    assert all("adapter other: template unknown" in said[n] for n in (0, 2))
    assert "compare within one template" in said[3]
    assert "trained on tiny-qwen3" in said[4] and "another hash" in said[4]
    assert result["trained_on"] == {"sft": {"name": "tiny-qwen3", "sha256": "0" * 64, "same": False}}
    with pytest.raises(BadModelError, match="--strict-base"):
        job.run({**params(sweep_config, tmp_path / "runs" / "b"), "strict_base": True}, EventWriter())
    assert not (tmp_path / "runs" / "b").exists()
    note["base"] = base_identity(Checkpoint.open(tiny_qwen3))
    (folder / "training.json").write_text(json.dumps(note))
    events = EventWriter()
    adapters = {"sft": Adapter.open(folder)}
    found = job.compare_with_base(adapters, Checkpoint.open(tiny_qwen3), events, strict=True)
    assert found[0]["sft"]["same"] is True and found[1] == []


class Meddler(EventWriter):
    """Writes into a file at the first progress event, as somebody who trains on would."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def progress(self, *args: Any, **kwargs: Any) -> None:
        data = bytearray(self.path.read_bytes())
        data[-1] ^= 1
        self.path.write_bytes(data)


def test_an_adapter_that_changes_during_the_run_ends_it(sweep_config, tmp_path):
    weights = Path(sweep_config["adapters"]["pt"]) / "adapter_model.safetensors"
    out = tmp_path / "runs" / "a"
    with pytest.raises(
        BadInputError, match=r"adapter_model\.safetensors changed on disk since this run started"
    ):
        job.run(params(sweep_config, out), Meddler(weights))
    assert not list((out / "cells").glob("*.parquet"))  # nothing measured with it counts as done
    (kept,) = (out / "cells").glob("*.jsonl")
    assert len(kept.read_text().splitlines()) == 1 + 3  # the cell, and the batch before it changed
    # measured again from the start, the cells have the hash of what is there now
    again = job.run(params(sweep_config, tmp_path / "runs" / "b"), EventWriter())
    assert again["reused"] == 0 and again["exit_code"] == 0


def test_what_does_not_fit_the_context_is_named(sweep_config, tiny_qwen3, tmp_path, write_jsonl):
    window = json.loads((tiny_qwen3 / "config.json").read_text())["max_position_embeddings"]
    long = "fever and pain " * window
    rows = [{"id": "short", "question": "Which?", "options": ["a", "b"], "answer": 0},
            {"id": "long", "question": long, "options": ["a", "b"], "answer": 1}]  # fmt: skip
    path = write_jsonl("long.jsonl", rows)
    sweep_config["tasks"] = [{"name": "mc", "kind": "multiple_choice", "data": str(path)}]
    with pytest.raises(BadDataError, match=rf"mc, sample long: .* the model's context is {window:,}"):
        job.run(params(sweep_config, tmp_path / "runs" / "a"), EventWriter())


def test_options_are_shuffled_and_missing_rows_are_told(sweep_config, tmp_path, write_jsonl):
    options = [f"o{k}" for k in range(4)]
    rows = [
        {"id": f"m{n}", "question": f"Which is {n}?", "options": options, "answer": 1, "set": n % 2}
        for n in range(8)
    ]
    path = str(write_jsonl("mc.jsonl", rows))
    task = {"name": "mc", "kind": "multiple_choice", "data": path, "where": {"set": 0}}
    sweep_config |= {"tasks": [{**task, "shuffle": 3}], "weights": [{"sft": 1}]}
    events = EventWriter()
    run = Path(job.run(params(sweep_config, tmp_path / "runs" / "a"), events)["run"])
    assert "mc: where keeps 4 of 8 rows" in [event.data.get("message") for event in events.kept]
    (found,) = rows_on_disk(run).values()
    assert {row["options"][row["answer"]] for row in found} == {"o1"}
    assert len({row["answer"] for row in found}) > 1
