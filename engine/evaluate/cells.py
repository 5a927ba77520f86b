"""What is to be measured, cut into cells: one model x task x template x decoding x seed, with a hash.

A model is a mixture of the base and its adapters, a GGUF file, or one behind a server.

A cell's hash covers everything its rows depend on (file hashes, weights, dtypes, device, template and its text,
decoding, seed, library versions), so that equal hash means equal rows, and a finished cell can be taken from
another run. What does not matter to a kind is left out: multiple choice and perplexity know no template and no
decoding, greedy decoding no seed. What a server runs cannot be hashed: its cells hold its name, address and
model, and are never taken from another run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine import templates
from engine.errors import BadRecipeError
from engine.evaluate.config import Decoding, EvalConfig, GgufFile, Server, Task
from engine.evaluate.summary import label_of
from engine.weights import Adapter, Checkpoint
from engine.weights.tensorfile import file_sha256

FORMAT = "medmerge.eval/2"  # raised when prompts or scoring change: old cells are then computed anew
READABLE = ("medmerge.eval/1", FORMAT)  # of runs whose rows can still be read
GREEDY_FIELDS = ("name", "temperature", "max_new_tokens")
TEXT_KINDS = ("generation", "probes", "instructions", "generated_choice")  # a model writes an answer
TOGETHER = 4  # batches of texts that are generated as one: freed places are taken by the next prompts
SERVER_TEMPLATE = "server"  # the name of the unknown template of a chat server
# What a task says beyond its name, data and limit, by kind of cell; left out of the hash where it is the default.
_TASK_FIELDS = (
    "half",
    "replace",
    "empty",
    "header",
    "where",
    "columns",
    "prompt",
    "answers",
    "shuffle",
    "language",
    "instruction",
    "style",
    "description",
)


@dataclass(frozen=True)
class Cell:
    """kind: a task's kind, `references` (the likelihood of a generation task's reference answers) or
    `generated_choice` (multiple choice by a letter the model writes). model: None for a mixture."""

    kind: str
    task: Task
    weights: dict[str, float]
    template: str  # "" where no chat template is used
    decoding: Decoding | None
    seed: int | None
    spec: dict[str, Any]  # everything the rows depend on, as JSON values
    model: GgufFile | Server | None = None

    @cached_property
    def hash(self) -> str:
        text = json.dumps(self.spec, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The model's name in tables."""
        return label_of(self.spec)

    @property
    def title(self) -> str:
        """For progress and logs: `PT30 SFT70 · medquad_short · greedy`."""
        name = f"{self.task.name} references" if self.kind == "references" else self.task.name
        parts = [self.label, name, self.decoding.name if self.decoding else ""]
        parts.append(f"seed {self.seed}" if self.seed is not None else "")
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Identity:
    """What runs: hashes of the base, the adapters and the GGUF files, how weights are rounded and multiplied."""

    base_name: str
    base_sha256: str
    adapters: dict[str, str]
    dtype: str
    compute: str
    device: str
    gguf: dict[str, str] = field(default_factory=dict)  # name -> SHA-256 of the file

    @classmethod
    def of(
        cls, base: Checkpoint | None, adapters: Mapping[str, Adapter], dtype: str, compute: str, device: str,
        gguf: Sequence[GgufFile] = (),
    ) -> Identity:  # fmt: skip
        return cls(
            base.name if base else "",
            base_sha256(base) if base else "",
            {label: a.sha256 for label, a in adapters.items()},
            dtype,
            compute,
            device,
            {file.name: file_sha256(file.path) for file in gguf},
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
    """All cells, model by model (writing a mixture, loading a file is done once), in the order of the config.

    A server gives texts only: what needs the likelihood of tokens is left out for it.

    Raises BadRecipeError when two models would have one label: a table would add up the rows of both.
    """
    _check_labels([about for _, _, about in _models(config, identity)])
    data = {task.data: file_sha256(task.data) for task in config.tasks}
    cells: list[Cell] = []
    for weights, model, about in _models(config, identity):
        for task in config.tasks:
            for kind, template, decoding, seed in _settings(config, task):
                if isinstance(model, Server):
                    if kind not in TEXT_KINDS:
                        continue
                    if model.api == "chat":  # the server's own template, so once
                        if template != config.templates[0]:
                            continue
                        template = SERVER_TEMPLATE
                spec: dict[str, Any] = {
                    "format": FORMAT,
                    "kind": kind,
                    "task": _task_spec(task, kind, data[task.data]),
                    **about,
                    "batch_size": config.batch_size,
                    "template": template,
                    "decoding": _decoding_spec(decoding),
                    "seed": seed,
                }
                if text := _template_sha256(template, model, config):
                    spec["template_sha256"] = text
                if model is None and kind in TEXT_KINDS:
                    spec["together"] = TOGETHER
                cells.append(Cell(kind, task, weights, template, decoding, seed, spec, model))
    return cells


def _check_labels(models: Sequence[Mapping[str, Any]]) -> None:
    found: dict[str, Mapping[str, Any]] = {}
    for about in models:
        label = label_of(about)
        if label in found:
            first, second = _in_words(found[label]), _in_words(about)
            raise BadRecipeError(
                f"{first} and {second} would both be called {label!r} in tables",
                "give a file or server another `name`"
                if about.get("model")
                else "label adapters by more than the case of letters, and give weights at most six digits",
            )
        found[label] = about


def _in_words(about: Mapping[str, Any]) -> str:
    model = about.get("model")
    if model:
        return f"{model['kind']} {about['base']['name']}"
    mixture = {label: weight for label, weight in about["weights"].items() if weight}
    return f"the mixture {mixture}" if mixture else f"the base {about['base']['name']}"


def _template_sha256(template: str, model: GgufFile | Server | None, config: EvalConfig) -> str:
    """Hash of the template's text where no other hash in the spec covers it: a model's own is in its files."""
    if template in ("", SERVER_TEMPLATE):
        return ""
    if template != "model":
        return str(templates.describe(templates.load(template))["sha256"])
    if isinstance(model, Server) and config.base is not None:
        return str(templates.describe(templates.load(template, config.base))["sha256"])
    return ""


def _models(
    config: EvalConfig, identity: Identity
) -> Iterator[tuple[dict[str, float], GgufFile | Server | None, dict[str, Any]]]:
    """(weights, file or server, what it adds to a cell's spec) of every model that is measured."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    if config.base is not None:
        for weights in config.weights:
            yield (
                weights,
                None,
                {
                    "base": {"name": identity.base_name, "sha256": identity.base_sha256},
                    "adapters": identity.adapters,
                    "weights": weights,
                    "dtype": identity.dtype,
                    "compute": identity.compute,
                    "device": identity.device,
                    "versions": versions,
                },
            )
    library = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    for file in config.gguf:
        yield {}, file, {
            "model": {"kind": "gguf", "name": file.name},
            "base": {"name": file.path.name, "sha256": identity.gguf[file.name]},
            "adapters": {}, "weights": {}, "dtype": "gguf", "compute": "llama.cpp", "device": config.device,
            "versions": library,
        }  # fmt: skip
    for server in config.servers:
        yield {}, server, {
            "model": {
                "kind": "server", "name": server.name, "url": server.url, "model": server.model, "api": server.api,
            },
            "base": {"name": server.model or server.name, "sha256": ""},
            "adapters": {}, "weights": {}, "dtype": "", "compute": "server", "device": "", "versions": {},
        }  # fmt: skip


def _settings(config: EvalConfig, task: Task) -> list[tuple[str, str, Decoding | None, int | None]]:
    """(kind, template, decoding, seed) of every cell of a task for one mixture."""
    generated = task.kind == "multiple_choice" and task.scoring == "generated"
    if task.kind in ("multiple_choice", "perplexity") and not generated:
        return [(task.kind, "", None, None)]
    kind = "generated_choice" if generated else task.kind
    found: list[tuple[str, str, Decoding | None, int | None]] = []
    for template in config.templates:
        if task.kind == "generation" and task.references:
            found.append(("references", template, None, None))
        for decoding in config.decoding:
            if task.max_new_tokens is not None:
                decoding = replace(decoding, max_new_tokens=task.max_new_tokens)
            seeds = (None,) if decoding.greedy else config.seeds
            found += [(kind, template, decoding, seed) for seed in seeds]
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
    for name in _TASK_FIELDS:
        value = getattr(task, name)
        if value != Task.__dataclass_fields__[name].default and value not in ({}, None):
            spec[name] = value
    return spec


def _decoding_spec(decoding: Decoding | None) -> dict[str, Any] | None:
    if decoding is None:
        return None
    names = GREEDY_FIELDS if decoding.greedy else tuple(Decoding.__dataclass_fields__)
    return {name: getattr(decoding, name) for name in names}
