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
from engine.merge import interference as room
from engine.merge.interference import SAMPLED_ROWS, compare
from engine.merge.subspaces import principal_angles

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
        for space_, factors_ in (("column", (b1, b2)), ("row", (a1.T, a2.T))):
            degrees = np.degrees(subspace_angles(*(f.astype(float) for f in factors_)))
            assert row[f"{space_}_angle_smallest"] == pytest.approx(min(degrees), rel=1e-6)
            assert row[f"{space_}_angle_median"] == pytest.approx(np.median(degrees), rel=1e-6)
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


def space(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    found = principal_angles(first, second)
    return found.overlap, found.chance


def test_spaces_that_are_apart_nested_or_empty() -> None:
    axes = np.eye(10)
    assert space(axes[:, :3], axes[:, 5:8]) == (pytest.approx(0, abs=1e-30), 0.3)
    nested, chance = space(axes[:, :2], axes[:, :5] @ np.random.default_rng(0).standard_normal((5, 5)))
    assert nested == pytest.approx(1)
    assert chance == 0.5
    empty = principal_angles(axes[:, :2], np.zeros((10, 4)))
    assert (empty.overlap, empty.chance, empty.smallest, empty.median) == (0, 0, None, None)
    doubled = np.column_stack([axes[:, 0], axes[:, 0]])  # rank 1, though it has two columns
    assert space(doubled, axes[:, 1:2]) == (pytest.approx(0, abs=1e-30), 0.1)


@pytest.mark.parametrize("shape", [(40, 5, 5), (40, 3, 7), (12, 8, 6), (30, 6, 1), (900, 4, 6)])
def test_angles_are_scipys(shape: tuple[int, int, int]) -> None:
    n, r1, r2 = shape
    rng = np.random.default_rng(n + r1)
    first = rng.standard_normal((n, r1))
    near = np.column_stack([first, rng.standard_normal((n, max(r2 - r1, 0)))])[:, :r2]
    for size in (0.0, 1e-9, 1e-4, 1.0, 100.0):  # the second turns away from the first
        second = near + rng.standard_normal((n, r2)) * size
        wanted = sorted(np.degrees(subspace_angles(first, second)))
        # scipy takes some small angles from their cosines, good to 1e-6 degrees only
        np.testing.assert_allclose(principal_angles(first, second).degrees, wanted, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("stretch", [1.0, 300.0, 1e5])
def test_small_angles_of_badly_scaled_factors(stretch: float) -> None:
    """Angles put there by a rotation in known planes, the columns then mixed: both ways to a basis."""
    rng = np.random.default_rng(3)
    axes = np.linalg.qr(rng.standard_normal((200, 8)))[0]
    degrees = np.array([0.0, 1e-9, 1e-5, 20.0])
    turned = axes[:, :4] * np.cos(np.radians(degrees)) + axes[:, 4:] * np.sin(np.radians(degrees))
    mixed = [
        basis @ (rng.standard_normal((4, 4)) + 3 * np.eye(4)) * np.geomspace(1, stretch, 4)
        for basis in (axes[:, :4], turned)
    ]
    for first, second in (mixed, mixed[::-1]):
        found = principal_angles(first, second).degrees
        np.testing.assert_allclose(found, degrees, rtol=1e-6, atol=3e-12)


def test_a_known_angle() -> None:
    axes = np.eye(6)
    for degrees in (1e-6, 0.5, 30.0, 89.0):
        turned = np.cos(np.radians(degrees)) * axes[:, 0] + np.sin(np.radians(degrees)) * axes[:, 3]
        angles = principal_angles(axes[:, :2], np.column_stack([turned, axes[:, 5]]))
        assert angles.smallest == pytest.approx(degrees, rel=1e-6)
        assert angles.degrees[1] == pytest.approx(90)
        assert angles.median == pytest.approx((degrees + 90) / 2)


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


def test_strip_by_layer_and_kind(tmp_path: Path) -> None:
    names = [
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.mlp.up_proj",
        "model.layers.3.self_attn.q_proj",
    ]
    experts = ["model.layers.3.mlp.experts.0.up_proj", "model.layers.3.mlp.experts.1.up_proj"]
    shapes = dict.fromkeys([*names, *experts, "lm_head"], (12, 10))
    one, two = factors(1, 2, shapes), factors(2, 2, shapes)
    first, second = dense(one, 6.0), dense(two, 6.0)
    paths = {"a": write(tmp_path / "a", one, 2), "b": write(tmp_path / "b", two, 2)}
    strip = compare(paths, EventWriter())["strips"][0]
    assert (
        strip["pair"] == ["a", "b"]
        and strip["layers"] == [1, 2, 3]
        and strip["kinds"] == ["q_proj", "up_proj"]
    )

    def cosine(modules: list[str]) -> float:
        x, y = (np.concatenate([deltas[m].ravel() for m in modules]) for deltas in (first, second))
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    wanted = [[cosine(names[:1]), None, cosine(names[2:])], [None, cosine(names[1:2]), cosine(experts)]]
    for row, want in zip(strip["cosine"], wanted, strict=True):
        assert [x is None for x in row] == [x is None for x in want]
        np.testing.assert_allclose([x for x in row if x is not None], [x for x in want if x is not None])
    assert strip["sign_conflict"][0][0] == pytest.approx(
        np.mean(first[names[0]] * second[names[0]] < 0), abs=1e-9
    )


class Counting(np.ndarray):
    """Arrays that count the floating-point operations done with them and the largest array made."""

    flops = 0
    largest = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, Counting) else x for x in inputs]
        keywords.pop("out", None)
        return self._counted(getattr(ufunc, method)(*plain, **keywords), ufunc is np.matmul, plain)

    def __array_function__(self, function: Any, types: Any, args: Any, keywords: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, Counting) else x for x in args]
        found = function(*plain, **keywords)
        if function in (np.linalg.qr, np.linalg.svd, np.linalg.cholesky, np.linalg.eigvalsh, np.linalg.solve):
            rows, columns = sorted(plain[0].shape, reverse=True)
            Counting.flops += 4 * rows * columns**2
            return [self._counted(x, False, []) for x in found] if isinstance(found, tuple) else found
        return self._counted(found, False, [])

    @staticmethod
    def _counted(found: Any, product: bool, factors: list[Any]) -> Any:
        size = int(np.size(found))
        Counting.flops += 2 * size * factors[0].shape[-1] if product else size
        Counting.largest = max(Counting.largest, size)
        return found.view(Counting) if isinstance(found, np.ndarray) else found


def test_the_time_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work grows as width * rank^2 and no array of width^2 is made: counted, not timed."""
    monkeypatch.setattr(room, "MOST_THREADS", 1)
    read = room.read_rows
    monkeypatch.setattr(room, "read_rows", lambda info: read(info).view(Counting))

    def cost(width: int, rank: int) -> tuple[int, int]:
        Counting.flops = Counting.largest = 0
        shapes = {"model.layers.0.mlp.up_proj": (width, width)}
        for label, seed in (("a", 1), ("b", 2)):
            write(tmp_path / f"{label}-{width}-{rank}", factors(seed, rank, shapes), rank)
        compare({label: tmp_path / f"{label}-{width}-{rank}" for label in "ab"}, EventWriter())
        return Counting.flops, Counting.largest

    small, wide, deep = cost(1024, 8), cost(2048, 8), cost(1024, 16)
    assert small[0] > 1024 * 8 * 8  # the counter counts
    assert 1.9 < wide[0] / small[0] < 2.1
    assert 1.9 < deep[0] / small[0] < 4.1
    assert wide[1] <= SAMPLED_ROWS * 2048  # the largest array are the sampled rows, far from 2048 * 2048


def test_what_is_not_compared_is_named(variant: Any) -> None:
    dora, saved, plain = (variant(name) for name in ("dora", "modules_to_save", "plain"))
    result = compare({"d": dora.adapter, "m": saved.adapter, "p": plain.adapter}, EventWriter())
    assert result["not_compared"].keys() == {"d", "m"}
    assert result["not_compared"]["d"] == ["DoRA"]
    assert result["not_compared"]["m"][0].startswith("modules_to_save: embed_tokens")
    assert len(result["modules"]) == 3 * 14
