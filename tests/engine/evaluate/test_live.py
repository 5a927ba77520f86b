"""Live mixtures are the merge: against float64, against PEFT, and back to the base bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from engine.errors import BadAdapterError, BadRecipeError
from engine.evaluate.live import LiveModel, cpu_has, pick_compute
from engine.weights import Adapter, Checkpoint


def open_live(base: Path, dtype: str = "bfloat16", compute: str = "model", **adapters: Path) -> LiveModel:
    opened = {label: Adapter.open(path) for label, path in adapters.items()}
    return LiveModel(Checkpoint.open(base), opened, dtype, compute, "cpu")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder in float64, read by the safetensors library itself."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                found[name] = file.get_tensor(name).to(torch.float64).numpy()
    return found


def round_to(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 rounded once to a dtype (torch goes through float32 for bf16, so do it by hand)."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_element_is_the_rounded_float64_sum(dtype, tiny_llama, make_adapter):
    pt, sft = make_adapter(tiny_llama, seed=1), make_adapter(tiny_llama, seed=2, rank=4, use_rslora=True)
    live = open_live(tiny_llama, dtype, pt=pt, sft=sft)
    live.set_weights({"pt": 0.3, "sft": 0.7})
    base, a, b = tensors_of(tiny_llama), tensors_of(pt), tensors_of(sft)
    state = live.model.state_dict()
    touched = 0
    for name, w in base.items():
        exact, slack = w.copy(), np.abs(w)
        for weight, scale, adapter in ((0.3, 16 / 8, a), (0.7, 8 / 4**0.5, b)):
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if key + "A.weight" in adapter:
                A, B = adapter[key + "A.weight"], adapter[key + "B.weight"]
                exact += weight * scale * B @ A
                slack += abs(weight * scale) * np.abs(B) @ np.abs(A)
                touched += 1
        found = state[name].to(torch.float64).numpy()
        error = 16 * 2.0**-24 * slack if np.any(exact != w) else 0 * slack
        kind = getattr(torch, dtype)
        assert np.all(found >= round_to(exact - error, kind)) and np.all(
            found <= round_to(exact + error, kind)
        ), name
    assert touched == 2 * 14  # two adapters, seven linear layers in two blocks


def test_against_peft_in_float32(tiny_qwen3, make_adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft = make_adapter(tiny_qwen3, seed=3)
    live = open_live(tiny_qwen3, "float32", sft=sft)
    live.set_weights({"sft": 1.0})
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32), sft
    )
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        torch.testing.assert_close(live.model(ids).logits, peft(ids).logits, rtol=1e-4, atol=1e-5)


def test_many_mixtures_leave_no_trace_and_zero_is_the_base(tiny_llama_sharded, make_adapter):
    live = open_live(
        tiny_llama_sharded,
        pt=make_adapter(tiny_llama_sharded, seed=1),
        sft=make_adapter(tiny_llama_sharded, seed=2),
    )
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    live.set_weights({"pt": 0.3, "sft": 0.7})
    first = {name: value.clone() for name, value in live.model.state_dict().items()}
    assert any(not torch.equal(first[name], before[name]) for name in before)
    for mixture in ({"pt": -3.0, "sft": 50.0}, {"sft": 1e-4}, {"pt": 0.3, "sft": 0.7}):
        live.set_weights(mixture)
    for name, value in live.model.state_dict().items():
        assert torch.equal(value, first[name]), name
    live.set_weights({"pt": 0, "sft": 0})
    for name, value in live.model.state_dict().items():
        bits = torch.int16
        assert torch.equal(value.view(bits), before[name].view(bits)), name


def test_wide_compute_holds_the_rounded_weights(tiny_llama, make_adapter):
    sft = make_adapter(tiny_llama, seed=2)
    narrow, wide = (open_live(tiny_llama, "bfloat16", compute, sft=sft) for compute in ("model", "float32"))
    for live in (narrow, wide):
        live.set_weights({"sft": 0.7})
    for name, value in wide.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, narrow.model.state_dict()[name].float()), name


def test_adapter_of_another_base_and_unknown_label(tiny_llama, tiny_qwen3, make_adapter, tmp_path):
    from tests.conftest import build_model

    wider = build_model("llama", tmp_path / "wider", intermediate_size=96)
    with pytest.raises(BadAdapterError, match=r"another base|is \[96, 64\]"):
        open_live(tiny_llama, sft=make_adapter(wider, seed=4))
    live = open_live(tiny_llama, sft=make_adapter(tiny_llama, seed=2))
    with pytest.raises(BadRecipeError, match="'stf'"):
        live.set_weights({"stf": 1})


def test_fan_in_fan_out_is_transposed(tiny_llama, make_adapter):
    """A factor marked as stored (in, out) adds the transposed delta: same numbers, other orientation."""
    from dataclasses import replace

    from engine.evaluate.live import mixed_tensor

    base = Checkpoint.open(tiny_llama)
    factor = Adapter.open(make_adapter(tiny_llama, seed=5)).match(base)[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    tensor = base.tensors[factor.tensor_name]
    cpu = torch.device("cpu")
    plain, nothing = (mixed_tensor(tensor, terms, torch.float32, cpu) for terms in ([(0.5, factor)], []))
    flipped = mixed_tensor(tensor, [(0.5, replace(factor, transposed=True))], torch.float32, cpu)
    torch.testing.assert_close(flipped - nothing, (plain - nothing).T, rtol=0, atol=1e-6)


def test_bf16_is_computed_wide_where_the_cpu_lacks_it(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name: x\nflags : fpu avx2 f16c\n")
    assert not cpu_has("bfloat16", info)
    info.write_text("model name: x\nflags : fpu avx2 avx512_bf16\n")
    assert cpu_has("bfloat16", info) and not cpu_has("float16", info)
    assert pick_compute("model", "bfloat16", torch.device("cpu")) == "bfloat16"
    assert pick_compute("auto", "bfloat16", torch.device("cuda")) == "bfloat16"
    assert pick_compute("auto", "float32", torch.device("cpu")) == "float32"


def test_layer_wise_weights_are_the_rounded_float64_sum(tiny_llama, make_adapter):
    """A number per tensor: every element within the verifier's bound of the float64 sum."""
    pt, sft = make_adapter(tiny_llama, seed=1), make_adapter(tiny_llama, seed=2, rank=4)
    live = open_live(tiny_llama, "bfloat16", pt=pt, sft=sft)
    rng = np.random.default_rng(0)
    names = sorted(live._places)
    weights = {
        label: {n: float(rng.choice([0.0, -0.5, 0.25, 1.5])) for n in names} for label in ("pt", "sft")
    }
    live.set_weights(weights)
    assert live.weights == weights
    base, factors = tensors_of(tiny_llama), {"pt": tensors_of(pt), "sft": tensors_of(sft)}
    state = live.model.state_dict()
    for name, w in base.items():
        exact, slack = w.copy(), np.abs(w)
        for label in ("pt", "sft"):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in factors[label]:
                a, b = factors[label][f"{key}.lora_A.weight"], factors[label][f"{key}.lora_B.weight"]
                exact += weights[label][name] * 2.0 * b @ a
                slack += abs(weights[label][name]) * 2.0 * np.abs(b) @ np.abs(a)
        e = 20 * 2.0**-24 * slack
        found = state[name].to(torch.float64).numpy()
        low, high = round_to(exact - e, torch.bfloat16), round_to(exact + e, torch.bfloat16)
        assert ((low <= found) & (found <= high)).all(), name
    live.set_weights({"pt": 0.3, "sft": dict.fromkeys(names, 0.7)})
    mixed = {name: value.clone() for name, value in live.model.state_dict().items()}
    live.set_weights({"pt": 0.3, "sft": 0.7})
    for name, value in live.model.state_dict().items():
        assert torch.equal(value, mixed[name]), name
    with pytest.raises(BadRecipeError, match=r"has no weight for"):
        live.set_weights({"pt": {names[0]: 1.0}})
    with pytest.raises(BadRecipeError, match="changes no nothing"):
        live.set_weights({"pt": {**weights["pt"], "nothing": 1.0}})
