"""The names of an adapter's tensors, in the dialects that trainers write, sorted by what they are.

    base_model.model.MODULE.lora_A.weight                    PEFT, and so TRL, LLaMA-Factory, axolotl, torchtune
    base_model.model.MODULE.lora_A.default.weight            saved from a raw state dict
    _orig_mod.base_model.model.MODULE...                     torch.compile; also _orig_mod inside (regional compile)
    module. / _fsdp_wrapped_module. / _checkpoint_wrapped_module.    DDP, FSDP, activation checkpointing
    MODULE.lora_embedding_A, .lora_magnitude_vector          embeddings, DoRA (with or without .weight)
    MODULE.base_layer.lora_A.weight                          the inner of two PEFT ParamWrappers (fused experts)
    MODULE.base_layer.weight, .bias                          the base's own tensor, saved beside its LoRA
    MODULE.weight, MODULE.modules_to_save.default.weight     modules_to_save, resized embeddings, trained biases

Names that belong to another method, or to torchtune's and mlx's own layouts, are refused with the method's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import BadAdapterError
from engine.weights.tensorfile import TensorFile, TensorInfo

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_PREFIX = re.compile(r"^(?:module\.)*(?:base_model\.model\.)?")
_LORA = re.compile(r"^(?P<module>.+?)\.lora_(?P<half>[AB])(?:\.(?P<name>[^.]+))?\.(?P<leaf>weight|bias)$")
_LORA_BARE = re.compile(r"^(?P<module>.+?)\.lora_(?P<half>[AB])(?:\.(?P<name>default))?$")
_EMBEDDING = re.compile(
    r"^(?P<module>.+?)\.lora_embedding_(?P<half>[AB])(?:\.(?P<name>[^.]+?))??(?:\.weight)?$"
)
_MAGNITUDE = re.compile(r"^(?P<module>.+?)\.lora_magnitude_vector(?:\.(?P<name>[^.]+?))??(?:\.weight)?$")
_TOKENS = re.compile(r"^(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(?:\.(?P<name>[^.]+))?$")
_SAVED = re.compile(r"^(?P<module>.+?)\.modules_to_save(?:\.(?P<name>[^.]+))??\.(?P<leaf>weight|bias)$")
_BASE_LAYER = re.compile(r"^(?P<module>.+?)(?:\.base_layer)+\.(?P<leaf>[^.]+)$")
_ORIGINAL = re.compile(r"\.original_module\.|\.token_adapter\.(?:base_layer|trainable_tokens_original)\b")
_OTHER_METHODS = (
    (re.compile(r"\.lora_E\b|\.ranknum\b"), "AdaLoRA"),
    (re.compile(r"\.hada_w"), "LoHa"),
    (re.compile(r"\.lokr_w"), "LoKr"),
    (re.compile(r"\.oft_[rRsS]\b|\.boft_"), "OFT"),
    (re.compile(r"vera_lambda|vera_[AB]\b"), "VeRA"),
    (re.compile(r"\.lora_diag\b"), "KaSA"),
    (re.compile(r"\.ia3_l\b"), "IA3"),
    (re.compile(r"\.lora_(?:up|down)\."), "kohya's LoRA layout"),
    (re.compile(r"\.lora_[ab](?:\.weight)?$|\.magnitude$"), "torchtune's own or mlx's key names"),
    (re.compile(r"(?:^|\.)v_head\."), "a value head (v_head)"),
    (re.compile(r"prompt_embeddings|prompt_encoder"), "prompt tuning"),
)  # fmt: skip


@dataclass
class Pair:
    """One LoRA layer's tensors. `inner` counts the `base_layer` between the module and its factors."""

    module: str
    inner: int = 0
    embedding: bool | None = None  # factors named lora_embedding_*: the base stores (vocabulary, width)
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None  # lora_bias

    def whole(self) -> tuple[TensorInfo, TensorInfo]:
        """A and B. Raises BadAdapterError when one is missing, they do not multiply, or what is beside does not fit."""
        one = self.a or self.b or self.magnitude or self.bias
        if self.a is None or self.b is None:
            had = "lora_A" if self.a else "lora_B" if self.b else "lora_magnitude_vector or lora_B.bias"
            raise BadAdapterError(
                f"{one.file if one else ''}: {self.module} has only {had}", "A and B come in pairs"
            )
        for info in (self.a, self.b):
            if len(info.shape) != 2 or not info.is_float or 0 in info.shape:
                raise BadAdapterError(
                    f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}, expected a float matrix",
                    "an empty one was saved from DeepSpeed ZeRO-3 or FSDP without gathering: save it again"
                    if 0 in info.shape
                    else "",
                )
        for extra in (self.magnitude, self.bias):
            if extra is not None and (not extra.is_float or extra.elements != self.b.shape[0]):
                raise BadAdapterError(
                    f"{extra.file}: {extra.name} is {extra.dtype} {list(extra.shape)}, and {self.module} has "
                    f"{self.b.shape[0]} outputs"
                )
        if self.a.shape[0] != self.b.shape[1]:
            raise BadAdapterError(
                f"{self.a.file}: {self.module} has A {list(self.a.shape)} and B {list(self.b.shape)}: "
                "their ranks differ"
            )
        return self.a, self.b


@dataclass
class Parts:
    """An adapter's tensors by what they are; module and tensor names without any trainer's prefix."""

    pairs: dict[tuple[str, int], Pair] = field(default_factory=dict)
    saved: dict[str, TensorInfo] = field(default_factory=dict)  # "lm_head.weight", "...q_proj.bias"
    base_layers: dict[str, TensorInfo] = field(default_factory=dict)  # saved beside a LoRA of the same layer
    token_rows: dict[str, TensorInfo] = field(default_factory=dict)  # by module


def sort_tensors(file: TensorFile) -> Parts:
    """Every tensor of the file, put where it belongs.

    Raises BadAdapterError for a key of another method (named), for two keys that mean the same, and for
    tensors of several adapters in one file.
    """
    parts, names = Parts(), set[str]()
    copies: dict[str, TensorInfo] = {}
    for key, info in file.tensors.items():
        name = module_path(key)
        for pattern, method in _OTHER_METHODS:
            if pattern.search("." + name):
                raise BadAdapterError(
                    f"{file.path}: key {key} belongs to {method}, which is not merged here",
                    "merge it with the tool that made it, or convert it to PEFT's LoRA layout",
                )
        if _ORIGINAL.search(name):
            continue  # the untouched copy that PEFT keeps of a saved module
        if found := _LORA.match(name) or _LORA_BARE.match(name):
            leaf = found.groupdict().get("leaf", "weight")
            if leaf == "bias" and found["half"] == "A":
                raise BadAdapterError(f"{file.path}: key {key} is a bias of A, which LoRA does not have")
            slot = "bias" if leaf == "bias" else found["half"].lower()
            _put(file.path, parts, found["module"], slot, info, embedding=None if slot == "bias" else False)
        elif found := _EMBEDDING.match(name):
            _put(file.path, parts, found["module"], found["half"].lower(), info, embedding=True)
        elif found := _MAGNITUDE.match(name):
            _put(file.path, parts, found["module"], "magnitude", info, embedding=None)
        elif found := _TOKENS.match(name):
            _once(file.path, parts.token_rows, found["module"], info)
        elif found := _SAVED.match(name):
            _once(file.path, copies, f"{found['module']}.{found['leaf']}", info)
        elif found := _BASE_LAYER.match(name):
            _once(file.path, parts.base_layers, f"{found['module']}.{found['leaf']}", info)
            continue
        else:
            _once(file.path, parts.saved, name, info)
            continue
        names |= {found["name"] or "default"}
    if len(names) > 1:
        raise BadAdapterError(
            f"{file.path} holds several adapters: {', '.join(sorted(names))}",
            "save each one in its own folder",
        )
    for name, info in copies.items():
        parts.saved.setdefault(name, info)  # where both are there PEFT loads MODULE.weight
    return parts


def module_path(key: str) -> str:
    """The key without the wrappers and prefixes of trainers."""
    return _PREFIX.sub("", _WRAPPERS.sub("", key), count=1)


def _put(path: Path, parts: Parts, module: str, slot: str, info: TensorInfo, embedding: bool | None) -> None:
    inner = 0
    while module.endswith(".base_layer"):
        module, inner = module.removesuffix(".base_layer"), inner + 1
    pair = parts.pairs.setdefault((module, inner), Pair(module, inner))
    if getattr(pair, slot) is not None:
        raise BadAdapterError(f"{path}: two tensors for lora_{slot.upper()} of {module}: one is {info.name}")
    setattr(pair, slot, info)
    if embedding is not None:
        if pair.embedding is not None and pair.embedding != embedding:
            raise BadAdapterError(f"{path}: {module} has factors of a linear layer and of an embedding")
        pair.embedding = embedding


def _once(path: Path, places: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    if name in places:
        raise BadAdapterError(f"{path}: {places[name].name} and {info.name} are both {name}")
    places[name] = info
