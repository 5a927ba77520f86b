"""deltalint's own list of defects, both checkers on the same folder: what it finds, we find, and give its name.

deltalint (PyPI, 0.1) checks one adapter at strength 1. Its defects: not applied, half, double and 8x strength,
1.001x, merged twice, partial rank, one layer reverted; in bfloat16 and float16, large and small deltas.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deltalint import Verdict, check_merge

from engine.jobs.events import EventWriter
from engine.merge.verify import verify_merge
from tests.engine.merge.verify.scenes import MODULES, RANK, Lora, Tensors, make_base, make_lora, save_model

Rule = Callable[[torch.Tensor, Lora, str], torch.Tensor]  # base weight, adapter, module -> merged, float64
REVERTED = "model.layers.2.mlp.down_proj"


def strength(factor: float) -> Rule:
    return lambda base, lora, module: base.double() + factor * lora.delta(module)


def merged_twice(base: torch.Tensor, lora: Lora, module: str) -> torch.Tensor:
    once = (base.double() + lora.delta(module)).to(base.dtype)
    return once.double() + lora.delta(module)


def partial_rank(base: torch.Tensor, lora: Lora, module: str) -> torch.Tensor:
    a, b = lora.pairs[module]
    half = RANK // 2
    return base.double() + lora.scales[module] * (b[:, :half].double() @ a[:half].double())


def one_layer_reverted(base: torch.Tensor, lora: Lora, module: str) -> torch.Tensor:
    return base.double() + (0 if module == REVERTED else 1) * lora.delta(module)


DEFECTS: dict[str, tuple[Rule, str]] = {
    "not_applied": (strength(0), "base_unchanged"),
    "half": (strength(0.5), "scaled_by"),
    "double": (strength(2), "scaled_by"),
    "eightfold": (strength(8), "scaled_by"),
    "1.001x": (strength(1.001), "scaled_by"),
    "merged_twice": (merged_twice, "scaled_by"),
    "partial_rank": (partial_rank, "partly_applied"),
    "one_layer_reverted": (one_layer_reverted, "partly_applied"),
}


class Merges:
    """A base and one adapter, and merges of them in plain torch."""

    def __init__(self, root: Path, dtype: torch.dtype, b_std: float) -> None:
        self.root, self.tensors, self.large = root, make_base(0, dtype), b_std > 0.01
        self.lora = make_lora(root / "adapter", 1, b_std)
        self.base = save_model(root / "base", self.tensors)

    def save(self, rule: Rule) -> Path:
        merged: Tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for module in MODULES:
            base = merged[f"{module}.weight"]
            merged[f"{module}.weight"] = rule(base, self.lora, module).to(base.dtype)
        return save_model(self.root / f"merged-{len(list(self.root.iterdir()))}", merged)

    def theirs(self, merged: Path) -> bool:
        """Whether deltalint passes it."""
        return check_merge(self.base, self.lora.folder, merged).verdict is Verdict.PASS


@pytest.fixture(params=[(torch.bfloat16, 0.02), (torch.bfloat16, 0.002), (torch.float16, 0.02), (torch.float16, 0.002)],
                ids=["bf16-large", "bf16-small", "fp16-large", "fp16-small"])  # fmt: skip
def merges(request: pytest.FixtureRequest, tmp_path: Path) -> Merges:
    return Merges(tmp_path, *request.param)


def test_a_right_merge_passes_both(merges: Merges) -> None:
    folder = merges.save(strength(1))
    assert merges.theirs(folder)
    verdict = verify_merge(folder, merges.base, {"pt": merges.lora.folder}, {"pt": 1.0}, EventWriter())
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_found_and_named(defect: str, merges: Merges) -> None:
    """deltalint passes 1.001x of a large delta: its residual tier allows 5%, and the replay is not reached."""
    rule, code = DEFECTS[defect]
    folder = merges.save(rule)
    assert merges.theirs(folder) == (defect == "1.001x" and merges.large)
    verdict = verify_merge(folder, merges.base, {"pt": merges.lora.folder}, {"pt": 1.0}, EventWriter())
    assert verdict.exit_code == 1, verdict.message
    assert code in [finding.code for finding in verdict.findings], verdict.message
