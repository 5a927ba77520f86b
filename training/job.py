"""The target of `medmerge train`: params {"config": settings, "run": folder, "resume": bool}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from engine.jobs.events import EventWriter
from training.config import TrainConfig, from_mapping


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Train one adapter; returns {adapter, run, steps, tokens, loss, eval_loss, first_eval_loss, seconds, ...}."""
    from training.run import train

    run_folder = Path(params["run"])
    resume = bool(params.get("resume"))
    config = saved_config(run_folder) if resume else from_mapping(dict(params["config"]), "training job")
    return train(config, run_folder, events, resume=resume)


def saved_config(run_folder: Path) -> TrainConfig:
    """The settings a run was started with. Raises BadInputError when the folder holds no run."""
    path = run_folder / "train.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{run_folder} is not a training run (train.json is missing or unreadable)",
            "give a folder below runs/",
        ) from error
    return from_mapping(values, str(path))
