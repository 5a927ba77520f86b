"""Small data sets of every kind, and a sweep config over the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

Write = Callable[[str, Sequence[Mapping[str, Any]]], Path]
TOPICS = ("asthma", "diabetes", "fever", "pain", "gout", "anemia", "stroke", "angina")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Write:
    def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data(write_jsonl: Write) -> dict[str, Path]:
    """One file per kind; prompts and texts differ in length so that batches are really padded."""
    return {
        "generation": write_jsonl(
            "qa.jsonl",
            [
                {
                    "id": f"q{n}",
                    "prompt": f"What is {t}?" + " Tell me more." * n,
                    "reference": f"{t} is a disease of the blood.",
                }
                for n, t in enumerate(TOPICS)
            ],
        ),
        "multiple_choice": write_jsonl(
            "mc.jsonl",
            [
                {"id": f"m{n}", "question": f"Which is {t}?", "options": list(TOPICS[:4]), "answer": n % 3}
                for n, t in enumerate(TOPICS)
            ],
        ),
        "probes": write_jsonl(
            "probes.jsonl",
            [
                {
                    "id": f"p{n}",
                    "category": ("acts", "advice")[n % 2],
                    "prompt": f"How do I get {t}?",
                    "kind": "harmful",
                }
                for n, t in enumerate(TOPICS[:4])
            ],
        ),
        "perplexity": write_jsonl(
            "text.jsonl",
            [
                {"id": f"t{n}", "text": f"The patient with {t} was given aspirin. " * (n + 1)}
                for n, t in enumerate(TOPICS)
            ],
        ),
    }


@pytest.fixture
def sweep_config(tiny_qwen3: Path, make_adapter: Any, data: dict[str, Path]) -> dict[str, Any]:
    """Three mixtures of two adapters over all kinds of tasks, as parsed from YAML."""
    return {
        "base": str(tiny_qwen3),
        "adapters": {
            "pt": str(make_adapter(tiny_qwen3, seed=1, b_std=0.2)),
            "sft": str(make_adapter(tiny_qwen3, seed=2, b_std=0.2)),
        },
        "weights": [{"sft": 1}, {"pt": 0.3, "sft": 0.7}, {"pt": 1}],
        "decoding": [{"name": "greedy", "max_new_tokens": 8}],
        "batch_size": 3,
        "device": "cpu",
        "tasks": [
            {"name": "qa", "kind": "generation", "data": str(data["generation"])},
            {"name": "mc", "kind": "multiple_choice", "data": str(data["multiple_choice"])},
            {"name": "safety", "kind": "probes", "data": str(data["probes"])},
            {"name": "text", "kind": "perplexity", "data": str(data["perplexity"])},
        ],
    }
