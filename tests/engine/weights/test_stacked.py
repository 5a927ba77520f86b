"""Stacked factors of experts kept by a merge: the same numbers, each B read once, never more kept than allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from engine.weights import stacked as room
from engine.weights.changes import ExpertFactor, Experts
from engine.weights.stacked import StackedColumns
from engine.weights.tensorfile import TensorFile, TensorInfo

EXPERTS, RANK, OUT, WIDTH = 5, 3, 8, 6


@pytest.fixture(params=["BF16", "F16", "F32"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, TensorInfo]:
    import torch

    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[request.param]
    torch.manual_seed(1)
    tensors = {
        "a": torch.randn(EXPERTS * RANK, WIDTH),
        "b": torch.randn(OUT, RANK * EXPERTS),
        "c": torch.randn(4, 10),
    }
    save_file({name: value.to(kind) for name, value in tensors.items()}, tmp_path / "f.safetensors")
    return TensorFile.open(tmp_path / "f.safetensors").tensors


def dense(info: TensorInfo) -> np.ndarray:
    """The stored numbers, read by safetensors."""
    return load_file(info.file)[info.name].float().numpy()


@pytest.mark.parametrize("grouped", [False, True])
def test_factors_of_every_expert(
    pair: dict[str, TensorInfo], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = dense(pair["a"]), dense(pair["b"])
    read: list[str] = []
    once = room.read_bytes
    monkeypatch.setattr(room, "read_bytes", lambda info: read.append(info.name) or once(info))
    kept = StackedColumns()
    fused = Experts(
        "m", pair["a"], pair["b"], RANK, 1.0, 1.0, EXPERTS, transposed=False, tensor="t", grouped=grouped
    )
    for expert in range(EXPERTS):
        apart = ExpertFactor(
            "m", pair["a"], pair["b"], RANK, 1.0, 1.0, expert=expert, experts=EXPERTS, first_row=2, rows=5,
            grouped=grouped,
        )  # fmt: skip
        columns = [expert * RANK + k if grouped else k * EXPERTS + expert for k in range(RANK)]
        wanted = a[expert * RANK : (expert + 1) * RANK]
        for left, right in (apart.factors(kept), apart.factors()):
            np.testing.assert_array_equal(left, b[2:7, columns])
            np.testing.assert_array_equal(right, wanted)
        for left, right in (fused.factors(expert, kept), fused.factors(expert)):
            np.testing.assert_array_equal(left, b[:, columns])
            np.testing.assert_array_equal(right, wanted)
    assert read == ["b"]


def test_what_was_used_last_stays_within_the_limit(
    pair: dict[str, TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    once = room.read_bytes
    monkeypatch.setattr(room, "read_bytes", lambda info: read.append(info.name) or once(info))

    def use(kept: StackedColumns, names: str) -> list[str]:
        read.clear()
        for name in names:
            kept.of(pair[name], 1, EXPERTS, False, 0, 2)
        return list(read)

    both = pair["b"].nbytes + pair["c"].nbytes
    assert use(StackedColumns(both), "bcbcbc") == ["b", "c"]
    assert use(StackedColumns(both - 1), "bbcccb") == ["b", "c", "b"]
    assert use(StackedColumns(0), "bb") == ["b"]  # the one in use is always kept
