"""Every failure we claim to find, planted in a merge written in plain torch, and found under its name."""

from __future__ import annotations

import shutil

import pytest
import torch

from engine.merge.verify import Verdict
from tests.engine.merge.verify.scenes import (
    ASKED,
    LAYERS,
    MODULES,
    SHAPES,
    MakeScene,
    Scene,
    make_lora,
    save_model,
)


@pytest.fixture(params=[0.02, 0.002], ids=lambda std: f"std{std}")
def any_scene(request: pytest.FixtureRequest, make_scene: MakeScene) -> Scene:
    return make_scene(b_std=request.param)


def bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).double()


def codes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.findings]


def detail(verdict: Verdict, code: str) -> str:
    return next(finding.detail for finding in verdict.findings if finding.code == code)


def expect(verdict: Verdict, code: str) -> Verdict:
    assert verdict.verdict == code, (codes(verdict), verdict.message)
    assert not verdict.ok
    assert verdict.exit_code == 1
    return verdict


def test_base_unchanged(any_scene: Scene) -> None:
    verdict = expect(any_scene.verify(dict(any_scene.base)), "base_unchanged")
    assert verdict.effective_weights == pytest.approx({"pt": 0, "sft": 0}, abs=1e-6)
    assert verdict.unchanged_share == 1


def test_swapped(any_scene: Scene) -> None:
    verdict = expect(any_scene.verify(any_scene.merge({"pt": 0.7, "sft": 0.3})), "swapped")
    assert verdict.effective_weights == pytest.approx({"pt": 0.7, "sft": 0.3}, abs=0.01)
    assert "swapped" in verdict.message


@pytest.mark.parametrize("gone", ["pt", "sft"])
def test_one_missing(any_scene: Scene, gone: str) -> None:
    verdict = expect(any_scene.verify(any_scene.merge({**ASKED, gone: 0.0})), "missing")
    assert detail(verdict, "missing") == gone


def test_weights_applied_twice(any_scene: Scene) -> None:
    squared = {label: weight**2 for label, weight in ASKED.items()}
    verdict = expect(any_scene.verify(any_scene.merge(squared)), "weight_squared")
    assert "applied twice" in verdict.message
    assert "0.300 / 0.700 was asked" in verdict.message
    assert verdict.effective_weights == pytest.approx(squared, abs=0.002)


@pytest.mark.parametrize("factor", [0.5, 2.0, 8.0, 1.001, 0.98, 1.37, -1.0])
def test_other_strength(any_scene: Scene, factor: float) -> None:
    verdict = any_scene.verify(any_scene.merge({label: weight * factor for label, weight in ASKED.items()}))
    expect(verdict, "scaled_by")
    assert float(detail(verdict, "scaled_by")) == pytest.approx(factor, rel=1e-3)


def test_strength_of_one_adapter(scene: Scene) -> None:
    verdict = expect(scene.verify(scene.merge({"pt": 0.6, "sft": 0.7})), "scaled_by")
    assert detail(verdict, "scaled_by") == "pt 2"


def test_other_weights(scene: Scene) -> None:
    verdict = expect(scene.verify(scene.merge({"pt": 0.45, "sft": 0.55})), "other_weights")
    assert detail(verdict, "other_weights") == "pt 0.45, sft 0.55"


@pytest.mark.parametrize("order", [("pt", "sft"), ("sft", "pt")])
def test_sequential_rounding(any_scene: Scene, order: tuple[str, str]) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        y = base.double()
        for label in order:
            y = bf16(y + ASKED[label] * any_scene.loras[label].delta(module))
        return y

    verdict = expect(any_scene.verify(any_scene.merge(rule=rule)), "sequential_rounding")
    assert detail(verdict, "sequential_rounding") == ", then ".join(order)


def test_published_pipeline_squares_and_rounds_twice(any_scene: Scene) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        y = base.double()
        for label, lora in any_scene.loras.items():
            y = bf16(y + ASKED[label] ** 2 * lora.delta(module))
        return y

    verdict = expect(any_scene.verify(any_scene.merge(rule=rule)), "weight_squared")
    assert "sequential_rounding" in codes(verdict)


def test_merged_twice(any_scene: Scene) -> None:
    verdict = any_scene.verify(
        any_scene.merge(rule=lambda base, m: bf16(base.double() + any_scene.total(m)) + any_scene.total(m))
    )
    expect(verdict, "scaled_by")
    assert detail(verdict, "scaled_by") == "2"
    assert "merged twice" in verdict.message


def test_cross_terms_as_peft_linear_makes_them(any_scene: Scene) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        roots = {
            label: (ASKED[label] * lora.scales[module]) ** 0.5 for label, lora in any_scene.loras.items()
        }
        a = sum(roots[label] * lora.pairs[module][0].double() for label, lora in any_scene.loras.items())
        b = sum(roots[label] * lora.pairs[module][1].double() for label, lora in any_scene.loras.items())
        return base.double() + b @ a

    verdict = expect(any_scene.verify(any_scene.merge(rule=rule)), "cross_terms")
    assert f"{0.21**0.5:.3f}" in detail(verdict, "cross_terms")


def test_wrong_adapter(any_scene: Scene) -> None:
    other = make_lora(
        any_scene.root / "other", seed=99, b_std=float(any_scene.loras["pt"].pairs[MODULES[0]][1].std())
    )
    verdict = any_scene.verify(
        any_scene.merge(
            rule=lambda base, m: base.double() + 0.3 * other.delta(m) + 0.7 * any_scene.loras["sft"].delta(m)
        )
    )
    assert verdict.exit_code == 1
    assert {"unknown_delta", "missing"} <= set(codes(verdict))
    assert detail(verdict, "missing") == "pt"


def test_something_more_inside(any_scene: Scene) -> None:
    other = make_lora(any_scene.root / "other", seed=99, b_std=0.002)
    verdict = any_scene.verify(
        any_scene.merge(rule=lambda base, m: base.double() + any_scene.total(m) + 0.5 * other.delta(m))
    )
    expect(verdict, "unknown_delta")
    assert "missing" not in codes(verdict)


def test_one_layer_left_out(any_scene: Scene) -> None:
    merged = any_scene.merge()
    names = [module for module in MODULES if ".layers.2." in module]
    for module in names:
        merged[f"{module}.weight"] = any_scene.base[f"{module}.weight"]
    verdict = expect(any_scene.verify(merged), "partly_applied")
    assert sorted(detail(verdict, "partly_applied").split(", ")) == sorted(names)
    assert codes(verdict) == ["partly_applied"]


def test_one_adapter_left_out_of_one_module(any_scene: Scene) -> None:
    module = "model.layers.1.mlp.up_proj"
    merged = any_scene.merge()
    without = any_scene.base[f"{module}.weight"].double() + any_scene.total(module, {**ASKED, "pt": 0.0})
    merged[f"{module}.weight"] = without.to(torch.bfloat16)
    verdict = expect(any_scene.verify(merged), "partly_applied")
    assert detail(verdict, "partly_applied") == module
    assert "without pt" in verdict.message


def test_partial_rank(any_scene: Scene) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        a, b = any_scene.loras["pt"].pairs[module]
        some = any_scene.loras["pt"].scales[module] * (b[:, :5].double() @ a[:5].double())
        return base.double() + 0.3 * some + 0.7 * any_scene.loras["sft"].delta(module)

    verdict = expect(any_scene.verify(any_scene.merge(rule=rule)), "partly_applied")
    assert detail(verdict, "partly_applied") == "pt"
    assert "5 of 8 ranks" in verdict.message


@pytest.mark.parametrize("asked", [ASKED, {"pt": 1.0, "sft": 0.0}], ids=["both", "alone"])
def test_a_sum_truncated_to_a_lower_rank(any_scene: Scene, asked: dict[str, float]) -> None:
    """The reference truncates the dense sum by torch's SVD."""

    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        total = sum(weight * any_scene.loras[label].delta(module) for label, weight in asked.items())
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        return base.double() + (u[:, :6] * s[:6]) @ vt[:6]

    whole = sum(any_scene.loras[label].pairs[MODULES[0]][0].shape[0] for label in asked if asked[label])
    verdict = expect(any_scene.verify(any_scene.merge(rule=rule), asked), "partly_applied")
    assert detail(verdict, "partly_applied") == f"rank 6 of {whole}"
    assert "truncated to rank 6" in verdict.message


@pytest.mark.parametrize("step", [1, -1])
def test_one_element_by_one_ulp(any_scene: Scene, step: int) -> None:
    merged = any_scene.merge()
    name = "model.layers.3.mlp.down_proj.weight"
    merged[name].view(torch.int16)[7, 11] += step
    verdict = expect(any_scene.verify(merged), "unexpected_change")
    assert verdict.elements_differing == 1
    assert detail(verdict, "unexpected_change") == name
    assert "[7, 11]" in verdict.message


def test_one_element_of_float16_by_one_ulp(scene: Scene) -> None:
    merged = scene.merge(dtype=torch.float16)
    merged["model.layers.0.mlp.down_proj.weight"].view(torch.int16)[0, 0] += 1
    assert scene.verify(merged).elements_differing == 1


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_untouched_tensor_changed(scene: Scene, name: str) -> None:
    merged = scene.merge()
    merged[name].view(torch.int16).view(-1)[3] += 1
    verdict = expect(scene.verify(merged), "unexpected_change")
    assert detail(verdict, "unexpected_change") == name
    assert verdict.tensors_wrong == (name,)


def test_delta_rounded_first(any_scene: Scene) -> None:
    verdict = any_scene.verify(any_scene.merge(rule=lambda base, m: base.double() + bf16(any_scene.total(m))))
    expect(verdict, "delta_rounded_first")


def test_peft_in_bfloat16_rounds_each_delta(any_scene: Scene) -> None:
    """merge_and_unload of adapters one by one on a bf16 model: (B @ A) * scale in bf16, added in bf16."""

    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        y = base
        for label, lora in any_scene.loras.items():
            y = y + (ASKED[label] * lora.delta(module)).to(torch.bfloat16)
        return y

    expect(any_scene.verify(any_scene.merge(rule=rule)), "delta_rounded_first")


def test_sums_in_bfloat16(any_scene: Scene) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        total = torch.zeros_like(base)
        for label, lora in any_scene.loras.items():
            total = total + ASKED[label] * lora.delta(module).to(torch.bfloat16)
        return base + total

    expect(any_scene.verify(any_scene.merge(rule=rule)), "low_precision_sums")


def test_differences_of_rounded_checkpoints_as_mergekit(any_scene: Scene) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        total = torch.zeros_like(base)
        for label, lora in any_scene.loras.items():
            checkpoint = (base.double() + lora.delta(module)).to(torch.bfloat16)
            total = total + ASKED[label] * (checkpoint - base)
        return base + total

    expect(any_scene.verify(any_scene.merge(rule=rule)), "low_precision_sums")


def test_truncated_instead_of_rounded(any_scene: Scene) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        exact = (base.double() + any_scene.total(module)).float()
        return (exact.view(torch.int32) & -65536).view(torch.float32)

    verdict = expect(any_scene.verify(any_scene.merge(rule=rule)), "low_precision_sums")
    assert detail(verdict, "low_precision_sums") == "truncated"


def test_alpha_over_rank_forgotten(scene: Scene) -> None:
    """alpha 16, rank 8: without the scale the deltas have half their size."""
    verdict = scene.verify(scene.merge({label: weight / 2 for label, weight in ASKED.items()}))
    assert detail(expect(verdict, "scaled_by"), "scaled_by") == "0.5"


def test_rslora_scale_read_as_plain(make_scene: MakeScene) -> None:
    settings = {"use_rslora": True, "scales": dict.fromkeys(MODULES, 16 / 8**0.5)}
    scene = make_scene(pt=settings, sft=settings)
    factor = 8**-0.5
    verdict = scene.verify(scene.merge({label: weight * factor for label, weight in ASKED.items()}))
    assert float(detail(expect(verdict, "scaled_by"), "scaled_by")) == pytest.approx(factor, rel=1e-3)


def test_transposed_delta_is_unknown(scene: Scene) -> None:
    def rule(base: torch.Tensor, module: str) -> torch.Tensor:
        total = scene.total(module)
        return base.double() + (total.T if total.shape[0] == total.shape[1] else total)

    verdict = expect(scene.verify(scene.merge(rule=rule)), "unknown_delta")
    assert set(verdict.tensors_wrong) == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(LAYERS)
    }


def test_not_a_number(scene: Scene) -> None:
    merged = scene.merge()
    merged["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    verdict = scene.verify(merged)
    assert verdict.exit_code == 1
    assert "NaN" in " ".join(finding.message for finding in verdict.findings)


def test_stale_shard(scene: Scene) -> None:
    folder = scene.save(scene.merge(), shards=3)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00004-of-00004.safetensors")
    verdict = expect(scene.verify(folder), "stale_files")
    assert detail(verdict, "stale_files") == "model-00004-of-00004.safetensors"
    assert scene.verify(folder, allow_extra_files=["model-00004*"]).ok


def test_unexpected_and_missing_tensors(scene: Scene) -> None:
    merged = scene.merge()
    merged["model.layers.9.extra.weight"] = torch.zeros(2, 2, dtype=torch.bfloat16)
    verdict = expect(scene.verify(merged), "unexpected_change")
    assert verdict.tensors_unexpected == ("model.layers.9.extra.weight",)
    merged = scene.merge()
    del merged["model.norm.weight"]
    assert "missing" in expect(scene.verify(merged), "unexpected_change").message


def test_wrong_shape_and_mixed_dtype(scene: Scene) -> None:
    merged = scene.merge()
    merged["model.norm.weight"] = merged["model.norm.weight"][:-1]
    assert "[63]" in expect(scene.verify(merged), "unexpected_change").message
    merged = scene.merge()
    merged["lm_head.weight"] = merged["lm_head.weight"].to(torch.float16)
    assert "F16" in expect(scene.verify(merged), "unexpected_change").message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"version": "2.0"}'),
        ("chat_template.jinja", "{{ other }}"),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>"}'),
        ("config.json", '{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "rope_theta": 1}'),
    ],
)
def test_companion_changed(scene: Scene, name: str, text: str) -> None:
    folder = scene.save(scene.merge(), rope_theta=10000)
    base = save_model(scene.root / "base2", scene.base, rope_theta=10000)
    scene.base_folder = base
    assert scene.verify(folder).ok
    (folder / name).write_text(text)
    assert detail(expect(scene.verify(folder), "unexpected_change"), "unexpected_change") == name


def test_missing_tokenizer_is_a_warning(scene: Scene) -> None:
    folder = scene.save(scene.merge())
    (folder / "tokenizer.json").unlink()
    verdict = scene.verify(folder)
    assert verdict.ok
    assert any("tokenizer.json" in warning for warning in verdict.warnings)


def test_shapes_cover_wide_and_tall_modules() -> None:
    assert any(out > inside for out, inside in SHAPES.values())
    assert any(out < inside for out, inside in SHAPES.values())
