"""Few-shot curves: the held-out loss after training on so many samples, several times (arXiv 2604.01538: 64 against
256 examples). The target of `medmerge train ... --shots 64,256 --seeds 5`.

params: {"config": settings, "run": folder, "shots": [64, 256], "seeds": 5, "resume": bool}. Every seed chooses its
own random order of the samples, and n shots are the first n of it, so that the 64 are among the 256. The held-out
samples are the same in all runs. Data are audited and encoded once.

    RUN/train.json, tokens/       as of a run (training.run)
        shots64-seed0/ ...        one run each: its curve and checkpoints
        fewshot.json              the table
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.atomic import write_json
from engine.claim import claim
from engine.errors import BadInputError, BadRecipeError
from engine.jobs.events import EventWriter
from training.artifact import MANIFEST, settings_for_manifest
from training.config import TrainConfig, from_mapping
from training.prepare import prepare
from training.run import (
    RUN_FILE,
    TOKENS,
    begin_run,
    check_output,
    open_run,
    read_inputs,
    run_fit,
    same_inputs,
)

TABLE = "fewshot.json"
PLAN = "plan.json"


def plan(
    config: TrainConfig, run_folder: Path, shots: Sequence[int], seeds: int
) -> list[tuple[TrainConfig, Path]]:
    """The runs of a curve: (settings, run folder) of each number of shots and seed, smallest first.

    Raises BadRecipeError for numbers that make no curve.
    """
    if not shots or min(shots) < 1 or len(set(shots)) != len(shots):
        raise BadRecipeError(f"shots are {list(shots)}, expected different numbers above 0", "--shots 64,256")
    if seeds < 1:
        raise BadRecipeError(f"seeds is {seeds}, expected at least 1", "--seeds 5")
    runs = []
    for count in sorted(shots):
        for seed in range(seeds):
            name = f"shots{count}-seed{seed}"
            output = f"{config.output}-{name}"
            settings = dataclasses.replace(config, shots=count, shots_seed=seed, output=output)
            runs.append((settings, run_folder / name))
    return runs


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """{"rows": [one a run], "table": [one a number of shots], "run"}; finished runs are kept on resume."""
    run_folder = Path(params["run"])
    resume = bool(params.get("resume"))
    if resume:
        params = {**params, **read_plan(run_folder)}
    config = from_mapping(dict(params["config"]), "few-shot job")
    runs = plan(config, run_folder, [int(count) for count in params["shots"]], int(params["seeds"]))
    if not resume:
        for settings, _ in runs:
            check_output(Path(settings.output), run_folder)
    with claim(run_folder):
        if not resume:
            if run_folder.exists() and any(run_folder.iterdir()):
                raise BadInputError(
                    f"{run_folder} holds a run already", "resume it, or choose another output"
                )
            run_folder.mkdir(parents=True, exist_ok=True)
        kept = {"config": params["config"], "shots": params["shots"], "seeds": params["seeds"]}
        write_json(run_folder / PLAN, kept)
        if not (run_folder / RUN_FILE).exists():
            begin_run(config, run_folder)
        try:
            inputs = read_inputs(config, run_folder, events)
            same_inputs(run_folder, inputs.story)
            # The largest number of shots decides whether there are samples enough, before anything is trained.
            prepare(runs[-1][0], inputs.tokenizer, run_folder / TOKENS, events, inputs.drop, inputs.files)
            rows = []
            for number, (settings, folder) in enumerate(runs):
                row = finished(settings, inputs.story)
                if row is None:
                    events.log(
                        f"run {number + 1} of {len(runs)}: {settings.shots} shots, seed {settings.shots_seed}"
                    )
                    again = (folder / RUN_FILE).exists()
                    if not again:
                        open_run(settings, folder)
                    run_fit(settings, folder, run_folder / TOKENS, inputs, events, again, keep_tokens=True)
                    row = finished(settings, inputs.story)
                    assert row is not None
                rows.append(row)
                events.row(**row)
        except BaseException:
            if not resume and not any((folder / RUN_FILE).exists() for _, folder in runs):
                shutil.rmtree(run_folder, ignore_errors=True)
            raise
        result = {"run": str(run_folder), "rows": rows, "table": table(rows)}
        write_json(run_folder / TABLE, result)
        shutil.rmtree(run_folder / TOKENS, ignore_errors=True)
    return result


def read_plan(run_folder: Path) -> dict[str, Any]:
    """What a curve was started with. Raises BadInputError where the folder holds none."""
    try:
        return dict(json.loads((run_folder / PLAN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"{run_folder} holds no few-shot curve ({PLAN} is missing or unreadable)"
        ) from error


def finished(settings: TrainConfig, story: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a run whose adapter is there, from its manifest; None when it is not.

    Raises BadInputError when another adapter stands in its place.
    """
    folder = Path(settings.output)
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = json.loads(json.dumps(settings_for_manifest(settings)))
        same = manifest["settings"] == expected and all(
            manifest[key] == story[key] for key in ("base", "data")
        )
        final = manifest["final"]
        first = [point["eval_loss"] for point in manifest["curve"] if "eval_loss" in point][:1]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise BadInputError(
            f"{folder} is there and is not the adapter of this curve", "choose another output"
        )
    return {
        "shots": settings.shots,
        "seed": settings.shots_seed,
        "steps": manifest["steps"],
        "loss": final["loss"],
        "before": first[0] if first else None,
        "eval_loss": final["eval_loss"],
        "eval_perplexity": final["eval_perplexity"],
        "adapter": str(folder),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a number of shots: n seeds, mean held-out loss with its 95% interval, and the perplexity of that mean.

    low, high: mean -+ t(.975, n - 1) * s / sqrt(n), Student's interval over seeds; None for a single seed. It says
    how much the choice of samples (and of the starting weights) matters, not how sure the held-out part is.
    """
    from scipy import stats

    lines = []
    for count in sorted({row["shots"] for row in rows}):
        losses = [row["eval_loss"] for row in rows if row["shots"] == count and row["eval_loss"] is not None]
        line: dict[str, Any] = {"shots": count, "n": len(losses), "mean": None, "low": None, "high": None}
        if losses:
            mean = statistics.fmean(losses)
            line |= {"mean": mean, "perplexity": math.exp(mean)}
            if len(losses) > 1:
                half = (
                    float(stats.t.ppf(0.975, len(losses) - 1))
                    * statistics.stdev(losses)
                    / math.sqrt(len(losses))
                )
                line |= {"low": mean - half, "high": mean + half}
        lines.append(line)
    return lines
