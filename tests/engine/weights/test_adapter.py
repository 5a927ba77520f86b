"""The adapter reader against PEFT itself: scales, orientation, deltas; and adapters it must refuse by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import BadAdapterError, BadTensorFileError
from engine.weights import Adapter, Checkpoint
from engine.weights.adapter import pattern_value
from engine.weights.discover import find_adapters, find_models
from engine.weights.tensorfile import read_rows
from tests.conftest import MakeAdapter


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter with other values in its config."""
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    config.update(changes)
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def adapter_folder(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, rank=4, seed=5, name="medical-pt")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        {
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 5, "1.self_attn.v_proj": 7},
            "use_rslora": True,
        },
        {"target_modules": "all-linear", "rank_pattern": {".*attn.o_proj": 3}},
    ],
)
def test_deltas_are_pefts(tiny_llama: Path, make_adapter: MakeAdapter, options: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_adapter(tiny_llama, rank=4, seed=3, **options)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"), folder
    )
    adapter = Adapter.open(folder)
    matched = adapter.match(Checkpoint.open(tiny_llama))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {f"{name}.weight" for name in layers} == matched.keys()
    for name, module in layers.items():
        factor = matched[f"{name}.weight"]
        ours = factor.scale * read_rows(factor.b).astype(np.float64) @ read_rows(factor.a).astype(np.float64)
        theirs = module.get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert factor.scale == pytest.approx(module.scaling["default"], rel=1e-12)


def test_pattern_rule_is_pefts() -> None:
    from peft.utils.other import get_pattern_key

    names = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head", "model.layers.1.q_proj"]
    keys = [
        "up_proj",
        "layers.1.mlp.up_proj",
        "1.mlp.up_proj",
        "proj",
        "^model.layers.1.*",
        "head",
        "lm_head",
        ".*q_.*",
    ]
    for name in names:
        for key in keys:
            theirs = get_pattern_key([key], name)
            assert pattern_value({key: 1}, name, 0) == (1 if theirs == key else 0), (name, key)


def test_summary(adapter_folder: Path) -> None:
    adapter = Adapter.open(adapter_folder)
    assert (adapter.name, adapter.kind, adapter.rank, adapter.scales) == ("medical-pt", "pt", 4, (2.0,))
    assert adapter.targets == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    )  # fmt: skip
    assert adapter.template == "" and adapter.dtype == "F32"
    assert adapter.sha256 == Adapter.open(adapter_folder).sha256


def test_hash_changes_with_weights_and_with_config(adapter_folder: Path, tmp_path: Path) -> None:
    first = Adapter.open(adapter_folder).sha256
    assert Adapter.open(edited(adapter_folder, tmp_path / "a", lora_alpha=9)).sha256 != first
    other = edited(adapter_folder, tmp_path / "b")
    data = bytearray((other / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "adapter_model.safetensors").write_bytes(data)
    assert Adapter.open(other).sha256 != first


def test_health_norms_and_findings(adapter_folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.open(adapter_folder)
    health = adapter.health()
    assert health.ok
    for layer in (0, 1):
        square = sum(
            np.linalg.norm(f.scale * read_rows(f.b).astype(np.float64) @ read_rows(f.a).astype(np.float64))
            ** 2
            for module, f in adapter.factors.items()
            if f".{layer}." in module
        )
        assert health.norm_by_layer[layer] == pytest.approx(np.sqrt(square), rel=1e-9)
    broken = edited(adapter_folder, tmp_path / "broken")
    data = bytearray((broken / "adapter_model.safetensors").read_bytes())
    first, second = list(Adapter.open(broken).factors.values())[:2]
    data[first.a.start : first.a.start + 4] = np.float32(np.nan).tobytes()
    data[second.b.start : second.b.start + second.b.nbytes] = bytes(second.b.nbytes)
    (broken / "adapter_model.safetensors").write_bytes(data)
    found = Adapter.open(broken).health()
    assert found.not_finite == (first.a.name,) and found.zero_b == (second.module,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"peft_type": "ADALORA"}, "peft_type is ADALORA"),
        ({"use_dora": True}, "use_dora, and model.layers.0.mlp.down_proj has no lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head in modules_to_save, and the file has no such tensor"),
        ({"lora_bias": True}, "has no lora_B.bias"),
        ({"trainable_token_indices": [3]}, "the file has no trained rows"),
        ({"bias": "some"}, "bias is 'some', expected none, all or lora_only"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_something_new": True}, "use_something_new"),
        ({"r": 5}, "says rank 5"),
        ({"r": "four"}, "r should be a positive number"),
        ({"r": 4.5}, "r should be a positive whole number"),
        ({"rank_pattern": [4]}, "rank_pattern should map module names to numbers"),
        ({"peft_type": None, "lora_alpha": None}, "peft_type is not given"),
        ({"lora_B_layout": "new"}, "lora_B_layout is 'new'"),
        ({"target_parameters": "experts"}, "target_parameters should be a list of names"),
        ({"trainable_token_indices": [-1]}, "should be a list of token numbers"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"use_qalora": True}, "QALoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": None, "fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "mlx-lm"),
        ({"lora_alpha": None}, "lora_alpha should be a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha should be a positive number"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_refuses_by_name(adapter_folder: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = edited(adapter_folder, tmp_path / "edited", **changes)
    with pytest.raises(BadAdapterError, match=says):
        Adapter.open(folder)


def test_eva_start_is_plain_lora(adapter_folder: Path, tmp_path: Path) -> None:
    folder = edited(adapter_folder, tmp_path / "eva", init_lora_weights="eva", eva_config={"rho": 2.0})
    assert Adapter.open(folder).rank == 4


def test_pickle_is_never_loaded(adapter_folder: Path, tmp_path: Path) -> None:
    folder = edited(adapter_folder, tmp_path / "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(BadAdapterError, match="pickle") as caught:
        Adapter.open(folder)
    assert "save_pretrained" in caught.value.hint


def test_lonely_a_and_foreign_keys(adapter_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(adapter_folder / "adapter_model.safetensors")
    first = next(name for name in tensors if name.endswith("lora_B.weight"))
    lonely = edited(adapter_folder, tmp_path / "lonely")
    save_file({k: v for k, v in tensors.items() if k != first}, lonely / "adapter_model.safetensors")
    with pytest.raises(BadAdapterError, match="has only lora_A"):
        Adapter.open(lonely)
    foreign = edited(adapter_folder, tmp_path / "foreign")
    save_file({**tensors, "extra.magnitude": np.ones(3, np.float32)}, foreign / "adapter_model.safetensors")
    with pytest.raises(BadAdapterError, match=r"extra\.magnitude"):
        Adapter.open(foreign)


def test_other_base_names_both_shapes(
    tiny_llama: Path, tiny_qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from tests.conftest import build_model

    wider = build_model("llama", tmp_path / "wider", hidden_size=96, num_attention_heads=4)
    adapter = Adapter.open(make_adapter(tiny_llama))
    with pytest.raises(BadAdapterError, match=r"64.*96") as caught:
        adapter.match(Checkpoint.open(wider))
    assert "another base" in caught.value.hint
    shallow = build_model("llama", tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(BadAdapterError, match=r"model\.layers\.1\.\S+ matches no tensor"):
        adapter.match(Checkpoint.open(shallow))


def test_discovery_lists_what_is_unusable_with_the_reason(
    adapter_folder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    edited(adapter_folder, tmp_path / "runs" / "good")
    edited(adapter_folder, tmp_path / "runs" / "dora", use_dora=True)
    edited(adapter_folder, tmp_path / "runs" / "half.partial")
    cut = edited(adapter_folder, tmp_path / "runs" / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    bare = edited(adapter_folder, tmp_path / "runs" / "bare")
    (bare / "adapter_config.json").unlink()
    (tmp_path / "runs" / "loop").symlink_to(tmp_path)
    found = {one.path.name: one for one in find_adapters([tmp_path])}
    assert found.keys() == {"good", "dora", "cut", "bare"}
    assert found["good"].adapter is not None and found["good"].error is None
    assert "a DoRA cannot be merged" in str(found["dora"].error) and "adapter_config.json is missing" in str(
        found["bare"].error
    )
    assert isinstance(found["cut"].error, BadTensorFileError)

    shutil.copytree(tiny_llama, tmp_path / "models" / "base")
    shutil.copytree(tiny_llama, tmp_path / "models" / "bad.rejected")
    assert [one.path.name for one in find_models([tmp_path])] == ["base"]
