"""Adapters as other trainers write them, merged and verified: merge and verifier read every dialect alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import MakeVariant
from tests.engine.merge.test_variant_merges import merge
from tests.engine.weights.test_dialects import DIALECTS, rewritten
from tests.engine.weights.variants import VariantCase


def is_verified(case: VariantCase, folder: Path, out: Path) -> None:
    changed = VariantCase(case.name, case.base, folder, case.merged)
    result = merge(changed, out, 1.0)
    assert result["exit_code"] == 0, result["verdict"]["findings"]
    for key, found in load_file(out / "model.safetensors").items():
        wanted = case.merged[key]
        assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted), key


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["dora", "modules_to_save"])
def test_dialects(variant: MakeVariant, tmp_path: Path, name: str, dialect: str) -> None:
    case = variant(name)
    is_verified(case, rewritten(case.adapter, tmp_path / "a", DIALECTS[dialect]), tmp_path / "out")


def test_fan_in_fan_out_of_a_linear_layer_does_not_count(variant: MakeVariant, tmp_path: Path) -> None:
    case = variant("plain")
    is_verified(case, rewritten(case.adapter, tmp_path / "a", fan_in_fan_out=True), tmp_path / "out")


@pytest.mark.parametrize("name", ["experts", "experts_mixtral"])
def test_unsloths_grouped_experts(variant: MakeVariant, tmp_path: Path, name: str) -> None:
    case = variant(name)
    folder = rewritten(case.adapter, tmp_path / "a", lora_B_layout="grouped_by_expert")
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        if "experts" in key and "lora_B" in key:  # (out, rank, expert) to (out, expert, rank)
            columns = value.reshape(len(value), 4, 4).transpose(0, 2, 1)
            tensors[key] = np.ascontiguousarray(columns.reshape(value.shape))
    save_file(tensors, folder / "adapter_model.safetensors")
    is_verified(case, folder, tmp_path / "out")
