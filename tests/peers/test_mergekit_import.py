"""Every number of an imported config at every tensor is what mergekit itself resolved (goldens/parameters.json)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.merge.mergekit import from_mergekit
from engine.merge.recipe import Recipe, parse
from engine.merge.selectors import layer_count, resolve
from tests.peers.cases import CASES
from tests.peers.inputs import MODULES, SHAPES


def imported(case: str, folder: Path) -> Recipe:
    import yaml

    document = from_mergekit(yaml.safe_load(CASES[case]), case, [folder]).recipe
    document["output"]["path"] = str(folder.parent / f"out-{case}")
    return parse(document, case, [])


@pytest.mark.parametrize("case", CASES)
def test_numbers_at_every_tensor(case: str, peer_inputs: Path, golden_facts: dict[str, Any]) -> None:
    recipe, theirs = imported(case, peer_inputs), golden_facts["cases"][case]
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
