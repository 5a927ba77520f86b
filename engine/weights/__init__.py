"""Bytes on disk: safetensors headers, model folders, PEFT adapters, hashes. No torch, no transformers.

`tensorfile` reads headers and row blocks, `checkpoint` a model folder, `adapter` a PEFT LoRA folder,
`discover` finds both below a folder.
"""

from engine.weights.adapter import Adapter, LoraFactor
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorFile, TensorInfo

__all__ = ["Adapter", "Checkpoint", "LoraFactor", "TensorFile", "TensorInfo"]
