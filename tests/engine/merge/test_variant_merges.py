"""Every LoRA variant merged, against PEFT's own merge in float32, and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.jobs import EventWriter
from engine.merge.job import run_merge
from tests.conftest import MakeVariant
from tests.engine.merge.references import load_model
from tests.engine.weights.variants import VARIANT_NAMES, VariantCase


def merge(case: VariantCase, out: Path, weight: float, dtype: str = "float32") -> dict[str, Any]:
    recipe = {
        "base": str(case.base),
        "adapters": {"a": {"path": str(case.adapter), "weight": weight}},
        "output": {"path": str(out), "dtype": dtype},
    }
    return run_merge({"recipe": recipe, "verify": True}, EventWriter())


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_merge_is_pefts(variant: MakeVariant, tmp_path: Path, name: str) -> None:
    case = variant(name)
    result = merge(case, tmp_path / "out", 1.0)
    assert result["exit_code"] == 0, result["verdict"]["findings"]
    found = {key: value.double().numpy() for key, value in load_model(tmp_path / "out").items()}
    assert found.keys() == case.merged.keys()
    for key, theirs in case.merged.items():
        assert found[key].shape == theirs.shape, key
        assert np.linalg.norm(found[key] - theirs) <= 1e-6 * np.linalg.norm(theirs), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if case.untied:
        assert config["tie_word_embeddings"] is False
    if case.rows:
        assert config["vocab_size"] == case.rows


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_part_of_it_is_on_the_straight_line(variant: MakeVariant, tmp_path: Path, name: str) -> None:
    """At weight .4 every element is W + .4 (W' - W), W' PEFT's merge; new rows of a longer table are W'."""
    case = variant(name)
    result = merge(case, tmp_path / "out", 0.4)
    assert result["exit_code"] == 0, result["verdict"]["findings"]
    base = {key: value.double().numpy() for key, value in load_model(case.base).items()}
    for key, found in load_model(tmp_path / "out").items():
        theirs = case.merged[key].astype(np.float64)
        before = base[key] if key in base else base["model.embed_tokens.weight"]
        wanted = theirs.copy()
        rows = before.shape[0] if before.ndim else None
        wanted[:rows] = before + 0.4 * (theirs[:rows] - before)
        assert np.linalg.norm(found.double().numpy() - wanted) <= 1e-6 * np.linalg.norm(wanted), key


@pytest.mark.parametrize(
    "name", ["dora", "modules_to_save", "experts", "lora_bias", "tied_lora_head", "resized_saved"]
)
def test_bf16_merges_are_verified(variant: MakeVariant, tmp_path: Path, name: str) -> None:
    result = merge(variant(name), tmp_path / "out", 0.7, "bfloat16")
    assert result["exit_code"] == 0, result["verdict"]["findings"]


def test_two_variants_together(variant: MakeVariant, tmp_path: Path) -> None:
    """DoRA beside saved modules on one base: each adds its own delta."""
    one, two = variant("dora"), variant("modules_to_save")
    recipe = {
        "base": str(one.base),
        "adapters": {
            "dora": {"path": str(one.adapter), "weight": 0.5},
            "saved": {"path": str(two.adapter), "weight": 0.25},
        },
        "output": {"path": str(tmp_path / "out"), "dtype": "float32"},
    }
    result = run_merge({"recipe": recipe, "verify": True}, EventWriter())
    assert result["exit_code"] == 0, result["verdict"]["findings"]
    base = load_model(one.base)
    for key, found in load_model(tmp_path / "out").items():
        before = base[key].double().numpy()
        wanted = before + 0.5 * (one.merged[key] - before) + 0.25 * (two.merged[key] - before)
        assert np.linalg.norm(found.double().numpy() - wanted) <= 2e-6 * np.linalg.norm(wanted), key
