"""Right merges pass, whatever made them; deltas that cannot be told apart give "could not tell"."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.errors import BadAdapterError, BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.verify import verify_merge
from tests.engine.merge.verify.scenes import (
    ASKED,
    INNER,
    MODULES,
    MakeScene,
    Scene,
    make_lora,
    save_model,
)

CONTRACT = {
    "ok", "verdict", "message", "findings", "asked", "expected_weights", "effective_weights", "rounding_loss",
    "residual", "rounding_floor", "differing_share", "unchanged_share", "tensors_checked", "tensors_unexpected",
}  # fmt: skip


@pytest.mark.parametrize("b_std", [0.02, 0.005, 0.002, 0.00015])
def test_bfloat16_of_any_size(make_scene: MakeScene, b_std: float) -> None:
    scene = make_scene(b_std=b_std)
    verdict = scene.verify(scene.merge())
    assert verdict.ok, verdict.message
    assert verdict.exit_code == 0
    assert verdict.effective_weights == pytest.approx(verdict.expected_weights, abs=1e-3)
    if b_std == 0.00015:  # bfloat16 keeps the change of a quarter of the elements at most
        assert verdict.unchanged_share > 0.75


def test_json_has_the_keys_of_the_contract(scene: Scene) -> None:
    answer = scene.verify(scene.merge()).to_json()
    assert answer.keys() >= CONTRACT
    assert answer["ok"] is True
    assert answer["verdict"] == "ok"
    assert answer["findings"] == [{"code": "ok", "detail": "", "message": answer["message"]}]
    assert answer["tensors_checked"] == len(scene.base)
    assert len(answer["per_module"]) == len(MODULES)


def test_numbers_agree_with_dense_numpy(scene: Scene) -> None:
    """Weights, residual and floor against numpy's own least squares on the dense deltas."""
    merged = scene.merge({"pt": 0.35, "sft": 0.6})
    verdict = scene.verify(merged)

    def change(tensors: dict[str, torch.Tensor]) -> np.ndarray:
        parts = [
            (tensors[f"{m}.weight"].double() - scene.base[f"{m}.weight"].double()).flatten() for m in MODULES
        ]
        return torch.cat(parts).numpy()

    design = np.stack(
        [torch.cat([lora.delta(m).flatten() for m in MODULES]).numpy() for lora in scene.loras.values()],
        axis=1,
    )
    for tensors, weights, residual in (
        (merged, verdict.effective_weights, verdict.residual),
        (scene.merge(), verdict.expected_weights, verdict.rounding_floor),
    ):
        target = change(tensors)
        found, *_ = np.linalg.lstsq(design, target, rcond=None)
        left = np.linalg.norm(target - design @ found) / np.linalg.norm(target)
        assert weights is not None
        assert list(weights.values()) == pytest.approx(found.tolist(), abs=2e-6)
        assert residual == pytest.approx(left, rel=1e-3)
    assert verdict.unchanged_share == pytest.approx(float(np.mean(change(merged) == 0)))


def test_rounding_loss_shows_when_deltas_are_small(make_scene: MakeScene) -> None:
    """FACTS of bfloat16: the smaller the delta, the more of the weight is lost, and none of it in float16."""
    losses = []
    for number, b_std in enumerate((0.002, 0.0003, 0.0001)):
        scene = make_scene(b_std=b_std, folder=f"scene{number}")
        verdict = scene.verify(scene.merge())
        assert verdict.ok
        assert verdict.rounding_loss is not None
        losses.append(verdict.rounding_loss["sft"])
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] > 0.05
    exact = scene.verify(scene.merge(dtype=torch.float32))
    assert exact.ok
    assert exact.rounding_loss == pytest.approx({"pt": 0, "sft": 0}, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(make_scene: MakeScene, dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    scene = make_scene(base_dtype=base_dtype)
    verdict = scene.verify(scene.merge(dtype=dtype))
    assert verdict.ok, verdict.message
    assert verdict.effective_weights == pytest.approx(ASKED, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_concatenated_in_float32_then_rounded(scene: Scene, dtype: torch.dtype) -> None:
    """PEFT's `cat`: weight and scale go into A, ranks are concatenated, all in float32."""

    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        a = torch.cat([x.pairs[module][0] * ASKED[n] * x.scales[module] for n, x in scene.loras.items()])
        b = torch.cat([x.pairs[module][1] for x in scene.loras.values()], dim=1)
        return base.float() + b @ a

    verdict = scene.verify(scene.merge(rule=rule, dtype=dtype))
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_after_the_other_in_float32(scene: Scene, dtype: torch.dtype) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        y = base.float()
        for label in ("sft", "pt"):
            a, b = scene.loras[label].pairs[module]
            y = y + ASKED[label] * ((b @ a) * scene.loras[label].scales[module])
        return y

    assert scene.verify(scene.merge(rule=rule, dtype=dtype)).ok


def test_shards_and_order_do_not_matter(scene: Scene) -> None:
    merged = scene.merge()
    folder = scene.save(dict(reversed(merged.items())), shards=4)
    scene.loras = dict(reversed(scene.loras.items()))
    verdict = scene.verify(folder)
    assert verdict.ok
    assert list(verdict.effective_weights or {}) == ["sft", "pt"]


def test_tied_head_written_out(make_scene: MakeScene) -> None:
    scene = make_scene(tie_word_embeddings=True, drop=("lm_head.weight",))
    merged = scene.merge()
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"].clone()
    assert scene.verify(merged).ok
    merged["lm_head.weight"].view(torch.int16)[0, 0] += 1
    assert scene.verify(merged).tensors_unexpected == ("lm_head.weight",)


def test_rslora_and_patterns(make_scene: MakeScene) -> None:
    """Scales by the definition: alpha / sqrt(r) for rsLoRA; alpha and rank by module otherwise."""
    up = [module for module in MODULES if module.endswith("up_proj")]
    first = [module for module in MODULES if module.startswith("model.layers.1.")]
    ranks = dict.fromkeys(up, 3)
    scales = {m: (64 if m in first else 16) / ranks.get(m, 8) for m in MODULES}
    scene = make_scene(
        pt={"use_rslora": True, "scales": dict.fromkeys(MODULES, 16 / math.sqrt(8))},
        sft={
            "ranks": ranks,
            "scales": scales,
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {r"layers\.1\..*": 64},
        },
    )
    verdict = scene.verify(scene.merge())
    assert verdict.ok, verdict.message


def test_adapters_on_different_modules(make_scene: MakeScene) -> None:
    attention = [module for module in MODULES if "self_attn" in module]
    scene = make_scene(pt={"modules": attention}, sft={"dtype": torch.bfloat16})
    assert scene.verify(scene.merge()).ok


def test_weights_by_tensor(scene: Scene) -> None:
    own = {module: (0.1 if ".layers.0." in module else 0.3) for module in MODULES}
    merged = scene.merge(rule=lambda base, m: base.double() + scene.total(m, {"pt": own[m], "sft": 0.7}))
    by_tensor = {"pt": {f"{module}.weight": weight for module, weight in own.items()}}
    assert scene.verify(merged, per_tensor_weights=by_tensor).ok
    assert not scene.verify(merged).ok


def test_negative_and_zero_weights(scene: Scene) -> None:
    for zero in (0.0, -0.0):
        weights = {"pt": -0.4, "sft": zero}
        assert scene.verify(scene.merge(weights), weights).ok


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a merge is too slow to shrink
)
@given(
    seed=st.integers(0, 10**6),
    pt=st.floats(-1.5, 1.5).map(lambda w: round(w, 2)),
    sft=st.floats(-1.5, 1.5).map(lambda w: round(w, 2)),
    b_std=st.sampled_from([0.05, 0.01, 0.002]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_no_false_alarm(
    make_scene: MakeScene, seed: int, pt: float, sft: float, b_std: float, dtype: torch.dtype
) -> None:
    scene = make_scene(seed=seed, b_std=b_std, folder=f"{seed}-{pt}-{sft}-{b_std}-{dtype}")
    weights = {"pt": pt, "sft": sft}
    verdict = scene.verify(scene.merge(weights, dtype=dtype), weights)
    assert verdict.exit_code in ((0,) if pt or sft else (0, 4)), verdict.message


# What is in there?


def test_weights_found_without_being_told(make_scene: MakeScene) -> None:
    scene = make_scene(b_std=0.0003)
    verdict = scene.verify(scene.merge(), None)
    assert verdict.ok, verdict.message
    assert verdict.asked is None
    assert verdict.guessed == ASKED  # though they fit to less
    assert verdict.effective_weights is not None
    assert verdict.effective_weights["sft"] < 0.69


def test_asking_what_is_in_the_base(scene: Scene) -> None:
    verdict = scene.verify(dict(scene.base), None)
    assert verdict.verdict == "base_unchanged"
    assert verdict.exit_code == 1


def test_one_wrong_element_is_seen_without_weights(scene: Scene) -> None:
    merged = scene.merge()
    merged["model.layers.0.mlp.up_proj.weight"].view(torch.int16)[0, 0] += 4
    verdict = scene.verify(merged, None)
    assert verdict.verdict == "unexpected_change"
    assert verdict.elements_differing == 1


# Could not tell


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_collinear_deltas(make_scene: MakeScene, noise: float) -> None:
    scene = make_scene()
    pairs = {
        m: (a, b * 0.8 + noise * 0.02 * torch.randn(b.shape)) for m, (a, b) in scene.loras["pt"].pairs.items()
    }
    scene.loras["sft"] = make_lora(scene.root / "copy", 0, pairs=pairs)
    verdict = scene.verify(scene.merge())
    assert verdict.verdict == "not_identifiable"
    assert verdict.exit_code == 4
    assert not verdict.ok
    assert scene.verify(dict(scene.base)).verdict == "base_unchanged"  # a definite no stays a no


def test_deltas_below_the_resolution(make_scene: MakeScene) -> None:
    scene = make_scene(b_std=1e-9)
    verdict = scene.verify(scene.merge())
    assert verdict.verdict == "not_identifiable"
    assert verdict.exit_code == 4
    assert "too coarse" in verdict.message


def test_one_delta_below_the_resolution(make_scene: MakeScene) -> None:
    scene = make_scene(pt={"b_std": 1e-9})
    verdict = scene.verify(scene.merge())
    assert verdict.exit_code == 4
    assert verdict.findings[0].detail == "pt"


def test_untrained_adapter(make_scene: MakeScene) -> None:
    scene = make_scene(pt={"b_std": 0.0})
    assert scene.verify(scene.merge()).verdict == "not_identifiable"


# Bad input


def test_labels_must_agree(scene: Scene) -> None:
    with pytest.raises(BadRecipeError, match="sft"):
        scene.verify(scene.merge(), {"pt": 0.3})
    with pytest.raises(BadRecipeError, match="nan"):
        scene.verify(scene.merge(), {"pt": float("nan"), "sft": 0.7})


def test_adapter_of_another_base(scene: Scene) -> None:
    wide = {m: (torch.zeros(8, INNER + 1), torch.zeros(7, 8)) for m in MODULES}
    lora = make_lora(scene.root / "wide", 0, pairs=wide)
    folder = scene.save(scene.merge())
    with pytest.raises(BadAdapterError, match=r"\[7, 97\]"):
        verify_merge(folder, scene.base_folder, {"pt": lora.folder}, {"pt": 1.0}, EventWriter())


def test_rank_that_contradicts_the_config(scene: Scene) -> None:
    lora = make_lora(scene.root / "odd", 0, r=4)
    with pytest.raises(BadAdapterError, match="says rank 4"):
        verify_merge(
            save_model(scene.root / "m", scene.base),
            scene.base_folder,
            {"x": lora.folder},
            {"x": 1.0},
            EventWriter(),
        )
