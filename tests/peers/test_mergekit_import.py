"""Every number of an imported config at every tensor is what mergekit itself resolved (goldens/parameters.json).

`random_config` makes configs for the live test: filters, gradients, scopes and slices in any mixture.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from engine.merge.mergekit import from_mergekit
from engine.merge.recipe import parse
from engine.merge.selectors import layer_count, resolve
from tests.peers.cases import CASES
from tests.peers.inputs import MODULES, SHAPES


@pytest.mark.parametrize("case", CASES)
def test_numbers_at_every_tensor(case: str, peer_inputs: Path, golden_facts: dict[str, Any]) -> None:
    assert_same_numbers(yaml.safe_load(CASES[case]), golden_facts["cases"][case], peer_inputs)


def assert_same_numbers(config: dict[str, Any], theirs: dict[str, Any], folder: Path) -> None:
    """The recipe that a config is read as has mergekit's numbers at every tensor."""
    document = from_mergekit(config, "merge.yml", [folder]).recipe
    document["output"]["path"] = str(folder.parent / "out")
    recipe = parse(document, "merge.yml", [])
    layers = layer_count(SHAPES)
    names = [f"{module}.weight" for module in MODULES] if recipe.adapters else list(SHAPES)
    for entry in recipe.entries:
        key = f"base+{entry.label}" if recipe.adapters else entry.label
        for parameter, spec in (("weight", entry.weights), ("density", entry.density)):
            asked = {name: theirs[name]["models"][key].get(parameter) for name in names}
            if spec is None or recipe.method == "slerp":
                assert parameter == "density" or set(asked.values()) == {None}
                continue
            assert resolve(spec, names, entry.label, layers)[0] == pytest.approx(asked, rel=1e-12), parameter
    shared = {name: theirs[name]["shared"] for name in names}
    assert recipe.parameters.lam == shared[names[0]].get("lambda", 1.0)
    assert recipe.normalize == shared[names[0]].get("normalize", recipe.normalize)
    if recipe.method == "slerp":
        t = {name: own["t"] for name, own in shared.items()}
        assert resolve(recipe.parameters.t, names, "t", layers)[0] == pytest.approx(t, rel=1e-12)


def random_config(random: Random) -> dict[str, Any]:
    """A config with settings in every scope; always with a last number for every tensor."""
    method = random.choice(["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
    filters = [
        "self_attn",
        "mlp",
        "q_proj",
        "layernorm",
        "embed_tokens",
        "lm_head",
        "layers.1.",
        "norm",
        "nothing",
        "*",
    ]

    def value() -> Any:
        numbers = [round(random.uniform(0.05, 0.95), 2) for _ in range(random.choice([1, 1, 2, 3, 5]))]
        return numbers[0] if len(numbers) == 1 else numbers

    def setting(final: bool) -> Any:
        if random.random() < 0.3 and final:
            return value()
        listed = [{"filter": random.choice(filters), "value": value()} for _ in range(random.randint(1, 4))]
        return listed + ([{"value": value()}] if final else [])

    names = ["t"] if method == "slerp" else ["weight"] if method == "linear" else ["weight", "density"]

    def block(final: bool) -> dict[str, Any]:
        return {name: setting(final) for name in names if final or random.random() < 0.6}

    config: dict[str, Any] = {"merge_method": method, "parameters": block(True)}
    if method != "linear":
        config["base_model"] = "a" if method == "slerp" else "base"
    models = ["a", "b"] if method in ("linear", "slerp") else ["base", "a", "b"]
    if random.random() < 0.4:
        edges = [0, *sorted(random.sample([1, 2], random.randint(0, 2))), 3]
        config["slices"] = [
            {
                "sources": [{"model": m, "layer_range": [i, j], "parameters": block(False)} for m in models],
                "parameters": block(False),
            }
            for i, j in pairwise(edges)
        ]
    else:
        config["models"] = [{"model": model, "parameters": block(False)} for model in models]
    return config
