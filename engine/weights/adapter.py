"""A PEFT LoRA adapter folder, read by header only: which base tensors it changes, by what factors.

The delta of a linear layer is `scale * B @ A` (out x in), with A (r x in), B (out x r) and
scale = alpha / r, or alpha / sqrt(r) for rsLoRA; `rank_pattern` and `alpha_pattern` change r and alpha for
modules whose name ends in (or matches) a key, by PEFT's own rule. What cannot be merged exactly is refused
by name, never skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadAdapterError
from engine.weights.checkpoint import Checkpoint, read_json
from engine.weights.tensorfile import TensorFile, TensorInfo, file_sha256, read_rows

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MANIFEST = "training.json"

# Options of a LoraConfig under which the delta is not scale * B @ A of a linear layer, by their names for people.
_NOT_MERGED = {
    "use_dora": "DoRA (its merge is not linear in the weight)",
    "modules_to_save": "modules_to_save (whole replaced modules)",
    "target_parameters": "target_parameters (fused experts)",
    "trainable_token_indices": "trainable_token_indices",
    "alora_invocation_tokens": "activated LoRA (on only for some tokens)",
    "lora_bias": "lora_bias",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
# Options that decide how training starts or runs, not what the delta is. (CorDA, LoftQ and LoRA-GA change the
# base when they start; init_lora_weights tells.)
_HARMLESS = ("use_rslora", "eva_config", "velora_config", "corda_config", "lora_ga_config", "loftq_config",
             "runtime_config")  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_A|lora_B)(?:\.default)?(?:\.weight)?$"
)


@dataclass(frozen=True)
class LoraFactor:
    """One module's low-rank pair: delta = scale * B @ A, B (out, r), A (r, in), both as stored on disk."""

    module: str  # "model.layers.0.self_attn.q_proj"
    a: TensorInfo
    b: TensorInfo
    rank: int
    alpha: float
    scale: float
    transposed: bool = False  # fan_in_fan_out: the base weight is stored (in, out)

    @property
    def tensor_name(self) -> str:
        """The base tensor it changes."""
        return f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the base weight it fits, as stored there."""
        out, inside = self.b.shape[0], self.a.shape[1]
        return (inside, out) if self.transposed else (out, inside)


@dataclass(frozen=True)
class Health:
    """What is wrong with the numbers of an adapter. Healthy when both lists are empty."""

    not_finite: tuple[str, ...]  # tensors holding NaN or infinity
    zero_b: tuple[str, ...]  # modules whose B (or A) is all zero: they change nothing (untrained)
    norm_by_layer: tuple[float, ...]  # Frobenius norm of the scaled deltas of each layer, in float64

    @property
    def ok(self) -> bool:
        return not self.not_finite and not self.zero_b


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder. `factors` is keyed by module name; nothing of the weights is in memory."""

    folder: Path
    config: dict[str, Any]
    file: TensorFile
    factors: dict[str, LoraFactor]
    training: dict[str, Any] = field(default_factory=dict)  # our manifest, when the folder has one

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Open a PEFT folder (adapter_config.json, adapter_model.safetensors).

        Raises:
            BadAdapterError: not an adapter, pickle weights, a kind that cannot be merged exactly (named), a
                key that is not a LoRA factor, an A without its B, ranks that do not agree with the config.
        """
        if not folder.is_dir():
            raise BadAdapterError(f"{folder} is not a folder", f"an adapter is a folder with {CONFIG}")
        config = read_json(folder / CONFIG, BadAdapterError, f"an adapter folder has {CONFIG} and {WEIGHTS}")
        refuse_unsupported(folder, config)
        if not (folder / WEIGHTS).is_file():
            if (folder / PICKLE).is_file():
                raise BadAdapterError(
                    f"{folder / PICKLE} is a pickle file, which is never loaded: it can run code",
                    "where you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(new, "
                    "safe_serialization=True)",
                )
            raise BadAdapterError(f"{folder / WEIGHTS} is missing", "the adapter's weights are not here")
        file = TensorFile.open(folder / WEIGHTS)
        factors = _pair(folder, config, file)
        if not factors:
            raise BadAdapterError(f"{folder / WEIGHTS} holds no LoRA factors")
        training: dict[str, Any] = {}
        if (folder / MANIFEST).is_file():
            training = read_json(
                folder / MANIFEST, BadAdapterError, "delete it to use the adapter without it"
            )
        return cls(folder, config, file, factors, training)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        """ "pt" or "sft" as our training manifest says, else a guess from the folder name, else ""."""
        said = str(self.training.get("kind", ""))
        if said:
            return said
        words = re.split(r"[^a-z]+", self.folder.name.lower())
        return "sft" if "sft" in words else "pt" if "pt" in words or "cpt" in words else ""

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(factor.rank for factor in self.factors.values())

    @property
    def scales(self) -> tuple[float, ...]:
        """The different scales of its modules, ascending."""
        return tuple(sorted({factor.scale for factor in self.factors.values()}))

    @property
    def dtype(self) -> str:
        return next(iter(self.factors.values())).b.dtype

    @property
    def nbytes(self) -> int:
        return self.file.size

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the module names it changes: ("down_proj", "q_proj", ...)."""
        return tuple(sorted({module.rsplit(".", 1)[-1] for module in self.factors}))

    @property
    def base_name(self) -> str:
        """The base model the config names ("" when it names none)."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def template(self) -> str:
        """The chat template it was trained with, as our manifest says ("" for foreign adapters: unknown)."""
        return str(self.training.get("template") or "")

    @cached_property
    def sha256(self) -> str:
        """One hash of what decides the delta: config and weights."""
        digest = hashlib.sha256(file_sha256(self.file.path).encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()

    def match(self, base: Checkpoint) -> dict[str, LoraFactor]:
        """Its factors by the name of the base tensor each one changes.

        Raises BadAdapterError when a factor matches no tensor of the base, or not its shape (names both).
        """
        matched = {}
        for module, factor in self.factors.items():
            tensor = base.tensors.get(factor.tensor_name)
            if tensor is None:
                near = next((name for name in base.tensors if name.endswith(".weight")), "nothing")
                raise BadAdapterError(
                    f"{self.file.path}: module {module} matches no tensor of {base.folder} "
                    f"(looked for {factor.tensor_name}; the base has tensors like {near})",
                    "this adapter belongs to another base",
                )
            if tensor.shape != factor.shape:
                raise BadAdapterError(
                    f"{self.file.path}: {module} changes a {list(factor.shape)} weight, and {tensor.name} of "
                    f"{base.folder} is {list(tensor.shape)}",
                    "this adapter belongs to another base"
                    + (f" ({self.base_name})" if self.base_name else ""),
                )
            matched[tensor.name] = factor
        return matched

    def health(self) -> Health:
        """Read every factor once and look for NaN, infinity and all-zero B; norms via r x r Gram matrices."""
        not_finite, zero_b = [], []
        layers: dict[int, float] = {}
        for factor in self.factors.values():
            a, b = read_rows(factor.a).astype(np.float64), read_rows(factor.b).astype(np.float64)
            not_finite += [
                info.name for info, x in ((factor.a, a), (factor.b, b)) if not np.isfinite(x).all()
            ]
            if not b.any() or not a.any():
                zero_b.append(factor.module)
            layer = re.search(r"\.(\d+)\.", factor.module)
            if layer and np.isfinite(a).all() and np.isfinite(b).all():
                square = factor.scale**2 * float(np.sum((b.T @ b) * (a @ a.T)))
                layers[int(layer[1])] = layers.get(int(layer[1]), 0.0) + max(square, 0.0)
        norms = tuple(math.sqrt(layers.get(i, 0.0)) for i in range(max(layers, default=-1) + 1))
        return Health(tuple(not_finite), tuple(zero_b), norms)


def refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    """Raise BadAdapterError for a kind or option that has no exact linear merge here, by its name."""
    kind = str(config.get("peft_type", "")).upper()
    path = folder / CONFIG
    if kind != "LORA":
        raise BadAdapterError(
            f"{path}: peft_type is {kind or 'not given'}, only LORA can be merged exactly here"
        )
    for key, value in config.items():
        unknown = key not in _HARMLESS and (key.startswith("use_") or key.endswith("_config"))
        if value and (key in _NOT_MERGED or unknown):
            raise BadAdapterError(
                f"{path}: uses {_NOT_MERGED.get(key, key)}, which this version does not merge",
                "only plain LoRA (alpha/r, rsLoRA, rank and alpha patterns) has an exact linear merge here",
            )
    if config.get("bias", "none") not in ("none", None):
        raise BadAdapterError(
            f"{path}: trains biases (bias={config['bias']!r}), which this version does not merge"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise BadAdapterError(
            f"{path}: init_lora_weights is {start!r}: the base itself was changed when training began",
            "convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )


def _pair(folder: Path, config: dict[str, Any], file: TensorFile) -> dict[str, LoraFactor]:
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        match = _KEY.match(name)
        if not match:
            raise BadAdapterError(f"{file.path}: key {name} is no lora_A or lora_B of a linear layer")
        if len(tensor.shape) != 2 or not tensor.is_float or 0 in tensor.shape:
            raise BadAdapterError(
                f"{file.path}: {name} is {tensor.dtype} {list(tensor.shape)}, expected a float matrix"
            )
        pair = halves.setdefault(match["module"], {})
        if match["part"] in pair:
            raise BadAdapterError(f"{file.path}: two tensors for {match['part']} of {match['module']}")
        pair[match["part"]] = tensor
    factors = {}
    for module, pair in halves.items():
        if len(pair) != 2:
            raise BadAdapterError(
                f"{file.path}: {module} has only {next(iter(pair))}", "A and B come in pairs"
            )
        factors[module] = _factor(folder, config, module, pair["lora_A"], pair["lora_B"])
    return factors


def _factor(folder: Path, config: dict[str, Any], module: str, a: TensorInfo, b: TensorInfo) -> LoraFactor:
    path = folder / CONFIG
    rank = _number(path, "r", pattern_value(config.get("rank_pattern"), module, config.get("r", 0)))
    alpha = _number(
        path, "lora_alpha", pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise BadAdapterError(
            f"{a.file}: {module} has A {list(a.shape)} and B {list(b.shape)}; {path} says rank {int(rank)}",
            "weights and config do not belong together",
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraFactor(module, a, b, int(rank), alpha, scale, bool(config.get("fan_in_fan_out")))


def _number(path: Path, key: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise BadAdapterError(f"{path}: {key} should be a positive number, and is {value!r}")
    return float(value)


def pattern_value(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the name or its end.

    As `peft.utils.other.get_pattern_key`: a key matches when `(.*\\.)?(key)$` matches the module name from its
    start, so a plain name must be whole parts at the end, and a key beginning with "^" the whole name.
    """
    if not isinstance(patterns, dict):
        return default
    for key, value in patterns.items():
        expression = rf"(.*\.)?({key})$"
        try:
            if re.match(expression, module):
                return value
        except re.error as error:
            raise BadAdapterError(
                f"rank_pattern/alpha_pattern key {key!r} is no regular expression: {error}"
            ) from error
    return default
