"""adapter_config.json as the verifier reads it: rank, alpha and scale of a module, and what is refused by name.

PEFT's definition (Hu et al. 2021, arXiv 2106.09685; rsLoRA arXiv 2312.03732):
dW = s * B @ A with s = alpha / r, or alpha / sqrt(r) when `use_rslora`; A is (r, in), B is (out, r).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadAdapterError
from engine.weights.tensorfile import read_regular

CONFIG = "adapter_config.json"
# Starts that write into the base itself: the deltas alone do not make the merged weight.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = (
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "velora_config", "kasa_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """What the folder's config says. Keys that tools leave out have PEFT's defaults."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> LoraConfig:
        """Raises BadAdapterError: no readable config, or a kind whose delta is not known here."""
        path = folder / CONFIG
        try:
            values = json.loads(read_regular(path))
        except (OSError, ValueError, RecursionError) as error:
            raise BadAdapterError(
                f"{path} cannot be read: {error}", f"an adapter folder has {CONFIG}"
            ) from error
        if not isinstance(values, dict):
            raise BadAdapterError(f"{path} should hold a JSON object")
        kind = str(values.get("peft_type") or "LORA").upper().rpartition(".")[2]
        if kind != "LORA":
            raise BadAdapterError(f"{path}: peft_type is {kind}, and only LORA can be verified")
        for key in _REFUSED:
            if values.get(key):
                raise BadAdapterError(f"{path}: uses {key}, whose merge cannot be verified here")
        start = values.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise BadAdapterError(
                f"{path}: init_lora_weights is {start!r}: the base itself was changed when training began"
            )
        return cls(path, values)

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """trainable_token_indices by the end of the module's name ("" for the input embedding)."""
        value = self.values.get("trainable_token_indices") or {}
        if isinstance(value, list):
            value = {"": value}
        try:
            return {str(name): [int(i) for i in indices] for name, indices in value.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise BadAdapterError(f"{self.path}: trainable_token_indices is {value!r}") from error

    @property
    def grouped_experts(self) -> bool:
        """Unsloth's lora_B_layout: whether B of fused experts lies expert by expert."""
        return self.values.get("lora_B_layout") == "grouped_by_expert"

    @property
    def target_parameters(self) -> list[str]:
        value = self.values.get("target_parameters") or []
        return [str(name) for name in value] if isinstance(value, list) else [str(value)]

    def scale(self, module: str, rank: int) -> float:
        """alpha / r (or alpha / sqrt(r)); the rank is that of the stored A, which the config must not contradict."""
        alpha = self._pattern("alpha_pattern", module, self.values.get("lora_alpha", 8))
        said = self._pattern("rank_pattern", module, self.values.get("r"))
        if said is not None and str(said) != str(rank):
            raise BadAdapterError(
                f"{self.path}: says rank {said} for {module}, and its A has {rank} rows",
                "weights and config do not belong together",
            )
        try:
            number = float(alpha)
        except (TypeError, ValueError):
            number = 0.0
        if isinstance(alpha, bool) or not 0 < number < float("inf"):
            raise BadAdapterError(
                f"{self.path}: lora_alpha for {module} should be a positive number, and is {alpha!r}"
            )
        return number / (rank**0.5 if self.values.get("use_rslora") else rank)

    def _pattern(self, name: str, module: str, default: Any) -> Any:
        """PEFT's rule (peft.utils.other.get_pattern_key): the first key that is the name, or ends it after a dot."""
        patterns = self.values.get(name) or {}
        if not isinstance(patterns, dict):
            raise BadAdapterError(f"{self.path}: {name} should be an object, and is {patterns!r}")
        for key, value in patterns.items():
            try:
                if re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
                    return value
            except re.error as error:
                raise BadAdapterError(
                    f"{self.path}: {name} key {key!r} is no regular expression: {error}"
                ) from error
        return default
