"""Random checkpoints and adapters of a given size, for benchmarks: bf16 Llamas and rank-16 LoRA on every layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine.weights.tensorfile import encode_header

RANK, VOCABULARY = 16, 32_000
SHAPES = (  # layers, hidden, intermediate, heads
    (8, 768, 2048, 12),
    (16, 1024, 3072, 16),
    (24, 1024, 3072, 16),
    (22, 2048, 5632, 32),
    (24, 2048, 6144, 32),
    (40, 5120, 17408, 40),
)


def shape_of(parameters: float) -> tuple[int, int, int, int]:
    """The (layers, hidden, intermediate, heads) whose number of parameters is nearest."""

    def size(shape: tuple[int, int, int, int]) -> float:
        layers, hidden, middle, _ = shape
        return 2 * VOCABULARY * hidden + sum(r * c for r, c in linear_shapes(layers, hidden, middle).values())

    return min(SHAPES, key=lambda shape: abs(size(shape) - parameters))


def linear_shapes(layers: int, hidden: int, middle: int) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of every linear layer, by module name."""
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def make_base(
    folder: Path, layers: int, hidden: int, middle: int, heads: int, seed: int = 0, sparse: bool = False
) -> int:
    """Write a random bf16 Llama checkpoint (normal, std 0.02); returns its number of parameters.

    `sparse`: only the header is written, the weights are a hole in the file (all 0).
    """
    folder.mkdir()
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    tensors |= {f"{module}.weight": shape for module, shape in linear_shapes(layers, hidden, middle).items()}
    for i in range(layers):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        tensors[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    random = np.random.default_rng(seed)
    values = (random.standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32)
    pattern = ((values + 0x8000) >> 16).astype("<u2")
    count = 0
    with (folder / "model.safetensors").open("wb") as file:
        file.write(
            encode_header([(name, "BF16", shape) for name, shape in tensors.items()], {"format": "pt"})
        )
        for shape in tensors.values():
            left = int(np.prod(shape))
            count += left
            if sparse:
                file.truncate(file.seek(2 * left, 1))
                continue
            while left:
                start = int(random.integers(0, len(pattern) // 2))
                piece = pattern[start : start + min(left, len(pattern) // 2)]
                file.write(piece.tobytes())
                left -= len(piece)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": middle, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 4, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "dtype": "bfloat16", "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return count


def make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], seed: int) -> None:
    """Write a float32 PEFT adapter of rank 16 on all linear layers, B with std 0.02."""
    from safetensors.numpy import save_file

    random, tensors = np.random.default_rng(seed), {}
    for module, (rows, columns) in shapes.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((RANK, columns), np.float32) / 30
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((rows, RANK), np.float32) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "task_type": "CAUSAL_LM", "bias": "none",
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in shapes}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
