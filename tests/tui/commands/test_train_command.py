"""`medmerge train`: from files to an adapter, previews, few-shot curves, resuming, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from engine.weights import Adapter
from engine.workspace import Workspace
from tests.training.conftest import write_jsonl
from tui.cli import main

SETTINGS: dict[str, Any] = {
    "rank": 4,
    "cutoff": 64,
    "held_out": 4,
    "eval_every": 4,
    "save_every": 2,
    "learning_rate": 1e-2,
    "threads": 1,
}


@pytest.fixture
def config(workspace: Workspace, tiny_llama: Path) -> dict[str, Any]:
    """A config of ten lines over 40 question/answer rows in the workspace."""
    rows = [
        {
            "instruction": f"{n}: what is the dose of aspirin?",
            "output": f"{n * 10} mg every {n % 7 + 1} hours.",
        }
        for n in range(40)
    ]
    write_jsonl(workspace.data / "qa.jsonl", rows)
    return {"base": str(tiny_llama), "data": ["data/qa.jsonl"], "output": "adapters/mine", **SETTINGS}


def write(workspace: Workspace, config: dict[str, Any]) -> str:
    path = workspace.root / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_config_of_ten_lines_gives_an_adapter(
    workspace: Workspace, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(config) == 10
    where = ["--workspace", str(workspace.root)]
    path = write(workspace, config)
    assert main(["train", "sft", path, *where, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    adapter = Adapter.open(workspace.adapters / "mine")
    assert (adapter.kind, adapter.template) == ("sft", "model") and result["steps"] == adapter.training[
        "steps"
    ]
    assert "<|im_start|>" in adapter.training["template_text"]["text"]
    story = adapter.training
    assert story["final"]["eval_loss"] == result["eval_loss"] < result["first_eval_loss"]
    assert story["final"]["eval_perplexity"] == pytest.approx(math.exp(result["eval_loss"]))
    assert (
        "packed to 64 tokens" in story["final"]["packing"]
        and story["base"]["sha256"]
        and story["versions"]["torch"]
    )
    assert not (workspace.runs / "mine" / "tokens").exists()
    assert main(["train", "sft", path, *where]) == 2
    assert "already there" in capsys.readouterr().err
    assert (
        main(["train", "sft", path, *where, "--out", str(workspace.adapters / "second"), "--set", "epochs=2"])
        == 0
    )
    said = capsys.readouterr()
    assert "held out  loss" in said.out and "steps an epoch" not in said.err
    assert (
        json.loads((workspace.adapters / "second" / "training.json").read_text())["settings"]["epochs"] == 2
    )


def test_flags_alone_are_enough_and_other_formats_are_read(
    workspace: Workspace, config: dict[str, Any], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = workspace.data / "notes.txt"
    text.write_text("\n\n".join(f"Note {n}. The patient was given {n} mg of paracetamol." for n in range(30)))
    argv = [
        "train",
        "pt",
        "--base",
        str(tiny_llama),
        "--data",
        str(text),
        "--out",
        str(workspace.adapters / "pt"),
    ]
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    assert main([*argv, *sets, "--workspace", str(workspace.root), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "documents do not see each other" in result["packing"]
    assert Adapter.open(workspace.adapters / "pt").kind == "pt"


def test_preview_shows_what_is_trained_and_trains_nothing(
    workspace: Workspace, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "sft", write(workspace, config), "--preview", "2", "--workspace", str(workspace.root)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>assistant" in out and "‹0 mg every 1 hours.<|im_end|>↵" in out
    assert main([*argv, "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert (
        len(samples) == 2
        and not (workspace.adapters / "mine").exists()
        and not list(workspace.runs.iterdir())
    )


def test_few_shot_curve_is_nested_and_its_interval_is_students(
    workspace: Workspace, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--workspace", str(workspace.root)]
    path = write(workspace, config)
    assert main(["train", "sft", path, *where, "--shots", "12,4", "--seeds", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["shots"], row["seed"]) for row in result["rows"]] == [
        (n, s) for n in (4, 12) for s in range(3)
    ]
    assert len({row["before"] for row in result["rows"]}) == 1, "the same held-out samples, before any step"
    for line in result["table"]:
        losses = [row["eval_loss"] for row in result["rows"] if row["shots"] == line["shots"]]
        low, high = stats.t.interval(0.95, 2, loc=np.mean(losses), scale=stats.sem(losses))
        assert (line["n"], line["mean"]) == (3, pytest.approx(np.mean(losses)))
        assert (line["low"], line["high"]) == (pytest.approx(low), pytest.approx(high))
    manifest = json.loads((workspace.adapters / "mine-shots12-seed1" / "training.json").read_text())
    assert manifest["samples"]["documents"] == 12 and manifest["settings"]["shots_seed"] == 1
    before = {
        path: path.stat().st_mtime_ns for path in workspace.adapters.glob("*/adapter_model.safetensors")
    }
    assert main(["train", "--resume", "mine", *where]) == 2  # a run is named by its folder
    capsys.readouterr()
    assert main(["train", "--resume", str(workspace.runs / "mine"), *where]) == 0
    out = capsys.readouterr().out
    assert "95% over seeds" in out and "6 adapters" in out
    assert before == {path: path.stat().st_mtime_ns for path in before}, "finished runs are kept"


def test_a_cancelled_command_says_how_to_go_on(workspace: Workspace, config: dict[str, Any]) -> None:
    """Ctrl+c in the terminal: a checkpoint, exit 130; --resume ends the run."""
    path = write(workspace, {**config, "epochs": 200, "save_every": 1000})
    command = [sys.executable, "-m", "tui.cli", "train"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    where = ["--workspace", str(workspace.root)]
    child = subprocess.Popen(
        [*command, "sft", path, *where],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    curve = workspace.runs / "mine" / "curve.jsonl"
    deadline = time.monotonic() + 120
    while not (curve.is_file() and '"step": 3,' in curve.read_text()):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "the checkpoint of step" in err and "is kept" in err
    run = workspace.runs / "mine"
    assert main(["train", "--resume", str(run), "--set", "epochs=1", *where]) == 2
    train = json.loads((run / "train.json").read_text())
    train["config"]["max_steps"] = 20  # so that the test ends: a person would not do this
    (run / "train.json").write_text(json.dumps(train))
    assert main(["train", "--resume", str(run), *where]) == 0
    assert json.loads((workspace.adapters / "mine" / "training.json").read_text())["resumed"] is True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lerning_rate": 1}, "did you mean 'learning_rate'"),
        ({"data": []}, "data is missing"),
        ({"epochs": 0}, "epochs is 0.0, expected above 0"),
        ({"train_on_prompt": True, "mask_history": True}, "the one hides what the other trains"),
        ({"held_out": 39}, "larger than what would be left"),
    ],
)
def test_bad_settings_are_named_and_leave_nothing(
    change: dict[str, Any],
    said: str,
    workspace: Workspace,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(workspace, {**config, **change})
    assert main(["train", "sft", path, "--workspace", str(workspace.root)]) == 2
    assert said in capsys.readouterr().err
    assert not (workspace.adapters / "mine").exists() and not list(workspace.runs.glob("mine*"))
