"""What was asked of a merge, as the verifier takes it: numbers by tensor, no selectors, no defaults to look up.

Whoever checks a merge makes one (the merge job from its plan, `medmerge verify` from the manifest or flags).
It goes through JSON unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError

LINEAR = ("linear", "task_arithmetic", "soup")
TRIMMED = ("ties", "dare_linear", "dare_ties")
METHODS = (*LINEAR, "slerp", *TRIMMED)
KINDS = ("adapter", "model")
VOCABULARIES = ("error", "intersection", "keep_first")
DEFAULT = "default"


@dataclass(frozen=True)
class AskedEntry:
    """One adapter or full model.

    `weight` and `density` map base tensor names to numbers; the key `default` stands for all others.
    """

    label: str
    path: Path
    kind: str = "adapter"
    weight: Mapping[str, float] = field(default_factory=lambda: {DEFAULT: 1.0})
    density: Mapping[str, float] = field(default_factory=lambda: {DEFAULT: 1.0})

    @property
    def by_tensor(self) -> bool:
        return len(set(self.weight.values())) > 1

    def weight_of(self, tensor: str) -> float:
        return _value(self.weight, tensor, 0.0)

    def density_of(self, tensor: str) -> float:
        return _value(self.density, tensor, 1.0)


@dataclass(frozen=True)
class Asked:
    """method, entries and parameters. `normalize` None means the method's own default (see `normalizes`)."""

    method: str
    entries: tuple[AskedEntry, ...]
    t: Mapping[str, float] = field(default_factory=lambda: {DEFAULT: 0.5})
    lam: float = 1.0
    normalize: bool | None = None
    rescale: bool = True
    seed: int = 0
    vocabulary: str = "error"

    @classmethod
    def mixture(
        cls,
        adapters: Mapping[str, Path],
        weights: Mapping[str, float],
        per_tensor: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Asked:
        """W + sum of weight * delta of LoRA adapters: one weight a label, or weights by tensor."""
        entries = tuple(
            AskedEntry(
                label, path, weight={DEFAULT: weights.get(label, 0.0), **(per_tensor or {}).get(label, {})}
            )
            for label, path in adapters.items()
        )
        return cls("linear", entries)

    @classmethod
    def of_models(cls, models: Mapping[str, Path], weights: Mapping[str, float], from_base: bool) -> Asked:
        """Full models: W + sum of weight * (X - W), or without a base the mean sum of weight * X / sum of weights."""
        entries = tuple(
            AskedEntry(label, path, "model", {DEFAULT: weights.get(label, 0.0)})
            for label, path in models.items()
        )
        return cls("task_arithmetic" if from_base else "linear", entries)

    def weighted(self, weights: Mapping[str, float]) -> Asked:
        """The same at other weights, one a label."""
        entries = (replace(entry, weight={DEFAULT: weights[entry.label]}) for entry in self.entries)
        return replace(self, entries=tuple(entries))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(entry.label for entry in self.entries)

    @property
    def models(self) -> bool:
        """Full models are merged, not adapters."""
        return any(entry.kind == "model" for entry in self.entries)

    @property
    def linear(self) -> bool:
        """The merge is linear in the weights, so that they can be found by least squares."""
        return self.method in LINEAR

    @property
    def normalizes(self) -> bool:
        """Whether weights are divided by their sum: as asked, else ties, soup and linear of models do."""
        if self.normalize is not None:
            return self.normalize
        return self.method in ("ties", "soup") or (self.method == "linear" and self.models)

    def t_of(self, tensor: str) -> float:
        return _value(self.t, tensor, 0.5)

    def weights(self) -> dict[str, float]:
        """One number a label, for people: the default, else the first."""
        return {entry.label: _one(entry.weight) for entry in self.entries}

    @property
    def by_tensor(self) -> bool:
        """Some entry's weight differs between tensors, so that no one number says what was asked."""
        return any(entry.by_tensor for entry in self.entries)

    def check(self) -> None:
        """Raise BadRecipeError for what has no meaning."""
        if self.method not in METHODS:
            raise BadRecipeError(f"there is no method {self.method!r}", f"methods: {', '.join(METHODS)}")
        if self.vocabulary not in VOCABULARIES:
            raise BadRecipeError(
                f"vocabulary is {self.vocabulary!r}", f"expected one of {', '.join(VOCABULARIES)}"
            )
        if not self.entries:
            raise BadRecipeError(
                "no adapters to look for", "name them: --adapter pt=PATH:0.3 --adapter sft=PATH:0.7"
            )
        if len(set(self.labels)) != len(self.entries):
            raise BadRecipeError("two entries have the same label")
        if self.method == "slerp" and len(self.entries) != 2:
            raise BadRecipeError(f"slerp goes between two, and {len(self.entries)} are named")
        for entry in self.entries:
            if entry.kind not in KINDS:
                raise BadRecipeError(f"{entry.label} is a {entry.kind!r}, expected adapter or model")
            for weight in entry.weight.values():
                if not -1e9 < weight < 1e9:  # also refuses NaN
                    raise BadRecipeError(
                        f"the weight of {entry.label} is {weight}, which is not a usable number"
                    )
            for density in entry.density.values():
                if not 0 <= density <= 1:
                    raise BadRecipeError(
                        f"the density of {entry.label} is {density}, expected a number from 0 to 1"
                    )

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "entries": [
                {
                    "label": entry.label,
                    "path": str(entry.path),
                    "kind": entry.kind,
                    "weight": dict(entry.weight),
                    "density": dict(entry.density),
                }
                for entry in self.entries
            ],
            "t": dict(self.t),
            "lambda": self.lam,
            "normalize": self.normalize,
            "rescale": self.rescale,
            "seed": self.seed,
            "vocabulary": self.vocabulary,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Asked:
        """The inverse of `to_json`. Raises BadRecipeError naming the key that is missing or of a wrong type."""
        try:
            entries: Sequence[Mapping[str, Any]] = document["entries"]
            asked = cls(
                str(document["method"]),
                tuple(
                    AskedEntry(
                        str(entry["label"]),
                        Path(entry["path"]),
                        str(entry["kind"]),
                        _numbers(entry["weight"]),
                        _numbers(entry["density"]),
                    )
                    for entry in entries
                ),
                _numbers(document["t"]),
                float(document["lambda"]),
                None if document["normalize"] is None else bool(document["normalize"]),
                bool(document["rescale"]),
                int(document["seed"]),
                str(document["vocabulary"]),
            )
        except KeyError as error:
            raise BadRecipeError(f"what was asked has no {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise BadRecipeError(f"what was asked cannot be read: {error}") from error
        asked.check()
        return asked


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}


def _value(values: Mapping[str, float], tensor: str, missing: float) -> float:
    return values.get(tensor, values.get(DEFAULT, missing))


def _one(values: Mapping[str, float]) -> float:
    return values.get(DEFAULT, next(iter(values.values()), 0.0))
