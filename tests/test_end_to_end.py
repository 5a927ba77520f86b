"""The whole path through the commands, as a script would take it: train PT and SFT, merge, verify, export,
chat, evaluate, report. Once on a tiny random model, with really trained adapters of a few steps."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tui.cli import main

WORDS = ["aspirin", "fever", "dose", "asthma", "glucose", "cough", "patient", "tablet", "doctor", "pain"]


def sentence(seed: int) -> str:
    """Twelve random words: no two sentences share a run of eight, so the audit finds nothing."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice("abcdefgh") for _ in range(12)).capitalize() + "."


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Shell:
    """Runs commands in this process (jobs are real children) and returns their JSON."""

    workspace: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *argv: object, code: int = 0) -> Any:
        words = [str(word) for word in argv]
        self.capture.readouterr()
        got = main([*words, "--json", "--workspace", str(self.workspace)])
        captured = self.capture.readouterr()
        assert got == code, f"{words} exited {got}, expected {code}\n{captured.out}\n{captured.err}"
        return json.loads(captured.out)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path / "w", capsys)


def train(shell: Shell, kind: str, base: Path, data: Path, tests: Path) -> Path:
    config = {
        "base": str(base), "data": [str(data)], "tests": [str(tests)], "template": "model", "rank": 4,
        "learning_rate": 0.01, "cutoff": 128, "max_steps": 4, "held_out": 4, "eval_every": 2, "save_every": 2,
        "output": f"adapters/my-{kind}",
    }  # fmt: skip
    path = shell.workspace / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(config))
    result = shell("train", kind, path)
    manifest = json.loads((Path(result["adapter"]) / "training.json").read_text())
    assert manifest["kind"] == kind and len(manifest["curve"]) >= 4
    return Path(result["adapter"])


def test_from_text_to_a_verified_merge_that_talks(shell: Shell, tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("", "adapters", "data"):
        (shell.workspace / name).mkdir(exist_ok=True)
    data = shell.workspace / "data"
    questions = [
        {
            "id": f"q{i}",
            "prompt": f"What is {WORDS[i % 10]} {i}?",
            "reference": sentence(900 + i),
            "source": "t",
        }
        for i in range(6)
    ]
    tests = write_jsonl(data / "test.jsonl", questions)
    texts = [
        {"id": str(i), "text": " ".join(sentence(i * 9 + j) for j in range(4)), "source": "a"}
        for i in range(40)
    ]
    pairs = [
        {
            "id": str(i),
            "instruction": f"Say {WORDS[i % 10]} {i}.",
            "input": "",
            "output": sentence(i),
            "source": "b",
        }
        for i in range(60)
    ]
    pt = train(shell, "pt", tiny_llama, write_jsonl(data / "pt.jsonl", texts), tests)
    sft = train(shell, "sft", tiny_llama, write_jsonl(data / "sft.jsonl", pairs), tests)

    listed = shell("adapters", shell.workspace / "adapters")
    assert {row["name"]: row["kind"] for row in listed["adapters"]} == {"my-pt": "pt", "my-sft": "sft"}
    overlap = shell("interference", "--base", tiny_llama, "--adapter", f"pt={pt}", "--adapter", f"sft={sft}")
    assert len(overlap["modules"]) == 14 and -1 <= overlap["overall"]["cosine"] <= 1

    flags = ["--base", tiny_llama, "--adapter", f"pt={pt}:0.3", "--adapter", f"sft={sft}:0.7"]
    merged = shell.workspace / "merges" / "m"
    made = shell("merge", *flags, "--method", "linear", "--out", merged)
    assert made["verdict"]["ok"] and Path(made["out"]) == merged
    verdict = shell("verify", merged, *flags)
    assert verdict["ok"] and verdict["verdict"] == "ok"
    for label in ("pt", "sft"):
        assert verdict["effective_weights"][label] == pytest.approx(
            verdict["expected_weights"][label], abs=1e-3
        )
    swapped = shell(
        "verify",
        merged,
        "--base",
        tiny_llama,
        "--adapter",
        f"pt={pt}:0.7",
        "--adapter",
        f"sft={sft}:0.3",
        code=1,
    )
    assert swapped["verdict"] == "swapped"

    gguf = shell.workspace / "gguf" / "m.gguf"
    assert shell("gguf", merged, "--type", "f16", "--out", gguf)["bytes"] == gguf.stat().st_size
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say aspirin.\n")
    answer = shell("chat", gguf, "--prompts", prompts, "--temperature", "0", "--max-tokens", "8")
    assert "Say aspirin." in json.dumps(answer)

    sweep = {
        "base": str(tiny_llama),
        "adapters": {"pt": str(pt), "sft": str(sft)},
        "weights": [{"pt": 0, "sft": 1}, {"pt": 0.3, "sft": 0.7}, {"pt": 1, "sft": 0}],
        "templates": ["model"],
        "decoding": [{"name": "greedy", "temperature": 0, "max_new_tokens": 8}],
        "seeds": [1],
        "tasks": [
            {"name": "short", "kind": "generation", "data": str(tests)},
            {"name": "text", "kind": "perplexity", "data": str(write_jsonl(data / "text.jsonl", texts[:4]))},
        ],
    }
    (shell.workspace / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    shell("sweep", shell.workspace / "sweep.yaml", "--out", "first")
    rows = shell("report", "first", "--format", "json")["rows"]
    assert {(row["weights"]["pt"], row["weights"]["sft"]) for row in rows} == {(0, 1), (0.3, 0.7), (1, 0)}
    assert all(row["n"] in (4, 6) for row in rows)
    assert {job["state"] for job in shell("jobs", "list")["jobs"]} == {"done"}
