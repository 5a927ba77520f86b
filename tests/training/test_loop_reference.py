"""The loop against an independent one: plain torch, a sample at a time, with every setting away from its default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import set_seed

from engine.jobs.events import EventWriter
from training.config import TrainConfig
from training.masking import IGNORE
from training.model import lora_model
from training.prepare import load_tokenizer, prepare
from training.run import train

Settings = Callable[..., TrainConfig]
SET: dict[str, Any] = {
    "packing": False,
    "held_out": 0,
    "epochs": 2,
    "accumulation": 5,
    "learning_rate": 2e-2,
    "weight_decay": 0.4,
    "beta1": 0.8,
    "beta2": 0.9,
    "epsilon": 1e-6,
    "max_grad_norm": 0.2,
    "warmup": 2,
    "schedule": "linear",
    "dropout": 0.0,
    "seed": 7,
}


def reference(config: TrainConfig, tokens: Path) -> tuple[list[float], list[float]]:
    """Losses and learning rates: a sum over trained tokens by their number in the step, AdamW, clipping by norm, a
    linear rise over the warm-up and a linear fall to 0."""
    prepared = prepare(config, load_tokenizer(Path(config.base)), tokens, EventWriter())
    set_seed(config.seed)
    model, _ = lora_model(config)
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        weights,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    blocks = list(prepared.train)
    per_epoch = -(-len(blocks) // config.accumulation)
    total, losses, rates = int(per_epoch * config.epochs), [], []
    for epoch in range(int(config.epochs)):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(blocks))
        for start in range(0, len(blocks), config.accumulation):
            chosen = [blocks[index] for index in order[start : start + config.accumulation]]
            count = sum(label != IGNORE for block in chosen for label in block.labels[1:])
            step, summed = len(losses), torch.zeros(())
            rate = step / config.warmup if step < config.warmup else (total - step) / (total - config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            optimizer.zero_grad()
            for block in chosen:
                ids = torch.tensor([block.ids])
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
                    0, :-1
                ]
                labels = torch.tensor(block.labels[1:])
                scores = torch.log_softmax(logits.float(), -1)[labels != IGNORE]
                summed = summed - scores.gather(1, labels[labels != IGNORE][:, None]).sum()
            loss = summed / count
            loss.backward()
            norm = torch.sqrt(sum((w.grad**2).sum() for w in weights if w.grad is not None))
            for weight in weights:
                if weight.grad is not None:
                    weight.grad *= torch.clamp(config.max_grad_norm / (norm + 1e-6), max=1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            rates.append(config.learning_rate * rate)
    return losses, rates


def test_losses_and_rates_equal_an_independent_loop(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    config = settings("sft", sft_file, attention="sdpa", **SET)
    train(config, tmp_path / "run", EventWriter())
    curve = json.loads((Path(config.output) / "training.json").read_text())["curve"]
    losses, rates = reference(config, tmp_path / "tokens")
    assert [point["lr"] for point in curve] == pytest.approx(rates)
    assert [point["loss"] for point in curve] == pytest.approx(losses, rel=2e-4)
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_schedules_differ(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    rates = {}
    for schedule in ("linear", "cosine", "constant"):
        config = settings(
            "sft", sft_file, **{**SET, "schedule": schedule, "output": str(tmp_path / schedule)}
        )
        train(config, tmp_path / f"run-{schedule}", EventWriter())
        curve = json.loads((Path(config.output) / "training.json").read_text())["curve"]
        rates[schedule] = [round(point["lr"] / config.learning_rate, 6) for point in curve]
    assert rates["constant"] == [0, 0.5, 1, 1, 1, 1]
    assert rates["linear"] == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates["cosine"] == pytest.approx([0, 0.5, 1, 0.853553, 0.5, 0.146447])
