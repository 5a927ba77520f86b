"""Every method, on adapters and on full models, against the plain float64 formulas of `references`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import BadInputError, BadModelError, BadRecipeError
from engine.jobs import EventWriter
from engine.merge import schedule
from engine.merge.job import run_merge, run_plan
from tests.conftest import MakeAdapter
from tests.engine.merge import references
from tests.engine.merge.references import HALF_ULP, Array, Exact, as_float64, load_model

WEIGHTS = {"pt": 0.3, "sft": 0.7}


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    return {
        "pt": make_adapter(tiny_llama, seed=1, name="pt"),
        "sft": make_adapter(tiny_llama, seed=2, name="sft", rank=4),
    }


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two fine-tunes of the base: the base plus noise of its own size."""
    return {
        label: fine_tune(tiny_llama, tmp_path_factory.mktemp("tuned") / label, seed)
        for seed, label in ((5, "pt"), (6, "sft"))
    }


def fine_tune(base: Path, folder: Path, seed: int, size: float = 0.5) -> Path:
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (
            tensor.float() + size * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
        ).to(tensor.dtype)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def merge(out: Path, verify: bool = True, **document: Any) -> dict[str, Any]:
    output = {"path": str(out), **document.pop("output", {})}
    result = run_merge({"recipe": {**document, "output": output}, "verify": verify}, EventWriter())
    assert result["exit_code"] == 0, result["verdict"]
    return result


def entries(paths: dict[str, Path], weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    own = WEIGHTS if weights is None else weights
    return {
        label: {"path": str(path), **({"weight": own[label]} if label in own else {}), **more}
        for label, path in paths.items()
    }


def expected(
    method: str, name: str, base: Array, deltas: list[Array], errors: list[Array] | None, **how: Any
) -> Exact:
    weights, labels = list(WEIGHTS.values()), list(WEIGHTS)
    density, seed = how.get("density", 0.5), how.get("seed", 0)
    draws = [references.dare_draws(seed, label, name, base.size).reshape(base.shape) for label in labels]
    densities = [density] * 2
    if method == "task_arithmetic":
        return references.linear(base, deltas, weights, how.get("lam", 1.0), errors)
    if method == "ties":
        return references.ties(base, deltas, weights, densities, how.get("lam", 1.0), errors=errors)
    if method == "dare_linear":
        return references.dare_linear(base, deltas, weights, densities, draws, errors=errors)
    if method == "dare_ties":
        return references.dare_ties(base, deltas, weights, densities, draws, errors=errors)
    own = [np.zeros(base.shape)] * 2 if errors is None else errors
    return references.slerp(base + deltas[0], base + deltas[1], how.get("t", 0.5), own[0] + own[1])


METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.8},
    "slerp": {"t": 0.3},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.6, "seed": 7},
    "dare_ties": {"density": 0.6, "seed": 7},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, method: str, dtype: str
) -> None:
    how = METHODS[method]
    weights = {} if method == "slerp" else WEIGHTS
    merge(
        tmp_path / "out", base=str(tiny_llama), method=method, adapters=entries(adapters, weights),
        parameters=how, output={"dtype": dtype},
    )  # fmt: skip
    made = [references.deltas(path) for path in adapters.values()]
    after = load_model(tmp_path / "out")
    touched = 0
    for name, old in load_model(tiny_llama).items():
        if name not in made[0]:
            assert torch.equal(after[name], old.to(after[name].dtype)), name
            continue
        deltas = [as_float64(one[name][0]) for one in made]
        errors = [(8 + 4) * HALF_ULP * as_float64(one[name][1]) for one in made]
        known = {"lam" if key == "lambda" else key: value for key, value in how.items()}
        exact = expected(method, name, as_float64(old), deltas, errors, **known)
        exact.assert_rounded(after[name], name, undecided_share=0.01)
        touched += 1
    assert touched == 14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_models_on_a_base(
    tiny_llama: Path, models: dict[str, Path], tmp_path: Path, method: str, dtype: str
) -> None:
    how = METHODS[method]
    weights = {} if method == "slerp" else WEIGHTS
    merge(
        tmp_path / "out", base=str(tiny_llama), method=method, models=entries(models, weights), parameters=how,
        output={"dtype": dtype},
    )  # fmt: skip
    tensors = [load_model(path) for path in models.values()]
    after = load_model(tmp_path / "out")
    for name, old in load_model(tiny_llama).items():
        base = as_float64(old)
        deltas = [(as_float64(one[name]) - base) for one in tensors]
        if method != "slerp":
            deltas = [delta.astype(np.float32).astype(np.float64) for delta in deltas]
        known = {"lam" if key == "lambda" else key: value for key, value in how.items()}
        exact = expected(method, name, base, deltas, None, **known)
        exact.assert_rounded(after[name], name, undecided_share=0.01)


@pytest.mark.parametrize("method", ["soup", "linear"])
def test_models_without_a_base(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    weights = {"pt": 1.0, "sft": 3.0}
    merge(tmp_path / "out", method=method, models=entries(models, weights))
    first, second = (load_model(path) for path in models.values())
    for name, found in load_model(tmp_path / "out").items():
        exact = references.soup([as_float64(first[name]), as_float64(second[name])], [1.0, 3.0])
        exact.assert_rounded(found, name)


def test_the_base_may_be_one_of_the_models_of_a_soup(models: dict[str, Path], tmp_path: Path) -> None:
    """It then counts as any other; to a method that sees models from the base it would add nothing, and is refused."""
    merge(
        tmp_path / "with",
        base=str(models["pt"]),
        method="soup",
        models=entries(models, {"pt": 1.0, "sft": 3.0}),
    )
    merge(tmp_path / "without", method="soup", models=entries(models, {"pt": 1.0, "sft": 3.0}))
    assert (tmp_path / "with" / "model.safetensors").read_bytes() == (
        tmp_path / "without" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(BadRecipeError, match="model pt is the base itself"):
        merge(tmp_path / "no", base=str(models["pt"]), method="ties", models=entries(models))


def test_linear_sum_that_is_not_normalised(models: dict[str, Path], tmp_path: Path) -> None:
    weights = {"pt": 0.5, "sft": 0.75}
    merge(
        tmp_path / "out", False, method="linear", models=entries(models, weights), parameters={"normalize": False}
    )  # fmt: skip
    first, second = (load_model(path) for path in models.values())
    for name, found in load_model(tmp_path / "out").items():
        both = [as_float64(first[name]), as_float64(second[name])]
        references.soup(both, [0.5, 0.75], normalize=False).assert_rounded(found, name)


def test_slerp_of_two_models_without_a_base(models: dict[str, Path], tmp_path: Path) -> None:
    t = {"default": 0.25, "layer 1": 0.75, "*norm*": [0.0, 1.0]}
    merge(tmp_path / "out", method="slerp", models=entries(models, {}), parameters={"t": t})
    first, second = (load_model(path) for path in models.values())
    for name, found in load_model(tmp_path / "out").items():
        own = 0.75 if ".layers.1." in name else 0.25
        if "norm" in name:  # the last selector wins; two layers, and the final norm after them
            own = 0.0 if ".layers.0." in name else 1.0
        references.slerp(as_float64(first[name]), as_float64(second[name]), own).assert_rounded(found, name)


def test_gradient_over_depth_and_module_kinds(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    weights = {"pt": {"default": [0.2, 0.6], "mlp": 0.1}, "sft": {"attention": 0.5, "mlp": [1.0, 0.0]}}
    merge(tmp_path / "out", base=str(tiny_llama), adapters=entries(adapters, weights))

    def pt(name: str) -> float:
        return 0.1 if ".mlp." in name else 0.2 if ".layers.0." in name else 0.6

    def sft(name: str) -> float:
        return 0.5 if ".self_attn." in name else 1.0 if ".layers.0." in name else 0.0

    references.assert_is_merge(tmp_path / "out", tiny_llama, [(adapters["pt"], pt), (adapters["sft"], sft)])


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_blocks_do_not_change_dare_and_ties(
    tiny_llama: Path, models: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: masks, thresholds and angles do not depend on how the work is cut (differences are exact)."""
    weights = {} if method == "slerp" else WEIGHTS
    found = []
    for threads, elements in ((1, 1 << 17), (4, 700)):
        monkeypatch.setattr(schedule, "BLOCK_ELEMENTS", elements)
        out = tmp_path / f"out-{threads}"
        document = {
            "base": str(tiny_llama), "method": method, "models": entries(models, weights),
            "parameters": METHODS[method], "output": {"path": str(out)},
        }  # fmt: skip
        run_merge({"recipe": document, "verify": False, "threads": threads}, EventWriter())
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_other_shard_layouts(tiny_llama_sharded: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """The output has the reference's shards, whatever the others have."""
    both = {"sharded": tiny_llama_sharded, "tuned": models["pt"]}
    result = merge(tmp_path / "out", method="soup", models=entries(both, {}))
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(
        p.name for p in tiny_llama_sharded.glob("*.safetensors")
    )
    one, two, merged = (load_model(path) for path in (tiny_llama_sharded, models["pt"], tmp_path / "out"))
    for name, tensor in merged.items():
        references.soup([as_float64(one[name]), as_float64(two[name])], [1, 1]).assert_rounded(tensor, name)
    hashes = result["manifest"]["models"]["tuned"]["files"]
    import hashlib

    data = (models["pt"] / "model.safetensors").read_bytes()
    assert hashes["model.safetensors"] == hashlib.sha256(data).hexdigest()


def other_vocabulary(model: Path, folder: Path) -> Path:
    """The same model with two tokens swapped in tokenizer and tables, and one token renamed."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    one, two, three = [token for token in tokens if token not in special][5:8]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    vocabulary["quite-another"] = vocabulary.pop(three)
    path.write_text(json.dumps(tokenizer))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = [vocabulary[one], vocabulary[two]]
        weights[name][rows] = weights[name][rows[::-1]].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_vocabularies_are_compared_token_by_token(models: dict[str, Path], tmp_path: Path) -> None:
    moved = other_vocabulary(models["sft"], tmp_path / "moved")
    both = entries({"pt": models["pt"], "sft": moved}, {})
    with pytest.raises(BadModelError, match=r"vocabular.*1 tokens only in the first.*have another row"):
        merge(tmp_path / "refused", method="soup", models=both)
    merge(tmp_path / "by-token", method="soup", models=both, vocabulary="intersection")
    merge(tmp_path / "kept", method="soup", models=both, vocabulary="keep_first")
    merge(tmp_path / "plain", method="soup", models=entries(models, {}))
    plain, by_token, kept = (load_model(tmp_path / name) for name in ("plain", "by-token", "kept"))
    first = load_model(models["pt"])
    original = json.loads((models["sft"] / "tokenizer.json").read_text())["model"]["vocab"]
    renamed = json.loads((moved / "tokenizer.json").read_text())["model"]["vocab"]["quite-another"]
    assert renamed in original.values()
    for name, wanted in plain.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            wanted = wanted.clone()
            wanted[renamed] = first[name][renamed]  # a token the other model does not have
            assert torch.equal(kept[name], first[name]), name
        else:
            assert torch.equal(kept[name], wanted), name
        assert torch.equal(by_token[name], wanted), name


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"method": "soup", "adapters": "two"}, "soup averages full models"),
        ({"method": "slerp", "models": "one", "base": "base"}, "slerp goes between two"),
        ({"method": "ties", "models": "two"}, "ties needs `base:`"),
        ({"method": "linear", "models": "one"}, "one model alone"),
        (
            {"method": "linear", "models": "two", "parameters": {"density": 0.5}},
            "density means nothing to linear",
        ),
        (
            {"method": "ties", "models": "two", "base": "base", "parameters": {"density": 1.5}},
            "between 0 and 1",
        ),
        (
            {"method": "slerp", "models": "two", "parameters": {"t": {"layer 7": 0.1, "default": 0}}},
            "matches none",
        ),
        ({"method": "soup", "models": "two", "adapters": "two"}, "not both"),
        ({"method": "soup", "models": "two", "output": {"kind": "adapter"}}, "adapters merged by linear"),
        ({"method": "linear", "models": "zero"}, "add up to 0"),
    ],
)
def test_recipes_without_meaning(
    tiny_llama: Path, adapters: dict[str, Path], models: dict[str, Path], tmp_path: Path,
    document: dict[str, Any], says: str,
) -> None:  # fmt: skip
    given = dict(document)
    if given.get("adapters"):
        given["adapters"] = entries(adapters)
    listed = {"two": models, "one": {"pt": models["pt"]}, "zero": models}
    if "models" in given:
        weights = {"pt": 0.5, "sft": -0.5} if given["models"] == "zero" else {}
        given["models"] = entries(listed[given["models"]], weights)
    if "base" in given or "adapters" in given:
        given["base"] = str(tiny_llama)
    with pytest.raises(BadRecipeError, match=says):
        merge(tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_plan_of_every_method(tiny_llama: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for method, how in METHODS.items():
        document = {
            "base": str(tiny_llama), "method": method, "parameters": how,
            "models": entries(models, {} if method == "slerp" else WEIGHTS), "output": {"path": str(tmp_path / "x")},
        }  # fmt: skip
        plan = run_plan({"recipe": document}, EventWriter())
        assert plan["tensors_changed"] == 21 and plan["memory_bytes"] > 5e7 and plan["seconds"] > 0
        lost = plan["rounding_loss"]
        assert (lost is None) == (method != "task_arithmetic")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["linear", *METHODS])
def test_the_device_path_is_verified(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA, on torch's processor: other blocks and products, the same verification."""
    from engine.merge import kernel as kernels
    from engine.merge.kernel.device import DeviceKernel

    monkeypatch.setattr(kernels, "_chosen", [DeviceKernel(kernels.host_kernel(), "cpu")])
    weights = {} if method == "slerp" else WEIGHTS
    result = merge(
        tmp_path / "out", base=str(tiny_llama), method=method, adapters=entries(adapters, weights),
        parameters=METHODS.get(method, {}),
    )  # fmt: skip
    assert result["manifest"]["versions"]["kernel"].startswith("torch")
    assert result["verdict"]["ok"]


def test_a_device_that_is_not_there(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    document = {
        "base": str(tiny_llama),
        "adapters": entries(adapters),
        "output": {"path": str(tmp_path / "x")},
    }
    with pytest.raises(BadInputError, match="cuda is not there"):
        run_merge({"recipe": document, "device": "cuda"}, EventWriter())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_is_verified(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    document = {
        "base": str(tiny_llama),
        "adapters": entries(adapters),
        "output": {"path": str(tmp_path / "x")},
    }
    result = run_merge({"recipe": document, "device": "cuda"}, EventWriter())
    assert result["verdict"]["ok"]
