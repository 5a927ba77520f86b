"""The settings of a training run: a frozen dataclass, presets, and the YAML file they come from.

    preset: demo-pt                      # or paper-pt, paper-sft, demo-sft; every key below overrides it
    base: bases/smollm2-135m-instruct    # relative paths: to the workspace root, then to this file's folder
    data: [data/pt_train.jsonl]
    tests: [data/medquad_short.jsonl]    # audited against the data before anything is trained
    output: adapters/my-pt

Called by `tui/commands/train.py` and `training.job`. No torch here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.errors import BadRecipeError

KINDS = ("pt", "sft")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class TrainConfig:
    """One LoRA run. Defaults are the small, common ones; presets carry the published recipes.

    kind: "pt" (plain text, every token trained) or "sft" (conversations, answers trained).
    cutoff: tokens per packed block; longer documents are cut into blocks (pt), longer samples shortened (sft).
    accumulation: blocks x batch_size per optimizer step. epochs: passes over the data.
    held_out: rows kept from training for the evaluation loss, every `eval_every` optimizer steps.
    train_on_prompt, mask_history: sft only; which turns carry loss (LLaMA-Factory's meaning).
    dtype: of the frozen base; "auto" is bfloat16 on CUDA and float32 elsewhere. Adapters train in float32.
    threads: CPU threads of torch, 0 for its own choice.
    """

    kind: str
    base: str
    data: tuple[str, ...]
    output: str
    tests: tuple[str, ...] = ()
    template: str = "model"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("all-linear",)
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 1
    accumulation: int = 2
    cutoff: int = 512
    packing: bool = True
    train_on_prompt: bool = False
    mask_history: bool = False
    held_out: int = 32
    eval_every: int = 50
    save_every: int = 50
    seed: int = 42
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    threads: int = 0
    preset: str = ""

    def validate(self) -> TrainConfig:
        """Self, if every value makes sense; else BadRecipeError naming the key and what was expected."""
        rules = {
            "kind": (self.kind in KINDS, f"one of {', '.join(KINDS)}"),
            "data": (bool(self.data), "at least one file"),
            "rank": (1 <= self.rank <= 1024, "between 1 and 1024"),
            "alpha": (self.alpha > 0, "above 0"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "learning_rate": (0 < self.learning_rate < 1, "above 0 and below 1"),
            "weight_decay": (0 <= self.weight_decay < 1, "at least 0 and below 1"),
            "warmup": (0 <= self.warmup < 1, "a share of the steps, at least 0 and below 1"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "epochs": (self.epochs > 0, "above 0"),
            "max_steps": (self.max_steps >= 0, "0 (no limit) or a number of steps"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "accumulation": (self.accumulation >= 1, "at least 1"),
            "cutoff": (self.cutoff >= 16, "at least 16 tokens"),
            "held_out": (self.held_out >= 0, "0 or more rows"),
            "eval_every": (self.eval_every >= 1, "at least 1"),
            "save_every": (self.save_every >= 1, "at least 1"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "threads": (self.threads >= 0, "0 or more"),
        }
        for key, (good, expected) in rules.items():
            if not good:
                raise BadRecipeError(f"training setting {key} is {getattr(self, key)!r}, expected {expected}")
        return self


_PAPER: dict[str, Any] = {
    "rank": 16,
    "alpha": 16,
    "dropout": 0.07,
    "weight_decay": 0.03,
    "accumulation": 64,
    "cutoff": 2048,
    "learning_rate": 1e-4,
    "warmup": 0.1,
    "dtype": "bfloat16",
    "template": "qwen3_nothink",
    "gradient_checkpointing": True,
    "held_out": 200,
}
_DEMO: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "dropout": 0.0,
    "learning_rate": 5e-4,
    "accumulation": 2,
    "cutoff": 512,
    "held_out": 16,
    "eval_every": 100,
    "save_every": 25,
}

# paper-*: arXiv 2601.18350 (learning rate and warm-up are LLaMA-Factory's usual ones; the paper's own scripts
# do not fix them). demo-*: what the shipped adapters were trained with.
PRESETS: dict[str, dict[str, Any]] = {
    "paper-pt": {"kind": "pt", "epochs": 4.0, **_PAPER},
    "paper-sft": {"kind": "sft", "epochs": 2.0, "mask_history": True, **_PAPER},
    "demo-pt": {"kind": "pt", **_DEMO},
    "demo-sft": {"kind": "sft", **_DEMO},
}


def from_mapping(values: dict[str, Any], where: str = "config") -> TrainConfig:
    """A validated config from plain values; a preset's values are overridden by the others.

    Raises BadRecipeError naming `where` and the key for unknown keys, wrong types and missing ones.
    """
    values = dict(values)
    preset = values.get("preset") or ""
    if preset and preset not in PRESETS:
        raise BadRecipeError(f"{where}: unknown preset {preset!r}", f"known: {', '.join(PRESETS)}")
    merged = {**PRESETS.get(preset, {}), **values}
    fields = {item.name: item for item in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(merged) - set(fields))
    if unknown:
        raise BadRecipeError(f"{where}: unknown key {unknown[0]!r}", f"known: {', '.join(fields)}")
    missing = [key for key in ("kind", "base", "data", "output") if not merged.get(key)]
    if missing:
        raise BadRecipeError(
            f"{where}: {missing[0]} is missing", "a run needs base, data, output, and kind or preset"
        )
    checked = {key: _typed(key, str(fields[key].type), value, where) for key, value in merged.items()}
    return TrainConfig(**checked).validate()


def _typed(key: str, kind: str, value: Any, where: str) -> Any:
    """The value in the field's type; YAML's `1e-4` (a string without a dot) counts as a number."""
    if kind.startswith("tuple"):
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise BadRecipeError(f"{where}: {key} must be a list of texts, not {value!r}")
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise BadRecipeError(f"{where}: {key} must be {kind}, not {value!r}")


def read(path: Path, workspace: Path, **overrides: Any) -> TrainConfig:
    """The config in a YAML file with absolute paths. `overrides` (not None) win over the file.

    Inputs are looked for below the workspace, then beside the file; the output goes below the workspace.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRecipeError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadRecipeError(
            f"{path} must hold keys and values",
            "base, data, output and settings; docs/training.md has an example",
        )
    values.update({key: value for key, value in overrides.items() if value is not None})
    config = from_mapping(values, str(path))

    def find(name: str) -> str:
        given = Path(name).expanduser()
        places = [given] if given.is_absolute() else [workspace / given, path.parent / given]
        return str(next((place for place in places if place.exists()), places[0]).absolute())

    return dataclasses.replace(
        config,
        base=find(config.base),
        data=tuple(find(name) for name in config.data),
        tests=tuple(find(name) for name in config.tests),
        output=str((workspace / Path(config.output).expanduser()).absolute()),
    )
