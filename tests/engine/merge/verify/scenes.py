"""Tiny models, adapters and merges written in plain torch: independent of the code that merges or verifies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.jobs.events import EventWriter
from engine.merge.verify import Verdict, verify_merge

HIDDEN, INNER, LAYERS, VOCAB, RANK = 64, 96, 4, 80, 8
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in SHAPES]
ASKED = {"pt": 0.3, "sft": 0.7}
Tensors = dict[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, in), B (out, r), float32


def make_base(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "model.norm.weight": normal(HIDDEN) + 1}
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = normal(HIDDEN) + 1
        for kind, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{kind}.weight"] = normal(*shape)
    tensors["lm_head.weight"] = normal(VOCAB, HIDDEN)
    return tensors


def save_model(folder: Path, tensors: Tensors, shards: int = 1, **config: Any) -> Path:
    """A model folder with config and tokenizer; with `shards` > 1 several files and an index."""
    folder.mkdir(parents=True)
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
    dtype = names[tensors["model.embed_tokens.weight"].dtype]
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": dtype, **config})
    )
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclass
class Lora:
    """An adapter with its factors; `deltas` is s * B @ A in float64, from the definition."""

    folder: Path
    pairs: dict[str, Pair]
    scales: dict[str, float]

    def delta(self, module: str) -> torch.Tensor:
        a, b = self.pairs[module]
        return self.scales[module] * (b.double() @ a.double())


def make_lora(
    folder: Path,
    seed: int,
    b_std: float = 0.02,
    modules: list[str] = MODULES,
    rank: int = RANK,
    alpha: float = 16,
    dtype: torch.dtype = torch.float32,
    pairs: dict[str, Pair] | None = None,
    scales: dict[str, float] | None = None,
    ranks: dict[str, int] | None = None,
    **config: Any,
) -> Lora:
    """Write a PEFT folder; A as PEFT starts it (uniform within 1/sqrt(in)), B normal. `ranks` differ by module."""
    generator = torch.Generator().manual_seed(seed)
    if pairs is None:
        pairs = {}
        for module in modules:
            out, inside = SHAPES[module.split(".", 3)[3]]
            r = (ranks or {}).get(module, rank)
            a = (torch.rand((r, inside), generator=generator) * 2 - 1) / inside**0.5
            pairs[module] = (a.to(dtype), (torch.randn((out, r), generator=generator) * b_std).to(dtype))
    folder.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return Lora(folder, pairs, scales or dict.fromkeys(pairs, alpha / rank))


@dataclass
class Scene:
    """A base and two adapters, right merges of them, and the verifier's answer on any merge."""

    root: Path
    base: Tensors
    loras: dict[str, Lora]
    base_folder: Path
    made: list[Path] = field(default_factory=list)

    def total(self, module: str, weights: dict[str, float] = ASKED) -> torch.Tensor:
        """sum of weight * delta of one module, float64."""
        found = torch.zeros(self.base[f"{module}.weight"].shape, dtype=torch.float64)
        for label, lora in self.loras.items():
            if module in lora.pairs:
                found += weights[label] * lora.delta(module)
        return found

    def merge(
        self,
        weights: dict[str, float] = ASKED,
        rule: Callable[[torch.Tensor, str], torch.Tensor] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensors:
        """All tensors of a merge; `rule(base tensor, module)` replaces the right sum (float64, rounded once)."""
        merged = {name: tensor.to(dtype, copy=True) for name, tensor in self.base.items()}
        for module in {module for lora in self.loras.values() for module in lora.pairs}:
            name = f"{module}.weight"
            if rule is None:
                merged[name] = (self.base[name].double() + self.total(module, weights)).to(dtype)
            else:
                merged[name] = rule(self.base[name], module).to(dtype)
        return merged

    def save(self, tensors: Tensors, **settings: Any) -> Path:
        folder = save_model(self.root / f"merge-{len(self.made)}", tensors, **settings)
        self.made.append(folder)
        return folder

    def verify(
        self, merged: Tensors | Path, weights: dict[str, float] | None = ASKED, **settings: Any
    ) -> Verdict:
        folder = merged if isinstance(merged, Path) else self.save(merged)
        adapters = {label: lora.folder for label, lora in self.loras.items()}
        return verify_merge(folder, self.base_folder, adapters, weights, EventWriter(), **settings)


MakeScene = Callable[..., Scene]
