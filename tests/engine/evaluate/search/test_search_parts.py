"""The parts of a search without a model: config, space and its recipes, what is tried, the verdict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BadDataError, BadRecipeError
from engine.evaluate.data import Sample
from engine.evaluate.search import parse_search, points, report
from engine.evaluate.search.log import append_lines, read_lines
from engine.evaluate.search.space import make_space
from engine.merge.selectors import resolve

MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def names(layers: int, modules: tuple[str, ...] = MODULES) -> list[str]:
    return [f"model.layers.{n}.{module}.weight" for n in range(layers) for module in modules]


def test_groups_are_even_and_cover_every_layer_once() -> None:
    space = make_space({"pt": names(10)}, 10, 4, kinds=False)
    assert [(d.first, d.last) for d in space.dimensions] == [(0, 2), (3, 4), (5, 7), (8, 9)]
    assert [d.title for d in space.dimensions][:2] == ["pt layers 0-2", "pt layers 3-4"]
    covered = [tensor for d in space.dimensions for tensor in d.tensors]
    assert sorted(covered) == sorted(names(10))


@given(
    layers=st.integers(2, 9),
    groups=st.integers(2, 9),
    kinds=st.booleans(),
    only=st.sampled_from([MODULES, MODULES[:2], MODULES[2:]]),
    seed=st.integers(0, 99),
)
def test_selectors_mean_exactly_the_weights_of_the_point(
    layers: int, groups: int, kinds: bool, only: tuple[str, ...], seed: int
) -> None:
    """What a recipe's selectors resolve to, by the merge's own resolver, is what was measured."""
    tensors = {
        "pt": ["model.embed_tokens.weight", *names(layers), "lm_head.weight"],
        "sft": names(layers, only)[: max(1, layers * len(only) - 3)],  # not in every layer
    }
    groups = min(groups, layers)
    space = make_space(tensors, layers, groups, kinds)
    point = points.rounded(np.random.default_rng(seed).uniform(-1, 2, len(space.dimensions)).tolist())
    weights, selectors = space.weights(point), space.selectors(point)
    for label, its in tensors.items():
        resolved, decided = resolve(selectors[label], its, label)
        assert resolved == weights[label]
        assert set(resolved) == set(its)
        assert all(decided.get(selector, 0) >= 0 for selector in selectors[label])


def test_a_uniform_point_is_one_weight_everywhere() -> None:
    space = make_space({"pt": names(4), "sft": names(4)}, 4, 2, kinds=True)
    assert len(space.dimensions) == 8
    for label, by_tensor in space.weights(space.uniform({"pt": 0.3, "sft": 0.7})).items():
        assert set(by_tensor.values()) == {{"pt": 0.3, "sft": 0.7}[label]} and len(by_tensor) == 16


def test_spaces_that_make_no_sense() -> None:
    with pytest.raises(BadRecipeError, match="groups is 5, and the model has 4 layers"):
        make_space({"pt": names(4)}, 4, 5, kinds=False)
    with pytest.raises(BadRecipeError, match="one weight only"):
        make_space({"pt": names(4)}, 4, 1, kinds=False)


def test_the_grid_and_its_half_steps() -> None:
    grid = points.uniform_grid(0, 1, 3, 2)
    assert grid == [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    assert set(points.half_steps((0.0, 0.5), 0, 1, 3)) == {
        (0, 0.25),
        (0, 0.75),
        (0.25, 0.25),
        (0.25, 0.5),
        (0.25, 0.75),
    }


def test_the_optimisers_find_a_planted_optimum() -> None:
    """-|x - target|^2: uniform weights cannot reach it, layer-wise ones can."""
    target = np.array([0.9, 0.1, 0.2, 0.7, 0.4, 0.6])
    calls: list[str] = []

    def value(point: tuple[float, ...], phase: str) -> float:
        calls.append(phase)
        return -float(np.sum((np.array(point) - target) ** 2))

    def spread(numbers: tuple[float, ...]) -> tuple[float, ...]:
        return (numbers[0],) * 3 + (numbers[1],) * 3

    uniform, start = points.best_uniform(value, (0.3, 0.7), spread, 0.0, 1.0, 5)
    assert uniform == (0.375, 0.625)  # half a step from the grid's best; exact would be (0.4, 0.5667)
    assert calls.count("grid") == len(calls) - 1 and calls[0] == "asked"
    found = points.layerwise(value, start, 0.0, 1.0, 400, seed=1)
    np.testing.assert_allclose(found.point, target, atol=0.02)
    assert calls.count("search") <= 400
    again = points.layerwise(value, start, 0.0, 1.0, 400, seed=1)
    assert again == found
    assert all(round(x, 4) == x for x in found.point)


def test_a_search_is_never_worse_than_its_start_and_survives_nan() -> None:
    start = points.Best((0.5, 0.5), 1.0)
    values = iter([math.nan, -math.inf, *([0.5] * 50)])
    assert points.layerwise(lambda point, phase: next(values), start, 0, 1, 30, seed=0) == start
    tried = []

    def value(point: tuple[float, ...], phase: str) -> float:
        tried.append(point)
        return 0.0

    points.layerwise(value, points.Best((0.0, 1.0), -1.0), 0.0, 1.0, 60, seed=3)
    assert all(0 <= x <= 1 for point in tried for x in point)


def rows(sums: Any) -> list[dict[str, Any]]:
    return [{"id": str(n), "sum": float(x), "count": 2} for n, x in enumerate(sums)]


def test_the_verdict_follows_the_interval() -> None:
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(60) * 5  # what all mixtures share: pairing takes it away
    better = {"asked": rows(hard), "uniform": rows(hard), "layerwise": rows(hard + 0.5 + rng.random(60))}
    dev = {"asked": -1.0, "uniform": -0.9, "layerwise": -0.5}
    result = report.compare(better, dev)
    first = result["differences"][0]
    assert result["verdict"] == "gain" and "are better" in result["message"]
    wanted = np.mean(
        [(x["sum"] - y["sum"]) / 2 for x, y in zip(better["layerwise"], better["uniform"], strict=True)]
    )
    assert first["difference"] == pytest.approx(wanted) and first["low"] < wanted < first["high"]
    assert first["dev_difference"] == pytest.approx(0.4) and first["n"] == 60
    # the interval against statsmodels' normal one of the paired mean: the same within a tenth of its width
    from statsmodels.stats.weightstats import DescrStatsW

    paired = [(x["sum"] - y["sum"]) / 2 for x, y in zip(better["layerwise"], better["uniform"], strict=True)]
    low, high = DescrStatsW(paired).tconfint_mean()
    assert first["low"] == pytest.approx(low, abs=0.1 * (high - low))
    assert first["high"] == pytest.approx(high, abs=0.1 * (high - low))
    # the same spread around zero
    noise = {**better, "layerwise": rows(hard + rng.standard_normal(60))}
    result = report.compare(noise, dev)
    assert result["differences"][0]["low"] < 0 < result["differences"][0]["high"]
    assert result["verdict"] == "no gain shown" and "no gain shown" in result["message"]
    worse = {**better, "layerwise": rows(hard - 1)}
    assert report.compare(worse, dev)["verdict"] == "loss"
    same = report.compare({**better, "layerwise": rows(hard)}, dev)
    assert same["verdict"] == "no gain shown" and same["differences"][0]["difference"] == 0
    assert report.verdict(math.nan, math.nan) == "no gain shown"


def test_the_split_is_by_id_and_stays() -> None:
    samples = [Sample(f"s{n}") for n in range(200)]
    dev, held_out = report.split(samples)
    assert {s.id for s in dev}.isdisjoint(s.id for s in held_out) and len(dev) + len(held_out) == 200
    assert 70 < len(dev) < 130
    few, _ = report.split(samples[:50])
    assert {s.id for s in few} == {s.id for s in dev} & {s.id for s in samples[:50]}
    with pytest.raises(BadDataError, match="too few"):
        report.split(samples[:2])


def test_lines_that_are_torn_or_damaged_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"n": 0}, {"n": 1}])
    whole = path.read_bytes()
    for damage in (b'{"n": 2', b'{"n": 2\n{"n": 3}\n', b"[1]\n"):
        path.write_bytes(whole + damage)
        assert read_lines(path) == [{"n": 0}, {"n": 1}]
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"group": 4}}, "did you mean groups"),
        ({"search": {"groups": 0}}, "search.groups should be a whole number"),
        ({"search": {"kinds": "yes"}}, "search.kinds"),
        ({"search": {"low": 1, "high": 0}}, "is not below"),
        ({"search": {"high": 0.5}}, "weights.sft is 0.7, outside"),
        ({"search": {"grid": 50}}, "2500 mixtures"),
        ({"search": [1]}, "should be a mapping"),
        ({"weights": [{"pt": 1}, {"sft": 1}]}, "holds 2 mixtures"),
        ({"adapters": None, "weights": None}, "adapters is missing"),
        ({"templates": ["model", "chatml"]}, "templates holds 2"),
    ],
)
def test_configs_that_make_no_sense(planted: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipeError, match=message):
        parse_search({**planted.config(), **change})


def test_tasks_without_a_likelihood_are_refused(planted: Any) -> None:
    config = planted.config()
    config["tasks"][0] = {"name": "p", "kind": "probes", "data": str(planted.data)}
    with pytest.raises(BadRecipeError, match="no likelihood"):
        parse_search(config)
    config["tasks"][0] = {"name": "p", "kind": "generation", "data": str(planted.data), "references": False}
    with pytest.raises(BadRecipeError, match="references is false"):
        parse_search(config)


def test_a_config_survives_its_own_document(planted: Any) -> None:
    config = parse_search(planted.config(kinds=True))
    assert parse_search(config.to_dict()) == config
    assert config.limited(10).task.limit == 10
