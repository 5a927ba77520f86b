"""What was asked, tensor by tensor: adapters and models opened by header and turned into tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.errors import BadModelError, BadRecipeError
from engine.merge.verify.asked import Asked, AskedEntry
from engine.merge.verify.deltas import read_deltas, reference
from engine.merge.verify.formulas import Task
from engine.merge.verify.rounding import FORMATS, Array
from engine.merge.verify.terms import Term
from engine.merge.verify.tokens import common_rows, is_table, token_ids
from engine.merge.verify.whole import Nothing, Whole
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorInfo


@dataclass
class Models:
    """The reference (the base, or the first model), the merge, and what every touched tensor should have become.

    `implied` is the label whose weight is what the others leave of the whole: the first model, without a base.
    """

    base: Checkpoint
    merged: Checkpoint
    asked: Asked
    terms: dict[str, list[Term]] = field(default_factory=dict)
    implied: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels whose weights a fit can find."""
        return tuple(label for label in self.asked.labels if label != self.implied)

    def task(self, name: str, pair: tuple[TensorInfo, TensorInfo], asked: Asked) -> Task:
        """What `asked` (these models at any weights) wants of one tensor."""
        terms = tuple(self.terms[name])
        entries = {entry.label: entry for entry in asked.entries}
        own = [entries[term.label] for term in terms]
        counted = own if self.implied is None else [entries[self.implied], *own]
        return Task(
            name, *pair, terms,
            weights=np.array([entry.weight_of(name) for entry in own]),
            densities=np.array([entry.density_of(name) for entry in own]),
            method=asked.method, t=asked.t_of(name), lam=asked.lam, normalize=asked.normalizes,
            rescale=asked.rescale, seed=asked.seed, of_models=asked.models,
            total=sum(entry.weight_of(name) for entry in counted),
        )  # fmt: skip


def open_models(merged: Path, base: Path | None, asked: Asked) -> Models:
    """Open everything by header.

    Raises:
        BadModelError, BadTensorFileError, BadAdapterError: an input that cannot be read or does not belong.
        BadRecipeError: no base where one is needed.
    """
    asked.check()
    first = asked.entries[0]
    if base is None and (not asked.models or asked.method not in ("linear", "soup", "slerp")):
        raise BadRecipeError(
            f"a {asked.method} merge is seen from its base, and none is given", "give it: --base"
        )
    origin = Checkpoint.open(base or first.path)
    models = Models(origin, Checkpoint.open(merged), asked, implied=first.label if base is None else None)
    for entry in asked.entries:
        if entry.kind == "adapter":
            for name, term in read_deltas(entry.label, entry.path, origin).items():
                models.terms.setdefault(name, []).append(term)
    _add_models(models)
    if asked.method == "slerp":
        for name, terms in models.terms.items():
            by_label = {term.label: term for term in terms}
            shape = terms[0].shape
            models.terms[name] = [
                by_label.get(label) or Nothing(label, name, shape) for label in asked.labels
            ]
        models.implied = None
    return models


def _add_models(models: Models) -> None:
    origin, asked = models.base, models.asked
    entries = [entry for entry in asked.entries if entry.kind == "model"]
    if not entries:
        return
    opened = {entry.label: Checkpoint.open(entry.path) for entry in entries}
    own = token_ids(origin.folder)
    others = {label: token_ids(model.folder) for label, model in opened.items()}
    moved = {label: ids for label, ids in others.items() if own and ids and ids != own}
    every = {label: ids for label, ids in others.items() if ids}
    for name, held in origin.tensors.items():
        if held.dtype not in FORMATS:
            continue
        found = {entry.label: _of(entry, opened[entry.label], name) for entry in entries}
        rows: dict[str, Array] = {}
        if own and moved and is_table(name) and asked.vocabulary == "intersection":
            length = held.shape[0]
            rows = common_rows(own, length, every, {label: info.shape[0] for label, info in found.items()})
        for label, info in found.items():
            keep = label in moved and is_table(name) and asked.vocabulary == "keep_first"
            if label == models.implied or keep:
                continue
            term = Whole(label, name, info, rows.get(label))
            if term.shape != held.shape or info.dtype not in FORMATS:
                raise BadModelError(
                    f"{info.file}: {name} is {info.dtype} {list(info.shape)}, and {held.dtype} {list(held.shape)} "
                    f"in {origin.folder}",
                    "the models do not have the same shape",
                )
            models.terms.setdefault(name, []).append(term)


def _of(entry: AskedEntry, model: Checkpoint, name: str) -> TensorInfo:
    info = reference(model, name)
    if info is None:
        raise BadModelError(
            f"{entry.path} ({entry.label}) has no tensor {name}", "it is another architecture"
        )
    return info
