"""The search job: try mixtures on the dev half, compare the winners on the held-out half, write their recipes.

Target `engine.evaluate.search.job:run` with params {"config": resolved config, "out": run folder, "merges": folder
the recipes' outputs lie in, "resume": bool}. Stopping it at any point loses at most one evaluation.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.atomic import write_json, write_text
from engine.evaluate.cells import Identity
from engine.evaluate.data import Sample
from engine.evaluate.job import compare_with_base, samples_of, warn_about_templates
from engine.evaluate.search import points, report
from engine.evaluate.search.config import SearchConfig, parse_search
from engine.evaluate.search.log import FORMAT, RESULT, SAMPLES, SearchLog, append_lines
from engine.evaluate.search.space import Point, Space, make_space
from engine.jobs.events import EventWriter
from engine.merge.selectors import layer_count
from engine.weights import Adapter, Checkpoint
from engine.weights.tensorfile import file_sha256

HALF_STEPS_OF = 3  # each adapter's weight may go half a step down, stay, or go up


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Search as the config says.

    Returns the comparison (engine/evaluate/search/report.py) with `run`, `task`, `trained_on` and `warnings` (as an
    evaluation has them), `n_dev`, `n_held_out`, `evaluations`,
    `uniform` {label: weight}, `dimensions` [{title, uniform, layerwise}], `recipes` {name: path},
    `seconds` and `exit_code` 0.
    """
    started = time.monotonic()
    config = parse_search(params["config"], "config")
    evaluation, settings = config.evaluation, config.settings
    base = Checkpoint.open(config.base)
    adapters = {label: Adapter.open(path) for label, path in evaluation.adapters.items()}
    tensors = {label: list(adapter.match(base)) for label, adapter in adapters.items()}
    space = make_space(tensors, layer_count(base.tensors), settings.groups, settings.kinds)
    task = config.task
    dev, held_out = report.split(samples_of(task))
    events.log(
        f"{len(space.dimensions)} weights; {len(dev)} samples to choose them on, {len(held_out)} held out"
    )
    warnings = warn_about_templates(evaluation, adapters, events)
    log, note = SearchLog(Path(params["out"])), _note(config, base, adapters, events)
    bases, others = compare_with_base(adapters, base, events, bool(params.get("strict_base", False)))
    with log.writing(note, bool(params.get("resume", False))):
        search = _Search(config, base, adapters, space, log, events, dev, held_out)
        asked = points.rounded([config.asked[label] for label in adapters])
        uniform, best = points.best_uniform(
            search.value, asked, search.spread, settings.low, settings.high, settings.grid
        )
        layerwise = points.layerwise(
            search.value, best, settings.low, settings.high, settings.evaluations, settings.seed
        )
        chosen = {"asked": search.spread(asked), "uniform": best.point, "layerwise": layerwise.point}
        rows = {name: search.compared(name, point) for name, point in chosen.items()}
        dev_values = {"asked": search.asked_value, "uniform": best.value, "layerwise": layerwise.value}
        result = {
            **report.compare(rows, dev_values),
            "run": str(log.folder),
            "task": task.name,
            "trained_on": bases,
            "warnings": [*warnings, *others],
            "n_dev": len(dev),
            "n_held_out": len(held_out),
            "evaluations": search.done,
            "uniform": dict(zip(adapters, uniform, strict=True)),
            "dimensions": [
                {"title": dimension.title, "uniform": u, "layerwise": w}
                for dimension, u, w in zip(space.dimensions, best.point, layerwise.point, strict=True)
            ],
            "recipes": _write_recipes(
                config, log.folder, Path(params["merges"]), dict(zip(adapters, uniform, strict=True)),
                space.selectors(layerwise.point),
            ),
        }  # fmt: skip
        write_json(log.folder / RESULT, result)
    search.finish()
    for row in result["candidates"]:
        events.row(**row)
    return {**result, "seconds": round(time.monotonic() - started, 1), "exit_code": 0}


class _Search:
    """What one job holds: the log, and the model once something must be measured."""

    def __init__(
        self,
        config: SearchConfig,
        base: Checkpoint,
        adapters: Mapping[str, Adapter],
        space: Space,
        log: SearchLog,
        events: EventWriter,
        dev: Sequence[Sample],
        held_out: Sequence[Sample],
    ) -> None:
        self.config, self.base, self.adapters, self.space = config, base, dict(adapters), space
        self.log, self.events, self.halves = log, events, {"dev": dev, "held_out": held_out}
        self.done = 0
        self.asked_value = float("nan")
        self._best = float("-inf")
        self._objectives: dict[str, Any] = {}
        self._live: Any = None
        s = config.settings
        # An upper bound: half steps outside the bounds fall away, CMA-ES may converge early.
        uniform = s.grid ** len(adapters) + HALF_STEPS_OF ** len(adapters) - 1
        self.total = 1 + uniform + s.evaluations + len(report.CANDIDATES)

    def spread(self, numbers: Point) -> Point:
        """The point where each adapter has one weight everywhere."""
        return self.space.uniform(dict(zip(self.adapters, numbers, strict=True)))

    def value(self, point: Point, phase: str) -> float:
        """The objective of a mixture on the dev half, from the log or measured and logged."""
        row = self.log.recall(self.done, point)
        if row is None:
            from engine.evaluate.search.objective import mean

            started = time.monotonic()
            rows = self._objective("dev").measure(self.space.weights(point))
            row = {
                "n": self.done, "phase": phase, "point": list(point), "value": mean(rows),
                "sum": sum(r["sum"] for r in rows), "count": sum(r["count"] for r in rows),
                "seconds": round(time.monotonic() - started, 3),
            }  # fmt: skip
            self.log.add(row)
        value = float(row["value"])
        if phase == "asked":
            self.asked_value = value
        self._best = max(self._best, value)
        self._advance(phase)
        self.events.metric(self.done, value=value, best=self._best)
        return value

    def compared(self, name: str, point: Point) -> list[dict[str, Any]]:
        """The held-out rows of a candidate, kept or measured and kept."""
        ids = [sample.id for sample in self.halves["held_out"]]
        rows = self.log.samples(name, "held_out", ids)
        if rows is None:
            found = self._objective("held_out").measure(self.space.weights(point))
            rows = [{"candidate": name, "half": "held_out", **row} for row in found]
            append_lines(self.log.folder / SAMPLES, rows)
        self._advance("compare")
        return rows

    def finish(self) -> None:
        self.events.progress(self.total, self.total, unit="mixtures", phase="search")

    def _advance(self, phase: str) -> None:
        self.done += phase != "compare"
        done = self.done if phase != "compare" else self.total - 1
        self.events.progress(
            done, self.total, unit="mixtures", message=f"{phase}, best {self._best:.4f}", phase="search"
        )

    def _objective(self, half: str) -> Any:
        if half not in self._objectives:
            from engine.evaluate.live import LiveModel
            from engine.evaluate.search.objective import Objective

            if self._live is None:
                e = self.config.evaluation
                self.events.log(f"loading {self.base.name}")
                self._live = LiveModel(self.base, self.adapters, e.dtype, e.compute, e.device)
            self._objectives[half] = Objective(self._live, self.config, self.halves[half])
        return self._objectives[half]


def _note(
    config: SearchConfig, base: Checkpoint, adapters: Mapping[str, Adapter], events: EventWriter
) -> dict[str, Any]:
    """Everything the values depend on. A search goes on only where all of it is the same."""
    from engine.evaluate.live import pick_compute, pick_device

    evaluation = config.evaluation
    device = pick_device(evaluation.device)
    compute = pick_compute(evaluation.compute, evaluation.dtype, device)
    events.log(f"hashing {base.name} ({base.nbytes / 1e9:.2f} GB)")
    identity = Identity.of(base, adapters, evaluation.dtype, compute, device.type)
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "inputs": asdict(identity),
        "data": file_sha256(config.task.data),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "cmaes")},
    }


def _write_recipes(
    config: SearchConfig,
    folder: Path,
    merges: Path,
    uniform: Mapping[str, float],
    layerwise: Mapping[str, Mapping[str, float]],
) -> dict[str, str]:
    """uniform.yaml and layerwise.yaml, ready for `medmerge merge`."""
    import yaml

    written = {}
    for name, weights in (("uniform", uniform), ("layerwise", layerwise)):
        recipe = {
            "base": str(config.base),
            "method": "linear",
            "adapters": {
                label: {
                    "path": str(path),
                    "weight": dict(weight) if isinstance(weight := weights[label], Mapping) else weight,
                }
                for label, path in config.evaluation.adapters.items()
            },
            "output": {
                "path": str(merges / f"{folder.name}-{name}"),
                "dtype": config.evaluation.dtype,
            },
        }
        path = folder / f"{name}.yaml"
        text = yaml.safe_dump(recipe, sort_keys=False)
        write_text(path, f"# Found by medmerge search {folder.name}\n{text}")
        written[name] = str(path)
    return written
