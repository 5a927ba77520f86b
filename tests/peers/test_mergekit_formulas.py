"""mergekit's own results against the formulas, tensor by tensor: where they differ, and by how much, and why.

`references` has the formulas in float64. In float32 (and linear and slerp in any dtype) mergekit agrees with them
within float32's error. In bfloat16 its task methods round every step; `theirs` repeats those steps bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.merge import references as ref
from tests.peers import theirs
from tests.peers.conftest import GOLDENS
from tests.peers.inputs import ALPHA, MODULES, RANK, SHAPES, TOKENS, digest

Models = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def models(peer_inputs: Path) -> Models:
    return {name: load_file(peer_inputs / name / "model.safetensors") for name in TOKENS}


def golden(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{case}.safetensors")


def numbers(facts: dict[str, Any], case: str, tensor: str, parameter: str) -> list[float]:
    """What mergekit resolved for the models of a case at one tensor, in their order, without the base."""
    models = facts["cases"][case][tensor]["models"]
    return [own[parameter] for own in models.values() if parameter in own]


def f64(models: Models, name: str, *which: str) -> list[ref.Array]:
    return [ref.as_float64(models[model][name]) for model in which]


def test_the_inputs_are_those_of_the_goldens(peer_inputs: Path, golden_facts: dict[str, Any]) -> None:
    assert digest(peer_inputs) == golden_facts["inputs"]
    assert set(golden("linear")) == set(SHAPES)


@pytest.mark.parametrize("case", ["linear", "linear_filters"])
def test_linear_is_the_weighted_mean_rounded_once(
    case: str, models: Models, golden_facts: dict[str, Any]
) -> None:
    for name, found in golden(case).items():
        ref.soup(f64(models, name, "a", "b"), numbers(golden_facts, case, name, "weight")).assert_rounded(
            found, name
        )


@pytest.mark.parametrize("name", SHAPES)
def test_slerp(name: str, models: Models, golden_facts: dict[str, Any]) -> None:
    """mergekit's angle is float32's: near 0 its sine carries an error of 1e-6 or so of the whole."""
    t = golden_facts["cases"]["slerp"][name]["shared"]["t"]
    p, q = f64(models, name, "a", "b")
    exact = ref.slerp(p, q, t, error=2e-6 * np.maximum(np.abs(p), np.abs(q)))
    exact.assert_rounded(golden("slerp")[name], name)


def test_task_arithmetic_in_float32(models: Models, golden_facts: dict[str, Any]) -> None:
    for name, found in golden("task_arithmetic").items():
        base, a, b = f64(models, name, "base", "a", "b")
        weights = numbers(golden_facts, "task_arithmetic", name, "weight")
        ref.linear(base, [a - base, b - base], weights, lambda_=1.5).assert_rounded(found, name)


def test_bf16_sums_misround_a_tenth_of_the_elements(models: Models) -> None:
    wrong = total = 0
    for name, found in golden("task_arithmetic_bf16").items():
        again = theirs.task_arithmetic(
            models["base"][name], [models["a"][name], models["b"][name]], [0.6, 0.3]
        )
        assert torch.equal(again, found), name
        base, a, b = f64(models, name, "base", "a", "b")
        once = torch.from_numpy(ref.linear(base, [a - base, b - base], [0.6, 0.3]).value).to(torch.bfloat16)
        wrong, total = wrong + int((once != found).sum()), total + found.numel()
    assert 0.05 < wrong / total < 0.3, wrong / total


def test_ties_in_float32_differs_only_at_the_threshold(models: Models, golden_facts: dict[str, Any]) -> None:
    """mergekit keeps exactly k elements and picks among equals; the formula keeps all equals."""
    differing = total = 0
    for name, found in golden("ties").items():
        base, a, b = f64(models, name, "base", "a", "b")
        deltas = [a - base, b - base]
        densities = numbers(golden_facts, "ties", name, "density")
        exact = ref.ties(base, deltas, [1.0, 0.7], densities)
        level = np.zeros(base.shape, bool)
        for delta, density in zip(deltas, densities, strict=True):
            level |= np.abs(delta.astype(np.float32)) == ref.trim(delta, density)[1]
        wrong = np.abs(ref.as_float64(found) - exact.value) > exact.slack
        assert not (wrong & ~level & ~exact.undecided).any(), name
        differing, total = differing + int(wrong.sum()), total + wrong.size
    assert 0 < differing / total < 0.03, differing / total


def test_ties_in_bf16_is_trimmed_by_rounded_deltas(models: Models) -> None:
    for name, found in golden("ties_bf16").items():
        own = [models["a"][name], models["b"][name]]
        again = theirs.ties(models["base"][name], own, [0.5, 0.5], [0.5, 0.5], lambda_=0.8, normalize=False)
        assert torch.equal(again, found), name


def test_dare_ties_of_density_1_is_the_sign_election_alone(models: Models) -> None:
    for name, found in golden("dare_ties").items():
        base, a, b = f64(models, name, "base", "a", "b")
        deltas, draws = [a - base, b - base], [np.zeros(base.size, np.uint32)] * 2
        exact = ref.dare_ties(base, deltas, [0.6, 0.4], [1.0, 1.0], draws, normalize=True)
        exact.assert_rounded(found, name, undecided_share=0.05)


def test_dare_drops_half_and_rescales_to_the_old_l1_norm(models: Models) -> None:
    """Not by 1/density as the paper does: equal in the mean, and a constant of each tensor."""
    kept = total = 0
    for name, found in golden("dare_linear").items():
        base, a = f64(models, name, "base", "a")
        delta = 0.6 * (a - base)
        change = ref.as_float64(found) - base
        some = delta != 0
        mask = np.abs(change) > 0
        factor = np.abs(delta).sum() / np.abs(delta[mask & some]).sum()
        assert change[mask & some] == pytest.approx(factor * delta[mask & some], abs=1e-6), name
        if delta.size > 500:
            assert factor == pytest.approx(2, rel=0.2), name
        kept, total = kept + int((mask & some).sum()), total + int(some.sum())
    assert kept / total == pytest.approx(0.5, abs=5 * (0.25 / total) ** 0.5)


def test_tokens_are_merged_by_name_where_a_model_lacks_them(models: Models) -> None:
    """tokenizer_source base: a model without a token counts as unchanged there, and the others still add theirs."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base, a, c = f64(models, name, "base", "a", "c")
        deltas = [a - base, np.zeros_like(base)]
        for row, token in enumerate(TOKENS["base"]):
            if token in TOKENS["c"]:
                deltas[1][row] = c[TOKENS["c"].index(token)] - base[row]
        ref.linear(base, deltas, [0.5, 0.25]).assert_rounded(golden("vocabulary")[name], name)


def merged_loras(models: Models, peer_inputs: Path, name: str) -> list[torch.Tensor]:
    """base+pt and base+sft as PEFT saves them for mergekit."""
    module = name.removesuffix(".weight")
    if module not in MODULES:
        return [models["base"][name]] * 2
    found = []
    for label in ("pt", "sft"):
        factors = load_file(peer_inputs / label / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        found.append(theirs.lora_merged(models["base"][name], a, b, ALPHA / RANK))
    return found


def test_lora_pairs_are_rounded_before_they_are_summed(models: Models, peer_inputs: Path) -> None:
    """Each base+adapter to bf16, its difference from the base again, and then every step of the sum."""
    wrong = total = 0
    for name, found in golden("lora").items():
        own = merged_loras(models, peer_inputs, name)
        assert torch.equal(theirs.task_arithmetic(models["base"][name], own, [0.3, 0.7]), found), name
        if name.removesuffix(".weight") in MODULES:
            deltas = [ref.deltas(peer_inputs / label)[name][0].numpy() for label in ("pt", "sft")]
            exact = ref.linear(*f64(models, name, "base"), deltas, [0.3, 0.7])
            once = torch.from_numpy(exact.value).to(torch.bfloat16)
            wrong, total = wrong + int((once != found).sum()), total + found.numel()
    assert 0.1 < wrong / total < 0.5, wrong / total


def test_lora_slerp(models: Models, peer_inputs: Path, golden_facts: dict[str, Any]) -> None:
    for name, found in golden("lora_slerp").items():
        t = golden_facts["cases"]["lora_slerp"][name]["shared"]["t"]
        p, q = (ref.as_float64(model) for model in merged_loras(models, peer_inputs, name))
        ref.slerp(p, q, t, error=2e-6 * np.maximum(np.abs(p), np.abs(q))).assert_rounded(found, name)
