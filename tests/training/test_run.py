"""Real runs on the tiny model: loss falls, resume equals uninterrupted, what is saved is whole and readable."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import (
    BadDataError,
    BadInputError,
    BadModelError,
    BadRecipeError,
    CancelledError,
    MedmergeError,
    TargetExistsError,
)
from engine.jobs.events import EventWriter
from engine.weights import Adapter
from training import job
from training.artifact import settings_for_manifest
from training.config import TrainConfig
from training.prepare import load_tokenizer, prepare
from training.run import train

Settings = Callable[..., TrainConfig]


class StopAtStep(EventWriter):
    """Sends SIGTERM to this very process when the given step is reported."""

    def __init__(self, step: int, key: str = "loss") -> None:
        super().__init__(None)
        self.step, self.key = step, key

    def metric(self, step: float, **values: Any) -> None:
        super().metric(step, **values)
        if step == self.step and self.key in values:
            os.kill(os.getpid(), signal.SIGTERM)


def losses(manifest: dict[str, Any], key: str = "loss") -> list[float]:
    return [point[key] for point in manifest["curve"] if key in point]


def test_sft_run_leaves_a_whole_adapter_with_its_manifest(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    events = EventWriter()
    config = settings("sft", sft_file, epochs=3)
    result = train(config, tmp_path / "run", events)
    folder = Path(result["adapter"])
    adapter = Adapter.open(folder)  # the reader of the engine, not PEFT
    assert (adapter.kind, adapter.rank, adapter.dtype, adapter.template) == ("sft", 4, "BF16", "model")
    assert len(adapter.factors) == 14 and adapter.health().ok
    assert adapter.base_name == Path(config.base).name
    manifest = json.loads((folder / "training.json").read_text())
    assert manifest["format"] == "medmerge.training/1" and manifest["data"][0]["rows"] == 12
    assert losses(manifest)[-1] < losses(manifest)[0] - 0.3
    assert losses(manifest, "eval_loss")[-1] < losses(manifest, "eval_loss")[0]
    tokens = manifest["tokens"]
    assert tokens["processed"] == 3 * tokens["per_epoch_processed"] > tokens["trained"] > 0
    metrics = [event.data for event in events.kept if event.type == "metric"]
    assert {"loss", "lr", "grad_norm", "tok_s", "tokens"} <= set(metrics[1])
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, result["steps"] + 1))
    assert not list(tmp_path.rglob("*.partial"))


def test_pt_run_counts_its_tokens(settings: Settings, pt_file: Path, tmp_path: Path) -> None:
    result = train(settings("pt", pt_file, held_out=0), tmp_path / "run", EventWriter())
    tokens = result["tokens"]
    assert (
        tokens["processed"] == tokens["per_epoch_processed"]
        and tokens["trained"] == tokens["per_epoch_trained"]
    )
    # every document, and every piece of one that crosses a border, starts with a token without loss
    assert 10 <= tokens["processed"] - tokens["trained"] <= 10 + tokens["processed"] // 64 + 1
    assert result["eval_loss"] is None


def test_resumed_equals_uninterrupted(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    """Dropout, data order, optimizer, schedule, counts and curve all go on where they were."""
    changes = {"dropout": 0.1, "accumulation": 1, "max_steps": 6, "eval_every": 3}
    whole = settings("sft", sft_file, output=str(tmp_path / "a" / "whole"), **changes)
    train(whole, tmp_path / "run-whole", EventWriter())
    broken = settings("sft", sft_file, output=str(tmp_path / "a" / "resumed"), **changes)
    run = tmp_path / "run-broken"
    with pytest.raises(CancelledError):
        train(broken, run, StopAtStep(3))
    assert not Path(broken.output).exists()
    job.run({"run": str(run), "resume": True}, EventWriter())
    left, right = (load_file(Path(c.output) / "adapter_model.safetensors") for c in (whole, broken))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    first, second = (json.loads((Path(c.output) / "training.json").read_text()) for c in (whole, broken))
    assert first["curve"] == second["curve"] and first["tokens"] == second["tokens"]


def test_resume_refuses_changed_data_and_runs_without_checkpoint(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = settings("sft", sft_file, accumulation=1, save_every=1)
    with pytest.raises(CancelledError):
        train(config, run, StopAtStep(0, "eval_loss"))
    assert not run.exists(), "a run that has made no step yet does not block its name"
    with pytest.raises(CancelledError, match="checkpoint of step 1 is kept"):
        train(config, run, StopAtStep(1))
    with pytest.raises(BadInputError, match="holds a run already"):
        train(config, run, EventWriter())
    sft_file.write_text(sft_file.read_text().replace("aspirin", "ibuprofen"))
    with pytest.raises(BadInputError, match="data is not what it was"):
        job.run({"run": str(run), "resume": True}, EventWriter())
    with pytest.raises(BadInputError, match="not a training run"):
        job.run({"run": str(tmp_path), "resume": True}, EventWriter())


def test_checkpointed_activations_give_the_same_run(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    curves = []
    for wanted in (False, True):
        config = settings(
            "sft",
            sft_file,
            gradient_checkpointing=wanted,
            max_steps=3,
            output=str(tmp_path / f"out-{wanted}"),
        )
        train(config, tmp_path / f"run-{wanted}", EventWriter())
        curves.append(losses(json.loads((tmp_path / f"out-{wanted}" / "training.json").read_text())))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][0] != curves[0][2]


def test_nan_loss_stops_the_run_and_leaves_no_adapter(
    settings: Settings, sft_file: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    base = tmp_path / "nan-base"
    shutil.copytree(tiny_llama, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = settings("sft", sft_file, base=str(base), held_out=0)
    with pytest.raises(MedmergeError, match="loss is nan at step 1"):
        train(config, tmp_path / "run", EventWriter())
    assert not Path(config.output).exists()


def test_leaking_data_is_not_trained_on(
    settings: Settings, sft_file: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    tests = write_jsonl(
        tmp_path / "test.jsonl",
        [{"id": "t", "prompt": "4 WHAT is the dose of aspirin, for an adult", "reference": "?"}],
    )
    with pytest.raises(BadDataError, match=r"sft\.jsonl row 4 repeats .*test\.jsonl row 0 \(exact\)"):
        train(settings("sft", sft_file, tests=[str(tests)]), tmp_path / "run", EventWriter())
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_trained_is_refused_by_name(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipeError, match=r"<\|begin_of_text\|>"):
        train(settings("sft", sft_file, template="llama3"), tmp_path / "r1", EventWriter())
    with pytest.raises(BadRecipeError, match="qkv_proj"):
        train(settings("sft", sft_file, targets=["qkv_proj"]), tmp_path / "r2", EventWriter())
    with pytest.raises(BadModelError, match=r"no config\.json"):
        train(settings("sft", sft_file, base=str(tmp_path)), tmp_path / "r3", EventWriter())
    config = settings("sft", sft_file)
    Path(config.output).mkdir(parents=True)
    with pytest.raises(TargetExistsError):
        train(config, tmp_path / "r4", EventWriter())


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_are_read_and_merged_by_the_engine(
    variant: str, settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    """What is saved is what was trained: PEFT's merge of the folder equals the engine's, at the right scale."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from engine.merge.execute import merge
    from engine.merge.recipe import parse

    config = settings("sft", sft_file, alpha=12.5, **{variant: True})
    train(config, tmp_path / "run", EventWriter())
    adapter = Adapter.open(Path(config.output))
    assert adapter.scales == ((12.5 / 2,) if variant == "rslora" else (12.5 / 4,))
    document = {
        "base": config.base,
        "adapters": {"sft": {"path": config.output, "weight": 1.0}},
        "output": {"path": str(tmp_path / "merged"), "dtype": "float32"},
    }
    merge(parse(document, "test", []), EventWriter())
    model = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, config.output).merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4, msg=name)


def test_weights_count_rows_and_held_out_rows_are_never_trained(
    settings: Settings, sft_file: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()]
    (tmp_path / "other").mkdir()
    other = write_jsonl(
        tmp_path / "other" / "sft.jsonl", [{**row, "output": row["output"] + "!"} for row in rows]
    )
    data = [{"path": str(sft_file), "weight": 2}, {"path": str(other), "weight": 0.5}]
    config = settings("sft", sft_file, data=data, held_out=4, packing=False, cutoff=256)
    prepared = prepare(config, load_tokenizer(Path(config.base)), tmp_path / "tokens", EventWriter())
    trained = [tuple(block.ids) for block in prepared.train]
    held = {tuple(block.ids) for block in prepared.held_out}
    assert len(held) == 4 and not held & set(trained)
    counts = Counter(trained)
    assert set(counts.values()) == {1, 2} and len(counts) < 24 - 4, "the first file twice, half of the second"
    settled = settings_for_manifest(config)
    assert [(source["path"], source["weight"]) for source in settled["data"]] == [
        ("sft.jsonl", 2),
        ("sft.jsonl", 0.5),
    ]


def test_outputs_that_could_not_be_made_are_refused_before_training(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    config = settings("sft", sft_file)
    for output in (tmp_path / "run", tmp_path / "run" / "inside", sft_file / "below-a-file"):
        with pytest.raises(BadInputError):
            train(dataclasses.replace(config, output=str(output)), tmp_path / "run", EventWriter())
    assert not (tmp_path / "run").exists()


def test_dropped_rows_are_not_trained_on(
    settings: Settings, sft_file: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    tests = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "4 WHAT is the dose of aspirin, for an adult"}])
    config = settings("sft", sft_file, tests=[str(tests)], on_leak="drop", held_out=0)
    train(config, tmp_path / "run", EventWriter())
    manifest = json.loads((Path(config.output) / "training.json").read_text())
    assert manifest["audit"]["leaks"] >= 1 and manifest["audit"]["dropped_rows"] >= 1
    assert manifest["samples"]["documents"] == 12 - manifest["audit"]["dropped_rows"]
    text = tmp_path / "notes.txt"
    text.write_text(
        "\n".join(
            ["4 what is the dose of aspirin for an adult", "Another line of text entirely.", "A third."]
        )
    )
    lines = settings(
        "pt",
        text,
        data=[{"path": str(text), "split": "line"}],
        tests=[str(tests)],
        on_leak="drop",
        held_out=0,
    )
    lines = dataclasses.replace(lines, output=str(tmp_path / "lines"))
    with pytest.raises(BadDataError, match="counts paragraphs where the run splits otherwise"):
        train(lines, tmp_path / "run-lines", EventWriter())


def test_tensorboard_files_hold_the_curve(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = settings("sft", sft_file, tensorboard=True)
    train(config, tmp_path / "run", EventWriter())
    written = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    found = [event.value for event in written.Scalars("train/loss")]
    manifest = json.loads((Path(config.output) / "training.json").read_text())
    assert found == pytest.approx(losses(manifest), rel=1e-6)
