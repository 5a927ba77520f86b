"""A search whose best mixture is known: answers chosen by a model with planted layer-wise weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakeAdapter, build_model

WORDS = ["aspirin", "fever", "pain", "blood", "dose", "adult", "asthma", "glucose", "patient", "cough"]
OPTIONS = ["the", "and", "fever", "of"]
QUESTIONS = 160
PLANTED = {("pt", 0): 1.0, ("pt", 1): 0.0, ("sft", 0): 0.0, ("sft", 1): 1.0}  # (adapter, layer) -> weight


@dataclass(frozen=True)
class Planted:
    base: Path
    adapters: dict[str, Path]
    data: Path

    def config(self, **search: Any) -> dict[str, Any]:
        return {
            "base": str(self.base),
            "adapters": {label: str(path) for label, path in self.adapters.items()},
            "weights": [{"pt": 0.3, "sft": 0.7}],
            "tasks": [
                {"name": "mc", "kind": "multiple_choice", "scoring": "options", "data": str(self.data)}
            ],
            "device": "cpu",
            "dtype": "float32",
            "batch_size": 64,
            "search": {"groups": 2, "grid": 3, "evaluations": 60, **search},
        }


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter) -> Planted:
    """Questions with the answers of base + pt in layer 0 + sft in layer 1."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("planted")
    base = build_model("llama", folder / "base", dtype="float32", initializer_range=0.15)
    adapters = {label: make_adapter(base, seed=n, b_std=0.15) for n, label in enumerate(("pt", "sft"), 1)}
    state = load_file(base / "model.safetensors")
    for label, path in adapters.items():
        factors = load_file(path / "adapter_model.safetensors")
        for key, a in factors.items():
            if ".lora_A." in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weight = PLANTED[label, int(module.split(".")[2])]
                state[f"{module}.weight"] += weight * 2.0 * factors[key.replace("lora_A", "lora_B")] @ a
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = [tokenizer(f" {option}")["input_ids"] for option in OPTIONS]
    assert all(len(ids) == 1 for ids in tokens)  # so that one pass answers for all options
    rng = np.random.default_rng(3)
    rows = []
    for n in range(QUESTIONS):
        question = " ".join(rng.choice(WORDS, 4))
        ids = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            answer = int(model(ids).logits[0, -1, [token for (token,) in tokens]].argmax())
        rows.append({"id": f"q{n}", "question": question, "options": OPTIONS, "answer": answer})
    data = folder / "mc.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Planted(base, adapters, data)
