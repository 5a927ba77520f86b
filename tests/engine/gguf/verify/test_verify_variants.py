"""Every LoRA variant inside a GGUF: PEFT's own merge, written and quantised, judged against base and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.errors import BadAdapterError
from engine.gguf.verify import verify_gguf
from engine.jobs.events import EventWriter
from tests.engine.gguf.conftest import to_gguf
from tests.engine.weights.variants import VariantCase, variant

NAMES = (
    "patterns", "rslora", "lora_bias", "bias_all", "modules_to_save", "embedding", "token_indices", "dora",
    "tied_lora_head", "tied_lora_embedding", "tied_saved_head", "both_saved",
)  # fmt: skip


def checkpoint(case: VariantCase, out: Path) -> Path:
    """PEFT's merged weights (float32) as a checkpoint, with the base's other files."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(case.base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {name: torch.from_numpy(value.copy()) for name, value in case.merged.items()}
    save_file(state, out / "model.safetensors", {"format": "pt"})
    if case.untied:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_right_and_the_base_is_not(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = variant(name, tmp_path_factory.mktemp(name))
    file = to_gguf(checkpoint(case, tmp_path / "merged"), tmp_path / "m.gguf", "q8_0")
    right = verify_gguf(file, case.base, {"pt": case.adapter}, {"pt": 1.0}, EventWriter())
    assert right.ok, right.to_json()["findings"]
    half = verify_gguf(file, case.base, {"pt": case.adapter}, {"pt": 0.5}, EventWriter())
    assert half.exit_code == 1 and half.verdict.verdict == "scaled_by", half.to_json()["findings"]
    base = to_gguf(case.base, tmp_path / "b.gguf", "q8_0")
    nothing = verify_gguf(base, case.base, {"pt": case.adapter}, {"pt": 1.0}, EventWriter())
    assert nothing.exit_code == 1


def test_new_tokens_are_refused_by_name(tmp_path: Path) -> None:
    case = variant("resized_saved", tmp_path / "v")
    file = to_gguf(case.base, tmp_path / "b.gguf", "q8_0")
    with pytest.raises(BadAdapterError, match=r"392, (.|\n)*new tokens need a merged checkpoint"):
        verify_gguf(file, case.base, {"pt": case.adapter}, {"pt": 1.0}, EventWriter())
