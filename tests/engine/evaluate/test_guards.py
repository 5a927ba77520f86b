"""What keeps two things from passing for one, or a broken one for a good one: labels, stamps, hashes, manifests."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadRecipeError
from engine.evaluate import cells as cells_module
from engine.evaluate import job, parse_config
from engine.evaluate.bench import changed_since, stamps_of
from engine.evaluate.cells import Identity, plan_cells
from engine.evaluate.rules import rules_sha256
from engine.evaluate.store import RunStore
from engine.evaluate.summary import load_table
from engine.evaluate.trust import doubts
from engine.jobs.events import EventWriter
from tests.engine.evaluate.test_job import params


def plan(raw: dict[str, Any], mode: str = "sweep") -> list[Any]:
    config = parse_config(raw, mode=mode)
    base = config.base.name if config.base else ""
    shas = {file.name: file.name for file in config.gguf}
    return plan_cells(
        config, Identity(base, "0", dict.fromkeys(config.adapters, "1"), "float32", "float32", "cpu", shas)
    )


@pytest.fixture
def gguf(tmp_path: Path) -> Any:
    def make(name: str) -> str:
        (tmp_path / name).write_bytes(b"GGUF")
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [{"sft": 1}], "gguf": "SFT.gguf"},
        {"weights": [{"pt": 0.1234567}, {"pt": 0.1234568}]},
        {"weights": [{"sft": 0}], "gguf": "base.gguf"},
    ],
)
def test_two_models_of_one_label_are_refused(sweep_config, gguf, change):
    files = [gguf(change.pop("gguf"))] if "gguf" in change else []
    with pytest.raises(
        BadRecipeError, match=r"would both be called '(SFT|PT0\.123457|base)' in tables"
    ) as error:
        plan({**sweep_config, **change, "gguf": files})
    assert "name" in error.value.hint or "digits" in error.value.hint


def test_labels_that_differ_in_case_alone_are_refused(sweep_config):
    adapters = {"pt": sweep_config["adapters"]["pt"], "PT": sweep_config["adapters"]["sft"]}
    with pytest.raises(BadRecipeError, match=r"the mixture \{'pt': 1\.0\} and the mixture \{'PT': 1\.0\}"):
        plan({**sweep_config, "adapters": adapters, "weights": [{"pt": 1}, {"PT": 1}]})


def test_a_quantisation_called_like_its_base_keeps_its_ending(sweep_config, tiny_qwen3, gguf):
    raw = {"base": str(tiny_qwen3), "tasks": sweep_config["tasks"], "gguf": [gguf(f"{tiny_qwen3.name}.gguf")]}
    assert {cell.label for cell in plan(raw)} == {tiny_qwen3.name, f"{tiny_qwen3.name}.gguf"}
    config = parse_config(raw)
    assert parse_config(config.to_dict()) == config


def test_a_base_may_be_there_for_its_template_alone(sweep_config, tiny_qwen3, gguf):
    raw = {"base": str(tiny_qwen3), "tasks": sweep_config["tasks"][:1],
           "servers": [{"name": "s", "url": "http://localhost:1/v1"}]}  # fmt: skip
    for config in (parse_config(raw, mode="eval"), parse_config({**raw, "weights": []})):
        assert config.weights == () and parse_config(config.to_dict(), mode="eval") == config
        assert stamps_of(config) == {}
    (cell,) = plan({**raw, "weights": []})
    assert cell.label == "s" and len(cell.spec["template_sha256"]) == 64
    with pytest.raises(BadRecipeError, match="weights"):
        parse_config({**sweep_config, "weights": []})


def test_another_template_text_is_another_cell(sweep_config, monkeypatch):
    raw = {**sweep_config, "templates": ["chatml"]}
    first = plan(raw)
    template = cells_module.templates.load("chatml")
    other = replace(template, opening=template.opening + " ")
    monkeypatch.setitem(cells_module.templates.BUILTIN, "chatml", other)
    for before, after in zip(first, plan(raw), strict=True):
        assert (before.hash == after.hash) == (before.template == "")


def test_tables_of_other_rules_and_runs_of_the_format_before(sweep_config, tmp_path):
    sweep_config |= {"weights": [{"sft": 1}], "tasks": sweep_config["tasks"][1:2]}
    run = Path(job.run(params(sweep_config, tmp_path / "a"), EventWriter())["run"])
    good, path = load_table(run), run / "table.json"
    kept = json.loads(path.read_text())
    assert kept["rules"] == rules_sha256()
    kept["rows"][0]["value"] = 99.0
    path.write_text(json.dumps(kept))
    assert load_table(run)[0].value == 99.0  # the stamp is right, so it is taken
    path.write_text(json.dumps({**kept, "rules": "0" * 64}))
    assert load_table(run) == good
    note = json.loads((run / "cells.json").read_text())
    for said in ("medmerge.eval/1", "medmerge.eval/2"):
        (run / "cells.json").write_text(json.dumps({**note, "format": said}))
        assert len(RunStore(run).cells()["cells"]) == 1 and load_table(run) == good


def test_only_files_that_a_cell_reads_stop_it(sweep_config, tmp_path, tiny_qwen3):
    base = shutil.copytree(tiny_qwen3, tmp_path / "copy")
    (base / "README.md").write_text("one")
    config = parse_config({**sweep_config, "base": str(base), "templates": ["chatml"],
                           "servers": [{"name": "s", "url": "http://localhost:1/v1"}]})  # fmt: skip
    cells = plan_cells(config, Identity("copy", "0", {"pt": "1", "sft": "2"}, "float32", "float32", "cpu"))
    mixture, server = cells[0], cells[-1]
    stamps = stamps_of(config)
    (base / "README.md").write_text("two")
    (base / "medmerge.json").write_text("{}")
    assert changed_since(stamps, mixture) is None
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        os.utime(base / name, (1, 1))
        assert changed_since(stamps, mixture) == base / name
        assert changed_since(stamps, server) is None
        stamps = stamps_of(config)


def test_weight_files_beside_or_missing_from_a_manifest_are_doubtful(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    note = {"format": "medmerge.merge/2", "verification": {"done": True, "ok": True},
            "output": {"files": {"a.safetensors": "1", "b.safetensors": "2", "config.json": "3"}}}  # fmt: skip
    (folder / "medmerge.json").write_text(json.dumps(note))
    assert doubts(folder, {"a.safetensors": "1", "b.safetensors": "2"}) == []
    said = doubts(folder, {"a.safetensors": "1", "c.safetensors": "4"})
    assert said == [
        "m: its manifest does not name c.safetensors",
        "m: b.safetensors of its manifest is not there, or not used",
    ]


@pytest.mark.parametrize("task", [0, 1, 3])
def test_a_mixture_of_no_numbers_fails_its_cells_and_the_others_go_on(sweep_config, tmp_path, task):
    """Weights of 1e30 in float16 are infinite: argmax would answer token 0 and option A."""
    sweep_config |= {
        "weights": [{"pt": 1e30}, {"sft": 0.01}], "dtype": "float16", "compute": "float32",
        "tasks": sweep_config["tasks"][task : task + 1],
    }  # fmt: skip
    result = job.run(params(sweep_config, tmp_path / "a"), EventWriter())
    assert result["exit_code"] == 3 and result["failed"]
    assert all("PT" in title for title in result["failed"])
    for reason in result["failed"].values():
        assert "values that are not numbers" in reason and "sample " in reason and "tiny" in reason
    assert {row["model"] for row in result["rows"]} == {"SFT1"}
