"""A whole search on a tiny model whose best layer-wise weights were planted; stopping, going on, and lying data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import BadInputError, CancelledError, TargetExistsError
from engine.evaluate.search import job, parse_search
from engine.evaluate.search.log import EVALUATIONS, SAMPLES
from engine.jobs.events import EventWriter
from engine.merge.recipe import read_recipe
from engine.merge.selectors import resolve
from engine.weights import Adapter, Checkpoint


def params(config: dict[str, Any], out: Path, resume: bool = False) -> dict[str, Any]:
    document = parse_search(config).to_dict()
    return {
        "config": document,
        "out": str(out),
        "merges": str(out.parent.parent / "merges"),
        "resume": resume,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def found(planted: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, EventWriter]:
    out, events = tmp_path_factory.mktemp("w") / "runs" / "one", EventWriter()
    return job.run(params(planted.config(), out), events), out, events


def test_the_planted_weights_are_found_and_the_gain_is_shown(found: Any) -> None:
    result, _, _ = found
    weights = {row["title"]: row["layerwise"] for row in result["dimensions"]}
    # near the planted corner; a likelihood's own best is not exactly there
    assert weights["pt layers 0-0"] > 0.7 and weights["pt layers 1-1"] < weights["pt layers 0-0"] - 0.2
    assert weights["sft layers 0-0"] < 0.3 and weights["sft layers 1-1"] > 0.7
    assert result["verdict"] == "gain" and "better" in result["message"]
    first = result["differences"][0]
    assert (first["first"], first["second"]) == ("layerwise", "uniform")
    assert 0 < first["low"] < first["difference"] < first["high"]
    accuracy = {row["name"]: row["accuracy"] for row in result["candidates"]}
    assert accuracy["layerwise"] > accuracy["uniform"]
    assert result["n_dev"] + result["n_held_out"] == 160 and min(result["n_dev"], result["n_held_out"]) > 60


def test_every_number_comes_from_rows(found: Any, planted: Any) -> None:
    result, out, events = found
    tried = lines(out / EVALUATIONS)
    assert [row["n"] for row in tried] == list(range(len(tried))) and len(tried) == result["evaluations"]
    assert [row["phase"] for row in tried][:2] == ["asked", "grid"]
    assert tried[0]["point"] == [0.3, 0.3, 0.7, 0.7]
    values = {row["phase"]: max(r["value"] for r in tried if r["phase"] == row["phase"]) for row in tried}
    dev = {row["name"]: row["dev"] for row in result["candidates"]}
    assert dev["asked"] == values["asked"] and dev["uniform"] == max(values["asked"], values["grid"])
    assert dev["layerwise"] == max(values.values())
    kept = lines(out / SAMPLES)
    ids = {row["id"] for row in kept}
    assert len(kept) == 3 * result["n_held_out"] and len(ids) == result["n_held_out"]
    for row in result["candidates"]:
        sums = [r["sum"] for r in kept if r["candidate"] == row["name"]]
        assert row["held_out"] == pytest.approx(np.mean(sums)) and row["n"] == len(sums)
        assert row["low"] < row["held_out"] < row["high"]
    progress = [event.data for event in events.kept if event.type == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] and len(progress) >= 2
    assert json.loads((out / "result.json").read_text())["verdict"] == result["verdict"]


def test_recipes_give_the_weights_that_were_measured(found: Any, planted: Any) -> None:
    result, out, _ = found
    point = [row["layerwise"] for row in result["dimensions"]]
    base = Checkpoint.open(planted.base)
    for name in ("uniform", "layerwise"):
        recipe = read_recipe(Path(result["recipes"][name]))
        assert recipe.output == out.parent.parent / "merges" / f"one-{name}"
        for entry in recipe.adapters:
            chosen, _ = resolve(entry.weights, Adapter.open(entry.path).match(base), entry.label)
            for tensor, weight in chosen.items():
                wanted = result["uniform"][entry.label]
                if name == "layerwise":
                    wanted = point[(2 if entry.label == "sft" else 0) + int(tensor.split(".")[2])]
                assert weight == wanted


class Stop(EventWriter):
    """Cancels the job at the n-th mixture, as SIGTERM would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def metric(self, step: float, **values: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise CancelledError("stop")


def test_a_stopped_search_goes_on_as_if_nothing_happened(found: Any, planted: Any, tmp_path: Path) -> None:
    whole, out, _ = found
    again = tmp_path / "runs" / "one"
    for after in (3, 17):  # in the grid, then in CMA-ES
        with pytest.raises(CancelledError):
            job.run(params(planted.config(), again, resume=after > 3), Stop(after))
    with (again / EVALUATIONS).open("a") as file:
        file.write('{"n": 18, "phase": "se')  # the line a killed process was writing
    result = job.run(params(planted.config(), again, resume=True), EventWriter())
    changing = ("seconds", "run", "recipes")
    assert {k: v for k, v in result.items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }
    for name in (EVALUATIONS, SAMPLES):
        rows = [
            [{k: v for k, v in row.items() if k != "seconds"} for row in lines(folder / name)]
            for folder in (out, again)
        ]
        assert rows[0] == rows[1]


def test_a_finished_search_is_not_measured_again(found: Any, planted: Any, monkeypatch: Any) -> None:
    import engine.evaluate.live as live

    whole, out, _ = found

    def no_model(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(live, "LiveModel", no_model)
    result = job.run(params(planted.config(), out, resume=True), EventWriter())
    assert result["candidates"] == whole["candidates"]


def test_other_settings_or_inputs_are_refused(found: Any, planted: Any) -> None:
    _, out, _ = found
    with pytest.raises(TargetExistsError):
        job.run(params(planted.config(), out), EventWriter())
    with pytest.raises(BadInputError, match="another config"):
        job.run(params(planted.config(seed=1), out, resume=True), EventWriter())
    with pytest.raises(BadInputError, match="is not a search"):
        job.run(params(planted.config(), planted.base, resume=True), EventWriter())


def test_answers_at_random_show_no_gain(planted: Any, tmp_path: Path) -> None:
    """Fitting noise wins on the dev half and must not be believed."""
    rng = np.random.default_rng(0)
    rows = [{**row, "answer": int(rng.integers(0, 4))} for row in lines(planted.data)]
    noise = tmp_path / "noise.jsonl"
    noise.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = planted.config(evaluations=30)
    config["tasks"][0]["data"] = str(noise)
    result = job.run(params(config, tmp_path / "runs" / "noise"), EventWriter())
    first = result["differences"][0]
    assert first["dev_difference"] > 0 and first["low"] <= 0
    assert result["verdict"] != "gain"
    if first["high"] >= 0:
        assert result["verdict"] == "no gain shown" and "no gain shown" in result["message"]
