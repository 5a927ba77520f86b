"""Merges made by PEFT and mergekit themselves, at .3/.7 into a bf16 base: the verifier names each for what it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.jobs.events import EventWriter
from engine.merge.verify import Verdict, verify_merge
from tests.peers.conftest import GOLDENS

WEIGHTS = {"pt": 0.3, "sft": 0.7}


def judge(merged: Path, inputs: Path, weights: dict[str, float] | None = None) -> Verdict:
    adapters = {label: inputs / label for label in WEIGHTS}
    return verify_merge(merged, inputs / "base", adapters, weights or WEIGHTS, EventWriter())


def details(verdict: Verdict) -> dict[str, str]:
    return {finding.code: finding.detail for finding in verdict.findings}


def both_adapters(inputs: Path, dtype: torch.dtype) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=dtype)
    model = PeftModel.from_pretrained(base, inputs / "pt", adapter_name="pt")
    model.load_adapter(inputs / "sft", adapter_name="sft")
    return model


Combine = Callable[..., Path]


@pytest.fixture
def combined(peer_inputs: Path, tmp_path: Path) -> Combine:
    """`combined("cat", dtype)`: PEFT's add_weighted_adapter at .3/.7, merge_and_unload, save_pretrained."""

    def make(kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
        model = both_adapters(peer_inputs, dtype)
        model.add_weighted_adapter(
            list(WEIGHTS), list(WEIGHTS.values()), "both", combination_type=kind, **options
        )
        model.set_adapter("both")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        return tmp_path / "merged"

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_peft_linear_multiplies_a_and_b_of_different_adapters(
    dtype: torch.dtype, combined: Combine, peer_inputs: Path
) -> None:
    verdict = judge(combined("linear", dtype), peer_inputs)
    assert verdict.verdict == "cross_terms", verdict.message
    assert f"{0.21**0.5:.3f}" in details(verdict)["cross_terms"]


def test_peft_cat_into_float32_is_right(combined: Combine, peer_inputs: Path) -> None:
    assert judge(combined("cat", torch.float32), peer_inputs).ok


def test_peft_cat_into_bf16_rounds_the_factors_and_the_delta(combined: Combine, peer_inputs: Path) -> None:
    """The new adapter has the base's dtype: w s A and B are rounded into it, then B A, then the sum."""
    verdict = judge(combined("cat"), peer_inputs)
    assert verdict.verdict == "delta_rounded_first", verdict.message
    assert details(verdict)["delta_rounded_first"] == "A and B side by side"
    assert "'cat'" in verdict.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_peft_svd_of_all_ranks_is_right(dtype: torch.dtype, combined: Combine, peer_inputs: Path) -> None:
    verdict = judge(combined("svd", dtype, svd_rank=8), peer_inputs)
    assert verdict.ok, verdict.message


def test_peft_svd_of_fewer_ranks_is_named(combined: Combine, peer_inputs: Path) -> None:
    verdict = judge(combined("svd", svd_rank=4), peer_inputs)
    assert verdict.verdict == "partly_applied" and verdict.exit_code == 1, verdict.message
    assert details(verdict)["partly_applied"] == "rank 4 of 8" and "'svd'" in verdict.message


def test_peft_sequential_merge_and_unload_rounds_after_each(peer_inputs: Path, tmp_path: Path) -> None:
    """As the published script merges: one adapter at its weight, then the other into the result."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(peer_inputs / "base", dtype=torch.bfloat16)
    for label, weight in WEIGHTS.items():
        lora = PeftModel.from_pretrained(model, peer_inputs / label)
        for module in lora.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= weight
        model = lora.merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    verdict = judge(tmp_path / "merged", peer_inputs)
    assert verdict.verdict == "sequential_rounding", verdict.message
    assert details(verdict)["sequential_rounding"] == "pt, then sft"


def test_peft_merge_and_unload_of_two_adapters_forgets_the_weights(peer_inputs: Path, tmp_path: Path) -> None:
    both_adapters(peer_inputs, torch.bfloat16).merge_and_unload(adapter_names=list(WEIGHTS)).save_pretrained(
        tmp_path / "merged"
    )
    verdict = judge(tmp_path / "merged", peer_inputs)
    assert verdict.verdict == "other_weights", verdict.message
    assert details(verdict) == {"other_weights": "pt 1, sft 1", "sequential_rounding": "pt, then sft"}


def test_mergekit_rounds_every_step_of_the_sum(peer_inputs: Path, tmp_path: Path) -> None:
    """Its weights, too: .3 is .3008 in bf16, which the fit shows."""
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copy(peer_inputs / "base" / "config.json", merged)
    shutil.copy(GOLDENS / "lora.safetensors", merged / "model.safetensors")
    verdict = judge(merged, peer_inputs)
    assert verdict.verdict == "low_precision_sums", verdict.message
    assert "as mergekit does" in verdict.message
    assert verdict.effective_weights == pytest.approx({"pt": 0.30078, "sft": 0.69922}, abs=2e-4)
