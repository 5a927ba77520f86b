"""Checkpoints as GGUF: the same numbers as transformers, every tensor where it belongs, and every refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.claim import claim, lock_path
from engine.errors import (
    BadInputError,
    BadModelError,
    BadRecipeError,
    BadTensorFileError,
    CancelledError,
    NoSpaceError,
    TargetExistsError,
)
from engine.gguf import job, tensors, writer
from engine.gguf.convert import Conversion, convert
from engine.jobs.events import EventWriter
from tests.conftest import MakeAdapter, build_model
from tests.engine.gguf.conftest import llama_log_probs, to_gguf, transformers_log_probs

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "architecture, config",
    [
        ("llama", {}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
        ("qwen3", {"rope_parameters": YARN}),
    ],
)
def test_f32_gives_transformers_log_probabilities(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = build_model(architecture, tmp_path / "m", seed=5, **config)
    if config.get("attention_bias"):
        _random_biases(folder)
    difference = np.abs(
        llama_log_probs(to_gguf(folder, tmp_path / "m.gguf")) - transformers_log_probs(folder)
    )
    assert difference.max() < 1e-3


def _random_biases(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if name.endswith(".bias"):
            state[name] = torch.randn(value.shape, generator=generator).to(value.dtype) * 0.3
    assert any(name.endswith("k_proj.bias") for name in state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "kind, allowed",
    [("bf16", 0.02), ("f16", 0.01), ("q8_0", 0.05), ("q4_0", 1.0), ("q4_k_m", 1.0), ("q6_k", 0.3)],
)
def test_other_types_stay_within_their_error(
    tmp_path: Path, tiny_llama: Path, kind: str, allowed: float
) -> None:
    right = transformers_log_probs(tiny_llama)
    difference = np.abs(llama_log_probs(to_gguf(tiny_llama, tmp_path / "m.gguf", kind)) - right)
    assert difference.max() < allowed
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def read_back(file: Path) -> dict[str, Any]:
    """Every tensor of a GGUF as float32 in the checkpoint's order of dimensions, by gguf's own reader."""
    from gguf import GGUFReader, dequantize

    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(
            [int(n) for n in reversed(tensor.shape)]
        )
        for tensor in GGUFReader(file).tensors
    }


def test_every_tensor_holds_the_checkpoints_numbers(
    tiny_qwen3: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Read back with gguf's own reader; q and k of Llama undone by transformers' formula for loading GGUF."""
    from safetensors.torch import load_file

    for folder in (tiny_llama, tiny_qwen3):
        written = read_back(to_gguf(folder, tmp_path / f"{folder.name}.gguf"))
        state = {
            name: value.float().numpy() for name, value in load_file(folder / "model.safetensors").items()
        }
        assert len(written) == len(state)
        for name, value in state.items():
            target = tensors.gguf_name(name)
            assert target is not None
            found = written[target]
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            if folder == tiny_llama and heads:
                half = found.shape[0] // heads // 2
                found = found.reshape(heads, half, 2, found.shape[1]).swapaxes(2, 1).reshape(found.shape)
            assert np.array_equal(found, value), name


def test_shards_and_block_size_do_not_change_a_byte(
    tiny_llama: Path, tiny_llama_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data(folder: Path, name: str) -> bytes:
        return to_gguf(folder, tmp_path / name, "q8_0").read_bytes()[-100_000:]

    whole = data(tiny_llama, "a.gguf")
    assert data(tiny_llama_sharded, "b.gguf") == whole
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 64 * 7)
    assert data(tiny_llama, "c.gguf") == whole


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of 12 MB as float32 passes through in blocks of 256 kB."""
    import tracemalloc

    folder = build_model("llama", tmp_path / "m", hidden_size=8192)
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 1 << 16)
    plan = Conversion.plan(folder)
    assert plan.model.sha256  # read now, in its own blocks of 4 MiB
    tracemalloc.start()
    plan.write(tmp_path / "m.gguf", "f16", EventWriter())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000 < 384 * 8192 * 4


def test_metadata(tiny_llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    from engine.weights.tensorfile import file_sha256

    fields = GGUFReader(to_gguf(tiny_llama, tmp_path / "m.gguf", "q4_k_m")).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["general.file_type"].contents() == 15
    assert fields["general.name"].contents() == "tiny-llama"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()
    source = json.loads(fields["medmerge.source"].contents())
    assert source["sha256"] == {"model.safetensors": file_sha256(tiny_llama / "model.safetensors")}
    assert str(tmp_path) not in str(source)


def test_mixture_is_the_merged_checkpoint(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """base + adapters straight to GGUF against the float32 merge by PEFT's own deltas."""
    from gguf import GGUFReader

    from tests.engine.gguf.test_lora import peft_merged

    pt, sft = (
        make_adapter(tiny_llama, b_std=0.2, seed=1),
        make_adapter(tiny_llama, b_std=0.2, seed=2, use_rslora=True),
    )
    weights = {"pt": {"path": str(pt), "weight": 0.3}, "sft": {"path": str(sft), "weight": 0.7}}
    params = {"base": str(tiny_llama), "adapters": weights, "type": "f32", "out": str(tmp_path / "mix.gguf")}
    result = job.run(params, EventWriter())
    assert result["kind"] == "mixture" and result["bytes"] == (tmp_path / "mix.gguf").stat().st_size
    merged = peft_merged(tiny_llama, {"pt": (pt, 0.3), "sft": (sft, 0.7)}, tmp_path / "merged")
    right, found = read_back(to_gguf(merged, tmp_path / "merged.gguf")), read_back(tmp_path / "mix.gguf")
    base = read_back(to_gguf(tiny_llama, tmp_path / "base.gguf"))
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert np.abs(found[name] - value).max() < 1e-6, name
        assert name.endswith("norm.weight") or "blk" not in name or np.abs(base[name] - value).max() > 0.01
    fields = GGUFReader(tmp_path / "mix.gguf").fields
    adapters = json.loads(fields["medmerge.source"].contents())["adapters"]
    assert {label: entry["weight"] for label, entry in adapters.items()} == {"pt": 0.3, "sft": 0.7}


# ---- refusals ----------------------------------------------------------------------------------------------


def _changed(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize(
    "config, says",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "not given"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "no place"),
        ({"vocab_size": 400}, r"embed_tokens.weight is \[384, 64\]"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"intermediate_size": "many"}, "intermediate_size"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {**YARN, "factor": "big"}}, "rope factor"),
        ({"tie_word_embeddings": True}, "another lm_head"),
    ],
)
def test_configs_that_cannot_be_written(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    folder = _changed(tiny_llama, tmp_path / "m", **config)
    with pytest.raises(BadModelError, match=says):
        Conversion.plan(folder)


def test_weights_that_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    for number, (value, kind) in enumerate([(float("nan"), "f32"), (float("inf"), "q8_0"), (1e6, "f16")]):
        folder = _changed(tiny_llama, tmp_path / f"m{number}")
        state = load_file(folder / "model.safetensors")
        state[name][3, 5] = torch.tensor(value)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadModelError, match=name):
            to_gguf(folder, tmp_path / "m.gguf", kind)
    to_gguf(folder, tmp_path / "ok.gguf", "bf16")
    assert [path.name for path in tmp_path.glob("*gguf*")] == ["ok.gguf"]


def test_truncated_shard_and_missing_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = _changed(tiny_llama, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BadTensorFileError):
        Conversion.plan(folder)
    folder = _changed(tiny_llama, tmp_path / "n")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadModelError, match=r"tokenizer\.json is missing"):
        Conversion.plan(folder)


def test_unknown_types_list_those_there_are(tiny_llama: Path, tmp_path: Path) -> None:
    plan = Conversion.plan(tiny_llama)
    with pytest.raises(BadRecipeError, match=r"'q5_x' does not exist(.|\n)*q4_k_m") as caught:
        convert(plan, tmp_path / "m.gguf", "q5_x", EventWriter())
    assert caught.value.exit_code == 2
    with pytest.raises(BadRecipeError, match="importance matrix"):
        convert(plan, tmp_path / "m.gguf", "IQ2_XS", EventWriter())
    assert not list(tmp_path.iterdir())


def test_existing_target_is_refused_and_kept(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(TargetExistsError):
        to_gguf(tiny_llama, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_no_space_is_seen_before_and_while_writing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr("engine.atomic.shutil.disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(NoSpaceError, match="needs"):
            to_gguf(tiny_llama, tmp_path / "m.gguf")
    calls = iter(range(100))

    def full(*arguments: Any) -> bytes:
        if next(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return bytes(4)

    monkeypatch.setattr(writer, "encode", full)
    with pytest.raises(NoSpaceError, match="filled up"):
        to_gguf(tiny_llama, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_cancelling_leaves_nothing(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    class Impatient(EventWriter):
        def progress(self, done: float, total: float | None = None, *rest: Any, **more: Any) -> None:
            if total and done > total / 2:
                raise CancelledError("cancelled")

    with pytest.raises(CancelledError):
        convert(Conversion.plan(tiny_llama), tmp_path / "m.gguf", kind, Impatient())
    assert not list(tmp_path.iterdir())


def test_a_dead_writers_partial_is_replaced_and_others_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    partial = tmp_path / "m.gguf.partial"
    with pytest.raises(KeyboardInterrupt), claim(partial):
        lock = lock_path(partial).read_bytes()
        raise KeyboardInterrupt
    partial.write_bytes(b"half" * 10_000_000)
    with pytest.raises(BadInputError, match="nothing says that this program left it"):
        to_gguf(tiny_llama, tmp_path / "m.gguf")
    assert partial.stat().st_size == 40_000_000
    lock_path(partial).write_bytes(lock)  # as after kill -9: named, and held by nobody
    to_gguf(tiny_llama, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").stat().st_size < 1_000_000
    with (
        writer.new_file(tmp_path / "n.gguf", 10, "a test"),
        pytest.raises(BadInputError, match=f"being written by process {os.getpid()}"),
    ):
        to_gguf(tiny_llama, tmp_path / "n.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_link_in_the_partials_place_is_never_followed(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "m.gguf.partial").symlink_to(tmp_path / "mine")
    lock_path(tmp_path / "m.gguf.partial").write_text("a dead one's")
    with pytest.raises(BadInputError, match="nothing says"):
        to_gguf(tiny_llama, tmp_path / "m.gguf")
    assert (tmp_path / "mine").read_text() == "precious"
