"""adapter_config.json, checked: what of PEFT's LoraConfig decides the change, and what is refused by name.

Called by engine/weights/adapter.py. Keys that only say how training started or ran are ignored; a key whose
effect is not known here and that looks like a variant (`use_...`, `..._config`) is refused, never skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadAdapterError

CONFIG = "adapter_config.json"

# Options of a LoraConfig whose merge is not exact, or not possible, by their names for people.
_NOT_MERGED = {
    "alora_invocation_tokens": "activated LoRA (on only for some tokens)",
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
_HARMLESS = ("use_rslora", "use_dora", "eva_config", "velora_config", "corda_config", "lora_ga_config",
             "loftq_config", "runtime_config")  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LAYOUTS = {"": False, "rank_major": False, "grouped_by_expert": True}  # Unsloth's lora_B_layout


@dataclass(frozen=True)
class LoraOptions:
    """The config's fields that decide what the adapter changes. Field names are PEFT's where it has one."""

    path: Path
    r: int | None  # None where the config names none: then A's rows say it
    lora_alpha: float
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # "" stands for any module
    ensure_weight_tying: bool = False
    grouped_experts: bool = False
    peft_version: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> LoraOptions:
        """Check the config's fields.

        Raises BadAdapterError naming the file and key: a kind or option that cannot be merged exactly, a value
        of the wrong type, a rank or alpha that is not a positive number.
        """
        refuse_unsupported(folder, config)
        path = folder / CONFIG
        rank = config.get("r")
        return cls(
            path=path,
            r=None if rank is None else whole(path, "r", rank),
            lora_alpha=positive(path, "lora_alpha", config.get("lora_alpha")),
            rank_pattern=_pattern(path, "rank_pattern", config),
            alpha_pattern=_pattern(path, "alpha_pattern", config),
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            bias=str(config.get("bias") or "none"),
            lora_bias=bool(config.get("lora_bias")),
            modules_to_save=_names(path, "modules_to_save", config),
            target_parameters=_names(path, "target_parameters", config),
            token_indices=_token_indices(path, config.get("trainable_token_indices")),
            ensure_weight_tying=bool(config.get("ensure_weight_tying")),
            grouped_experts=_layout(path, config.get("lora_B_layout")),
            peft_version=tuple(
                int(part) for part in re.findall(r"\d+", str(config.get("peft_version") or ""))[:3]
            ),
        )

    def rank_of(self, name: str, default: int) -> int:
        """The rank of a module (or parameter): rank_pattern's, else r, else `default`."""
        said = pattern_value(self.rank_pattern, name, self.r)
        return default if said is None else whole(self.path, "rank_pattern", said)

    def alpha_of(self, name: str) -> float:
        return positive(self.path, "alpha_pattern", pattern_value(self.alpha_pattern, name, self.lora_alpha))

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise BadAdapterError for a kind or option that has no exact merge here, by its name.

    A config without peft_type counts as LoRA when it has lora_alpha (older torchtune writes none).
    """
    path = folder / CONFIG
    said = config.get("peft_type")
    if said is None and "fine_tune_type" in config and "lora_parameters" in config:
        raise BadAdapterError(
            f"{path}: this is an mlx-lm adapter, whose factors are stored the other way around",
            "fuse it with mlx_lm.fuse, or convert it to PEFT's layout",
        )
    kind = str(said or "").upper().removeprefix("PEFTTYPE.")
    if kind != "LORA" and not (said is None and config.get("lora_alpha") is not None):
        raise BadAdapterError(
            f"{path}: peft_type is {kind or 'not given'}, only LORA can be merged exactly here"
        )
    for key, value in config.items():
        unknown = key not in _HARMLESS and (key.startswith("use_") or key.endswith("_config"))
        if value and (key in _NOT_MERGED or unknown):
            raise BadAdapterError(
                f"{path}: uses {_NOT_MERGED.get(key, key)}, which this version does not merge",
                "merge it with the tool that made it, and use the result as a model",
            )
    bias = config.get("bias")
    if bias not in ("none", "all", "lora_only", None):
        raise BadAdapterError(f"{path}: bias is {bias!r}, expected none, all or lora_only")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise BadAdapterError(
            f"{path}: init_lora_weights is {start!r}: the base itself was changed when training began",
            "convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )


def pattern_value(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the name or its end.

    As `peft.utils.other.get_pattern_key`: a key matches when `(.*\\.)?(key)$` matches the module name from its
    start, so a plain name must be whole parts at the end, and a key beginning with "^" the whole name.
    """
    if not isinstance(patterns, Mapping):
        return default
    for key, value in patterns.items():
        expression = rf"(.*\.)?({key})$"
        try:
            if re.match(expression, module):
                return value
        except (re.error, RecursionError, OverflowError) as error:
            raise BadAdapterError(
                f"rank_pattern/alpha_pattern key {key!r} is no regular expression: {error}"
            ) from error
    return default


def positive(path: Path, key: str, value: Any) -> float:
    """A positive number; one written as text ("16") is taken as the number. Raises BadAdapterError."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        number = float(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not 0 < number < 1e18
        or not math.isfinite(number)
    ):
        raise BadAdapterError(f"{path}: {key} should be a positive number, and is {value!r}")
    return float(number)


def whole(path: Path, key: str, value: Any) -> int:
    """A positive whole number. Raises BadAdapterError."""
    number = positive(path, key, value)
    if number != int(number):
        raise BadAdapterError(f"{path}: {key} should be a positive whole number, and is {value!r}")
    return int(number)


def _pattern(path: Path, key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise BadAdapterError(f"{path}: {key} should map module names to numbers, and is {value!r}")
    for name in value:
        pattern_value({name: 0}, "model", None)  # raises for a key that is no regular expression
    return value


def _names(path: Path, key: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BadAdapterError(f"{path}: {key} should be a list of names, and is {value!r}")
    return tuple(value)


def _token_indices(path: Path, value: Any) -> dict[str, tuple[int, ...]]:
    by_module = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(by_module, dict) or not all(
        isinstance(rows, list)
        and all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in rows)
        for rows in by_module.values()
    ):
        raise BadAdapterError(
            f"{path}: trainable_token_indices should be a list of token numbers, or such lists by module"
        )
    return {str(module): tuple(rows) for module, rows in by_module.items()}


def _layout(path: Path, value: Any) -> bool:
    said = "" if value is None else str(value)
    if said not in _LAYOUTS:
        raise BadAdapterError(
            f"{path}: lora_B_layout is {said!r}, expected rank_major or grouped_by_expert",
            "Unsloth writes it; it decides which columns of B belong to which expert",
        )
    return _LAYOUTS[said]
