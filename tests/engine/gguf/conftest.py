"""Comparing GGUF files with transformers, the independent reference."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from engine.gguf.convert import Conversion, convert
from engine.jobs.events import EventWriter

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


@pytest.fixture(scope="session")
def tiny_llama_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(tiny_llama, tmp_path_factory.mktemp("gguf") / "tiny-llama-f32.gguf")
