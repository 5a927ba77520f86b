"""Small training data and settings for the tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.config import TrainConfig, from_mapping

QUESTIONS = ["What is asthma?", "What is the dose of aspirin for an adult?", "Is diabetes a disease?"]
ANSWERS = [
    "A disease with wheezing.",
    "500 mg every 6 hours, for pain and fever.",
    "Yes, of glucose in the blood.",
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(name="write_jsonl")
def write_jsonl_fixture() -> Callable[[Path, list[dict[str, Any]]], Path]:
    return write_jsonl


@pytest.fixture
def sft_file(tmp_path: Path) -> Path:
    """12 question/answer rows of different lengths."""
    rows = [
        {
            "id": str(n),
            "instruction": f"{n} {QUESTIONS[n % 3]}",
            "input": "",
            "output": f"{ANSWERS[n % 3]} " * (1 + n % 4),
        }
        for n in range(12)
    ]
    return write_jsonl(tmp_path / "sft.jsonl", rows)


@pytest.fixture
def pt_file(tmp_path: Path) -> Path:
    rows = [{"id": str(n), "text": f"{n} " + " ".join(ANSWERS) * (1 + n % 3)} for n in range(10)]
    return write_jsonl(tmp_path / "pt.jsonl", rows)


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path) -> Callable[..., TrainConfig]:
    """A config for the tiny Llama: `settings(kind, file, **changes)`."""

    def make(kind: str, file: Path, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "kind": kind,
            "base": str(tiny_llama),
            "data": [str(file)],
            "output": str(tmp_path / "adapters" / f"tiny-{kind}"),
            "rank": 4,
            "cutoff": 64,
            "held_out": 2,
            "eval_every": 2,
            "save_every": 2,
            "learning_rate": 1e-2,
            "threads": 1,
        }
        return from_mapping({**values, **changes})

    return make
