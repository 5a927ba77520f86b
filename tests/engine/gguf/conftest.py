"""Comparing GGUF files with transformers, the independent reference."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.gguf.convert import Conversion, convert
from engine.jobs.events import EventWriter
from tests.conftest import MakeAdapter, build_model

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # read when llama.cpp is loaded; spinning starves other work
TEXT = "Aspirin is used to reduce pain, fever. What is the dose of 500 mg?\n\n1. one 2. two"


def to_gguf(folder: Path, out: Path, kind: str = "f32") -> Path:
    convert(Conversion.plan(folder), out, kind, EventWriter())
    return out


def transformers_log_probs(folder: Path, text: str = TEXT) -> npt.NDArray[np.float64]:
    """log p of every next token after each token of the text, in float32 by transformers, (tokens, vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()


def llama_log_probs(
    file: Path, text: str = TEXT, loras: dict[str, Path] | None = None, scales: dict[str, float] | None = None
) -> npt.NDArray[np.float64]:
    """The same from llama.cpp, with adapters at the given scales."""
    from engine.chat.runtime import Model

    with Model(file, gpu_layers=0) as model:
        for label, path in (loras or {}).items():
            model.load_adapter(label, path)
        with model.context(256, threads=1) as context:
            if scales:
                context.set_scales(scales)
            return context.log_probabilities(model.tokenize(text))


@dataclass(frozen=True)
class Family:
    """A base wide enough for K-quants (rows of 256) with two adapters trained "apart", asked at .3 and .7."""

    base: Path
    adapters: dict[str, Path]
    weights: dict[str, float] = field(default_factory=lambda: {"pt": 0.3, "sft": 0.7})


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter) -> dict[str, Family]:
    """ "llama" (rows of q and k permuted, head of its own) and "qwen3" (neither)."""
    found = {}
    for number, name in enumerate(("llama", "qwen3")):
        base = build_model(
            name, tmp_path_factory.mktemp("wide") / name, seed=3 + number, hidden_size=256, intermediate_size=256,
            head_dim=64, num_hidden_layers=2,
        )  # fmt: skip
        adapters = {label: make_adapter(base, b_std=0.02, seed=s) for label, s in (("pt", 1), ("sft", 2))}
        found[name] = Family(base, adapters)
    return found


def deltas_by_torch(folder: Path) -> dict[str, Any]:
    """alpha / r * B @ A of every module in float64, by base tensor name: plain code on the adapter's files."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, b in state.items():
        if ".lora_B." in key:
            a = state[key.replace(".lora_B.", ".lora_A.")].double()
            name = key.removeprefix("base_model.model.").replace(".lora_B", "")
            found[name] = config["lora_alpha"] / config["r"] * (b.double() @ a)
    return found


def merged_by_torch(
    family: Family,
    out: Path,
    weights: Callable[[str], dict[str, float]],
    dtype: str = "bfloat16",
    extra: Callable[[str, Any], Any] = lambda name, value: value,
) -> Path:
    """A merged checkpoint by torch: `weights(tensor name)` gives the weights there, `extra` changes its value."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(family.base, out)
    state = load_file(out / "model.safetensors")
    deltas = {label: deltas_by_torch(folder) for label, folder in family.adapters.items()}
    for name, value in state.items():
        total = value.double()
        for label, weight in weights(name).items():
            if name in deltas[label]:
                total = total + weight * deltas[label][name]
        state[name] = extra(name, total).to(getattr(torch, dtype)).contiguous()
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="session")
def tiny_llama_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(tiny_llama, tmp_path_factory.mktemp("gguf") / "tiny-llama-f32.gguf")
