"""Every LoRA variant, made by PEFT on a tiny random model and trained a few steps, with PEFT's own merge beside it.

`variant(name, folder)` (as fixture: `variant`) makes the base (bf16 on disk), the adapter (float32, saved by PEFT)
and `merged`: the float32 result of `merge_and_unload` on the base read as float32, by tensor name. A tied
base is untied before the adapter is loaded, so that a change of one side is a change of that side only, as in
PEFT's own forward pass (PEFT's merge of a tied tensor changes both).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.conftest import LINEAR_LAYERS, build_model

ATTENTION = ["q_proj", "v_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class VariantCase:
    """One variant. `merged` holds every tensor of PEFT's merged model (float32) by the name the base has on disk.

    Where `untied`, the base ties its embeddings (no lm_head.weight) and `merged` has both: different ones for
    the variants called tied_..., equal ones for both_...  Where `rows` is not None the vocabulary
    was resized to that many rows.
    """

    name: str
    base: Path
    adapter: Path
    merged: dict[str, npt.NDArray[np.float32]]
    untied: bool = False
    rows: int | None = None


@dataclass(frozen=True)
class Variant:
    """How one is made: the base, the LoraConfig fields, and what is done to the model before it is wrapped."""

    base: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None


VARIANTS = {
    "plain": Variant(),
    "patterns": Variant(
        config={
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"down_proj": 3, "^model.layers.0.self_attn.v_proj": 5},
        }
    ),
    "rslora": Variant(config={"use_rslora": True, "rank_pattern": {"o_proj": 3}}),
    "bias_all": Variant("llama_bias", {"bias": "all", "target_modules": ATTENTION}),
    "bias_lora_only": Variant("llama_bias", {"bias": "lora_only", "target_modules": ATTENTION}),
    "lora_bias": Variant("llama_bias", {"lora_bias": True}),
    "bias_twice": Variant("llama_bias", {"lora_bias": True, "bias": "lora_only", "target_modules": ATTENTION}),
    "modules_to_save": Variant(config={"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "embedding": Variant(config={"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "resized": Variant(config={"target_modules": ATTENTION}, rows=392),
    "resized_saved": Variant(config={"modules_to_save": ["embed_tokens", "lm_head"]}, rows=392),
    "resized_embedding": Variant(config={"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, rows=392),
    "token_indices": Variant(config={"trainable_token_indices": [0, 5, 7, 383]}),
    "tied_lora_head": Variant("qwen3", {"target_modules": ["lm_head", "q_proj"]}),
    "tied_lora_embedding": Variant("qwen3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied_saved_head": Variant("qwen3", {"modules_to_save": ["lm_head"]}),
    "tied_saved_embedding": Variant("qwen3", {"modules_to_save": ["embed_tokens"]}),
    "tied_lora_apart": Variant("qwen3", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "both_tokens": Variant("qwen3", {"trainable_token_indices": [1, 9, 200]}),
    "both_lora": Variant("qwen3", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "both_saved": Variant("qwen3", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "both_resized": Variant("qwen3", {"target_modules": ATTENTION}, rows=392),
    "conv1d": Variant("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "conv1d_mixed": Variant("gpt2", {"target_modules": [*CONV1D, "lm_head"]}),
    "dora": Variant(config={"use_dora": True}),
    "dora_rslora": Variant(config={"use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 5}}),
    "dora_conv1d": Variant("gpt2", {"target_modules": CONV1D, "use_dora": True, "fan_in_fan_out": True}),
    "dora_embedding": Variant(config={"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
    "experts": Variant("moe", {"target_modules": ["q_proj"], "target_parameters": EXPERT_PARAMETERS}),
    "router": Variant("moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "experts_patterns": Variant(
        "moe",
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": EXPERT_PARAMETERS,
            "rank_pattern": {"experts.down_proj": 3, "v_proj": 2},
            "alpha_pattern": {"gate_up_proj": 5, "^model.layers.1.mlp.experts.down_proj": 7},
        },
    ),
    "experts_one": Variant(
        "moe", {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True}
    ),
    "experts_transposed": Variant(
        "gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERT_PARAMETERS}
    ),
    "experts_mixtral": Variant("mixtral", {"target_modules": [], "target_parameters": EXPERT_PARAMETERS}),
    "experts_apart": Variant("moe_apart", {"target_modules": [], "target_parameters": EXPERT_PARAMETERS}),
}  # fmt: skip
VARIANT_NAMES = tuple(VARIANTS)

_CACHE: dict[str, VariantCase] = {}


def variant(name: str, folder: Path) -> VariantCase:
    """The case of that name, made below `folder` the first time and then kept for the session: do not change it."""
    if name not in _CACHE:
        _CACHE[name] = _make(name, VARIANTS[name], folder)
    return _CACHE[name]


def _make(name: str, made: Variant, folder: Path) -> VariantCase:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    base, adapter = folder / f"base-{made.base}", folder / f"adapter-{name}"
    if not base.exists():
        _BASES[made.base](base)
    settings: dict[str, Any] = {"target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM", **made.config}
    torch.manual_seed(sum(name.encode()))
    model = get_peft_model(_load(base, made.rows), LoraConfig(r=4, lora_alpha=6, **settings))
    _train(model)
    model.save_pretrained(adapter)

    plain = _load(base, made.rows)
    config = LoraConfig.from_pretrained(adapter)
    if name == "both_lora":  # PEFT would add the delta twice to the one tensor: once for each side
        config.ensure_weight_tying, config.target_modules = False, {*settings["target_modules"], "lm_head"}
    if name.startswith("tied") or name == "both_lora":
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    merged = PeftModel.from_pretrained(plain, adapter, config=config).merge_and_unload()
    state = _state(merged, made.base, folder / name)
    return VariantCase(name, base, adapter, state, made.base == "qwen3", made.rows)


def _load(base: Path, rows: int | None) -> Any:
    """The base in float32, with a vocabulary of `rows` (the new rows as transformers makes them)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    return model


def _train(model: Any, steps: int = 4) -> None:
    """A few steps of AdamW on random tokens; every trainable tensor must have moved (B off zero)."""
    import torch

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    for _ in range(steps):
        tokens = torch.randint(0, model.config.vocab_size, (4, 96))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in trained.items():
        assert not torch.equal(p, before[name]) and p.any(), f"{name} did not move"


def _state(model: Any, base: str, folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Float32 tensors by their names on disk (where the experts lie apart there: as transformers saves them)."""
    if base not in ("moe_apart", "mixtral"):
        return {name: tensor.float().numpy().copy() for name, tensor in model.state_dict().items()}
    from safetensors.numpy import load_file

    model.save_pretrained(folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


def _llama_bias(folder: Path) -> None:
    """A Llama whose linear layers have biases that are not zero."""
    import torch
    from transformers import AutoModelForCausalLM

    build_model("llama", folder, attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            p.data = torch.randn(p.shape).to(p.dtype) * 0.1
    model.save_pretrained(folder)


def _gpt2(folder: Path) -> None:
    """A GPT-2: linear layers are Conv1D, stored (in, out), with biases; embeddings tied."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(vocab_size=384, n_positions=128, n_embd=64, n_layer=2, n_head=4,
                        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)  # fmt: skip
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)


def _moe_model() -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(4)
    config = Qwen3MoeConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16)


def _moe_apart(folder: Path) -> None:
    """A Qwen3-MoE as transformers saves it: each expert's gate, up and down a tensor of its own."""
    _moe_model().save_pretrained(folder)


def _mixtral(folder: Path) -> None:
    """A Mixtral: its experts lie apart, too, as block_sparse_moe.experts.0.w1, w2 and w3."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(6)
    config = MixtralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _moe(folder: Path) -> None:
    """The same with the experts fused on disk: gate_up_proj (experts, 2 * width, in), down_proj."""
    from safetensors.torch import save_file

    model = _moe_model()
    model.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def _gpt_oss(folder: Path) -> None:
    """A GPT-OSS: fused experts stored (experts, in, out), with biases; down_proj square, as in the 20B."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(5)
    config = GptOssConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config._experts_implementation = "eager"
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _llama(folder: Path) -> None:
    build_model("llama", folder)


def _qwen3(folder: Path) -> None:
    build_model("qwen3", folder, seed=1)


_BASES: dict[str, Callable[[Path], None]] = {
    "llama": _llama, "llama_bias": _llama_bias, "qwen3": _qwen3, "gpt2": _gpt2, "gpt_oss": _gpt_oss,
    "moe": _moe, "moe_apart": _moe_apart, "mixtral": _mixtral,
}  # fmt: skip
