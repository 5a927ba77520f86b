"""`medmerge verify FILE.gguf` as a person and a script run it: exit codes, JSON, text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.gguf.mixture import Mixture
from engine.gguf.outputs import write_ggufs
from engine.jobs.events import EventWriter
from tests.conftest import MakeAdapter
from tui.cli import main

CONTRACT = (
    "ok", "verdict", "message", "findings", "asked", "expected_weights", "effective_weights", "rounding_loss",
    "residual", "rounding_floor", "differing_share", "unchanged_share", "tensors_checked", "tensors_unexpected",
    "format", "standard_error",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("verify-gguf")
    pt, sft = (make_adapter(tiny_llama, seed=seed) for seed in (1, 2))
    mixture = Mixture(tiny_llama, {"pt": pt, "sft": sft}, {"pt": 0.3, "sft": 0.7})
    write_ggufs(mixture, {"q8_0": folder / "m.gguf"}, EventWriter())
    (folder / "bad.gguf").write_text("no model")
    return {"file": f"{folder / 'm.gguf'}", "bad": f"{folder / 'bad.gguf'}", "base": f"{tiny_llama}",
            "pt": f"{pt}", "sft": f"{sft}", "w": f"{folder / 'w'}"}  # fmt: skip


def run(made: dict[str, str], text: str) -> int:
    words = text.format(**made).split()
    return main([words[0], *words[1:], "--workspace", made["w"]])


ASK = "verify {file} --base {base} "


@pytest.mark.parametrize(
    "command, code, verdict",
    [
        (ASK + "--adapter pt={pt}:0.3 --adapter sft={sft}:0.7", 0, "ok"),
        (ASK + "--adapter pt={pt} --adapter sft={sft}", 0, "ok"),
        (ASK + "--adapter pt={pt}:0.7 --adapter sft={sft}:0.3", 1, "swapped"),
        (ASK + "--adapter a={pt}:0.3 --adapter b={pt}:0.7", 1, None),
        (ASK, 1, "unexpected_change"),
    ],
)
def test_exit_codes_and_json(
    made: dict[str, str], capsys: pytest.CaptureFixture[str], command: str, code: int, verdict: str | None
) -> None:
    assert run(made, command + " --json") == code
    result = json.loads(capsys.readouterr().out)
    assert all(key in result for key in CONTRACT)
    assert verdict is None or result["verdict"] == verdict
    assert result["format"]["types"] and result["exit_code"] == code


@pytest.mark.parametrize(
    "command, says",
    [
        ("verify {file}", "needs --base"),
        ("verify {file} --base {base} --adapter pt={pt}:0.3 --adapter sft={sft}", "has no weight"),
        ("verify {bad} --base {base}", "not a usable GGUF"),
        ("verify {file} --manifest", "json is missing"),
    ],
)
def test_wrong_usage(
    made: dict[str, str], capsys: pytest.CaptureFixture[str], command: str, says: str
) -> None:
    assert run(made, command) == 2
    captured = capsys.readouterr()
    assert says in captured.err and not captured.out


def test_text_for_people(made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(made, ASK + "--adapter pt={pt}:0.3 --adapter sft={sft}:0.7") == 0
    right = capsys.readouterr().out
    assert right.startswith("✓ every tensor is within its format's bound (Q8_0)") and "0 of" in right
    assert run(made, ASK + "--adapter pt={pt}:0.7 --adapter sft={sft}:0.3") == 1
    wrong = capsys.readouterr().out
    assert wrong.startswith("✗") and "swapped pt sft" in wrong


def test_gguf_commands_verify_what_they_make(
    made: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {**made, "out": f"{tmp_path / 'x.gguf'}", "raw": f"{tmp_path / 'raw.gguf'}"}
    make = "gguf --base {base} --adapter pt={pt}:0.3 --adapter sft={sft}:0.7 --type q8_0 --json --out "
    assert run(made, make + "{out}") == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["ok"] is True
    assert run(made, make + "{raw} --no-verify") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] is None
    assert Path(made["raw"]).read_bytes() == Path(made["out"]).read_bytes()
