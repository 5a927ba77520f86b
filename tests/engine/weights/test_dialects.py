"""The same adapter under the names and configs other trainers write reads as the same changes; others are refused.

Each rename is what a tool really writes: torch.compile (axolotl `torch_compile`, checkpoints of FSDP2 with compile)
puts `_orig_mod.`, DDP `module.`, FSDP `_fsdp_wrapped_module.`, a raw state dict keeps `.default.`, older PEFT and
Unsloth keep `.modules_to_save.default.`, torchtune writes five config keys, vision models nest their text model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import BadAdapterError
from engine.weights import Adapter, Change, Checkpoint, Dora, Experts, Replacement, Sum
from engine.weights.changes import tensors_of
from engine.weights.tensorfile import read_bytes
from tests.conftest import MakeAdapter, MakeVariant
from tests.engine.weights import dense

Rename = Callable[[str], str]


def rewritten(
    source: Path, target: Path, rename: Rename = str, drop: tuple[str, ...] = (), **config: Any
) -> Path:
    """A copy of an adapter with its keys renamed, config keys changed, and those in `drop` left out."""
    shutil.copytree(source, target)
    weights = target / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(weights).items()}, weights)
    path = target / "adapter_config.json"
    said = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in said.items() if key not in drop}))
    return target


def default_names(key: str) -> str:
    """Keys of a raw state dict, with the adapter's name in them."""
    key = re.sub(r"\.(lora_[AB])\.", r".\1.default.", key)
    key = re.sub(r"\.(lora_embedding_[AB]|lora_magnitude_vector)$", r".\1.default", key)
    key = re.sub(r"\.(trainable_tokens_delta)$", r".\1.default", key)
    return re.sub(r"\.(embed_tokens|lm_head|\w*norm)\.weight$", r".\1.modules_to_save.default.weight", key)


PREFIX = "base_model.model."
DIALECTS: dict[str, Rename] = {
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "default": default_names,
    "compile": lambda key: "_orig_mod." + key,
    "regional compile": lambda key: key.replace(".layers.0.", ".layers.0._orig_mod."),
    "ddp": lambda key: "module." + key,
    "compile in ddp": lambda key: "module._orig_mod." + key,
    "fsdp": lambda key: "_fsdp_wrapped_module." + key.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
    "checkpointing": lambda key: key.replace(".layers.1.", ".layers.1._checkpoint_wrapped_module."),
    "no head": lambda key: key.replace(PREFIX + "model.", PREFIX) if "lm_head" not in key else key,
    "text model": lambda key: key.replace(PREFIX + "model.", PREFIX + "model.language_model."),
    "old vision model": lambda key: key.replace(PREFIX, PREFIX + "language_model."),
}  # fmt: skip


def same_merge(one: Path, other: Path, base: Path) -> None:
    first, second = dense.merged(one, base), dense.merged(other, base)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def told(change: Change) -> tuple[Any, ...]:
    """A change without the names of its module and keys: its kind, numbers, tensor and the bytes it is made of."""
    if isinstance(change, Sum):
        return tuple(told(part) for part in change.parts)
    inner = change.low_rank if isinstance(change, Dora) else change
    numbers = tuple(getattr(inner, key, None) for key in ("rank", "alpha", "scale", "transposed", "rows"))
    data = tuple(read_bytes(info) for info in tensors_of(change))
    return type(change), change.tensor_name, change.shape, numbers, data


@pytest.mark.parametrize(
    "name", ["plain", "dora", "modules_to_save", "embedding", "token_indices", "lora_bias"]
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_read_the_same(variant: MakeVariant, tmp_path: Path, name: str, dialect: str) -> None:
    case = variant(name)
    renamed = rewritten(case.adapter, tmp_path / "a", DIALECTS[dialect])
    base = Checkpoint.open(case.base)
    ours, theirs = Adapter.open(renamed).changes(base), Adapter.open(case.adapter).changes(base)
    assert ours.keys() == theirs.keys()
    for key, change in theirs.items():
        assert told(ours[key]) == told(change), key


def test_magnitudes_may_end_in_weight(variant: MakeVariant, tmp_path: Path) -> None:
    case = variant("dora")
    other = rewritten(
        case.adapter, tmp_path / "a", lambda key: re.sub(r"(magnitude_vector)$", r"\1.default.weight", key)
    )
    same_merge(other, case.adapter, case.base)


@pytest.mark.parametrize(
    "changes",
    [
        {"drop": ("peft_type",)},
        {"drop": ("r",)},
        {"drop": ("rank_pattern", "alpha_pattern", "bias", "use_rslora", "use_dora", "modules_to_save")},
        {"r": "4", "lora_alpha": "6"},
        {"peft_type": "PeftType.LORA"},
        {"rank_pattern": None, "alpha_pattern": None, "bias": None, "fan_in_fan_out": None},
        {"fan_in_fan_out": True},  # PEFT sets it back for every layer that is no Conv1D
    ],
    ids=str,
)
def test_configs_with_missing_or_odd_keys(
    variant: MakeVariant, tmp_path: Path, changes: dict[str, Any]
) -> None:
    case = variant("plain")
    same_merge(rewritten(case.adapter, tmp_path / "a", **changes), case.adapter, case.base)


def test_torchtunes_config(variant: MakeVariant, tmp_path: Path) -> None:
    """torchtune's adapter_config.json has five keys; its folder holds a pickle and the whole model besides."""
    case = variant("plain")
    folder = rewritten(case.adapter, tmp_path / "epoch_0")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "r": 4,
                "lora_alpha": 6,
                "target_modules": ["q_proj"],
                "peft_type": "LORA",
                "base_model_name_or_path": "x",
            }
        )
    )
    (folder / "adapter_model.pt").write_bytes(b"pickle")
    same_merge(folder, case.adapter, case.base)


def test_torchtunes_pickles_are_named(variant: MakeVariant, tmp_path: Path) -> None:
    folder = rewritten(variant("plain").adapter, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_0.pt")
    with pytest.raises(BadAdapterError, match=r"adapter_0\.pt is a pickle file"):
        Adapter.open(folder)


def test_magnitudes_without_use_dora_are_refused(variant: MakeVariant, tmp_path: Path) -> None:
    """PEFT would drop them without a word; torchtune's configs never say use_dora."""
    folder = rewritten(variant("dora").adapter, tmp_path / "a", drop=("use_dora",))
    with pytest.raises(BadAdapterError, match=r"has a lora_magnitude_vector, and .* does not say use_dora"):
        Adapter.open(folder)


def test_unsloths_grouped_experts(variant: MakeVariant, tmp_path: Path) -> None:
    """`lora_B_layout: grouped_by_expert` says that B's columns lie expert by expert; PEFT's lie rank by rank."""
    case = variant("experts")
    folder = rewritten(case.adapter, tmp_path / "a", lora_B_layout="grouped_by_expert")
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        if "experts" in key and "lora_B" in key:
            columns = value.reshape(value.shape[0], 4, 4).transpose(
                0, 2, 1
            )  # (out, rank, expert) to (out, expert, rank)
            tensors[key] = np.ascontiguousarray(columns.reshape(value.shape))
    save_file(tensors, folder / "adapter_model.safetensors")
    same_merge(folder, case.adapter, case.base)
    norms = [Adapter.open(path).health().norm_by_layer for path in (folder, case.adapter)]
    np.testing.assert_allclose(*norms, rtol=1e-9)


def test_experts_of_old_peft_lie_the_other_way(variant: MakeVariant, tmp_path: Path) -> None:
    """PEFT before 0.19.1 took (experts, in, out) for every model: the shapes say so where they differ."""
    case = variant("experts")
    folder = rewritten(case.adapter, tmp_path / "a", peft_version="0.18.1")
    tensors = load_file(folder / "adapter_model.safetensors")
    swapped = {}
    for key, value in tensors.items():
        if "experts" in key and "lora_A" in key:  # A holds expert by expert, B rank by rank
            other = tensors[key.replace("lora_A", "lora_B")]
            swapped[key] = other.reshape(-1, 4, 4).transpose(2, 1, 0).reshape(16, -1)
            swapped[key.replace("lora_A", "lora_B")] = (
                value.reshape(4, 4, -1).transpose(2, 1, 0).reshape(-1, 16)
            )
    tensors.update({key: np.ascontiguousarray(value) for key, value in swapped.items()})
    save_file(tensors, folder / "adapter_model.safetensors")
    changes = Adapter.open(folder).changes(Checkpoint.open(case.base))
    assert all(change.transposed for change in changes.values() if isinstance(change, Experts))
    same_merge(folder, case.adapter, case.base)


def test_experts_adapted_one_by_one(variant: MakeVariant, tmp_path: Path) -> None:
    """Adapters trained before transformers 5 name each expert; PEFT fuses them when it loads, we need not.

    (PEFT 0.21 doubles rank and alpha of gate and up to fuse them, which with rsLoRA makes them sqrt(2) too large.)
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    case = variant("experts_apart")
    random = np.random.default_rng(3)
    shapes = {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}
    tensors = {}
    for layer, expert in np.ndindex(2, 4):
        for part, (out, inside) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}"
            tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.1, (4, inside)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.1, (out, 4)).astype(np.float32)
    folder = rewritten(case.adapter, tmp_path / "a", target_parameters=None, target_modules=list(shapes))
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(case.base, dtype="float32")
    PeftModel.from_pretrained(plain, folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    ours = dense.merged(folder, case.base)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert np.linalg.norm(ours[key] - value) <= 1e-6 * np.linalg.norm(value), key


def test_square_experts_of_an_unknown_version_are_refused(variant: MakeVariant, tmp_path: Path) -> None:
    case = variant("experts_transposed")
    folder = rewritten(case.adapter, tmp_path / "a", drop=("peft_version",))
    same_merge(folder, case.adapter, case.base)  # gpt_oss says itself that it is transposed
    other = tmp_path / "other-model"
    shutil.copytree(case.base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "another"}))
    with pytest.raises(BadAdapterError, match=r"2 ways into targeted parameters of .*experts"):
        Adapter.open(folder).changes(Checkpoint.open(other))


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (lambda key: key.replace("lora_A", "lora_a").replace("lora_B", "lora_b"), "torchtune's own or mlx's"),
        (lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "kohya"),
        (lambda key: key.replace("lora_A.weight", "hada_w1_a"), "LoHa"),
        (lambda key: key.replace("lora_A.weight", "lokr_w1"), "LoKr"),
        (lambda key: key.replace("lora_A.weight", "oft_R.weight"), "OFT"),
        (lambda key: key.replace("lora_A.weight", "lora_E"), "AdaLoRA"),
        (lambda key: key.replace("lora_A.weight", "vera_lambda_b"), "VeRA"),
        (lambda key: "v_head.summary.weight" if key.endswith("1.mlp.up_proj.lora_A.weight") else key, "value head"),
        (lambda key: key.replace(".0.mlp.up_proj.lora_B.", ".0.mlp.up_proj.lora_B.other."), "several adapters"),
        (lambda key: key.replace(".layers.1.", ".layers.7."), "matches no tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_methods_and_stray_keys_are_named(
    variant: MakeVariant, tmp_path: Path, rename: Rename, says: str
) -> None:
    case = variant("plain")
    folder = rewritten(case.adapter, tmp_path / "a", rename)
    with pytest.raises(BadAdapterError, match=says) as caught:
        Adapter.open(folder).changes(Checkpoint.open(case.base))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "key", ["extra", "model.norm.weight", "base_model.model.model.layers.0.mlp.up_proj.bias"]
)
def test_a_tensor_the_config_does_not_explain_is_refused(
    variant: MakeVariant, tmp_path: Path, key: str
) -> None:
    folder = rewritten(variant("plain").adapter, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, key: np.ones(64, np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(BadAdapterError, match=f"key {key} is no lora_A or lora_B.*does not say why"):
        Adapter.open(folder)


def test_an_embedding_saved_beside_its_lora_counts_only_when_it_changed(
    variant: MakeVariant, tmp_path: Path
) -> None:
    case = variant("embedding")
    base = Checkpoint.open(case.base)
    assert Adapter.open(case.adapter).match(base).keys() == Adapter.open(case.adapter).changes(base).keys()
    folder = rewritten(case.adapter, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"][5] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(BadAdapterError, match=r"lm_head\.weight.*only a merge can apply"):
        Adapter.open(folder).match(base)
    ours, before = dense.merged(folder, case.base), dense.merged(case.adapter, case.base)
    np.testing.assert_allclose(ours["lm_head.weight"][5], before["lm_head.weight"][5] + 1, rtol=1e-6)


def test_refusals_against_the_base(variant: MakeVariant, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    llama, tied = variant("plain"), variant("tied_lora_head")
    base, tied_base = Checkpoint.open(llama.base), Checkpoint.open(tied.base)
    with pytest.raises(BadAdapterError, match=r"changes the output side alone"):
        Adapter.open(tied.adapter).match(tied_base)
    for name, word in (
        ("dora", "DoRA"),
        ("modules_to_save", "modules_to_save"),
        ("token_indices", "token rows"),
    ):
        with pytest.raises(BadAdapterError, match=word):
            Adapter.open(variant(name).adapter).match(base)
    lora_bias = variant("lora_bias").adapter
    with pytest.raises(BadAdapterError, match=r"the layer has no bias"):
        Adapter.open(lora_bias).changes(base)
    with pytest.raises(BadAdapterError, match=r"fits no targeted parameters"):
        Adapter.open(variant("experts").adapter).changes(base)
    shrunk = rewritten(variant("modules_to_save").adapter, tmp_path / "shrunk")
    tensors = load_file(shrunk / "adapter_model.safetensors")
    for key in [key for key in tensors if "embed_tokens" in key or "lm_head" in key]:
        tensors[key] = tensors[key][:300].copy()
    save_file(tensors, shrunk / "adapter_model.safetensors")
    with pytest.raises(BadAdapterError, match="300 rows, fewer than the 384"):
        Adapter.open(shrunk).changes(base)
    one_side = rewritten(variant("resized").adapter, tmp_path / "one-side")
    tensors = load_file(one_side / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, one_side / "adapter_model.safetensors")
    with pytest.raises(BadAdapterError, match="the other embedding table keeps 384"):
        Adapter.open(one_side).changes(base)


def test_unsaved_zero3_shards_are_named(variant: MakeVariant, tmp_path: Path) -> None:
    for name, key in (("plain", "q_proj.lora_A.weight"), ("modules_to_save", "lm_head.weight")):
        case = variant(name)
        folder = rewritten(case.adapter, tmp_path / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        full = next(known for known in tensors if known.endswith(key))
        save_file({**tensors, full: np.zeros((0,), np.float32)}, folder / "adapter_model.safetensors")
        with pytest.raises(BadAdapterError, match="expected") as caught:
            Adapter.open(folder).changes(Checkpoint.open(case.base))
        assert "ZeRO-3" in caught.value.hint


def test_variants_in_words_and_health_of_all(variant: MakeVariant, tmp_path: Path) -> None:
    words = {
        "plain": (), "rslora": ("rsLoRA",), "dora": ("DoRA",),
        "modules_to_save": ("modules_to_save: embed_tokens, lm_head, norm",),
        "embedding": ("embedding LoRA: embed_tokens",), "experts": ("fused parameters: experts",),
        "bias_all": ("trained biases",), "lora_bias": ("lora_bias",),
        "token_indices": ("trained token rows: embed_tokens",),
    }  # fmt: skip
    for name, said in words.items():
        adapter = Adapter.open(variant(name).adapter)
        assert adapter.variants == said
        assert adapter.plain == (name in ("plain", "rslora", "embedding"))
        health = adapter.health()
        assert health.ok and (not adapter.parts.pairs or min(health.norm_by_layer) > 0)
    folder = rewritten(variant("modules_to_save").adapter, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"][3, 3] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    assert Adapter.open(folder).health().not_finite == ("base_model.model.lm_head.weight",)


def test_norms_of_experts_are_those_of_the_dense_deltas(variant: MakeVariant) -> None:
    case = variant("experts_one")
    adapter, base = Adapter.open(case.adapter), Checkpoint.open(case.base)
    for layer, norm in enumerate(adapter.health().norm_by_layer):
        change = adapter.changes(base)[f"model.layers.{layer}.mlp.experts.down_proj"]
        dense_norm = np.linalg.norm(dense.delta(change, np.zeros(change.shape)))
        assert norm == pytest.approx(dense_norm, rel=1e-6)


def test_untouched_copies_are_no_change(variant: MakeVariant) -> None:
    """PEFT saves original_module and modules_to_save beside the same tensor where the vocabulary was resized."""
    case = variant("resized_saved")
    changes = Adapter.open(case.adapter).changes(Checkpoint.open(case.base))
    change = changes["lm_head.weight"]
    assert isinstance(change, Replacement) and change.values.name == "base_model.model.lm_head.weight"
