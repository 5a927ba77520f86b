"""Our merge of a mergekit config, tensor by tensor: right by the formulas, and where it differs from mergekit's own.

The formulas are computed in float64 from the numbers that mergekit resolved, so the import is tested with them.
`DIFFERS` says how many elements differ from the golden, case by case; test_mergekit_formulas says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from engine.jobs.events import EventWriter
from engine.merge.execute import merge
from engine.merge.mergekit import from_mergekit
from engine.merge.recipe import parse
from tests.engine.merge import references as ref
from tests.peers.cases import CASES
from tests.peers.conftest import GOLDENS
from tests.peers.inputs import SHAPES, TOKENS

Tensors = dict[str, torch.Tensor]

# Share of elements that differ from mergekit's, at least and at most, beyond float32's own error.
DIFFERS = {
    "linear": (0, 0),
    "linear_filters": (0, 0),
    "slerp": (0, 0),
    "task_arithmetic": (0, 0),
    "dare_ties": (0, 0),
    "ties": (0, 0.03),  # elements equal to the threshold: all kept here
    "task_arithmetic_bf16": (0.05, 0.3),  # bf16 sums
    "ties_bf16": (0.02, 0.3),  # bf16 deltas at the threshold, bf16 sums
    "lora": (0.1, 0.5),  # base+adapter rounded to bf16 first, bf16 sums
    "lora_slerp": (0.05, 0.5),  # base+adapter rounded to bf16 first
    "vocabulary": (0.01, 0.014),  # rows of the 4 tokens of 40 that one model lacks
    "dare_linear": (0.6, 0.85),  # other draws: equal where both drop it, a quarter
}


@pytest.fixture(scope="module")
def ours(peer_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """Every case merged by this program, from the mergekit config itself, and passed by its own verifier."""
    root, found = tmp_path_factory.mktemp("ours"), {}
    for case, text in CASES.items():
        document = from_mergekit(yaml.safe_load(text), case, [peer_inputs]).recipe
        document["output"]["path"] = str(root / case)
        result = merge(parse(document, case, []), EventWriter())
        assert result["verdict"]["ok"], (case, result["verdict"]["message"])
        found[case] = load_file(Path(result["out"]) / "model.safetensors")
    return found


class Exact:
    """What a case should be at one tensor, from the formulas and mergekit's own numbers."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.facts = facts["cases"]
        self.models = {name: load_file(folder / name / "model.safetensors") for name in TOKENS}
        self.loras = {name: ref.deltas(folder / name) for name in ("pt", "sft")}

    def __call__(self, case: str, name: str) -> ref.Exact:
        own, shared = self.facts[case][name]["models"], self.facts[case][name]["shared"]
        base, a, b = (ref.as_float64(self.models[model][name]) for model in ("base", "a", "b"))
        if case == "vocabulary":
            return self._of_other_tokens(name, base, a)
        weights = [values["weight"] for values in own.values() if "weight" in values]
        densities = [values["density"] for values in own.values() if "density" in values]
        scale, deltas = shared.get("lambda", 1.0), [a - base, b - base]
        if case.startswith("lora"):
            return self._of_adapters(case, name, base, weights, shared)
        if case.startswith("linear"):
            return ref.soup([a, b], weights)
        if case == "slerp":
            return ref.slerp(a, b, shared["t"])
        if case.startswith("ties"):
            return ref.ties(base, deltas, weights, densities, scale, shared["normalize"])
        if case.startswith("dare"):
            draws = [ref.dare_draws(0, label, name, base.size) for label in ("a", "b")]
            if case == "dare_ties":
                return ref.dare_ties(base, deltas, weights, densities, draws, scale, shared["normalize"])
            return ref.dare_linear(base, deltas, weights, densities, draws, scale)
        return ref.linear(base, deltas, weights, scale)

    def _of_other_tokens(self, name: str, base: ref.Array, a: ref.Array) -> ref.Exact:
        """Rows of tokens that all have, by token; the others are the base's."""
        c = ref.as_float64(self.models["c"][name])
        if len(c) == len(base):
            return ref.linear(base, [a - base, c - base], [0.5, 0.25])
        here = np.array([token in TOKENS["c"] for token in TOKENS["base"]])
        rows = [TOKENS["c"].index(token) for token, both in zip(TOKENS["base"], here, strict=True) if both]
        deltas = [np.where(here[:, None], a - base, 0.0), np.zeros_like(base)]
        deltas[1][here] = c[rows] - base[here]
        return ref.linear(base, deltas, [0.5, 0.25])

    def _of_adapters(
        self, case: str, name: str, base: ref.Array, weights: list[float], shared: dict[str, Any]
    ) -> ref.Exact:
        nothing = (torch.zeros(base.shape), torch.zeros(base.shape))
        pairs = [self.loras[label].get(name, nothing) for label in ("pt", "sft")]
        deltas = [delta.double().numpy() for delta, _ in pairs]
        errors = [8 * ref.HALF_ULP * size.double().numpy() for _, size in pairs]
        if case == "lora":
            return ref.linear(base, deltas, weights, errors=errors)
        return ref.slerp(base + deltas[0], base + deltas[1], shared["t"], error=sum(errors))


@pytest.fixture(scope="module")
def exact(peer_inputs: Path, golden_facts: dict[str, Any]) -> Exact:
    return Exact(peer_inputs, golden_facts)


@pytest.mark.parametrize("case", CASES)
def test_ours_is_right_at_every_element(case: str, ours: dict[str, Tensors], exact: Exact) -> None:
    assert ours[case].keys() == SHAPES.keys()
    undecided = 0
    for name, found in ours[case].items():
        want = exact(case, name)
        want.assert_rounded(found, f"{case} {name}", undecided_share=1)
        undecided += int(want.undecided.sum())
    assert undecided / sum(found.numel() for found in ours[case].values()) < 0.01


@pytest.mark.parametrize("case", CASES)
def test_where_mergekit_differs(case: str, ours: dict[str, Tensors], exact: Exact) -> None:
    differing = total = 0
    for name, theirs in load_file(GOLDENS / f"{case}.safetensors").items():
        found, want = ours[case][name], exact(case, name)
        assert theirs.dtype == found.dtype
        apart = found != theirs
        if found.dtype == torch.float32:
            gap = np.abs(ref.as_float64(found) - ref.as_float64(theirs))
            apart &= torch.from_numpy(gap > 2 * want.slack)
        else:  # two roundings of the interval that float32 sums leave are both right
            exact_to = [torch.from_numpy(want.value + side * want.slack) for side in (-1, 1)]
            low, high = (edge.to(found.dtype) for edge in exact_to)
            apart &= (theirs < low) | (theirs > high)
        apart &= torch.from_numpy(~want.undecided)
        differing, total = differing + int(apart.sum()), total + apart.numel()
    least, most = DIFFERS[case]
    assert least <= differing / total <= most, differing / total
