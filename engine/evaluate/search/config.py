"""The config of a search: an evaluation's config of one mixture and one task, and a `search:` part.

base, adapters, dtype, compute, device, batch_size, templates     as in an evaluation (docs/evaluation.md)
weights: {pt: 0.3, sft: 0.7}          the asked mixture: what the search is compared with
tasks: [{name, kind, data, ...}]      one: generation (its references are scored), perplexity, multiple_choice
search: {groups: 4, kinds: false, low: 0, high: 1, grid: 5, evaluations: 100, seed: 42}
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.evaluate.config import EvalConfig, Task, parse_config, read_yaml

MOST_GRID_POINTS = 400
MEASURED = ("generation", "perplexity", "multiple_choice")


@dataclass(frozen=True)
class Settings:
    """How to search.

    groups: the layers are cut into so many ranges of equal length; each adapter has one weight in each.
    kinds: twice as many weights, attention apart from the rest of the layer (mlp, norms).
    low, high: every weight stays between them.
    grid: so many uniform weights per adapter from low to high, all combinations; then half steps around the best.
    evaluations: so many mixtures are tried by CMA-ES, starting at the best uniform one.
    seed: of CMA-ES.
    """

    groups: int = 4
    kinds: bool = False
    low: float = 0.0
    high: float = 1.0
    grid: int = 5
    evaluations: int = 100
    seed: int = 42


@dataclass(frozen=True)
class SearchConfig:
    evaluation: EvalConfig
    settings: Settings

    @property
    def task(self) -> Task:
        return self.evaluation.tasks[0]

    @property
    def base(self) -> Path:
        if self.evaluation.base is None:  # parse_search wants adapters, and adapters a base
            raise BadRecipeError("a search needs a base")
        return self.evaluation.base

    @property
    def asked(self) -> dict[str, float]:
        return self.evaluation.weights[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, readable by `parse_search`."""
        return {**self.evaluation.to_dict(), "search": asdict(self.settings)}

    def limited(self, limit: int | None) -> SearchConfig:
        """The same with at most `limit` samples (both halves together)."""
        return replace(self, evaluation=self.evaluation.limited(limit))


def load_search(path: Path, workspace: Path | None = None) -> SearchConfig:
    """Read and check a YAML config; relative paths: from the workspace, then beside the config."""
    roots = [root for root in (workspace, path.parent.absolute()) if root is not None]
    return parse_search(read_yaml(path), str(path), roots)


def parse_search(raw: Any, where: str = "config", roots: Sequence[Path] = ()) -> SearchConfig:
    """A checked config from plain values; `where` begins every error.

    Raises BadRecipeError naming the key: what an evaluation refuses, more than one mixture, task or template, a
    task that has no likelihood, settings that make no sense.
    """
    if not isinstance(raw, Mapping):
        raise BadRecipeError(f"{where} should be a mapping of keys to values")
    rest = {key: value for key, value in raw.items() if key != "search"}
    settings = _settings(raw.get("search") or {}, where)
    evaluation = parse_config(rest, where, roots, mode="eval")
    if not evaluation.adapters:
        raise BadRecipeError(f"{where}: adapters is missing", "a search mixes adapters onto the base")
    for key, items in (("tasks", evaluation.tasks), ("templates", evaluation.templates)):
        if len(items) != 1:
            raise BadRecipeError(f"{where}: {key} holds {len(items)}, and a search has one objective")
    task = evaluation.tasks[0]
    if task.kind not in MEASURED:
        raise BadRecipeError(
            f"{where}: tasks[0].kind is {task.kind}, which has no likelihood",
            f"use one of {', '.join(MEASURED)}",
        )
    if task.scoring == "generated":
        raise BadRecipeError(
            f"{where}: tasks[0].scoring is generated, and the search scores likelihoods",
            "use letters or options",
        )
    if task.kind == "generation" and not task.references:
        raise BadRecipeError(f"{where}: tasks[0].references is false, and the search scores the references")
    for label, weight in evaluation.weights[0].items():
        if not settings.low <= weight <= settings.high:
            raise BadRecipeError(
                f"{where}: weights.{label} is {weight:g}, outside search.low {settings.low:g} to search.high "
                f"{settings.high:g}",
                "widen the bounds",
            )
    points = settings.grid ** len(evaluation.adapters)
    if points > MOST_GRID_POINTS:
        raise BadRecipeError(
            f"{where}: search.grid {settings.grid} with {len(evaluation.adapters)} adapters is {points} mixtures",
            f"at most {MOST_GRID_POINTS}: choose a smaller grid",
        )
    return SearchConfig(evaluation, settings)


def _settings(raw: Any, where: str) -> Settings:
    known = Settings.__dataclass_fields__
    if not isinstance(raw, Mapping):
        raise BadRecipeError(f"{where}: search should be a mapping, e.g. {{groups: 4}}")
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise BadRecipeError(f"{where}: search.{key} is not a known key", hint)
    values = {key: raw.get(key, field.default) for key, field in known.items()}
    for key, least in (("groups", 1), ("grid", 2), ("evaluations", 1), ("seed", 0)):
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadRecipeError(
                f"{where}: search.{key} should be a whole number of at least {least}, and is {value!r}"
            )
    for key in ("low", "high"):
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRecipeError(f"{where}: search.{key} should be a number, and is {value!r}")
        values[key] = float(value)
    if not isinstance(values["kinds"], bool):
        raise BadRecipeError(f"{where}: search.kinds should be true or false, and is {values['kinds']!r}")
    if not values["low"] < values["high"]:
        raise BadRecipeError(
            f"{where}: search.low {values['low']:g} is not below search.high {values['high']:g}"
        )
    return Settings(**values)
