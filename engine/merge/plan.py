"""The recipe resolved tensor by tensor: which changes and numbers, where every byte goes, before any is written.

`engine.merge.numbers` gives every tensor its weights, `engine.merge.layout` its place; `engine.merge.stream`
executes a Plan, `engine.merge.forecast` adds what it will cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.merge import inputs as opened
from engine.merge import numbers
from engine.merge.inputs import Inputs, open_inputs
from engine.merge.layout import EMBEDDINGS, HEAD, Layout, Part, ShardPlan, TensorPlan
from engine.merge.recipe import DTYPES, TRIMS, Recipe
from engine.merge.selectors import DEFAULT, layer_count, resolve
from engine.template_check import agreed, of_adapter
from engine.weights import Adapter, Checkpoint, LoraFactor
from engine.weights.changes import Dora
from engine.weights.identity import TrainedOn, base_warnings, compare_bases, noted_sha256


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    recipe: Recipe
    inputs: Inputs
    shards: tuple[ShardPlan, ...]
    weights: dict[str, dict[str, float]]  # label -> tensor name -> weight as asked, zeros included
    counted: dict[str, dict[str, float]]  # the same as they count: after normalize, and lambda where linear
    densities: dict[str, dict[str, float]]  # the same for density; empty where the method trims nothing
    selectors: dict[str, dict[str, int]]  # label -> selector -> number of tensors it decided
    untied: bool  # the output stores a head of its own where the base shares its embeddings
    warnings: tuple[str, ...]

    @property
    def base(self) -> Checkpoint:
        """The reference: the base, or the first model."""
        return self.inputs.reference

    @property
    def adapters(self) -> dict[str, Adapter]:
        return self.inputs.adapters

    @property
    def tensors(self) -> Iterator[TensorPlan]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def changed(self) -> list[TensorPlan]:
        """Tensors to which something is added."""
        return [tensor for tensor in self.tensors if tensor.parts]

    @property
    def input_files(self) -> list[Path]:
        """Every file whose bytes decide the result."""
        models = [self.base, *(m for m in self.inputs.models.values() if m is not self.base)]
        files = [shard.path for model in models for shard in model.shards]
        files += [path for model in models for path in model.companions if path.suffix == ".json"]
        for adapter in self.adapters.values():
            files += [adapter.file.path, adapter.folder / "adapter_config.json"]
        return [path for path in files if path.is_file()]

    @property
    def bytes_read(self) -> int:
        others = [m for m in self.inputs.models.values() if m is not self.base]
        return (
            self.base.nbytes
            + sum(adapter.nbytes for adapter in self.adapters.values())
            + sum(model.nbytes for model in others)
        )

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def dtype(self) -> str:
        """Name of the output's dtype: the recipe's, else the base's ("bfloat16")."""
        names = {code: name for name, code in DTYPES.items()}
        return self.recipe.dtype or names.get(self.base.dtype, self.base.dtype)

    @property
    def asked(self) -> dict[str, Any]:
        """The weights as asked: a number per label, or selectors and gradients where there are several."""
        listed = self.recipe.to_dict()["models" if self.recipe.models else "adapters"]
        return {label: entry["weight"] for label, entry in listed.items()}

    @cached_property
    def trained_on(self) -> dict[str, TrainedOn]:
        """Whether each adapter was trained on this base, as far as that is known without reading its weights."""
        return compare_bases(self.adapters, self.base, noted_sha256(self.base))

    @property
    def base_warnings(self) -> list[str]:
        """What `trained_on` warns of: for a plan. A merge compares the hashes it takes, and warns of those."""
        return base_warnings(self.trained_on)

    @property
    def not_linear_adapters(self) -> tuple[str, ...]:
        """Labels of adapters whose delta is the straight line to a DoRA weight, which a screen should say."""
        return tuple(
            label
            for label, made in self.inputs.changes.items()
            if any(isinstance(c, Dora) for c in made.values())
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON. `tensors` lists only those that change."""
        return {
            "recipe": self.recipe.to_dict(),
            "output": str(self.recipe.output),
            "dtype": self.dtype,
            "method": self.recipe.method,
            "base": {"name": self.base.name, "parameters": self.base.parameters, "dtype": self.base.dtype},
            "adapters": {
                label: {
                    "name": adapter.name,
                    "rank": adapter.rank,
                    "scales": list(adapter.scales),
                    "tensors": len(self.weights[label]),
                    "selectors": self.selectors[label],
                    "trained_on": self.trained_on[label].to_dict() if label in self.trained_on else None,
                }
                for label, adapter in self.adapters.items()
            },
            "models": {
                label: {
                    "name": model.name,
                    "tensors": len(self.weights[label]),
                    "selectors": self.selectors[label],
                }
                for label, model in self.inputs.models.items()
            },
            "shards": len(self.shards),
            "tensors_changed": len(self.changed),
            "tensors_copied": sum(1 for tensor in self.tensors if tensor.copied),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "warnings": [*self.warnings, *self.base_warnings],
            "tensors": [
                {
                    "name": tensor.target.name,
                    "shape": list(tensor.target.shape),
                    "dtype": tensor.target.dtype,
                    "parts": self._numbers(tensor),
                }
                | ({"t": tensor.t} if self.recipe.method == "slerp" else {})
                for tensor in self.changed
            ],
        }

    def _numbers(self, tensor: TensorPlan) -> dict[str, dict[str, Any]]:
        """What each entry counts in a tensor, by label: also the reference's own, and weights and densities of 0."""
        name, parts = tensor.target.name, {part.label: part for part in tensor.parts}
        found: dict[str, dict[str, Any]] = {}
        for label, own in self.counted.items():
            if label in parts:
                found[label] = _part_dict(parts[label], self.recipe)
            elif name in own:
                kept = self.densities.get(label, {})
                found[label] = {"weight": own[name]} | ({"density": kept[name]} if name in kept else {})
        return found


def _part_dict(part: Part, recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = {"weight": part.weight}
    if isinstance(part.change, LoraFactor):
        found |= {"scale": part.change.scale, "rank": part.change.rank}
    elif part.change is not None:
        found["kind"] = type(part.change).__name__.lower() if recipe.adapters else "model"
    if recipe.method in TRIMS:
        found["density"] = part.density
    return found


def make_plan(recipe: Recipe) -> Plan:
    """Open the inputs by header and resolve the recipe. Reads no weights and writes nothing.

    Raises:
        BadModelError, BadAdapterError, BadTensorFileError: inputs that cannot be merged, by name.
        BadRecipeError: weights or outputs that make no sense with these inputs.
    """
    inputs = open_inputs(recipe)
    refuse_overlap(recipe)
    layers = layer_count(inputs.reference.tensors)
    weights: dict[str, dict[str, float]] = {}
    densities: dict[str, dict[str, float]] = {}
    selectors: dict[str, dict[str, int]] = {}
    whole = [name for name, tensor in inputs.reference.tensors.items() if tensor.is_float]
    for entry in recipe.entries:
        names = list(inputs.changes[entry.label]) or whole
        weights[entry.label], selectors[entry.label] = resolve(entry.weights, names, entry.label, layers)
        if recipe.method in TRIMS:
            densities[entry.label] = numbers.densities(entry, recipe, names, layers)
    counted, base_weights = numbers.counted(recipe, weights)
    t = numbers.t_of(recipe, inputs, layers) if recipe.method == "slerp" else {}
    parts = {
        name: numbers.parts(name, recipe, inputs, counted, densities)
        for name in dict.fromkeys(name for changed in inputs.changes.values() for name in changed)
    }
    untied = inputs.reference.tied and any(
        made and name.endswith((*EMBEDDINGS, HEAD)) for name, made in parts.items() if recipe.adapters
    )
    layout = Layout(recipe, parts, base_weights, t, untied, HEAD in inputs.reference.tensors)
    shards = tuple(layout.shard(shard) for shard in inputs.reference.shards)
    return Plan(
        recipe, inputs, shards, weights, counted, densities, selectors, untied,
        tuple(_warnings(recipe, inputs, selectors, untied)),
    )  # fmt: skip


def refuse_broken_adapters(plan: Plan) -> None:
    """Read every adapter once and raise BadAdapterError for the first that holds NaN or infinity."""
    opened.refuse_broken_adapters(plan.inputs)


def refuse_overlap(recipe: Recipe) -> None:
    """Raise BadRecipeError when the output is, contains, or lies inside an input."""
    output = recipe.output.resolve()
    named = [("the base", recipe.base)] if recipe.base else []
    for what, path in [*named, *((f"{entry.kind} {entry.label}", entry.path) for entry in recipe.entries)]:
        inside = path.resolve()
        if output == inside or output in inside.parents or inside in output.parents:
            relation = "is" if output == inside else "contains" if output in inside.parents else "is inside"
            raise BadRecipeError(
                f"the output {recipe.output} {relation} {what} ({path})", "choose a folder outside the inputs"
            )


def _other_base(label: str, adapter: Adapter, base: Checkpoint) -> str:
    """The base that an adapter's config or training.json names, where it is called otherwise and not known to be it."""
    noted = compare_bases({label: adapter}, base, noted_sha256(base)).get(label)
    if noted and noted.same:
        return ""
    here = {base.name.lower(), base.folder.name.lower()}
    named = [adapter.base_name, noted.name if noted else ""]
    return next((name for name in named if name and Path(name).name.lower() not in here), "")


def _warnings(
    recipe: Recipe, inputs: Inputs, selectors: dict[str, dict[str, int]], untied: bool
) -> Iterator[str]:
    base = inputs.reference
    for entry in recipe.entries:
        for selector, count in selectors[entry.label].items():
            if count == 0 and selector != DEFAULT:
                yield f"{entry.kind} {entry.label}: later selectors override {selector!r} everywhere"
            elif count == 0:
                yield f"{entry.kind} {entry.label}: its default weight is used by no tensor"
        if entry.uniform == 0 and recipe.method == "slerp":
            yield f"{entry.kind} {entry.label} has weight 0: its end of the arc is {base.name} itself"
        elif entry.uniform == 0:
            yield f"{entry.kind} {entry.label} has weight 0: it changes nothing"
    for label, adapter in inputs.adapters.items():
        if other := _other_base(label, adapter, base):
            yield f"adapter {label} names another base: {other} (shapes do fit {base.folder.name})"
        if any(isinstance(change, Dora) for change in inputs.changes[label].values()):
            yield (
                f"adapter {label} is DoRA: its weight goes straight from the base to the adapted weight, "
                "which is not what a weight inside DoRA would mean; at 0 and 1 both agree"
            )
    trained = [of_adapter(label, adapter) for label, adapter in inputs.adapters.items()]
    taught = [one for one in trained if one.template]
    if taught and agreed(taught) is None:
        named = ", ".join(f"{one.label} with {one.template}" for one in taught)
        yield f"the adapters were trained with different chat templates: {named}"
    paths = [entry.path.resolve() for entry in recipe.entries]
    if len(set(paths)) < len(paths):
        yield "the same folder is named twice: their weights cannot be told apart afterwards"
    if untied:
        yield (
            f"{base.folder} shares its embeddings with its head, and an adapter changes one of them: the merge "
            "stores both (tie_word_embeddings: false)"
        )
    for (label, name), rows in inputs.rows.items():
        yield f"model {label}: {int((rows >= 0).sum()):,} of {len(rows):,} rows of {name} are merged, by token"
    if not any(path.name.startswith("tokenizer") for path in base.companions):
        yield f"{base.folder} has no tokenizer: the merge will have none either"
    if list(base.folder.glob("*.py")):
        yield f"{base.folder} carries its own Python code, which is not copied and never run"
