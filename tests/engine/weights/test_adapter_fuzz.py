"""Whatever an adapter folder holds, reading it ends in changes or in an error of our own kind, never in another."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import MedmergeError
from engine.weights import Adapter, Checkpoint
from engine.weights.changes import tensors_of
from engine.weights.tensorfile import TensorFile, encode_header
from tests.conftest import MakeVariant

SETTINGS = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VARIANTS = ("plain", "dora", "experts", "resized_embedding", "token_indices", "lora_bias", "modules_to_save")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "lora_bias",
    "modules_to_save", "target_parameters", "trainable_token_indices", "ensure_weight_tying", "lora_B_layout",
    "peft_version", "fan_in_fan_out", "init_lora_weights", "base_model_name_or_path", "layer_replication",
)  # fmt: skip
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head",
           "model.norm", "model.layers.0.mlp.experts", "", "model.layers.0")  # fmt: skip
PIECES = (
    "base_model.model.", "_orig_mod.", "module.", ".base_layer", ".lora_A", ".lora_B", ".lora_embedding_A",
    ".lora_embedding_B", ".lora_magnitude_vector", ".default", ".weight", ".bias", ".modules_to_save",
    ".token_adapter.trainable_tokens_delta", ".original_module", ".", "\x1b[31m", "é",
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 64, 160, 384, 392]), max_size=3).map(tuple)


@st.composite
def keys(draw: st.DrawFn) -> str:
    """A name that looks like an adapter's, more or less."""
    before = draw(st.lists(st.sampled_from(PIECES[:3]), max_size=2))
    after = draw(st.lists(st.sampled_from(PIECES[3:]), max_size=3))
    return "".join([*before, draw(st.sampled_from(MODULES)), *after])


def write(folder: Path, config: Any, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header = encode_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()])
    size = sum(
        {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1}[dtype] * _count(shape) for dtype, shape in tensors.values()
    )
    (folder / "adapter_model.safetensors").write_bytes(header + bytes(size))
    return folder


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def read_all(folder: Path, base: Checkpoint) -> bool:
    """Open, describe, check and match. True where it was read, False where it was refused as it should be."""
    try:
        adapter = Adapter.open(folder)
        assert all(isinstance(word, str) for word in adapter.variants)
        assert adapter.rank >= 0 and adapter.modules > 0 and adapter.dtype and adapter.targets is not None
        adapter.health()
        for name, change in adapter.changes(base).items():
            assert name == change.tensor_name and change.shape
            assert all(info.is_float and info.elements for info in tensors_of(change))
        adapter.match(base)
    except MedmergeError as error:
        assert error.exit_code == 2 and error.message
        return False
    return True


@SETTINGS
@given(
    name=st.sampled_from(VARIANTS),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
)
def test_any_config(variant: MakeVariant, name: str, changes: dict[str, Any]) -> None:
    case = variant(name)
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "a"
        shutil.copytree(case.adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        read_all(folder, Checkpoint.open(case.base))


@SETTINGS
@given(
    tensors=st.dictionaries(
        keys(), st.tuples(st.sampled_from(["F32", "BF16", "I64", "BOOL"]), SHAPES), max_size=5
    ),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=2),
    pair=st.booleans(),
)
def test_any_keys(tiny_llama: Path, tensors: Any, changes: dict[str, Any], pair: bool) -> None:
    if pair:
        tensors = {
            **tensors,
            "model.layers.1.self_attn.q_proj.lora_A.weight": ("F32", (4, 64)),
            "model.layers.1.self_attn.q_proj.lora_B.weight": ("F32", (64, 4)),
        }
    with tempfile.TemporaryDirectory() as room:
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes}
        read_all(write(Path(room), config, tensors), Checkpoint.open(tiny_llama))


@SETTINGS
@given(
    name=st.sampled_from(VARIANTS),
    which=st.integers(0, 200),
    change=st.tuples(st.just("dtype"), st.sampled_from(["I64", "BOOL", "BF16"]))
    | st.tuples(st.just("shape"), SHAPES)
    | st.tuples(st.just("key"), keys()),
)
def test_one_tensor_changed(variant: MakeVariant, name: str, which: int, change: tuple[str, Any]) -> None:
    case = variant(name)
    found = TensorFile.open(case.adapter / "adapter_model.safetensors").tensors
    tensors = {info.name: (info.dtype, info.shape) for info in found.values()}
    key = list(tensors)[which % len(tensors)]
    dtype, shape = tensors.pop(key)
    changed = {"key": key, "dtype": dtype, "shape": shape, change[0]: change[1]}
    tensors[changed["key"]] = (changed["dtype"], changed["shape"])
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    with tempfile.TemporaryDirectory() as room:
        read_all(write(Path(room), config, tensors), Checkpoint.open(case.base))


def test_the_fuzz_reads_what_is_right(tiny_llama: Path, tmp_path: Path) -> None:
    """Without a change the written folder is read, so that the tests above do more than refuse."""
    pair: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.layers.1.self_attn.q_proj.lora_A.weight": ("F32", (4, 64)),
        "model.layers.1.self_attn.q_proj.lora_B.weight": ("BF16", (64, 4)),
        "lm_head.weight": ("F32", (384, 64)),
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    folder = write(tmp_path, config, pair)
    assert not read_all(folder, Checkpoint.open(tiny_llama))  # match refuses lm_head; the rest is read
    assert Adapter.open(folder).changes(Checkpoint.open(tiny_llama)).keys() == {
        "model.layers.1.self_attn.q_proj.weight", "lm_head.weight",
    }  # fmt: skip
    del pair["lm_head.weight"]
    assert read_all(write(tmp_path, config, pair), Checkpoint.open(tiny_llama))
