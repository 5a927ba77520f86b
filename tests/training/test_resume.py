"""Nothing is lost: runs killed at any moment, full disks, numbers that are none, memory that runs out."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import BadInputError, CancelledError, MedmergeError, NoSpaceError
from engine.jobs.events import EventWriter
from training import checkpoints, curve, job, trainer
from training.config import TrainConfig
from training.packing import Block
from training.run import train

Settings = Callable[..., TrainConfig]
REPOSITORY = Path(__file__).parents[2]
# Dropout draws random numbers, the schedule moves, steps span epochs, evaluations fall between checkpoints.
LIVELY: dict[str, Any] = {
    "dropout": 0.1,
    "accumulation": 2,
    "epochs": 2,
    "eval_every": 2,
    "save_every": 3,
    "packing": False,
}
CHILD = """
import json, sys
from pathlib import Path
from engine.jobs.events import EventWriter
from training import job
job.run(json.loads(Path(sys.argv[1]).read_text()), EventWriter(None))
"""


def params(config: TrainConfig, run: Path, resume: bool) -> dict[str, Any]:
    import dataclasses

    return {"config": dataclasses.asdict(config), "run": str(run), "resume": resume}


def start(config: TrainConfig, run: Path, resume: bool) -> subprocess.Popen[bytes]:
    """The run in a process of its own."""
    order = run.with_name(f"{run.name}-params.json")
    order.write_text(json.dumps(params(config, run, resume)))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, str(order)], env=environment, stderr=subprocess.PIPE
    )


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, (process.stderr and process.stderr.read().decode()) or "ended"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def same(left: TrainConfig, right: TrainConfig) -> None:
    """The same adapter bit by bit, and the same curve."""
    first, second = (load_file(Path(c.output) / "adapter_model.safetensors") for c in (left, right))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    stories = [json.loads((Path(c.output) / "training.json").read_text()) for c in (left, right)]
    assert stories[0]["curve"] == stories[1]["curve"] and stories[0]["tokens"] == stories[1]["tokens"]


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    """kill -9 while it encodes, before the first checkpoint, between and while writing them; then to the end."""
    whole = settings("sft", sft_file, output=str(tmp_path / "whole"), **LIVELY)
    train(whole, tmp_path / "run-whole", EventWriter())
    broken = settings("sft", sft_file, output=str(tmp_path / "broken"), **LIVELY)
    run = tmp_path / "run-broken"
    moments: list[Callable[[], bool]] = [
        lambda: (run / "train.json").is_file(),
        lambda: len(curve.read(run / "curve.jsonl")) >= 3,
        lambda: any(run.glob("checkpoints/checkpoint-3/*")),
        lambda: any(point["step"] >= 5 for point in curve.read(run / "curve.jsonl")),
    ]
    for number, reached in enumerate(moments):
        process = start(broken, run, resume=number > 0)
        until(reached, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path(broken.output).exists()
    job.run(params(broken, run, True), EventWriter())
    same(whole, broken)
    points = [
        {key: p[key] for key in ("step", "loss", "eval_loss") if key in p}
        for p in curve.read(run / "curve.jsonl")
    ]
    expected = curve.read(tmp_path / "run-whole" / "curve.jsonl")
    assert points == [{key: p[key] for key in ("step", "loss", "eval_loss") if key in p} for p in expected]
    assert not (run / "tokens").exists()


def test_a_torn_checkpoint_is_passed_over(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    whole = settings("sft", sft_file, output=str(tmp_path / "whole"), **LIVELY)
    train(whole, tmp_path / "run", EventWriter())
    parent = tmp_path / "run" / "checkpoints"
    last = checkpoints.newest(parent)
    assert last is not None and checkpoints.step_of(last) == 10
    with (last / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    before = checkpoints.newest(parent)
    assert before is not None and checkpoints.step_of(before) == 9
    again = settings("sft", sft_file, output=str(tmp_path / "again"), **LIVELY)
    train(again, tmp_path / "run", EventWriter(), resume=True)
    same(whole, again)
    assert checkpoints.newest(parent) == last


def test_a_run_that_had_made_its_last_step_only_saves(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    whole = settings("sft", sft_file, output=str(tmp_path / "whole"), **LIVELY, max_steps=4)
    train(whole, tmp_path / "run", EventWriter())
    again = settings("sft", sft_file, output=str(tmp_path / "again"), **LIVELY, max_steps=4)
    events = EventWriter()
    train(again, tmp_path / "run", events, resume=True)
    same(whole, again)
    assert not [event for event in events.kept if "loss" in event.data], "nothing was trained again"


def test_two_processes_cannot_write_one_run(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    config = settings("sft", sft_file, **LIVELY)
    run = tmp_path / "run"
    process = start(config, run, resume=False)
    try:
        until(lambda: (run / "curve.jsonl").is_file(), process)
        with pytest.raises(BadInputError, match="process"):
            train(config, run, EventWriter(), resume=True)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for the encoded data and two checkpoints of the tiny model, not for a third."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=450k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    disk: Path, settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    whole = settings("sft", sft_file, output=str(tmp_path / "whole"), **{**LIVELY, "save_every": 1})
    train(whole, tmp_path / "run-whole", EventWriter())
    config = settings("sft", sft_file, output=str(tmp_path / "full"), **{**LIVELY, "save_every": 1})
    with pytest.raises(NoSpaceError, match=r"disk filled up while .*checkpoint-\d+ was written; .* is kept"):
        train(config, disk / "run", EventWriter())
    kept = checkpoints.newest(disk / "run" / "checkpoints")
    assert kept is not None
    assert not checkpoints.remove_torn(kept.parent), "nothing half-written stays"
    moved = tmp_path / "moved"
    shutil.copytree(disk / "run", moved)
    job.run({"run": str(moved), "resume": True}, EventWriter())
    same(whole, config)


def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(
    settings: Settings, sft_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("sft", sft_file, **{**LIVELY, "save_every": 1})
    clip = trainer.LoraTrainer._clip_grad_norm

    def poisoned(self: Any, model: Any) -> Any:
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("nan")
        return clip(self, model)

    monkeypatch.setattr(trainer.LoraTrainer, "_clip_grad_norm", poisoned)
    with pytest.raises(MedmergeError, match="gradient norm is nan at step 3"):
        train(config, tmp_path / "run", EventWriter())
    kept = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert kept is not None and checkpoints.step_of(kept) == 2
    assert all(torch.isfinite(t).all() for t in load_file(kept / "adapter_model.safetensors").values())


def test_evaluation_halves_its_batch_when_memory_runs_out(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    generator = random.Random(0)
    blocks = [
        Block(ids, [-100, *ids[1:]], list(range(len(ids))))
        for ids in ([generator.randrange(384) for _ in range(9)] for _ in range(11))
    ]
    expected, count = trainer.held_out_loss(model, blocks, pad=0, batch_size=1)
    forward, tried = model.forward, []

    def cramped(*args: Any, **kwargs: Any) -> Any:
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    model.forward = cramped
    loss, again = trainer.held_out_loss(model, blocks, pad=0, batch_size=8)
    assert (loss, again) == (pytest.approx(expected, rel=1e-6), count)
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]


def test_out_of_memory_says_what_to_change(settings: Settings, tmp_path: Path) -> None:
    """A real allocation that fails: the address space of the process is limited, as `ulimit -v` does."""
    rows = [{"text": "Aspirin reduces fever. " * 3000}]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings("pt", data, cutoff=40000, batch_size=1, held_out=0, attention="eager")
    run = tmp_path / "run"
    order = tmp_path / "params.json"
    order.write_text(json.dumps(params(config, run, False)))
    code = CHILD.replace(
        "job.run(",
        "import resource, torch, transformers, peft, training.fit, training.trainer\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "job.run(",
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(order)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "out of memory while training (batch_size 1, cutoff 40000" in done.stderr
    assert "gradient_checkpointing: true (the same result" in done.stderr and "cutoff 20000" in done.stderr


def test_cancelled_within_a_step_the_curve_on_disk_is_whole(
    settings: Settings, sft_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the step after an evaluation: the checkpoint carries it, and the curve keeps it once."""
    whole = settings("sft", sft_file, output=str(tmp_path / "whole"), **LIVELY)
    train(whole, tmp_path / "run-whole", EventWriter())
    broken = settings("sft", sft_file, output=str(tmp_path / "broken"), **LIVELY)
    run, loss = tmp_path / "run-broken", trainer.LoraTrainer.compute_loss

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LoraTrainer, "compute_loss", stopped)
    with pytest.raises(CancelledError, match="checkpoint of step 4 is kept"):
        train(broken, run, EventWriter())
    monkeypatch.setattr(trainer.LoraTrainer, "compute_loss", loss)
    job.run(params(broken, run, True), EventWriter())
    same(whole, broken)
    shapes = [
        [(p["step"], p.get("loss"), p.get("eval_loss")) for p in curve.read(folder / "curve.jsonl")]
        for folder in (tmp_path / "run-whole", run)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("changed", ["tokenizer.json", "chat_template.jinja"])
def test_resume_refuses_another_tokenizer_or_template(
    changed: str, settings: Settings, sft_file: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = settings("sft", sft_file, base=str(base), **LIVELY)
    train(config, tmp_path / "run", EventWriter())
    shutil.rmtree(config.output)
    path = base / changed
    path.write_text(path.read_text().replace("user", "user ", 1) + "\n")
    with pytest.raises(BadInputError, match="is not what it was when"):
        train(config, tmp_path / "run", EventWriter(), resume=True)
