"""`medmerge search`: from a YAML file to a table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.workspace import Workspace
from tests.conftest import MakeAdapter
from tui.cli import main
from tui.commands.search import render


@pytest.fixture
def config(workspace: Workspace, tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Any]:
    rows = [
        {"id": f"t{n}", "text": f"The patient had a fever for {n} days and was given aspirin."}
        for n in range(12)
    ]
    (workspace.data / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": str(tiny_llama),
        "adapters": {"pt": str(make_adapter(tiny_llama, seed=1, b_std=0.2))},
        "weights": [{"pt": 0.5}],
        "tasks": [{"name": "text", "kind": "perplexity", "data": "data/text.jsonl"}],
        "device": "cpu",
        "search": {"groups": 2, "grid": 3, "evaluations": 6},
    }


def test_search_then_again_then_resumed(
    workspace: Workspace, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace.root / "s.yaml"
    path.write_text(yaml.safe_dump(config))
    common = ["--out", "one", "--workspace", str(workspace.root)]
    assert main(["search", str(path), *common, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["candidates"]] == ["asked", "uniform", "layerwise"]
    assert [row["title"] for row in result["dimensions"]] == ["pt layers 0-0", "pt layers 1-1"]
    assert result["verdict"] in ("gain", "loss", "no gain shown")
    assert Path(result["run"]) == workspace.runs / "one"
    for name in ("uniform", "layerwise"):
        recipe = yaml.safe_load(Path(result["recipes"][name]).read_text())
        assert recipe["output"]["path"] == str(workspace.merges / f"one-{name}")
    assert main(["search", str(path), *common]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["search", str(path), *common, "--resume"]) == 0
    text = capsys.readouterr().out
    assert f"held out (n={result['n_held_out']})" in text and result["message"] in text
    assert "layerwise - uniform" in text and "rough interval" in text
    assert main(["report", "one", "--workspace", str(workspace.root)]) == 2
    said = capsys.readouterr().err
    assert "one is a search" in said and result["recipes"]["layerwise"] in said and "docs/search.md" in said
    (workspace.runs / "one" / "result.json").unlink()
    assert main(["report", "one", "--workspace", str(workspace.root)]) == 2
    assert "has not ended" in capsys.readouterr().err


def test_bad_configs_exit_with_2(
    workspace: Workspace, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace.root / "s.yaml"
    path.write_text(yaml.safe_dump({**config, "search": {"grups": 2}}))
    assert main(["search", str(path), "--workspace", str(workspace.root)]) == 2
    error = capsys.readouterr().err
    assert "s.yaml" in error and "search.grups" in error and "did you mean groups" in error
    assert not list(workspace.runs.iterdir())


def test_an_interval_that_is_not_known_says_so() -> None:
    row = {
        "dev": -1.0,
        "held_out": -1.1,
        "low": "nan",
        "high": "nan",
        "accuracy": 0.5,
        "name": "asked",
        "n": 1,
    }
    difference = {
        "first": "layerwise", "second": "uniform", "dev_difference": 0.1, "difference": 0.0,
        "low": "nan", "high": "nan", "verdict": "no gain shown",
    }  # fmt: skip
    text = render(
        {
            "candidates": [row], "differences": [difference], "dimensions": [], "task": "t", "n_dev": 1,
            "n_held_out": 1, "message": "m", "recipes": {}, "run": "r", "seconds": 1.0, "evaluations": 1,
        }
    )  # fmt: skip
    assert text.count("[no interval]") == 2 and "50.0%" in text
