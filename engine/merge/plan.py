"""The recipe resolved tensor by tensor: which factors and weights, where every byte goes, before any is written.

Where the dtype stays, a shard's header is the input's own, byte for byte, so every offset is known; where it
changes, the new header is laid out here. `engine.merge.stream` executes a Plan, `engine.merge.forecast` adds
what it will cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadAdapterError, BadModelError, BadRecipeError
from engine.merge.recipe import DTYPES, Recipe
from engine.merge.selectors import DEFAULT, resolve
from engine.weights import Adapter, Checkpoint, LoraFactor, TensorFile, TensorInfo
from engine.weights.tensorfile import ITEM_SIZE, encode_header, read_rows

MERGEABLE_DTYPES = ("F32", "F16", "BF16")
_TIED_NAMES = ("lm_head.weight", "embed_tokens.weight", "wte.weight", "embed_out.weight")


@dataclass(frozen=True)
class Part:
    """One adapter's share in one tensor: weight * factor.scale * B @ A."""

    label: str
    factor: LoraFactor
    weight: float


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: where it is read, where it is written, what is added (nothing: copied)."""

    source: TensorInfo
    target: TensorInfo
    parts: tuple[Part, ...]

    @property
    def copied(self) -> bool:
        """Its bytes are the input's: nothing is added and the dtype stays."""
        return not self.parts and self.source.dtype == self.target.dtype


@dataclass(frozen=True)
class ShardPlan:
    """One output file: same name as the input shard. `header` is the 8 length bytes and the JSON."""

    source: TensorFile
    name: str
    header: bytes
    tensors: tuple[TensorPlan, ...]
    size: int


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    recipe: Recipe
    base: Checkpoint
    adapters: dict[str, Adapter]
    shards: tuple[ShardPlan, ...]
    weights: dict[str, dict[str, float]]  # label -> base tensor name -> weight, zeros included
    selectors: dict[str, dict[str, int]]  # label -> selector -> number of tensors it decided
    warnings: tuple[str, ...]

    @property
    def tensors(self) -> Iterator[TensorPlan]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def changed(self) -> list[TensorPlan]:
        """Tensors to which something is added."""
        return [tensor for tensor in self.tensors if tensor.parts]

    @property
    def bytes_read(self) -> int:
        return self.base.nbytes + sum(adapter.nbytes for adapter in self.adapters.values())

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def dtype(self) -> str:
        """Name of the output's dtype: the recipe's, else the base's ("bfloat16")."""
        names = {code: name for name, code in DTYPES.items()}
        return self.recipe.dtype or names.get(self.base.dtype, self.base.dtype)

    @property
    def asked(self) -> dict[str, float | dict[str, float]]:
        """The weights as asked: a number per label, or selectors where there are several."""
        return {
            entry.label: dict(entry.weights) if entry.uniform is None else entry.uniform
            for entry in self.recipe.adapters
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON. `tensors` lists only those that change."""
        return {
            "recipe": self.recipe.to_dict(),
            "output": str(self.recipe.output),
            "dtype": self.dtype,
            "base": {"name": self.base.name, "parameters": self.base.parameters, "dtype": self.base.dtype},
            "adapters": {
                label: {
                    "name": adapter.name,
                    "rank": adapter.rank,
                    "scales": list(adapter.scales),
                    "tensors": len(self.weights[label]),
                    "selectors": self.selectors[label],
                }
                for label, adapter in self.adapters.items()
            },
            "shards": len(self.shards),
            "tensors_changed": len(self.changed),
            "tensors_copied": sum(1 for tensor in self.tensors if tensor.copied),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "warnings": list(self.warnings),
            "tensors": [
                {
                    "name": tensor.target.name,
                    "shape": list(tensor.target.shape),
                    "dtype": tensor.target.dtype,
                    "parts": {
                        part.label: {
                            "weight": part.weight,
                            "scale": part.factor.scale,
                            "rank": part.factor.rank,
                        }
                        for part in tensor.parts
                    },
                }
                for tensor in self.changed
            ],
        }


def make_plan(recipe: Recipe) -> Plan:
    """Open the inputs by header and resolve the recipe. Reads no weights and writes nothing.

    Raises:
        BadModelError, BadAdapterError, BadTensorFileError: inputs that cannot be merged, by name.
        BadRecipeError: weights or outputs that make no sense with these inputs.
    """
    base = Checkpoint.open(recipe.base)
    _refuse_base(base)
    adapters = {entry.label: Adapter.open(entry.path) for entry in recipe.adapters}
    parts: dict[str, list[Part]] = {}
    weights: dict[str, dict[str, float]] = {}
    selectors: dict[str, dict[str, int]] = {}
    for entry in recipe.adapters:
        factors = adapters[entry.label].match(base)
        _refuse_tied(base, factors, adapters[entry.label])
        weights[entry.label], selectors[entry.label] = resolve(entry.weights, factors, entry.label)
        for name, factor in factors.items():
            if base.tensors[name].dtype not in MERGEABLE_DTYPES:
                raise BadModelError(
                    f"{base.tensors[name].file}: {name} is {base.tensors[name].dtype}, and only "
                    f"{', '.join(MERGEABLE_DTYPES)} can be merged into",
                    "use the base before it was quantised",
                )
            if weights[entry.label][name] != 0.0:  # a weight of 0 leaves the base's bytes alone
                parts.setdefault(name, []).append(Part(entry.label, factor, weights[entry.label][name]))
    refuse_overlap(recipe)
    return Plan(
        recipe=recipe,
        base=base,
        adapters=adapters,
        shards=tuple(_plan_shard(recipe, shard, parts) for shard in base.shards),
        weights=weights,
        selectors=selectors,
        warnings=tuple(_warnings(recipe, base, adapters, selectors)),
    )


def refuse_broken_adapters(plan: Plan) -> None:
    """Read every factor once and raise BadAdapterError for the first that holds NaN or infinity."""
    for adapter in plan.adapters.values():
        for factor in adapter.factors.values():
            for info in (factor.a, factor.b):
                if not np.isfinite(read_rows(info)).all():
                    raise BadAdapterError(
                        f"{info.file}: {info.name} holds NaN or infinity",
                        "this adapter is broken: train it again, or use an earlier checkpoint of its run",
                    )


def refuse_overlap(recipe: Recipe) -> None:
    """Raise BadRecipeError when the output is, contains, or lies inside an input."""
    output = recipe.output.resolve()
    for what, path in [("the base", recipe.base)] + [
        (f"adapter {entry.label}", entry.path) for entry in recipe.adapters
    ]:
        inside = path.resolve()
        if output == inside or output in inside.parents or inside in output.parents:
            relation = "is" if output == inside else "contains" if output in inside.parents else "is inside"
            raise BadRecipeError(
                f"the output {recipe.output} {relation} {what} ({path})", "choose a folder outside the inputs"
            )


def _refuse_base(base: Checkpoint) -> None:
    if base.config.get("quantization_config"):
        raise BadModelError(
            f"{base.folder / 'config.json'} has quantization_config: quantised weights cannot be merged exactly",
            "use the base before it was quantised",
        )


def _refuse_tied(base: Checkpoint, factors: dict[str, LoraFactor], adapter: Adapter) -> None:
    if not base.tied:
        return
    for name in factors:
        if name.endswith(_TIED_NAMES):
            raise BadAdapterError(
                f"{adapter.file.path}: changes {name}, and {base.folder} ties its embeddings, so both sides would "
                "change",
                "this version does not merge into tied embeddings; train without embed_tokens and lm_head",
            )


def _plan_shard(recipe: Recipe, shard: TensorFile, parts: dict[str, list[Part]]) -> ShardPlan:
    path = recipe.output / shard.path.name
    changed = DTYPES[recipe.dtype] if recipe.dtype else None
    dtypes = {
        name: changed if changed and tensor.dtype in MERGEABLE_DTYPES else tensor.dtype
        for name, tensor in shard.tensors.items()
    }
    if all(dtypes[name] == tensor.dtype for name, tensor in shard.tensors.items()):
        header = shard.header
    else:
        header = encode_header(
            [(t.name, dtypes[t.name], t.shape) for t in shard.tensors.values()], shard.metadata
        )
    position, tensors = len(header), []
    for tensor in shard.tensors.values():
        nbytes = tensor.elements * ITEM_SIZE[dtypes[tensor.name]]
        target = TensorInfo(tensor.name, dtypes[tensor.name], tensor.shape, path, position, nbytes)
        tensors.append(TensorPlan(tensor, target, tuple(parts.get(tensor.name, ()))))
        position += nbytes
    return ShardPlan(shard, shard.path.name, header, tuple(tensors), position)


def _warnings(
    recipe: Recipe, base: Checkpoint, adapters: dict[str, Adapter], selectors: dict[str, dict[str, int]]
) -> Iterator[str]:
    for label, counts in selectors.items():
        for selector, count in counts.items():
            if count == 0 and selector != DEFAULT:
                yield f"adapter {label}: later selectors override {selector!r} everywhere"
            elif count == 0:
                yield f"adapter {label}: its default weight is used by no tensor"
        if not any(
            weight != 0 for weight in next(e.weights for e in recipe.adapters if e.label == label).values()
        ):
            yield f"adapter {label} has weight 0: it changes nothing"
    for label, adapter in adapters.items():
        named = Path(adapter.base_name).name.lower()
        if named and named not in {base.name.lower(), base.folder.name.lower()}:
            yield f"adapter {label} names another base: {adapter.base_name} (shapes do fit {base.folder.name})"
    templates = {adapter.template for adapter in adapters.values() if adapter.template}
    if len(templates) > 1:
        yield f"the adapters were trained with different chat templates: {', '.join(sorted(templates))}"
    paths = [entry.path.resolve() for entry in recipe.adapters]
    if len(set(paths)) < len(paths):
        yield "the same adapter folder is named twice: their weights cannot be told apart afterwards"
    if not any(path.name.startswith("tokenizer") for path in base.companions):
        yield f"{base.folder} has no tokenizer: the merge will have none either"
    if list(base.folder.glob("*.py")):
        yield f"{base.folder} carries its own Python code, which is not copied and never run"


def config_text(base: Checkpoint, dtype: str | None) -> str | None:
    """config.json of the output where the dtype changes, None where the input's is copied as it is."""
    if dtype is None or all(t.dtype in (DTYPES[dtype],) or not t.is_float for t in base.tensors.values()):
        return None
    config = dict(base.config)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = dtype
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
