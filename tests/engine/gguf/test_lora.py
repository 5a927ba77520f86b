"""LoRA GGUFs: what llama.cpp computes with them is what PEFT and the merged checkpoint compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BadAdapterError, BadRecipeError, TargetExistsError
from engine.gguf.lora import convert_adapter
from engine.jobs.events import EventWriter
from tests.conftest import MakeAdapter, build_model
from tests.engine.gguf.conftest import TEXT, llama_log_probs, to_gguf, transformers_log_probs

B_STD = 0.2  # deltas of the size of the weights, so that a wrong scale or permutation cannot hide


def peft_merged(base: Path, adapters: dict[str, tuple[Path, float]], out: Path) -> Path:
    """Base + sum of weight * delta in float32, by PEFT's own deltas, saved as a checkpoint."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for folder, weight in adapters.values():
        wrapped = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
        )
        for name, module in wrapped.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                state[f"{name}.weight"] += weight * module.get_delta_weight("default")
    model.load_state_dict(state)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, out / name)
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_two_adapters_with_weights_equal_the_merged_checkpoint(
    architecture: str, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Scales (.3, .7) of an rsLoRA adapter and one with rank and alpha patterns: the folded and the plain way."""
    base = build_model(architecture, tmp_path / "base", seed=3, head_dim=32)
    pt = make_adapter(base, rank=4, b_std=B_STD, seed=1, use_rslora=True)
    sft = make_adapter(
        base, rank=8, b_std=B_STD, seed=2,
        rank_pattern={"q_proj": 2, "down_proj": 16}, alpha_pattern={"k_proj": 40, "layers.1.self_attn.q_proj": 3},
    )  # fmt: skip
    gguf = to_gguf(base, tmp_path / "base.gguf")
    loras = {"pt": tmp_path / "pt.gguf", "sft": tmp_path / "sft.gguf"}
    for label, folder in (("pt", pt), ("sft", sft)):
        convert_adapter(folder, base, loras[label], "f32", EventWriter())
    scales = {"pt": 0.3, "sft": 0.7}

    live = llama_log_probs(gguf, loras=loras, scales=scales)
    merged = peft_merged(base, {"pt": (pt, 0.3), "sft": (sft, 0.7)}, tmp_path / "merged")
    exported = llama_log_probs(to_gguf(merged, tmp_path / "merged.gguf"))
    right = transformers_log_probs(merged)

    assert np.abs(live - right).max() < 2e-3
    assert np.abs(live - exported).max() < 2e-3
    assert np.abs(llama_log_probs(gguf) - right).max() > 0.1  # the deltas matter
    swapped = llama_log_probs(gguf, loras=loras, scales={"pt": 0.7, "sft": 0.3})
    assert np.abs(swapped - right).max() > 0.05


def test_scale_zero_and_no_scales_are_the_base(
    tiny_llama: Path, tiny_llama_gguf: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    lora = tmp_path / "a.gguf"
    convert_adapter(make_adapter(tiny_llama, b_std=B_STD), tiny_llama, lora, "f16", EventWriter())
    base = llama_log_probs(tiny_llama_gguf)
    assert np.array_equal(llama_log_probs(tiny_llama_gguf, loras={"a": lora}, scales={"a": 0.0}), base)
    assert np.array_equal(llama_log_probs(tiny_llama_gguf, loras={"a": lora}), base)
    assert not np.array_equal(llama_log_probs(tiny_llama_gguf, loras={"a": lora}, scales={"a": 0.1}), base)


def test_changing_scales_on_one_context_forgets_the_old_ones(
    tiny_llama: Path, tiny_llama_gguf: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from engine.chat.runtime import Model

    lora = tmp_path / "a.gguf"
    convert_adapter(make_adapter(tiny_llama, b_std=B_STD), tiny_llama, lora, "f32", EventWriter())
    fresh = llama_log_probs(tiny_llama_gguf, loras={"a": lora}, scales={"a": 0.5})
    with Model(tiny_llama_gguf, gpu_layers=0) as model:
        model.load_adapter("a", lora)
        with model.context(256, threads=1) as context:
            context.set_scales({"a": 2.0})
            context.log_probabilities(model.tokenize(TEXT))
            context.set_scales({"a": 0.5})
            assert context.tokens == []
            assert np.array_equal(context.log_probabilities(model.tokenize(TEXT)), fresh)


def test_refusals(tiny_llama: Path, tiny_qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama)
    out = tmp_path / "a.gguf"
    with pytest.raises(BadRecipeError, match="types: f32, f16"):
        convert_adapter(adapter, tiny_llama, out, "q4_k_m", EventWriter())
    with pytest.raises(BadAdapterError, match="another base"):
        convert_adapter(
            adapter, build_model("llama", tmp_path / "b", hidden_size=32), out, "f32", EventWriter()
        )
    head = make_adapter(tiny_qwen3, target_modules=["lm_head", "q_proj"])
    with pytest.raises(BadAdapterError):
        convert_adapter(head, tiny_qwen3, out, "f32", EventWriter())
    assert not list(tmp_path.glob("a.gguf*"))
    convert_adapter(adapter, tiny_llama, out, "f32", EventWriter())
    with pytest.raises(TargetExistsError):
        convert_adapter(adapter, tiny_llama, out, "f32", EventWriter())


def test_an_adapter_of_another_model_is_refused_by_the_runtime(
    tiny_llama: Path, tiny_llama_gguf: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from engine.chat.runtime import Model
    from engine.errors import BadTensorFileError

    other = build_model("llama", tmp_path / "other", hidden_size=32, intermediate_size=96)
    lora = tmp_path / "a.gguf"
    convert_adapter(make_adapter(other), other, lora, "f32", EventWriter())
    with Model(tiny_llama_gguf, gpu_layers=0) as model, pytest.raises(BadTensorFileError, match="same base"):
        model.load_adapter("a", lora)


def test_metadata_says_what_it_is(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    from gguf import GGUFReader

    adapter = make_adapter(tiny_llama, rank=4, lora_alpha=6, name="my-adapter")
    convert_adapter(adapter, tiny_llama, tmp_path / "a.gguf", "f32", EventWriter())
    fields = GGUFReader(tmp_path / "a.gguf").fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == 6.0
    source = json.loads(fields["medmerge.source"].contents())
    assert source["name"] == "my-adapter" and len(source["sha256"]) == 64
