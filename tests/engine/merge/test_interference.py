"""Interference against dense numpy and scipy on small matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.linalg import subspace_angles

from engine.errors import BadAdapterError, BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.interference import SAMPLED_ROWS, compare, space_overlap

Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # module -> A (r, in), B (out, r)


def write(folder: Path, factors: Factors, rank: int, alpha: float = 12, **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(seed: int, rank: int, shapes: dict[str, tuple[int, int]]) -> Factors:
    rng = np.random.default_rng(seed)
    return {
        module: (
            rng.standard_normal((rank, columns)).astype(np.float32),
            rng.standard_normal((rows, rank)).astype(np.float32),
        )
        for module, (rows, columns) in shapes.items()
    }


SHAPES = {"model.layers.0.mlp.up_proj": (48, 20), "model.layers.1.mlp.down_proj": (30, 56)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, Path], Factors, Factors]:
    one, two = factors(1, 4, SHAPES), factors(2, 6, SHAPES)
    paths = {"pt": write(tmp_path / "pt", one, 4), "sft": write(tmp_path / "sft", two, 6, use_rslora=True)}
    return paths, one, two


def dense(factors: Factors, scale: float) -> dict[str, np.ndarray]:
    return {m: scale * b.astype(np.float64) @ a.astype(np.float64) for m, (a, b) in factors.items()}


def test_agrees_with_dense_deltas(pair: tuple[dict[str, Path], Factors, Factors]) -> None:
    paths, one, two = pair
    first, second = dense(one, 12 / 4), dense(two, 12 / 6**0.5)
    result = compare(paths, EventWriter())
    assert [row["name"] for row in result["modules"]] == list(SHAPES)
    for row in result["modules"]:
        x, y = first[row["name"]], second[row["name"]]
        assert row["cosine"] == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-9)
        assert row["norm"]["pt"] == pytest.approx(np.linalg.norm(x))
        assert row["norm"]["sft"] == pytest.approx(np.linalg.norm(y))
        assert row["norm_ratio"] == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y))
        (a1, b1), (a2, b2) = one[row["name"]], two[row["name"]]
        columns = np.mean(np.cos(subspace_angles(b1.astype(float), b2.astype(float))) ** 2)
        rows = np.mean(np.cos(subspace_angles(a1.T.astype(float), a2.T.astype(float))) ** 2)
        assert row["column_overlap"] == pytest.approx(columns, rel=1e-6)
        assert row["row_overlap"] == pytest.approx(rows, rel=1e-6)
        assert row["subspace_overlap"] == pytest.approx((columns + rows) / 2, rel=1e-6)
        assert x.shape[0] <= SAMPLED_ROWS  # so that every row was counted
        assert row["sign_conflict"] == pytest.approx(np.mean(x * y < 0), abs=1e-3)
    flat = [np.concatenate([deltas[m].ravel() for m in SHAPES]) for deltas in (first, second)]
    whole = result["overall"]
    assert whole["cosine"] == pytest.approx(
        flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]), abs=1e-9
    )
    assert whole["norm"] == pytest.approx({"pt": np.linalg.norm(flat[0]), "sft": np.linalg.norm(flat[1])})
    assert whole["sign_conflict"] == pytest.approx(np.mean(flat[0] * flat[1] < 0), abs=1e-3)


def test_an_adapter_with_itself_and_its_opposite(pair: tuple[dict[str, Path], Factors, Factors]) -> None:
    paths, one, _ = pair
    opposite = {module: (a, -2 * b) for module, (a, b) in one.items()}
    other = write(paths["pt"].parent / "opposite", opposite, 4)
    same = compare({"a": paths["pt"], "b": paths["pt"]}, EventWriter())["overall"]
    assert same["cosine"] == pytest.approx(1)
    assert same["sign_conflict"] == 0
    assert same["subspace_overlap"] == pytest.approx(1)
    against = compare({"a": paths["pt"], "b": other}, EventWriter())["overall"]
    assert against["cosine"] == pytest.approx(-1)
    assert against["sign_conflict"] == 1
    assert against["norm_ratio"] == pytest.approx(0.5)


def test_spaces_that_are_apart_nested_or_empty() -> None:
    axes = np.eye(10)
    assert space_overlap(axes[:, :3], axes[:, 5:8]) == (0, 0.3)
    nested, chance = space_overlap(
        axes[:, :2], axes[:, :5] @ np.random.default_rng(0).standard_normal((5, 5))
    )
    assert nested == pytest.approx(1)
    assert chance == 0.5
    assert space_overlap(axes[:, :2], np.zeros((10, 4))) == (0, 0)
    doubled = np.column_stack([axes[:, 0], axes[:, 0]])  # rank 1, though it has two columns
    assert space_overlap(doubled, axes[:, 1:2]) == (0, 0.1)


def test_modules_of_one_adapter_only_are_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a", factors(1, 4, SHAPES), 4)
    some = {"model.layers.0.mlp.up_proj": (48, 20)}
    result = compare({"a": first, "b": write(tmp_path / "b", factors(2, 4, some), 4)}, EventWriter())
    assert result["only_in"] == {"a": ["model.layers.1.mlp.down_proj"]}
    assert [row["name"] for row in result["modules"]] == list(some)


def test_three_adapters_give_three_pairs(tmp_path: Path) -> None:
    paths = {name: write(tmp_path / name, factors(i, 4, SHAPES), 4) for i, name in enumerate("abc")}
    result = compare(paths, EventWriter())
    assert [entry["pair"] for entry in result["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert len(result["modules"]) == 6


def test_bad_input(tmp_path: Path) -> None:
    one = write(tmp_path / "a", factors(1, 4, SHAPES), 4)
    with pytest.raises(BadRecipeError, match="two adapters"):
        compare({"a": one}, EventWriter())
    other = write(tmp_path / "b", factors(1, 4, {"model.layers.0.mlp.up_proj": (50, 20)}), 4)
    with pytest.raises(BadAdapterError, match=r"\[48, 20\].*\[50, 20\]"):
        compare({"a": one, "b": other}, EventWriter())
