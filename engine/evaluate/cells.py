"""What is to be measured, cut into cells: one mixture x task x template x decoding x seed, with a hash.

A cell's hash covers everything its rows depend on (file hashes, weights, dtypes, device, template, decoding,
seed, library versions), so that equal hash means equal rows, and a finished cell can be taken from another run.
What does not matter to a kind is left out: multiple choice and perplexity know no template and no decoding,
greedy decoding no seed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.evaluate.config import Decoding, EvalConfig, Task
from engine.weights import Adapter, Checkpoint
from engine.weights.tensorfile import file_sha256

FORMAT = "medmerge.eval/1"  # raised when prompts or scoring change: old cells are then computed anew
GREEDY_FIELDS = ("name", "temperature", "max_new_tokens")


@dataclass(frozen=True)
class Cell:
    """kind: a task's kind, or `references` (the likelihood of a generation task's reference answers)."""

    kind: str
    task: Task
    weights: dict[str, float]
    template: str  # "" where no chat template is used
    decoding: Decoding | None
    seed: int | None
    spec: dict[str, Any]  # everything the rows depend on, as JSON values

    @cached_property
    def hash(self) -> str:
        text = json.dumps(self.spec, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """For progress and logs: `PT30 SFT70 · medquad_short · greedy`."""
        from engine.evaluate.summary import model_label

        name = f"{self.task.name} references" if self.kind == "references" else self.task.name
        parts = [model_label(self.weights), name, self.decoding.name if self.decoding else ""]
        parts.append(f"seed {self.seed}" if self.seed is not None else "")
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Identity:
    """What runs: hashes of the base and the adapters, how weights are rounded and multiplied."""

    base_name: str
    base_sha256: str
    adapters: dict[str, str]
    dtype: str
    compute: str
    device: str

    @classmethod
    def of(
        cls, base: Checkpoint, adapters: Mapping[str, Adapter], dtype: str, compute: str, device: str
    ) -> Identity:
        return cls(
            base.name,
            base_sha256(base),
            {label: a.sha256 for label, a in adapters.items()},
            dtype,
            compute,
            device,
        )


def base_sha256(base: Checkpoint) -> str:
    """One hash of the weights and of the files that decide texts and shapes (config, tokenizer, template).

    Rows depend on all of them; which weights an adapter was trained on is `engine.weights.identity.weights_sha256`.
    """
    files = {
        path.name: file_sha256(path)
        for path in base.companions
        if path.suffix in (".json", ".jinja", ".model")
    }
    return hashlib.sha256(json.dumps({**files, **base.sha256}, sort_keys=True).encode()).hexdigest()


def plan_cells(config: EvalConfig, identity: Identity) -> list[Cell]:
    """All cells, mixture by mixture (writing a mixture is done once), in the order of the config."""
    data = {task.data: file_sha256(task.data) for task in config.tasks}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    cells: list[Cell] = []
    for weights in config.weights:
        for task in config.tasks:
            for kind, template, decoding, seed in _settings(config, task):
                spec: dict[str, Any] = {
                    "format": FORMAT,
                    "kind": kind,
                    "task": _task_spec(task, kind, data[task.data]),
                    "base": {"name": identity.base_name, "sha256": identity.base_sha256},
                    "adapters": identity.adapters,
                    "weights": weights,
                    "dtype": identity.dtype,
                    "compute": identity.compute,
                    "device": identity.device,
                    "batch_size": config.batch_size,
                    "versions": versions,
                    "template": template,
                    "decoding": _decoding_spec(decoding),
                    "seed": seed,
                }
                cells.append(Cell(kind, task, weights, template, decoding, seed, spec))
    return cells


def _settings(config: EvalConfig, task: Task) -> list[tuple[str, str, Decoding | None, int | None]]:
    """(kind, template, decoding, seed) of every cell of a task for one mixture."""
    if task.kind in ("multiple_choice", "perplexity"):
        return [(task.kind, "", None, None)]
    found: list[tuple[str, str, Decoding | None, int | None]] = []
    for template in config.templates:
        if task.kind == "generation" and task.references:
            found.append(("references", template, None, None))
        for decoding in config.decoding:
            seeds = (None,) if decoding.greedy else config.seeds
            found += [(task.kind, template, decoding, seed) for seed in seeds]
    return found


def _task_spec(task: Task, kind: str, data_sha256: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "name": task.name,
        "data": Path(task.data).name,
        "sha256": data_sha256,
        "limit": task.limit,
    }
    if kind == "multiple_choice":
        spec["scoring"] = task.scoring
    elif kind == "perplexity":
        spec["max_tokens"] = task.max_tokens
    else:
        spec["system"] = task.system
    return spec


def _decoding_spec(decoding: Decoding | None) -> dict[str, Any] | None:
    if decoding is None:
        return None
    names = GREEDY_FIELDS if decoding.greedy else tuple(Decoding.__dataclass_fields__)
    return {name: getattr(decoding, name) for name in names}
