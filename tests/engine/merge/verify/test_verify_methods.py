"""Right merges of every method pass, of adapters and of models; anything else is named.

The merges are made from the plain float64 references in tests/engine/merge/references.py, rounded by torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import BadModelError, BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.verify import Verdict, verify_merge
from engine.merge.verify.asked import Asked, AskedEntry
from tests.engine.merge import references
from tests.engine.merge.verify.scenes import MODULES, MakeScene, Scene, Tensors, make_base, save_model

Array = np.ndarray[Any, np.dtype[Any]]
METHODS = ["linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties"]
WEIGHTS = {"pt": 0.4, "sft": 0.8}


@dataclass
class Setting:
    """Everything a method needs, as one number for all tensors."""

    method: str
    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    density: float = 0.4
    t: float = 0.3
    lam: float = 1.0
    normalize: bool | None = None
    rescale: bool = True
    seed: int = 7
    vocabulary: str = "error"

    @property
    def averages(self) -> bool:
        return self.method == "ties" if self.normalize is None else self.normalize

    def value(self, name: str, base: Array, deltas: dict[str, Array]) -> Array:
        """The tensor in float64, by the references."""
        labels = list(deltas)
        parts, weights = list(deltas.values()), [self.weights[label] for label in labels]
        densities = [self.density] * len(labels)
        if self.method in ("linear", "task_arithmetic"):
            return references.linear(base, parts, weights, self.lam).value
        if self.method == "slerp":
            ends = [base + self.weights[k] * deltas.get(k, np.zeros_like(base)) for k in self.weights]
            return references.slerp(ends[0], ends[1], self.t).value
        if self.method == "ties":
            return references.ties(base, parts, weights, densities, self.lam, self.averages).value
        draws = [references.dare_draws(self.seed, label, name, base.size) for label in labels]
        if self.method == "dare_linear":
            return references.dare_linear(
                base, parts, weights, densities, draws, self.lam, self.rescale
            ).value
        return references.dare_ties(
            base, parts, weights, densities, draws, self.lam, self.averages, self.rescale
        ).value

    def asked(self, paths: dict[str, Path], kind: str) -> Asked:
        entries = tuple(
            AskedEntry(label, path, kind, {"default": self.weights[label]}, {"default": self.density})
            for label, path in paths.items()
        )
        return Asked(
            self.method, entries, {"default": self.t}, self.lam, self.normalize, self.rescale, self.seed,
            self.vocabulary,
        )  # fmt: skip


def merged_adapters(scene: Scene, setting: Setting, dtype: torch.dtype) -> Tensors:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        deltas = {
            label: lora.delta(module).numpy() for label, lora in scene.loras.items() if module in lora.pairs
        }
        return torch.from_numpy(setting.value(f"{module}.weight", base.double().numpy(), deltas))

    return scene.merge(rule=rule, dtype=dtype)


def verify(scene: Scene, merged: Tensors, setting: Setting) -> Verdict:
    asked = setting.asked({label: lora.folder for label, lora in scene.loras.items()}, "adapter")
    return verify_merge(scene.save(merged), scene.base_folder, {}, None, EventWriter(), asked=asked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("b_std", [0.02, 0.002])
def test_right_merges_of_adapters(
    make_scene: MakeScene, method: str, dtype: torch.dtype, b_std: float
) -> None:
    scene, setting = make_scene(b_std=b_std), Setting(method)
    verdict = verify(scene, merged_adapters(scene, setting, dtype), setting)
    assert verdict.ok, verdict.message
    linear = method in ("linear", "task_arithmetic")
    assert (verdict.effective_weights is not None) == linear
    assert verdict.to_json()["method"] == method


@pytest.mark.parametrize(
    "setting",
    [
        Setting("ties", normalize=False, lam=0.7),
        Setting("ties", weights={"pt": -0.4, "sft": 0.4}),
        Setting("ties", density=1.0),
        Setting("ties", density=0.05),
        Setting("dare_linear", rescale=False, lam=1.5),
        Setting("dare_ties", normalize=True, density=0.9),
        Setting("dare_ties", density=1.0),
        Setting("slerp", t=0.0),
        Setting("slerp", t=1.0),
        Setting("slerp", weights={"pt": 30.0, "sft": 20.0}),  # a real angle
        Setting("task_arithmetic", lam=0.5),
    ],
    ids=repr,
)
def test_right_parameters(scene: Scene, setting: Setting) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        verdict = verify(scene, merged_adapters(scene, setting, dtype), setting)
        assert verdict.ok, verdict.message


def test_adapters_that_share_only_some_modules(make_scene: MakeScene) -> None:
    scene = make_scene(pt={"modules": MODULES[:6]}, sft={"modules": MODULES[4:10]})
    for method in METHODS:
        setting = Setting(method)
        verdict = verify(scene, merged_adapters(scene, setting, torch.bfloat16), setting)
        assert verdict.ok, (method, verdict.message)


@pytest.mark.parametrize("kernel", ["", "plain"])
@pytest.mark.parametrize("method", METHODS)
def test_one_element_by_one_ulp(use: Callable[[str], None], scene: Scene, method: str, kernel: str) -> None:
    use(kernel)
    setting = Setting(method)
    merged = merged_adapters(scene, setting, torch.bfloat16)
    merged[f"{MODULES[3]}.weight"].view(torch.int16)[5, 9] += 1
    verdict = verify(scene, merged, setting)
    assert verdict.exit_code == 1
    assert verdict.elements_differing == 1
    assert "[5, 9]" in verdict.message
    assert verdict.worst[0]["name"] == MODULES[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b_std", [0.02, 0.002])
@pytest.mark.parametrize(
    ("method", "change", "detail"),
    [
        ("ties", {"method": "linear"}, "linear merge"),
        ("ties", {"density": 0.6}, "density 0.6"),
        ("ties", {"normalize": False}, "normalize false"),
        ("ties", {"method": "dare_ties"}, "dare_ties"),
        ("dare_linear", {"method": "linear"}, "linear merge"),
        ("dare_linear", {"seed": 42}, "seed 42"),
        ("dare_linear", {"rescale": False}, "rescale false"),
        ("dare_ties", {"method": "dare_linear"}, "dare_linear"),
        ("dare_ties", {"density": 0.5}, "density 0.5"),
    ],
)
def test_other_parameters_are_named(
    make_scene: MakeScene, method: str, change: dict[str, Any], detail: str, dtype: torch.dtype, b_std: float
) -> None:
    scene, asked = make_scene(b_std=b_std), Setting(method)
    made = Setting(**{**vars(asked), **change})
    verdict = verify(scene, merged_adapters(scene, made, dtype), asked)
    assert verdict.exit_code == 1
    assert (verdict.verdict, verdict.findings[0].detail) == ("other_weights", detail), verdict.message


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_mistakes_that_every_method_can_have(scene: Scene, method: str) -> None:
    asked = Setting(method)
    for weights, code in (
        ({"pt": 0.8, "sft": 0.4}, "swapped"),
        ({"pt": 0.0, "sft": 0.8}, "missing"),
        ({"pt": 0.16, "sft": 0.64}, "weight_squared"),
    ):
        made = Setting(method, weights=weights)
        verdict = verify(scene, merged_adapters(scene, made, torch.bfloat16), asked)
        assert verdict.verdict == code, (weights, verdict.message)
    assert verify(scene, dict(scene.base), asked).verdict == "base_unchanged"


def test_unknown_change_under_ties(scene: Scene) -> None:
    setting = Setting("ties")
    merged = merged_adapters(scene, setting, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    for module in MODULES:
        tensor = merged[f"{module}.weight"]
        noise = torch.randn(tensor.shape, generator=generator) * 0.01
        merged[f"{module}.weight"] = (tensor.float() + noise).to(torch.bfloat16)
    verdict = verify(scene, merged, setting)
    assert verdict.verdict == "unknown_delta", verdict.message
    assert verdict.residual is None


# Models


@dataclass
class Checkpoints:
    """A base and two or three models near it, on disk."""

    root: Path
    base: Tensors
    models: dict[str, Tensors]

    def folder(self, label: str) -> Path:
        return self.root / label

    def paths(self, *labels: str) -> dict[str, Path]:
        return {label: self.folder(label) for label in labels or self.models}


MakeModels = Callable[..., Checkpoints]


@pytest.fixture
def make_models(tmp_path: Path) -> MakeModels:
    def make(count: int = 2, dtype: torch.dtype = torch.bfloat16, step: float = 0.004) -> Checkpoints:
        base = make_base(0, dtype)
        save_model(tmp_path / "base", base)
        models = {}
        for k, label in enumerate(("pt", "sft", "third")[:count]):
            generator = torch.Generator().manual_seed(100 + k)
            models[label] = {
                name: (t.float() + step * torch.randn(t.shape, generator=generator)).to(dtype)
                for name, t in base.items()
            }
            save_model(tmp_path / label, models[label], shards=1 + k)
        return Checkpoints(tmp_path, base, models)

    return make


def merged_models(
    models: Checkpoints, setting: Setting, dtype: torch.dtype, with_base: bool = True
) -> Tensors:
    merged = {}
    reference = models.base if with_base else next(iter(models.models.values()))
    for name, tensor in reference.items():
        base = tensor.double().numpy()
        values = {label: model[name].double().numpy() for label, model in models.models.items()}
        if setting.method in ("linear", "soup"):
            normalize = setting.normalize is not False
            value = references.soup(list(values.values()), list(setting.weights.values()), normalize).value
        else:
            value = setting.value(name, base, {label: x - base for label, x in values.items()})
        merged[name] = torch.from_numpy(value).to(dtype)
    return merged


def verify_models(
    models: Checkpoints, merged: Tensors | Path, setting: Setting, with_base: bool = True
) -> Verdict:
    folder = merged
    if not isinstance(folder, Path):
        folder = models.root / "merged"
        number = 1
        while folder.exists():
            folder, number = models.root / f"merged{number}", number + 1
        save_model(folder, merged)
    base = models.folder("base") if with_base else None
    asked = setting.asked(models.paths(), "model")
    return verify_merge(folder, base, {}, None, EventWriter(), asked=asked)


@pytest.mark.parametrize("method", ["soup", *METHODS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_right_merges_of_models(make_models: MakeModels, method: str, dtype: torch.dtype) -> None:
    models, setting = make_models(), Setting(method)
    for with_base in (True, False) if method in ("soup", "linear", "slerp") else (True,):
        verdict = verify_models(models, merged_models(models, setting, dtype, with_base), setting, with_base)
        assert verdict.ok, (with_base, verdict.message)
        if method in ("soup", "linear"):
            share = {"pt": 0.4 / 1.2, "sft": 0.8 / 1.2}
            assert verdict.effective_weights == pytest.approx(share, abs=0.02), with_base


def test_weights_that_are_not_normalised(make_models: MakeModels) -> None:
    models, setting = make_models(), Setting("linear", normalize=False)
    for with_base in (True, False):
        verdict = verify_models(
            models, merged_models(models, setting, torch.float32, with_base), setting, with_base
        )
        assert verdict.ok, verdict.message
        assert verdict.effective_weights == pytest.approx(WEIGHTS, abs=1e-3)


def test_soup_of_three(make_models: MakeModels) -> None:
    models = make_models(3)
    setting = Setting("soup", weights={"pt": 1.0, "sft": 2.0, "third": 5.0})
    verdict = verify_models(models, merged_models(models, setting, torch.float32, False), setting, False)
    assert verdict.ok, verdict.message
    assert verdict.effective_weights == pytest.approx({"pt": 1 / 8, "sft": 2 / 8, "third": 5 / 8}, abs=1e-3)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        (torch.bfloat16, {"pt": 0.3, "sft": 0.7}),
        (torch.float16, {"pt": 0.35, "sft": 0.65}),
        (torch.bfloat16, {"pt": 1 / 3, "sft": 1 / 3, "third": 1 / 3}),
        (torch.float32, {"pt": 1.0, "sft": 0.0}),
    ],
)
def test_what_is_in_a_soup(
    make_models: MakeModels, with_base: bool, dtype: torch.dtype, weights: dict[str, float]
) -> None:
    models = make_models(len(weights))
    folder = save_model(models.root / "m", merged_models(models, Setting("soup", weights), dtype, with_base))
    asked = Asked.of_models(models.paths(), {}, from_base=with_base)
    base = models.folder("base") if with_base else None
    verdict = verify_merge(folder, base, {}, None, EventWriter(), asked=asked, known=False)
    assert verdict.ok, verdict.message
    assert verdict.asked is None
    assert verdict.guessed == pytest.approx(weights, abs=1e-9)
    assert verdict.effective_weights == pytest.approx(verdict.expected_weights, abs=1e-3)
    assert verdict.effective_weights == pytest.approx(weights, abs=0.02)


def test_what_is_no_soup_of_these(make_models: MakeModels) -> None:
    """A model that is none of theirs, and one that is half in there: a guess never makes a wrong merge right."""
    models = make_models(3)
    right = merged_models(
        models, Setting("soup", {"pt": 0.3, "sft": 0.3, "third": 0.4}), torch.bfloat16, False
    )
    folder = save_model(models.root / "m", right)
    asked = Asked.of_models(models.paths("pt", "sft"), {}, from_base=False)
    verdict = verify_merge(folder, None, {}, None, EventWriter(), asked=asked, known=False)
    assert verdict.exit_code == 1
    assert verdict.verdict == "unknown_delta", verdict.message


def test_equal_weights_cannot_be_swapped(make_models: MakeModels) -> None:
    models = make_models(3)
    setting = Setting("soup", weights=dict.fromkeys(models.models, 1.0))  # thirds, which no float holds
    verdict = verify_models(models, merged_models(models, setting, torch.bfloat16, False), setting, False)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("vocabulary", ["intersection", "keep_first"])
def test_vocabularies_that_differ(make_models: MakeModels, vocabulary: str) -> None:
    """Tokens both models have are merged by token; all other rows, or both tables, are the first's."""
    models = make_models()
    count = len(models.base["model.embed_tokens.weight"])
    first = {f"t{i}": i for i in range(count - 5)}
    second = {f"t{i}": (i + 3) % count for i in range(7, count - 2)}
    for label, tokens in (("pt", first), ("sft", second)):
        text = json.dumps({"model": {"vocab": tokens}})
        (models.folder(label) / "tokenizer.json").write_text(text)
    setting = Setting("soup", vocabulary=vocabulary)
    by_row = merged_models(models, setting, torch.bfloat16, False)
    merged = dict(by_row)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one, two = models.models["pt"][name], models.models["sft"][name]
        table = one.clone()
        for token in first.keys() & second.keys() if vocabulary == "intersection" else ():
            mean = (0.4 * one[first[token]].double() + 0.8 * two[second[token]].double()) / 1.2
            table[first[token]] = mean.to(table.dtype)
        merged[name] = table
    for tensors, right in ((merged, True), (by_row, False)):
        folder = save_model(models.root / f"made-{right}", tensors)
        shutil.copy(models.folder("pt") / "tokenizer.json", folder)
        verdict = verify_models(models, folder, setting, False)
        assert verdict.ok == right, verdict.message


@pytest.mark.parametrize("with_base", [True, False])
def test_soup_with_other_weights(make_models: MakeModels, with_base: bool) -> None:
    models, asked = make_models(), Setting("soup", weights={"pt": 0.3, "sft": 0.7})
    for weights, code in (({"pt": 0.7, "sft": 0.3}, "swapped"), ({"pt": 0.5, "sft": 0.5}, "other_weights")):
        made = Setting("soup", weights=weights)
        verdict = verify_models(models, merged_models(models, made, torch.bfloat16), asked, with_base)
        assert verdict.verdict == code, verdict.message
        assert verdict.effective_weights == pytest.approx(weights, abs=0.02)


def test_slerp_that_was_a_straight_line(make_models: MakeModels) -> None:
    models, asked = make_models(step=0.05), Setting("slerp", weights={"pt": 1.0, "sft": 1.0})
    line = Setting("linear", weights={"pt": 0.7, "sft": 0.3})
    verdict = verify_models(models, merged_models(models, line, torch.bfloat16), asked, False)
    assert (verdict.verdict, verdict.findings[0].detail) == ("other_weights", "straight line"), (
        verdict.message
    )
    turned = Setting("slerp", weights={"pt": 1.0, "sft": 1.0}, t=0.7)
    verdict = verify_models(models, merged_models(models, turned, torch.bfloat16), asked, False)
    assert (verdict.verdict, verdict.findings[0].detail) == ("swapped", "t 0.7"), verdict.message


class Float32Angle(Setting):
    """A slerp whose cosine came out a little wrong, as the sum of very many float32 products does."""

    def value(self, name: str, base: Array, deltas: dict[str, Array]) -> Array:
        p, q = (base + self.weights[k] * deltas.get(k, np.zeros_like(base)) for k in self.weights)
        cosine = float((p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q)) + 5e-5
        if cosine > 0.9995:
            return super().value(name, base, deltas)
        angle = np.arccos(cosine)
        return np.asarray((np.sin((1 - self.t) * angle) * p + np.sin(self.t * angle) * q) / np.sin(angle))


def test_a_slerp_with_its_angle_from_float32(make_models: MakeModels) -> None:
    models, asked = make_models(step=0.05), Setting("slerp", weights={"pt": 1.0, "sft": 1.0})
    rough = Float32Angle("slerp", weights={"pt": 1.0, "sft": 1.0})
    verdict = verify_models(models, merged_models(models, rough, torch.bfloat16), asked, False)
    assert 0 < verdict.elements_differing < 500
    assert (verdict.verdict, verdict.findings[0].detail) == ("low_precision_sums", "the angle")
    right = merged_models(models, asked, torch.bfloat16)
    name = max(right, key=lambda name: right[name].numel())
    right[name].view(torch.int16).view(-1)[7] += 1
    verdict = verify_models(models, right, asked, False)
    assert (verdict.verdict, verdict.elements_differing) == ("unexpected_change", 1)


def test_models_of_other_shapes_are_refused(make_models: MakeModels) -> None:
    models = make_models()
    small = {name: tensor[: len(tensor) // 2] for name, tensor in models.base.items()}
    save_model(models.root / "small", small)
    asked = Setting("soup").asked({"pt": models.folder("pt"), "sft": models.folder("small")}, "model")
    with pytest.raises(BadModelError, match="same shape"):
        verify_merge(models.folder("pt"), None, {}, None, EventWriter(), asked=asked)


def test_ties_without_a_base_is_refused(make_models: MakeModels) -> None:
    models = make_models()
    with pytest.raises(BadRecipeError, match="base"):
        verify_models(models, models.folder("pt"), Setting("ties"), False)


def test_asked_goes_through_json(tmp_path: Path) -> None:
    entry = AskedEntry("pt", tmp_path, "model", {"default": 0.5, "a.weight": 0.25}, {"default": 0.5})
    asked = Asked("ties", (entry,), {"default": 0.1}, 0.9, False, False, 3, "intersection")
    assert Asked.from_json(asked.to_json()) == asked
    for key in asked.to_json():
        document = {k: v for k, v in asked.to_json().items() if k != key}
        with pytest.raises(BadRecipeError, match=key):
            Asked.from_json(document)
