"""What a recipe names, opened by header and checked against each other: which entry changes which tensor, how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.errors import BadAdapterError, BadModelError, BadRecipeError
from engine.merge.recipe import NEEDS_BASE, Entry, Recipe
from engine.merge.vocabulary import Rows, differences, is_table, read_vocabulary, row_map
from engine.weights import Adapter, Checkpoint
from engine.weights.changes import Change, Replacement, tensors_of
from engine.weights.tensorfile import TensorInfo, read_rows

MERGEABLE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Inputs:
    """The reference (base, or the first model), and for each entry the changes it makes by tensor name.

    The reference itself, where it is an entry, changes nothing: its mapping is empty. `rows` holds, for
    vocabulary tables whose tokens lie elsewhere in a model, which of its rows belongs to each of ours.
    """

    reference: Checkpoint
    adapters: dict[str, Adapter]
    models: dict[str, Checkpoint]
    changes: dict[str, dict[str, Change]]
    rows: dict[tuple[str, str], Rows]  # (label, tensor name)


def open_inputs(recipe: Recipe) -> Inputs:
    """Open every input of a recipe. Reads headers and tokenizers, no weights.

    Raises:
        BadModelError, BadAdapterError, BadTensorFileError: inputs that cannot be merged, by name.
        BadRecipeError: an entry that is the base itself.
    """
    reference = Checkpoint.open(recipe.reference)
    refuse_quantised(reference)
    adapters = {entry.label: Adapter.open(entry.path) for entry in recipe.adapters}
    models = {entry.label: _open_model(entry, reference) for entry in recipe.models}
    changes: dict[str, dict[str, Change]] = {}
    rows: dict[tuple[str, str], Rows] = {}
    for label, adapter in adapters.items():
        changes[label] = dict(adapter.changes(reference))
    for label, model in models.items():
        if model is reference and recipe.method in NEEDS_BASE:
            raise BadRecipeError(
                f"model {label} is the base itself ({model.folder})", "it changes nothing: leave it out"
            )
        if model is reference:
            changes[label] = {}
        else:
            changes[label], moved = _compare(recipe, reference, label, model)
            rows |= {(label, name): found for name, found in moved.items()}
    known = [label for label, model in models.items() if read_vocabulary(model.folder) is not None]
    rows = _rows_of_all(rows, {label: changes[label] for label in known})
    for label, changed in changes.items():
        for name in changed:
            tensor = reference.tensors.get(name)
            if tensor is not None and tensor.dtype not in MERGEABLE_DTYPES:
                raise BadModelError(
                    f"{tensor.file}: {name} is {tensor.dtype}, and only {', '.join(MERGEABLE_DTYPES)} can be "
                    f"merged into ({label} changes it)",
                    "use the model before it was quantised",
                )
    return Inputs(reference, adapters, models, changes, rows)


def _open_model(entry: Entry, reference: Checkpoint) -> Checkpoint:
    if entry.path.resolve() == reference.folder.resolve():
        return reference
    model = Checkpoint.open(entry.path)
    refuse_quantised(model)
    return model


def refuse_quantised(model: Checkpoint) -> None:
    if model.config.get("quantization_config"):
        raise BadModelError(
            f"{model.folder / 'config.json'} has quantization_config: quantised weights cannot be merged exactly",
            "use the model before it was quantised",
        )


def _compare(
    recipe: Recipe, reference: Checkpoint, label: str, model: Checkpoint
) -> tuple[dict[str, Change], dict[str, Rows]]:
    """What a model changes of the reference: every float tensor. Raises BadModelError where they do not fit."""
    first, other = (m.config.get("model_type") for m in (reference, model))
    if first != other:
        raise BadModelError(
            f"{model.folder} is a {other} model, and {reference.folder} a {first}",
            "only models of one architecture can be merged",
        )
    tables = _tables(recipe, reference, model)
    changes: dict[str, Change] = {}
    for name, tensor in reference.tensors.items():
        values = model.tensors.get(name)
        if values is None:
            raise BadModelError(
                f"{model.folder} has no tensor {name}, and {reference.folder} has",
                "one of them may tie its embeddings and the other not; they must have the same tensors",
            )
        if tables is not None and is_table(name):
            if recipe.vocabulary == "keep_first":
                continue
        elif values.shape != tensor.shape:
            raise BadModelError(
                f"{name} is {list(tensor.shape)} in {reference.folder}, and {list(values.shape)} in {model.folder}",
                "models must have the same shape; a table of tokens may differ with "
                "`vocabulary: intersection` or `keep_first`"
                if is_table(name)
                else "models must have the same shape",
            )
        if tensor.is_float != values.is_float or (tensor.is_float and values.dtype not in MERGEABLE_DTYPES):
            raise BadModelError(f"{values.file}: {name} is {values.dtype}, and {tensor.dtype} in the first")
        if tensor.is_float:
            changes[name] = Replacement(name.removesuffix(".weight"), values, name)
    strange = next((name for name in model.tensors if name not in reference.tensors), None)
    if strange:
        raise BadModelError(f"{model.folder} has {strange}, which {reference.folder} has not")
    moved: dict[str, Rows] = {}
    if tables is not None and recipe.vocabulary == "intersection":
        for name in changes:
            if is_table(name):
                size, there = reference.tensors[name].shape[0], model.tensors[name].shape[0]
                moved[name] = row_map(*tables, size, there)
    return changes, moved


def _rows_of_all(
    rows: dict[tuple[str, str], Rows], changes: dict[str, dict[str, Change]]
) -> dict[tuple[str, str], Rows]:
    """Row maps in which only tokens that every model has are found: the others stay the reference's in all.

    `changes` are those of models that have a tokenizer; nothing is known of the tokens of the others.
    """
    found = dict(rows)
    for table in {name for _, name in rows}:
        maps = [own for (_, name), own in rows.items() if name == table]
        everywhere = np.all([own >= 0 for own in maps], axis=0)
        for label, changed in changes.items():
            if table in changed:
                own = rows.get((label, table), np.arange(len(everywhere)))
                found[label, table] = np.where(everywhere, own, -1)
    return found


def _tables(
    recipe: Recipe, reference: Checkpoint, model: Checkpoint
) -> tuple[dict[str, int], dict[str, int]] | None:
    """Both vocabularies where they differ and the recipe says what to do then; None where they are the same."""
    first, other = read_vocabulary(reference.folder), read_vocabulary(model.folder)
    if first is None or other is None or first == other:
        return None
    if recipe.vocabulary == "error":
        raise BadModelError(
            f"the vocabularies of {reference.folder} and {model.folder} differ: "
            + "; ".join(differences(first, other)),
            "say what to do with `vocabulary:`: intersection (merge the tokens both have, by token) or "
            "keep_first (leave embeddings and head as the first model's)",
        )
    return first, other


def broken(change: Change) -> Iterator[TensorInfo]:
    """The tensors of an adapter's change that hold NaN or infinity. Reads them."""
    for info in tensors_of(change):
        step = max(1, (1 << 22) // max(1, info.columns))
        if any(
            not np.isfinite(read_rows(info, first, min(step, info.rows - first))).all()
            for first in range(0, info.rows, step)
        ):
            yield info


def refuse_broken_adapters(inputs: Inputs) -> None:
    """Read everything every adapter stores, once; BadAdapterError for the first NaN or infinity."""
    for label in inputs.adapters:
        for change in inputs.changes[label].values():
            for info in broken(change):
                raise BadAdapterError(
                    f"{info.file}: {info.name} holds NaN or infinity",
                    "this adapter is broken: train it again, or use an earlier checkpoint of its run",
                )
