"""Tiny models and adapters that come out bit for bit the same everywhere: what the peers' goldens were made from.

    inputs(folder) writes base, a, b, c (bf16 Llamas of 3 layers, width 32) and the adapters pt, sft (rank 4, float32)

Values are sums of four 16-bit words of Philox (whose stream numpy guarantees), so nearly normal, rounded to
bf16 by their bits. `a`, `b` and `c` are `base` with a change of a tenth of a weight's size, in every tensor; `c`
has another vocabulary: without the first four tokens, the others in reverse, and eight of its own. Numpy alone, so
that it also runs in mergekit's environment.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, LAYERS, VOCABULARY, RANK, ALPHA = 32, 24, 3, 40, 4, 8
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = {f"model.layers.{layer}.{kind}": shape for layer in range(LAYERS) for kind, shape in LINEAR.items()}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    **{f"{module}.weight": shape for module, shape in MODULES.items()},
    **{f"model.layers.{layer}.{n}_layernorm.weight": (HIDDEN,) for layer in range(LAYERS)
       for n in ("input", "post_attention")},
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = {name: [f"t{i}" for i in range(VOCABULARY)] for name in ("base", "a", "b")} | {
    "c": [f"t{i}" for i in reversed(range(4, VOCABULARY))] + [f"n{i}" for i in range(8)]
}
Array = Any


def draw(name: str, shape: tuple[int, ...]) -> Array:
    """float32, mean 0, standard deviation 1, from -3.5 to 3.5, decided by the name."""
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], "<u8")
    count = int(np.prod(shape))
    words = np.asarray(np.random.Philox(key=key).random_raw(count), "<u8").view("<u2").reshape(count, 4)
    total = words.astype(np.int64).sum(axis=1) - 2 * 65535
    return (total / (65536 / 3**0.5)).astype(np.float32).reshape(shape)


def bf16_bits(values: Array) -> Array:
    """The bits of float32 values rounded to bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bits(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_safetensors(path: Path, tensors: dict[str, Array], dtype: str) -> None:
    """The format, by hand: 8 bytes of length, a JSON header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, value in tensors.items():
        end = position + value.nbytes
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(value.tobytes() for value in tensors.values())
    )


def model_bits(name: str) -> dict[str, Array]:
    """The bf16 tensors of `base`, or of `a` or `b`, which differ from it."""
    found = {}
    for tensor, shape in SHAPES.items():
        norm = len(shape) == 1
        base = from_bits(bf16_bits(draw(f"base {tensor}", shape) * np.float32(0.05) + np.float32(norm)))
        if shape[0] == VOCABULARY:  # the rows of this model's tokens; 0 for those that base does not have
            rows = [TOKENS["base"].index(token) if token in TOKENS["base"] else -1 for token in TOKENS[name]]
            base = np.concatenate([base, np.zeros((1, HIDDEN), np.float32)])[rows]
        if name != "base":
            base = base + draw(f"{name} {tensor}", base.shape) * np.float32(0.005)
        found[tensor] = bf16_bits(base)
    return found


def write_tokenizer(folder: Path, tokens: list[str]) -> None:
    """A tokenizer of whole words; t39, which every model has, stands for what it does not know."""
    model = {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "t39"}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "unk_token": "t39"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def inputs(folder: Path) -> Path:
    """Write everything into `folder`; returns it."""
    for name, tokens in TOKENS.items():
        (folder / name).mkdir(parents=True)
        write_safetensors(folder / name / "model.safetensors", model_bits(name), "BF16")
        (folder / name / "config.json").write_text(
            json.dumps({**CONFIG, "vocab_size": len(tokens)}, indent=1)
        )
        write_tokenizer(folder / name, tokens)
    for name in ("pt", "sft"):
        tensors = {}
        for module, (rows, columns) in MODULES.items():
            prefix = f"base_model.model.{module}"
            a = draw(f"{name} {module} A", (RANK, columns)) * np.float32(0.1)
            tensors[f"{prefix}.lora_A.weight"] = a
            tensors[f"{prefix}.lora_B.weight"] = draw(f"{name} {module} B", (rows, RANK)) * np.float32(0.02)
        (folder / name).mkdir()
        write_safetensors(folder / name / "adapter_model.safetensors", tensors, "F32")
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
            "lora_dropout": 0.0, "use_rslora": False, "fan_in_fan_out": False, "inference_mode": True,
            "base_model_name_or_path": None,
            "target_modules": sorted({module.rsplit(".", 1)[1] for module in MODULES}),
        }  # fmt: skip
        (folder / name / "adapter_config.json").write_text(json.dumps(settings, indent=1))
    return folder


def digest(folder: Path) -> str:
    """One SHA-256 over all tensor files: the goldens say which inputs they were made from."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        found.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()
