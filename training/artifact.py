"""What a run leaves behind: the adapter folder with its manifest, and the identity of its base."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.atomic import new_folder, write_json
from engine.errors import MedmergeError
from engine.weights import Checkpoint, identity
from training.config import TrainConfig

FORMAT = "medmerge.training/1"
MANIFEST = "training.json"
MAGNITUDE = "lora_magnitude_vector"  # DoRA's: a rounding there is a factor on a whole row of the weights
_PLACES = ("base", "data", "eval_data", "tests", "output", "dataset_info", "notes")


def base_identity(folder: Path) -> dict[str, Any]:
    """Name, SHA-256 and number of weight files of a base: what everything that uses the adapter later compares.

    Raises BadModelError where the folder holds no safetensors weights.
    """
    return identity.base_identity(Checkpoint.open(folder))


def settings_for_manifest(config: TrainConfig) -> dict[str, Any]:
    """All settings; of paths only the names, since the rest says nothing on another machine."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in _PLACES}
    for key in ("data", "eval_data"):
        sources = getattr(config, key)
        values[key] = [{**dataclasses.asdict(source), "path": Path(source.path).name} for source in sources]
    return values


def curve_of(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """[{step, loss, lr}] and [{step, eval_loss}] in the order they were measured."""
    curve = []
    for entry in history:
        if "loss" in entry:
            curve.append({"step": entry["step"], "loss": entry["loss"], "lr": entry["learning_rate"]})
        elif "eval_loss" in entry:
            curve.append({"step": entry["step"], "eval_loss": entry["eval_loss"]})
    return curve


def save_adapter(trainer: Any, manifest: dict[str, Any], output: Path, base_name: str) -> None:
    """Write a PEFT folder: adapter_model.safetensors, adapter_config.json, training.json. The weights are bfloat16,
    DoRA's magnitudes float32.

    Called by every process; the first one writes. (Under FSDP the weights are gathered from all.)
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    state = {
        name: tensor.detach().to("cpu", torch.float32 if MAGNITUDE in name else torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model, whole).items())
    }
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise MedmergeError(
            f"the trained adapter holds NaN or infinity in {broken[0]}", "lower learning_rate"
        )
    with new_folder(output) as partial:
        save_file(state, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_model.safetensors").chmod(0o644)
        peft_config = model.peft_config["default"]
        peft_config.save_pretrained(partial)
        path = partial / "adapter_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {"base_model_name_or_path": base_name, "inference_mode": True}
        if isinstance(values.get("target_modules"), list):
            values["target_modules"] = sorted(values["target_modules"])
        write_json(path, values)
        write_json(partial / MANIFEST, manifest)
