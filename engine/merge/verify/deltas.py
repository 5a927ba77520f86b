"""Adapter folders as the verifier reads them: what each changes, by base tensor.

Written apart from engine/weights/adapter.py on purpose; only raw tensors are read through shared code. The keys of
an adapter file, after prefixes that tools put in front (base_model.model., module., _orig_mod.):

    M.lora_A.weight, M.lora_B.weight          (out, in) product of module M     M.lora_B.bias           its lora_bias
    M.lora_embedding_A, M.lora_embedding_B    transposed product of a table     M.lora_magnitude_vector its DoRA
    M.modules_to_save.weight, M.weight        a tensor stored whole             M.base_layer.weight     the same
    M.token_adapter.trainable_tokens_delta    some rows of a table, whole       M.original_module.*     not used
    M.base_layer.lora_A.weight, ...           fused experts: one level of base_layer for each further parameter

An adapter's own name may stand in between ("default").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.errors import BadAdapterError
from engine.merge.verify.bits import same_bytes
from engine.merge.verify.experts import expert_terms
from engine.merge.verify.lora_config import LoraConfig
from engine.merge.verify.rounding import FORMATS
from engine.merge.verify.terms import Delta, Term
from engine.merge.verify.whole import Bias, DoraDelta, Sum, Whole
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorFile, TensorInfo

WEIGHTS = "adapter_model.safetensors"
_PREFIXES = ("base_model.model.", "_orig_mod.", "module.")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_TEXT_MODELS = ("model.language_model.", "language_model.model.", "language_model.")
_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_SAVED = re.compile(
    r"(?P<module>.+?)(?P<how>\.modules_to_save|\.base_layer)?(?:\.default)?\.(?P<end>weight|bias)"
)
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = re.compile(r".*\.(?:c_attn|c_proj|c_fc|q_attn)")


@dataclass
class _Module:
    """Everything stored for one module, by part."""

    parts: dict[str, TensorInfo] = field(default_factory=dict)


def read_deltas(label: str, folder: Path, base: Checkpoint) -> dict[str, Term]:
    """What one PEFT LoRA folder changes, by base tensor name ("lm_head.weight" also where the base is tied).

    Raises:
        BadAdapterError: not a LoRA folder, a key or kind that is not known, keys that do not pair, a tensor the
            base does not have or of another shape.
    """
    config = LoraConfig.read(folder)
    file = TensorFile.open(_weights(folder))
    reader = _Reader(label, config, file, base)
    terms: dict[str, list[Term]] = {}
    for term in reader.terms():
        _check_shape(term, base)
        terms.setdefault(term.tensor, []).append(term)
    if not terms:
        raise BadAdapterError(f"{file.path} holds no LoRA factors")
    return {name: _joined(parts) for name, parts in terms.items()}


def _joined(parts: list[Term]) -> Term:
    """All that one adapter does to one tensor. Its changes add up, but for DoRA, whose norm is of the whole."""
    dora = next((part for part in parts if isinstance(part, DoraDelta)), None)
    if dora is not None and len(parts) > 1:
        raise BadAdapterError(
            f"{dora.where}: DoRA on {dora.tensor}, which the adapter also saves whole or changes otherwise",
            "DoRA on a layer that is also saved whole (a resized embedding) is not verified here",
        )
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    raise BadAdapterError(f"{folder / WEIGHTS} is missing", "an adapter folder has config and safetensors")


def reference(base: Checkpoint, name: str) -> TensorInfo | None:
    """The base's values for a tensor name: of lm_head in a tied base, those of the embedding."""
    if name not in base.tensors and name.endswith("lm_head.weight") and base.tied:
        return next((info for n, info in base.tensors.items() if is_embedding(n)), None)
    return base.tensors.get(name)


def is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))


def _check_shape(term: Term, base: Checkpoint) -> None:
    tensor = reference(base, term.tensor)
    if tensor is None:
        raise BadAdapterError(
            f"{term.where}: {term.tensor} is not a tensor of {base.folder}",
            "this adapter belongs to another base",
        )
    grown = len(term.shape) == 2 and term.shape[0] > tensor.shape[0] and _is_table(term.tensor)
    if term.shape != tensor.shape and not (grown and term.shape[1:] == tensor.shape[1:]):
        raise BadAdapterError(
            f"{term.where}: the delta of {term.tensor} is {list(term.shape)}, and the tensor in {base.folder} "
            f"is {list(tensor.shape)}",
            "this adapter belongs to another base",
        )


def _is_table(name: str) -> bool:
    return is_embedding(name) or name.endswith("lm_head.weight")


class _Reader:
    """One adapter file against its base."""

    def __init__(self, label: str, config: LoraConfig, file: TensorFile, base: Checkpoint) -> None:
        self.label, self.config, self.file, self.base = label, config, file, base
        self.modules: dict[str, _Module] = {}
        for key, info in file.tensors.items():
            module, part = self._split(key)
            if part is None:
                continue
            if not info.is_float or info.dtype not in FORMATS:
                raise BadAdapterError(
                    f"{file.path}: {key} is {info.dtype}, expected one of {', '.join(FORMATS)}"
                )
            parts = self.modules.setdefault(module, _Module()).parts
            if part in parts:
                raise BadAdapterError(f"{file.path}: two {part} for {module}", "remove one of them")
            parts[part] = info

    def _split(self, key: str) -> tuple[str, str | None]:
        """("model.layers.0.mlp.up_proj", "lora_A") from a key; the part is None for what is not used."""
        name, before = _WRAPPERS.sub("", key), ""
        while name != before:
            before = name
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
        if ".original_module." in name:
            return name, None
        if found := _LORA.fullmatch(name):
            end = "_bias" if found["end"] == ".bias" else ""
            if not end or found["part"] == "lora_B":
                return found["module"], found["part"] + end
        elif found := _TOKENS.fullmatch(name):
            return found["module"], "tokens"
        elif "lora_" not in name and (found := _SAVED.fullmatch(name)):
            how = {".modules_to_save": "saved", ".base_layer": "base", None: "plain"}[found["how"]]
            return found["module"], f"{how}.{found['end']}"
        raise BadAdapterError(
            f"{self.file.path}: {key} is not lora_A or lora_B of a layer, nor a tensor saved with the adapter",
            "what it changes is not known",
        )

    def _tensor(self, module: str, end: str = "weight") -> str:
        """The base tensor of a module; tools differ in whether the model's own prefix stands in front."""
        names = [f"{module}.{end}", f"model.{module}.{end}", f"{module.removeprefix('model.')}.{end}"]
        names += [f"transformer.{module}.{end}", f"{module.removeprefix('transformer.')}.{end}"]
        for prefix in _TEXT_MODELS:  # vision models hold a text model, under names that changed over time
            bare = module.removeprefix(prefix)
            names += [f"{bare}.{end}", f"model.{bare}.{end}"] if bare != module else []
            names += [f"{prefix}{module.removeprefix('model.')}.{end}"]
        return next((name for name in names if reference(self.base, name) is not None), names[0])

    def terms(self) -> Iterator[Term]:
        experts: dict[str, list[tuple[int, TensorInfo, TensorInfo]]] = {}
        for module, held in self.modules.items():
            parts = held.parts
            bare = module.removesuffix(".base_layer")
            while bare.endswith(".base_layer"):
                bare = bare.removesuffix(".base_layer")
            if "lora_A" in parts and "lora_B" in parts and reference(self.base, self._tensor(bare)) is None:
                depth = module.count(".base_layer")
                experts.setdefault(bare, []).append((depth, parts["lora_A"], parts["lora_B"]))
                continue
            yield from self._lora(module, parts)
            yield from self._whole(module, parts)
        for module, pairs in experts.items():
            yield from expert_terms(self.label, self.config, self.base, self.file.path, module, pairs)

    def _lora(self, module: str, parts: dict[str, TensorInfo]) -> Iterator[Term]:
        kinds = [kind for kind in ("lora", "lora_embedding") if any(p in parts for p in _pair(kind))]
        for kind in kinds:
            a, b = (parts.get(name) for name in _pair(kind))
            if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
                raise BadAdapterError(
                    f"{self.file.path}: A and B of {module} do not belong together "
                    f"(A {list(a.shape) if a else 'missing'}, B {list(b.shape) if b else 'missing'})"
                )
            tensor = self._tensor(module)
            transposed = kind == "lora_embedding" or self._transposed(tensor, module, a, b)
            delta = Delta(self.label, tensor, a, b, self.config.scale(module, a.shape[0]), transposed)
            magnitude = parts.get("lora_magnitude_vector")
            if bool(self.config.values.get("use_dora")) != (magnitude is not None):
                raise BadAdapterError(
                    f"{self.file.path}: use_dora is {bool(self.config.values.get('use_dora'))}, and {module} has "
                    f"{'a' if magnitude else 'no'} lora_magnitude_vector",
                    "weights and config do not belong together",
                )
            yield delta if magnitude is None else DoraDelta(delta, magnitude)
            if "lora_B_bias" in parts:
                yield Bias(self.label, self._tensor(module, "bias"), parts["lora_B_bias"], delta.scale)
        if not kinds and ("lora_magnitude_vector" in parts or "lora_B_bias" in parts):
            raise BadAdapterError(f"{self.file.path}: {module} has no A and B")

    def _transposed(self, tensor: str, module: str, a: TensorInfo, b: TensorInfo) -> bool:
        """Whether the base stores (in, out): by its shape, and for square ones by what the layer is (Conv1D)."""
        held = reference(self.base, tensor)
        straight, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
        if held is not None and straight != turned and held.shape in (straight, turned):
            return held.shape == turned
        conv = self.base.config.get("model_type") in _CONV1D_MODELS  # PEFT sets fan_in_fan_out back elsewhere
        return conv and _CONV1D.fullmatch(f".{module}") is not None

    def _whole(self, module: str, parts: dict[str, TensorInfo]) -> Iterator[Term]:
        for end in ("weight", "bias"):
            stored = parts.get(f"saved.{end}") or parts.get(f"plain.{end}") or parts.get(f"base.{end}")
            if stored is None:
                continue
            tensor = self._tensor(module.removesuffix(".base_layer"), end)
            held = reference(self.base, tensor)
            if held is not None and held.shape == stored.shape and _equal(held, stored):
                continue  # a copy of the base's own
            yield Whole(self.label, tensor, stored)
        if "tokens" in parts:
            tensor = self._tensor(module)
            held, stored = reference(self.base, tensor), parts["tokens"]
            indices = self.config.token_indices
            wanted = next((i for name, i in indices.items() if module.endswith(name)), None)
            if held is None or wanted is None or len(wanted) != stored.shape[0]:
                raise BadAdapterError(f"{self.file.path}: {stored.name} and trainable_token_indices differ")
            rows = np.full(held.rows, -1, dtype=np.int64)
            rows[wanted] = np.arange(len(wanted))
            yield Whole(self.label, tensor, stored, rows)
            if is_embedding(tensor) and self.base.tied and "lm_head.weight" not in self.base.tensors:
                yield Whole(self.label, "lm_head.weight", stored, rows)  # PEFT ties the rows as well


def _pair(kind: str) -> tuple[str, str]:
    return f"{kind}_A", f"{kind}_B"


def _equal(held: TensorInfo, stored: TensorInfo) -> bool:
    return held.dtype in FORMATS and same_bytes(held, stored) == 0
