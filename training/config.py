"""The settings of a training run: a frozen dataclass, and the YAML file they come from.

    preset: paper-sft                    # training/presets.py; every key below overrides it
    base: bases/smollm2-135m-instruct    # relative paths: to the workspace root, then to this file's folder
    data: [data/sft_train.jsonl]         # or {path, weight, layout, columns, ...}: training/data/sources.py
    tests: [data/medquad_short.jsonl]    # audited against the data before anything is trained
    output: adapters/my-sft

A LLaMA-Factory YAML is read as well (training/llamafactory.py). Called by `tui/commands/train.py` and
`training.job`. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import BadRecipeError
from training.data.dataset_info import resolve
from training.data.sources import Source, parse_sources
from training.llamafactory import from_llamafactory, is_llamafactory
from training.presets import PRESETS

__all__ = ["KINDS", "PRESETS", "TrainConfig", "from_mapping", "read"]

KINDS = ("pt", "sft")
SCHEDULES = ("cosine", "linear", "constant", "cosine_with_restarts", "polynomial", "inverse_sqrt")
DTYPES = ("auto", "bfloat16", "float32")
ATTENTION = ("auto", "sdpa", "flash_attention_2", "eager")
ON_LEAK = ("refuse", "drop", "allow")
DUPLICATES = ("keep", "exact", "near")
DISTRIBUTED = ("ddp", "fsdp")
QUANTIZATION = ("none", "nf4")
MOST_HELD_OUT = 1000  # rows, where `held_out` is a share


@dataclass(frozen=True)
class TrainConfig:
    """One LoRA run. Defaults are the small, common ones; presets carry the published recipes.

    kind: "pt" (plain text, every token trained) or "sft" (conversations, answers trained).
    data, eval_data: sources. Without eval_data, `held_out` rows of the data are kept for the evaluation loss
        (a number of rows, or below 1 a share of them), every `eval_every` optimizer steps.
    tests: files audited against the data. on_leak: refuse the run, drop the leaking rows, or allow them (the manifest
        says so). duplicates: keep repeated rows, or drop the later ones ("exact", or "near" as well).
    cutoff: tokens per packed block; longer documents are cut into blocks (pt), longer samples shortened (sft).
    accumulation: batches of batch_size blocks per optimizer step, over all processes together.
    epochs: passes over the data. shots: train on so many rows only, a random nested choice by `shots_seed`.
    train_on_prompt, mask_history: sft only; which turns carry loss (LLaMA-Factory's meaning).
    warmup: share of the steps (below 1), or number of steps, in which the learning rate rises from 0.
    dtype: of the frozen base; "auto" is bfloat16 on CUDA and float32 elsewhere. Adapters train in float32.
    quantization: "nf4" keeps the frozen base in 4 bits (QLoRA, arXiv 2305.14314; CUDA and bitsandbytes).
    processes: of this machine, 0 for one a GPU; more than one go through accelerate (distributed: ddp or fsdp).
    threads: CPU threads of torch in each process, 0 for its own choice.
    """

    kind: str
    base: str
    output: str
    data: tuple[Source, ...] = ()
    eval_data: tuple[Source, ...] = ()
    dataset_info: str = ""
    tests: tuple[str, ...] = ()
    on_leak: str = "refuse"
    duplicates: str = "keep"
    audit_column: str = ""
    template: str = "model"
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ("all-linear",)
    quantization: str = "none"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup: float = 0.05
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 1
    eval_batch_size: int = 0
    accumulation: int = 2
    cutoff: int = 512
    packing: bool = True
    train_on_prompt: bool = False
    mask_history: bool = False
    held_out: float = 0.05
    eval_every: int = 50
    save_every: int = 50
    keep_checkpoints: int = 2
    seed: int = 42
    shots: int = 0
    shots_seed: int = 0
    dtype: str = "auto"
    attention: str = "auto"
    gradient_checkpointing: bool = False
    threads: int = 0
    processes: int = 0
    distributed: str = "ddp"
    tensorboard: bool = False
    preset: str = ""
    notes: tuple[str, ...] = field(
        default=(), compare=False
    )  # what a foreign config said that has no meaning here

    def validate(self) -> TrainConfig:
        """Self, if every value makes sense; else BadRecipeError naming the key and what was expected."""
        rules = {
            "kind": (self.kind in KINDS, f"one of {', '.join(KINDS)}"),
            "data": (bool(self.data), "at least one file"),
            "on_leak": (self.on_leak in ON_LEAK, f"one of {', '.join(ON_LEAK)}"),
            "duplicates": (self.duplicates in DUPLICATES, f"one of {', '.join(DUPLICATES)}"),
            "rank": (1 <= self.rank <= 1024, "between 1 and 1024"),
            "alpha": (0 < self.alpha < math.inf, "above 0"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "quantization": (self.quantization in QUANTIZATION, f"one of {', '.join(QUANTIZATION)}"),
            "learning_rate": (0 < self.learning_rate < 1, "above 0 and below 1"),
            "weight_decay": (0 <= self.weight_decay < 1, "at least 0 and below 1"),
            "beta1": (0 <= self.beta1 < 1, "at least 0 and below 1"),
            "beta2": (0 <= self.beta2 < 1, "at least 0 and below 1"),
            "epsilon": (0 < self.epsilon < 1, "above 0 and below 1"),
            "warmup": (0 <= self.warmup < math.inf, "a share of the steps below 1, or a number of steps"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "max_grad_norm": (0 < self.max_grad_norm < math.inf, "above 0"),
            "epochs": (0 < self.epochs < math.inf, "above 0"),
            "max_steps": (self.max_steps >= 0, "0 (no limit) or a number of steps"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "eval_batch_size": (self.eval_batch_size >= 0, "0 (as batch_size) or more"),
            "accumulation": (self.accumulation >= 1, "at least 1"),
            "cutoff": (self.cutoff >= 16, "at least 16 tokens"),
            "mask_history": (
                not (self.mask_history and self.train_on_prompt),
                "false where train_on_prompt is true: the one hides what the other trains",
            ),
            "held_out": (self._held_out_makes_sense(), "a number of rows, or a share of them below 1"),
            "eval_every": (self.eval_every >= 1, "at least 1"),
            "save_every": (self.save_every >= 1, "at least 1"),
            "keep_checkpoints": (self.keep_checkpoints >= 1, "at least 1"),
            "shots": (self.shots >= 0, "0 (all rows) or a number of rows"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "attention": (self.attention in ATTENTION, f"one of {', '.join(ATTENTION)}"),
            "threads": (self.threads >= 0, "0 or more"),
            "processes": (self.processes >= 0, "0 (one a GPU) or more"),
            "distributed": (self.distributed in DISTRIBUTED, f"one of {', '.join(DISTRIBUTED)}"),
        }
        for key, (good, expected) in rules.items():
            if not good:
                raise BadRecipeError(f"training setting {key} is {getattr(self, key)!r}, expected {expected}")
        return self

    def _held_out_makes_sense(self) -> bool:
        return 0 <= self.held_out < 1 or (self.held_out >= 1 and self.held_out == int(self.held_out))

    def held_out_rows(self, rows: int) -> int:
        """How many of so many rows are kept for the evaluation loss."""
        if self.eval_data or not self.held_out:
            return 0
        if self.held_out >= 1:
            return int(self.held_out)
        return min(max(1, round(self.held_out * rows)), MOST_HELD_OUT, rows // 2)

    @property
    def files(self) -> list[str]:
        """The training data's paths, each once."""
        return list(dict.fromkeys(source.path for source in self.data))


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
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        known = f"known: {', '.join(fields)}"
        raise BadRecipeError(
            f"{where}: unknown key {unknown[0]!r}", f"did you mean {near[0]!r}? {known}" if near else known
        )
    missing = [key for key in ("kind", "base", "data", "output") if not merged.get(key)]
    if missing:
        raise BadRecipeError(
            f"{where}: {missing[0]} is missing", "a run needs base, data, output, and kind or preset"
        )
    checked = {key: _typed(key, str(fields[key].type), value, where) for key, value in merged.items()}
    return TrainConfig(**checked).validate()


def _typed(key: str, kind: str, value: Any, where: str) -> Any:
    """The value in the field's type; YAML's `1e-4` (a string without a dot) counts as a number."""
    if kind == "tuple[Source, ...]":
        return parse_sources(value, f"{where}: {key}") if value else ()
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


def read(path: Path | None, workspace: Path, **overrides: Any) -> TrainConfig:
    """The config in a YAML file (or of flags alone) with absolute paths. `overrides` (not None) win over the file.

    Inputs are looked for below the workspace, then beside the file (for flags: where the person stands); the output
    goes below the workspace.
    """
    values = _document(path) if path else {}
    notes: tuple[str, ...] = ()
    where = str(path) if path else "training settings"
    if is_llamafactory(values):
        values, notes = from_llamafactory(values, where)
    values.update({key: value for key, value in overrides.items() if value is not None})
    config = from_mapping(values, where)

    def find(name: str) -> str:
        given = Path(name).expanduser()
        beside = path.parent if path else Path.cwd()
        places = [given] if given.is_absolute() else [workspace / given, beside / given]
        return str(next((place for place in places if place.exists()), places[0]).absolute())

    def found(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        if config.dataset_info and sources:
            named = resolve([source.path for source in sources], Path(find(config.dataset_info)))
            return tuple(
                dataclasses.replace(
                    one, weight=source.weight, limit=source.limit, sample=source.sample or one.sample
                )
                for one, source in zip(named, sources, strict=True)
            )
        return tuple(dataclasses.replace(source, path=find(source.path)) for source in sources)

    return dataclasses.replace(
        config,
        base=find(config.base),
        data=found(config.data),
        eval_data=found(config.eval_data),
        dataset_info="",  # said by the sources now
        tests=tuple(find(name) for name in config.tests),
        output=str((workspace / Path(config.output).expanduser()).absolute()),
        notes=notes,
    )


def _document(path: Path) -> dict[str, Any]:
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
    return values
