"""Model folders: single file and shards, what they say of themselves, and folders that are no models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.errors import BadModelError, BadTensorFileError
from engine.weights import Checkpoint


def test_single_and_sharded_say_the_same(tiny_llama: Path, tiny_llama_sharded: Path) -> None:
    single, sharded = Checkpoint.open(tiny_llama), Checkpoint.open(tiny_llama_sharded)
    assert single.tensors.keys() == sharded.tensors.keys()
    assert (single.parameters, single.dtype, single.layers) == (sharded.parameters, "BF16", 2)
    assert single.architecture == "LlamaForCausalLM" and not single.tied
    assert len(single.shards) == 1 and len(sharded.shards) > 1
    assert single.index_path is None and sharded.index_path is not None
    assert sharded.sha256.keys() == {shard.path.name for shard in sharded.shards}
    assert {path.name for path in single.companions} >= {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }


def test_tied_when_lm_head_is_not_on_disk(tiny_qwen3: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_qwen3)
    assert base.tied and "lm_head.weight" not in base.tensors
    silent = tmp_path / "silent"
    shutil.copytree(tiny_qwen3, silent)
    config = json.loads((silent / "config.json").read_text())
    del config["tie_word_embeddings"]
    (silent / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(silent).tied


def test_links_as_in_the_hugging_face_cache(tiny_llama: Path, tmp_path: Path) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert Checkpoint.open(tmp_path).parameters == Checkpoint.open(tiny_llama).parameters


def test_refuses_folders_that_are_no_models(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match="is not a folder"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(BadModelError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadModelError, match="JSON object"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(BadModelError, match="cannot be read as JSON"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadModelError, match="no model weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadModelError, match="pickle weights"):
        Checkpoint.open(tmp_path)


def test_refuses_a_truncated_shard(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadTensorFileError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path / "cut")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.norm.weight", "model-00099-of-00099.safetensors", "which is not in"),
        ("model.norm.weight", "../model.safetensors", "not a plain file name"),
        ("model.nothing.weight", "model-00001-of-00006.safetensors", "and it is not"),
        ("model.norm.weight", "model-00001-of-00006.safetensors", "and it is not"),
        ("model.norm.weight", None, "does not name"),
    ],
)
def test_refuses_an_index_that_is_wrong(
    tiny_llama_sharded: Path, tmp_path: Path, name: str, value: str | None, says: str
) -> None:
    shutil.copytree(tiny_llama_sharded, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert index["weight_map"]["model.norm.weight"] != "model-00001-of-00006.safetensors"
    index["weight_map"].pop(name, None)
    if value is not None:
        index["weight_map"][name] = value
    path.write_text(json.dumps(index))
    with pytest.raises(BadModelError, match=says):
        Checkpoint.open(tmp_path / "m")
