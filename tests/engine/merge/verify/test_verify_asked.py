"""What a verdict says was asked: weights by tensor, a reference asked for as it is, changes that rounding swallows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.jobs.events import EventWriter
from engine.merge.verify import Verdict, verify_merge
from engine.merge.verify.asked import Asked, AskedEntry
from tests.engine.merge.verify.scenes import ASKED, MODULES, MakeScene, Scene, make_base, save_model


def by_layer(module: str) -> float:
    return int(module.split(".")[2]) / 3


def verify(scene: Scene, merged: dict[str, torch.Tensor], asked: Asked) -> Verdict:
    return verify_merge(scene.save(merged), scene.base_folder, {}, None, EventWriter(), asked=asked)


def entry(scene: Scene, label: str, weight: dict[str, float]) -> AskedEntry:
    return AskedEntry(label, scene.loras[label].folder, weight=weight)


@pytest.mark.parametrize("lam", [1.0, 2.0])
def test_weights_by_tensor_are_told_as_what_they_fit_to(scene: Scene, lam: float) -> None:
    """A gradient from 0 to 1 is not "0", its first number: it is dense least squares of what was added."""
    pt, sft = scene.loras["pt"], scene.loras["sft"]

    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        return base.double() + lam * (by_layer(module) * pt.delta(module) + 0.7 * sft.delta(module))

    weights = {f"{module}.weight": by_layer(module) for module in MODULES}
    asked = Asked(
        "task_arithmetic", (entry(scene, "pt", weights), entry(scene, "sft", {"default": 0.7})), lam=lam
    )
    verdict = verify(scene, scene.merge(rule=rule, dtype=torch.float32), asked)
    assert verdict.ok, verdict.message
    added = torch.cat(
        [(rule(scene.base[f"{m}.weight"], m) - scene.base[f"{m}.weight"].double()).flatten() for m in MODULES]
    )
    deltas = torch.stack(
        [torch.cat([lora.delta(m).flatten() for m in MODULES]) for lora in scene.loras.values()], 1
    )
    fitted = dict(zip(scene.loras, torch.linalg.lstsq(deltas, added).solution.tolist(), strict=True))
    assert verdict.asked is not None and verdict.rounding_loss is not None
    assert verdict.asked["pt"] == pytest.approx(fitted["pt"], abs=1e-6) and fitted["pt"] > 0.3
    assert verdict.asked["sft"] == pytest.approx(0.7 if lam == 1 else fitted["sft"], abs=1e-6)
    assert verdict.effective_weights == pytest.approx(fitted, abs=1e-5)
    assert "weights by tensor, on the whole" in verdict.message


def test_weights_by_tensor_of_other_methods_are_called_so(scene: Scene) -> None:
    weights = {f"{module}.weight": 0.0 for module in MODULES} | {"default": 1.0}
    asked = Asked("ties", (entry(scene, "pt", weights), entry(scene, "sft", {"default": 0.0})))
    verdict = verify(scene, scene.base, asked)
    assert "ties of pt / sft at weights by tensor / 0" in verdict.message


@pytest.mark.parametrize("labels", [("pt",), ("pt", "sft")])
def test_a_change_that_rounding_swallows_whole_is_no_yes(
    make_scene: MakeScene, labels: tuple[str, ...]
) -> None:
    """In bfloat16 the right merge is the base, bit for bit; larger deltas in float32 are not, and found."""
    scene = make_scene(b_std=1e-4)
    asked = Asked("linear", tuple(entry(scene, label, {"default": 1e-6}) for label in labels))
    weights = {label: 1e-6 if label in labels else 0.0 for label in ASKED}
    merged = scene.merge(weights)
    assert all(torch.equal(merged[name], tensor) for name, tensor in scene.base.items())
    verdict = verify(scene, merged, asked)
    assert (verdict.findings[0].code, verdict.exit_code) == ("not_identifiable", 4)
    large = make_scene(folder="large")
    asked = Asked("linear", tuple(entry(large, label, {"default": 1e-4}) for label in labels))
    weights = {label: 100 * weight for label, weight in weights.items()}
    fine = verify(large, large.merge(weights, dtype=torch.float32), asked)
    assert fine.ok, fine.message
    assert "0.0001" in fine.message  # and not 0.000


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_weights_of_0_ask_for_the_base(scene: Scene, method: str) -> None:
    asked = Asked(method, tuple(entry(scene, label, {"default": 0.0}) for label in ASKED))
    assert verify(scene, scene.base, asked).ok
    other = dict(scene.base)
    other["model.layers.1.mlp.up_proj.weight"] = -other["model.layers.1.mlp.up_proj.weight"]
    assert verify(scene, other, asked).exit_code == 1


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_of_a_slerp_of_models_are_the_models(tmp_path: Path, t: float) -> None:
    models = [make_base(seed) for seed in (1, 2)]
    folders = [save_model(tmp_path / f"model-{k}", model) for k, model in enumerate(models)]
    entries = tuple(AskedEntry(f"m{k}", folder, "model") for k, folder in enumerate(folders))

    def check(merged: dict[str, torch.Tensor], name: str, **settings: Any) -> Verdict:
        asked = Asked("slerp", entries, t={"default": t})
        return verify_merge(
            save_model(tmp_path / name, merged), None, {}, None, EventWriter(), asked=asked, **settings
        )

    assert check(models[int(t)], "right").ok
    assert check(models[1 - int(t)], "wrong").exit_code == 1


def test_another_model_is_not_taken_for_missing_ranks(scene: Scene) -> None:
    verdict = scene.verify({**make_base(7)})
    assert verdict.exit_code == 1
    assert "partly_applied" not in {finding.code for finding in verdict.findings}
    assert "unknown_delta" in {finding.code for finding in verdict.findings}
