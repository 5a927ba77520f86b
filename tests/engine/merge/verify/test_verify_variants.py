"""Every LoRA variant against PEFT's own merge (tests/engine/weights/variants.py), at weight 1 in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import BadAdapterError
from engine.jobs.events import EventWriter
from engine.merge.verify import Verdict, verify_merge
from engine.merge.verify.deltas import read_deltas
from engine.weights import Adapter, Checkpoint
from tests.engine.weights.variants import VARIANT_NAMES, VariantCase, variant


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


def save_merged(case: VariantCase, folder: Path, dtype: torch.dtype) -> Path:
    folder.mkdir()
    stored = {name: torch.from_numpy(value.copy()).to(dtype) for name, value in case.merged.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((case.base / "config.json").read_text())
    if case.untied:
        config["tie_word_embeddings"] = False
    if case.rows is not None:
        config["vocab_size"] = case.rows
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return folder


def verify(case: VariantCase, merged: Path, weight: float | None = 1.0) -> Verdict:
    weights = None if weight is None else {"x": weight}
    return verify_merge(merged, case.base, {"x": case.adapter}, weights, EventWriter())


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_peft_merges_is_right(name: str, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    case = variant(name, folder)
    merged = save_merged(case, tmp_path / "merged", dtype)
    verdict = verify(case, merged)
    assert verdict.ok, verdict.message
    assert verdict.effective_weights == pytest.approx({"x": 1.0}, abs=0.01 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_the_base_is_not_the_merge(name: str, folder: Path, tmp_path: Path) -> None:
    """Every changed tensor is checked: put back the base's values of each in turn, and it is missed."""
    case = variant(name, folder)
    stored = load_file(case.base / "model.safetensors")
    base = {key: value.float().numpy() for key, value in stored.items()}
    changed = [
        key
        for key, value in case.merged.items()
        if key in base and base[key].shape == value.shape and (base[key] != value).any()
    ]
    assert changed
    for number, key in enumerate({key.split(".layers.")[-1]: key for key in changed}.values()):
        wrong = VariantCase(
            case.name,
            case.base,
            case.adapter,
            {**case.merged, key: base[key]},
            case.untied,
            case.rows,
        )
        verdict = verify(case, save_merged(wrong, tmp_path / f"merged{number}", torch.float32))
        assert verdict.exit_code == 1
        assert verdict.tensors_wrong == (key,)


def test_dora_on_a_layer_that_is_saved_too(folder: Path, tmp_path: Path) -> None:
    """Its norm would be of the new weight: refused by the tensor's name, by the merge's reader and the verifier's."""
    case = variant("dora", folder)
    adapter = tmp_path / "adapter"
    shutil.copytree(case.adapter, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    module = next(key for key in tensors if "lora_magnitude_vector" in key).partition(".lora_")[0]
    name = module.removeprefix("base_model.model.") + ".weight"
    held = load_file(case.base / "model.safetensors")[name]
    base = Checkpoint.open(case.base)
    for saved, refused in ((held, False), (held + 0.01, True)):
        save_file({**tensors, f"{module}.base_layer.weight": saved}, adapter / "adapter_model.safetensors")
        if refused:
            with pytest.raises(BadAdapterError, match=name) as error:
                read_deltas("x", adapter, base)
            assert "saved whole" in str(error.value.hint)
            with pytest.raises(BadAdapterError, match=name) as error:
                Adapter.open(adapter).match(base)
            assert "saved whole" in str(error.value.hint)
        else:  # a copy of the base's own changes nothing
            assert name in read_deltas("x", adapter, base)
