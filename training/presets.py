"""Published and shipped training recipes by name: the values a config may start from. Used by `training.config`.

`paper-*`: arXiv 2601.18350, section on training: rank 16, alpha 16, all linear layers, dropout 0.07, weight decay
0.03, AdamW, accumulation 64, cutoff 2048 with packing, bf16; PT 4 epochs, SFT 2 epochs with masked history and the
template qwen3_nothink. Learning rate and warm-up are LLaMA-Factory's usual ones: the paper's own scripts do not fix
them. `demo-*`: what the shipped adapters were trained with.
"""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "rank": 16,
    "alpha": 16,
    "dropout": 0.07,
    "weight_decay": 0.03,
    "accumulation": 64,
    "cutoff": 2048,
    "learning_rate": 1e-4,
    "warmup": 0.1,
    "dtype": "bfloat16",
    "template": "qwen3_nothink",
    "gradient_checkpointing": True,
}
_DEMO: dict[str, Any] = {
    "on_leak": "drop",  # five pt rows share a boilerplate sentence on inheritance with one test row
    "rank": 8,
    "alpha": 16,
    "dropout": 0.0,
    "learning_rate": 5e-4,
    "accumulation": 2,
    "cutoff": 512,
    "held_out": 16,
    "eval_every": 100,
    "save_every": 25,
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper-pt": {"kind": "pt", "epochs": 4.0, **_PAPER},
    "paper-sft": {"kind": "sft", "epochs": 2.0, "mask_history": True, **_PAPER},
    "demo-pt": {"kind": "pt", **_DEMO},
    "demo-sft": {"kind": "sft", **_DEMO},
}
