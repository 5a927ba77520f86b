"""Several processes on this machine's CPU, connected by gloo: the loss of one, resumed and cancelled like one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import BadInputError, BadModelError, BadRecipeError, CancelledError
from engine.jobs.events import EventWriter
from tests.training.test_resume import start, until
from training import job, processes
from training.config import TrainConfig
from training.curve import read
from training.run import train

Settings = Callable[..., TrainConfig]
# Seven blocks and a step of four: the last step of an epoch is short, and one process gets an empty block.
SHARED: dict[str, Any] = {
    "dropout": 0.0,
    "accumulation": 4,
    "epochs": 2,
    "packing": False,
    "held_out": 5,
    "save_every": 1,
    "eval_every": 1,
    "dtype": "float32",
}


def manifest(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / "training.json").read_text())


def curve(config: TrainConfig, key: str) -> list[float]:
    return [point[key] for point in manifest(config)["curve"] if key in point]


def weights(config: TrainConfig) -> torch.Tensor:
    tensors = load_file(Path(config.output) / "adapter_model.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


@pytest.fixture
def alone(settings: Settings, sft_file: Path, tmp_path: Path) -> TrainConfig:
    config = settings("sft", sft_file, output=str(tmp_path / "alone"), **SHARED)
    train(config, tmp_path / "run-alone", EventWriter())
    return config


@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_two_processes_have_the_loss_of_one(
    distributed: str, alone: TrainConfig, settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    config = settings(
        "sft", sft_file, output=str(tmp_path / "two"), processes=2, distributed=distributed, **SHARED
    )
    events = EventWriter()
    result = train(config, tmp_path / "run-two", events)
    for key in ("loss", "eval_loss"):
        assert curve(config, key) == pytest.approx(curve(alone, key), abs=1e-4), key
    assert len(curve(config, "loss")) == result["steps"] == 4
    torch.testing.assert_close(weights(config), weights(alone), atol=2e-3, rtol=0.02)
    said, expected = manifest(config), manifest(alone)
    assert said["tokens"]["trained"] == expected["tokens"]["trained"]
    assert said["tokens"]["processed"] == expected["tokens"]["processed"]
    assert (said["processes"], said["distributed"]) == (2, distributed)
    metrics = [event.data for event in events.kept if event.type == "metric" and "loss" in event.data]
    assert [metric["step"] for metric in metrics] == [1, 2, 3, 4], "the first process's events are passed on"
    if distributed == "ddp":
        cancelled_and_resumed(
            config, settings("sft", sft_file, output=str(tmp_path / "broken"), processes=2, **SHARED)
        )


def cancelled_and_resumed(whole: TrainConfig, broken: TrainConfig) -> None:
    """The same run, cancelled after a step and gone on with, ends with the same weights and curve."""
    run = Path(broken.output).with_name("run-broken")
    stop_when(run / "curve.jsonl", '"step": 1,')
    with pytest.raises(CancelledError, match="checkpoint of step"):
        train(broken, run, EventWriter())
    job.run({"run": str(run), "resume": True}, EventWriter())
    assert torch.equal(weights(whole), weights(broken))
    assert manifest(whole)["curve"] == manifest(broken)["curve"]


def stop_when(path: Path, text: str) -> None:
    """SIGTERM to this process once the file holds the text."""
    signal.signal(signal.SIGTERM, _cancel)

    def watch() -> None:
        for _ in range(6000):
            if path.is_file() and text in path.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()


def _cancel(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise CancelledError("cancelled")


def test_what_a_worker_says_reaches_the_person(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="qkv_proj"):
        train(settings("sft", sft_file, targets=["qkv_proj"], processes=2), tmp_path / "r1", EventWriter())
    with pytest.raises(BadRecipeError, match="2 processes cannot share it evenly"):
        train(settings("sft", sft_file, accumulation=3, processes=2), tmp_path / "r2", EventWriter())
    assert not (tmp_path / "r1").exists() and not (tmp_path / "r2").exists()
    with pytest.raises(BadRecipeError, match="more than one process"):
        processes.wanted(settings("sft", sft_file, distributed="fsdp"))
    with pytest.raises(BadModelError):
        train(settings("sft", sft_file, base=str(tmp_path), processes=2), tmp_path / "r3", EventWriter())


def test_workers_do_not_outlive_a_killed_job(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    """kill -9 of the job's own process: its workers end at once, so that nobody writes beside a resumed run."""
    config = settings("sft", sft_file, processes=2, **{**SHARED, "epochs": 2000})
    run = tmp_path / "run"
    process = start(config, run, resume=False)
    until(lambda: bool(read(run / "curve.jsonl")), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(family) >= 3, "a launcher and two workers"
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and gone
