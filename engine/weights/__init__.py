"""Bytes on disk: safetensors headers, model folders, PEFT adapters, hashes. No torch, no transformers.

`tensorfile` reads headers and row blocks, `checkpoint` a model folder, `adapter` a PEFT LoRA folder, whose
`changes` are what it does to each base tensor; `discover` finds both below a folder.
"""

from engine.weights.adapter import Adapter
from engine.weights.changes import (
    Addition,
    Change,
    Dora,
    ExpertFactor,
    Experts,
    LoraFactor,
    Replacement,
    Sum,
    TokenRows,
)
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorFile, TensorInfo

__all__ = [
    "Adapter",
    "Addition",
    "Change",
    "Checkpoint",
    "Dora",
    "ExpertFactor",
    "Experts",
    "LoraFactor",
    "Replacement",
    "Sum",
    "TensorFile",
    "TensorInfo",
    "TokenRows",
]
