"""What a GGUF says about a model's shape: from config.json to llama.cpp's hyperparameters.

Two architectures are written: Llama and Qwen3 (dense). Everything llama.cpp would compute differently from the
checkpoint (another activation, partial rotation, sliding windows, an unknown RoPE scaling) is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import BadModelError
from engine.weights import Checkpoint
from engine.weights.tensorfile import Float32Array

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency, and a scaling of kind "none", "linear", "yarn" or "llama3"."""

    theta: float
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def frequency_factors(self, head_dim: int) -> Float32Array:
        """Llama 3's divisors of the rotary frequencies, shape (head_dim / 2,), float32.

        With wavelength L = 2 pi theta^(2i/d): 1 below original/high, `factor` above original/low, and between
        them 1 / ((1 - s) / factor + s) with s = (original / L - low) / (high - low). As transformers'
        `_compute_llama3_parameters`; llama.cpp reads it as the tensor `rope_freqs.weight`.
        """
        wavelength = 2 * math.pi * self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        ratio = self.original_context / wavelength
        smooth = (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        middle = 1.0 / ((1.0 - smooth) / self.factor + smooth)
        factors = np.where(
            ratio > self.high_freq_factor, 1.0, np.where(ratio < self.low_freq_factor, self.factor, middle)
        )
        return factors.astype(np.float32)


@dataclass(frozen=True)
class Architecture:
    """The hyperparameters of one model, in llama.cpp's words. `name` is "llama" or "qwen3"."""

    name: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocabulary: int
    norm_eps: float
    rope: Rope
    tied: bool

    @property
    def permutes(self) -> bool:
        """Whether rows of q and k are reordered: llama.cpp rotates neighbours in Llama, halves in Qwen3."""
        return self.name == "llama"

    @classmethod
    def of(cls, model: Checkpoint) -> Architecture:
        """Read and check config.json. Raises BadModelError naming the key for what cannot be written."""
        path = model.folder / "config.json"
        config = model.config
        if model.architecture not in SUPPORTED:
            raise BadModelError(
                f"{path}: architecture {model.architecture or 'not given'} cannot be written as GGUF",
                f"supported are {', '.join(sorted(SUPPORTED))}",
            )
        heads = _integer(model, "num_attention_heads")
        hidden = _integer(model, "hidden_size")
        kv_heads = _integer(model, "num_key_value_heads", heads)
        head_dim = _integer(model, "head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise BadModelError(
                f"{path}: {heads} attention heads, {kv_heads} key/value heads and head_dim {head_dim} do not fit"
            )
        _refuse(model, "hidden_act", config.get("hidden_act", "silu") != "silu", "only silu is written")
        _refuse(
            model, "use_sliding_window", bool(config.get("use_sliding_window")), "llama.cpp has none here"
        )
        return cls(
            name=SUPPORTED[model.architecture],
            layers=_integer(model, "num_hidden_layers"),
            hidden=hidden,
            feed_forward=_integer(model, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=_integer(model, "max_position_embeddings"),
            vocabulary=_integer(model, "vocab_size"),
            norm_eps=_number(model, "rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope=_rope(model),
            tied=model.tied,
        )

    def write(self, writer: Any) -> None:
        """Add the keys to a gguf.GGUFWriter of this architecture."""
        import gguf

        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(self.norm_eps)
        writer.add_vocab_size(self.vocabulary)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(self.rope.theta)
        if self.rope.scaling in ("linear", "yarn"):
            kind = gguf.RopeScalingType.LINEAR if self.rope.scaling == "linear" else gguf.RopeScalingType.YARN
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(self.rope.factor)
        if self.rope.scaling == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self.rope.original_context)
            writer.add_rope_scaling_yarn_beta_fast(self.rope.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(self.rope.beta_slow)


def _rope(model: Checkpoint) -> Rope:
    """RoPE from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    config = model.config
    raw = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise BadModelError(f"{model.folder / 'config.json'}: rope_parameters should be an object")
    theta = _number(model, "rope_theta", raw.get("rope_theta", config.get("rope_theta", 10000.0)))
    partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    _refuse(model, "partial_rotary_factor", partial not in (None, 1, 1.0), "only full rotation is written")
    kind = str(raw.get("rope_type", raw.get("type", "default")))
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "yarn", "llama3"):
        raise BadModelError(
            f"{model.folder / 'config.json'}: RoPE scaling {kind!r} cannot be written as GGUF",
            "supported are default, linear, yarn and llama3",
        )
    factor = _number(model, "rope factor", raw.get("factor"))
    if kind == "linear":
        return Rope(theta, "linear", factor)
    original = raw.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if original is None and kind == "yarn":
        original = config.get("max_position_embeddings")
    context = int(_number(model, "original_max_position_embeddings", original))
    if kind == "yarn":
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            _refuse(model, key, raw.get(key) is not None, "llama.cpp computes YaRN's own 0.1 ln(factor) + 1")
        return Rope(
            theta,
            "yarn",
            factor,
            context,
            beta_fast=_number(model, "beta_fast", raw.get("beta_fast") or 32.0),
            beta_slow=_number(model, "beta_slow", raw.get("beta_slow") or 1.0),
        )
    low = _number(model, "low_freq_factor", raw.get("low_freq_factor"))
    high = _number(model, "high_freq_factor", raw.get("high_freq_factor"))
    _refuse(model, "high_freq_factor", high <= low, "it must be above low_freq_factor")
    return Rope(theta, "llama3", factor, context, low, high)


def _refuse(model: Checkpoint, key: str, wrong: bool, why: str) -> None:
    if wrong:
        value = model.config.get(key, "set in rope_parameters")
        raise BadModelError(f"{model.folder / 'config.json'}: {key} is {value!r}: {why}")


def _integer(model: Checkpoint, key: str, default: int | None = None) -> int:
    value = model.config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise BadModelError(
            f"{model.folder / 'config.json'}: {key} should be a positive integer, is {value!r}"
        )
    return value


def _number(model: Checkpoint, key: str, value: Any) -> float:
    good = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
    if not good:
        raise BadModelError(
            f"{model.folder / 'config.json'}: {key} should be a positive number, is {value!r}"
        )
    return float(value)
