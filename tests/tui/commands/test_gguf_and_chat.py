"""`medmerge gguf`, `medmerge chat` and `medmerge doctor` as a person runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeAdapter, build_model
from tui.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any, str]:
    """Exit code, the JSON document on stdout, stderr."""
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_from_checkpoint_to_answers(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    workspace, out = str(tmp_path / "w"), tmp_path / "m.gguf"
    make = ["gguf", str(tiny_llama), "--workspace", workspace]
    code, result, _ = run(capsys, *make, "--type", "Q8_0", "--out", str(out))
    assert code == 0 and result["type"] == "q8_0" and out.stat().st_size == result["bytes"]

    code, error, _ = run(capsys, *make, "--out", str(out))
    assert code == 2 and "already there" in error["error"]
    code, error, _ = run(capsys, *make, "--type", "q9_z", "--out", str(tmp_path / "n"))
    assert code == 2 and "q9_z" in error["error"] and "q4_k_m" in error["hint"]

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is aspirin?\n\nWhat is asthma?\n")
    chat = ["chat", str(out), "--prompts", str(prompts), "--max-tokens", "6", "--workspace", workspace]
    code, first, _ = run(capsys, *chat)
    assert code == 0 and [row["prompt"] for row in first["answers"]] == [
        "What is aspirin?",
        "What is asthma?",
    ]
    assert all(row["finish"] in ("length", "end") and row["tokens"] <= 6 for row in first["answers"])
    assert run(capsys, *chat)[1]["answers"][1]["text"] == first["answers"][1]["text"]


def test_live_mixture_on_the_command_line(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A checkpoint and an adapter folder are prepared by a job, once; weight 0 is the base."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is aspirin?\n")
    adapter = make_adapter(tiny_llama, b_std=0.3, seed=4)

    def answer(*words: str) -> str:
        code, result, _ = run(
            capsys, "chat", str(tiny_llama), *words, "--prompts", str(prompts), "--max-tokens", "12",
            "--workspace", str(tmp_path / "w"),
        )  # fmt: skip
        assert code == 0
        return str(result["answers"][0]["text"])

    base = answer()
    files = sorted((tmp_path / "w" / "gguf" / "live").iterdir())
    assert answer("--adapter", f"a={adapter}:0") == base != answer("--adapter", f"a={adapter}:1")
    assert len(list((tmp_path / "w" / "gguf" / "live").iterdir())) == len(files) + 1


def test_chat_says_when_another_template_was_trained_with(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Adapters mixed in while it runs, a merged checkpoint, and GGUFs with and without a manifest beside them."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "prompts.txt").write_text("What is aspirin?\n")
    adapters = {}
    for label, training in (
        ("pt", {"kind": "pt", "template": "model", "template_text": None}),
        ("sft", {"kind": "sft", "template": "llama3", "template_text": None}),
        ("other", None),
    ):
        adapters[label] = make_adapter(tiny_llama, rank=2, name=label)
        if training:
            (adapters[label] / "training.json").write_text(json.dumps(training))

    def chat(model: Path, *words: str) -> list[str]:
        code, result, err = run(
            capsys, "chat", str(model), *words, "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "2",
            "--workspace", str(tmp_path / "w"),
        )  # fmt: skip
        assert code == 0
        said: list[str] = result["warnings"]
        assert all(f"warning: {words}" in err for words in said)
        return said

    live = [word for label, path in adapters.items() for word in ("--adapter", f"{label}={path}:0.5")]
    sft, other = chat(tiny_llama, *live)
    assert "adapter sft was trained with template llama3, and template model is used" in sft
    assert "choose --template llama3" in sft and "adapter other: template unknown" in other
    assert chat(tiny_llama, *live[:4], "--template", "llama3") == []
    assert chat(tiny_llama, *live[:2]) == chat(tiny_llama) == []
    merge = ["merge", "--base", str(tiny_llama), *live[:4], "--no-verify", "--workspace", str(tmp_path / "w")]
    assert run(capsys, *merge, "--out", str(tmp_path / "m"))[0] == 0
    inside = [words.replace("adapter sft", "adapter sft in m") for words in [sft]]
    assert chat(tmp_path / "m") == inside
    alone = ["--out", str(tmp_path / "one.gguf"), "--kind", "gguf", "--gguf", "f16"]
    assert run(capsys, *merge, *alone)[0] == 0
    assert (tmp_path / "one.gguf.json").is_file()
    inside = [words.replace("adapter sft", "adapter sft in one.gguf") for words in [sft]]
    assert chat(tmp_path / "one.gguf") == inside
    (tmp_path / "one.gguf.json").unlink()
    assert chat(tmp_path / "one.gguf") == inside and chat(tmp_path / "one.gguf", "--template", "llama3") == []


@pytest.mark.parametrize(
    "argv, says",
    [
        (["chat", "none.gguf"], "does not exist"),
        (["chat", "{bad}", "--template", "qwen3_nothnk", "--prompts", "{prompts}"], "unknown template"),
        (["chat", "{bad}"], "not a GGUF"),
        (["chat", "{bad}", "--temperature", "-1", "--prompts", "{prompts}"], "out of range"),
        (["chat", "{bad}", "--prompts", "{binary}"], "line 2 is not UTF-8"),
        (["chat", "{bad}", "--adapter", "x"], "LABEL=PATH"),
        (["chat", "{bad}", "--adapter", "x={folder}:1"], "--base"),
        (["gguf", "{folder}"], "--out is missing"),
        (["gguf", "{folder}", "--adapter", "a={folder}:1", "--out", "x.gguf"], "together"),
        (["gguf", "--base", "{folder}", "--adapter", "a={folder}", "--out", "x.gguf"], "no weight"),
        (["gguf", "--out", "x.gguf"], "nothing to convert"),
    ],
)
def test_wrong_usage_exits_2(
    argv: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "bad.gguf").write_text("no model")
    (tmp_path / "prompts.txt").write_text("hello\n")
    (tmp_path / "binary.txt").write_bytes(b"hello\n\xff\xfe\n")
    (tmp_path / "folder").mkdir()
    places = {
        "bad": tmp_path / "bad.gguf", "prompts": tmp_path / "prompts.txt", "binary": tmp_path / "binary.txt",
        "folder": tmp_path / "folder",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115, PTH123
    assert main([word.format(**places) for word in argv] + ["--workspace", str(tmp_path / "w")]) == 2
    out, err = capsys.readouterr()
    assert says in err and "Traceback" not in err and not out


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends(tmp_path: Path) -> None:
    """In a real terminal: an answer of seconds is interrupted, the conversation goes on, ctrl+d leaves with 0."""
    from engine.gguf.convert import Conversion, convert
    from engine.jobs.events import EventWriter

    folder = build_model("llama", tmp_path / "model", max_position_embeddings=16384)
    convert(Conversion.plan(folder), tmp_path / "m.gguf", "f32", EventWriter())
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "tui.cli", "chat", str(tmp_path / "m.gguf")]
    command += ["--max-tokens", "0", "--context", "16384", "--workspace", str(tmp_path / "w")]
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(tmp_path),
        "TERM": "dumb",
        "PYTHONPATH": str(Path.cwd()),
    }
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
    )
    os.close(child)
    shown, seen = "", 0

    def until(words: str) -> None:
        """Read on until `words` appear behind what was waited for before ("" is: anything at all)."""
        nonlocal shown, seen
        deadline = time.monotonic() + 120
        while len(shown) == seen or words not in shown[seen:]:
            assert time.monotonic() < deadline, shown
            if select.select([parent], [], [], 1)[0]:
                shown += os.read(parent, 65536).decode("utf-8", "replace")
        seen = shown.index(words, seen) + len(words)

    try:
        until("ctrl+d ends")
        until("› ")
        process.send_signal(signal.SIGINT)
        until("(ctrl+d ends)")
        for _ in range(2):
            until("› ")
            os.write(parent, b"What is aspirin used for?\n")
            until("used for?\r\n")
            until("")
            process.send_signal(signal.SIGINT)
            until("stopped · ")
        os.write(parent, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(parent)
    assert "Traceback" not in shown


# ---- doctor --------------------------------------------------------------------------------------------------


def test_doctor_finds_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import llama_cpp

    code, result, _ = run(capsys, "doctor", "--workspace", str(tmp_path))
    found = {entry["what"]: entry for entry in result["findings"]}
    assert code == 0 and llama_cpp.__version__ in found["llama.cpp"]["detail"]
    assert {
        "merge kernel",
        "merge --device",
        "torch",
        "cpu",
        "memory",
        "workspace",
        "terminal",
        "extra demo",
    } <= found.keys()
    assert not (tmp_path / "workspace.toml").exists()


def test_doctor_survives_broken_libraries() -> None:
    from tui.commands.doctor import ask, llama_finding, torch_finding

    broken = ask("raise SystemExit('no such library')")
    assert broken == {"error": "no such library"}
    assert torch_finding(broken).ok == llama_finding(broken).ok == "missing"
    assert "ended with code -6" in str(ask("import os; os.abort()")["error"])
    assert "error" in ask("print('hello')") and "error" in ask("print('[1]')")
    gpu = torch_finding({"version": "2", "cuda": True, "bf16": True, "devices": ["X"], "memory": [8e10]})
    assert gpu.ok == "ok" and "X (80.00 GB)" in gpu.detail


def test_doctor_says_which_kernel_merges_and_whether_cuda_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.merge.kernel import host_kernel
    from tui.commands import doctor

    here = doctor.kernel_finding(doctor.ask(doctor._KERNEL))
    assert here.detail.startswith(host_kernel().name)
    monkeypatch.setenv("MEDMERGE_KERNEL", "plain")
    asked = doctor.kernel_finding(doctor.ask(doctor._KERNEL))
    assert asked.detail.startswith("numpy") and "unset it" in asked.advice
    said = {"name": "compiled, AVX2", "compiled": True, "verify": True, "library": "k.so", "plain": False}
    assert doctor.kernel_finding(said).ok == "ok"
    half = doctor.kernel_finding({**said, "verify": False})
    assert half.ok == "note" and "verification" in half.detail and "pip install" in half.advice
    numpy = doctor.kernel_finding({**said, "name": "numpy", "compiled": False})
    assert "k.so cannot be loaded" in numpy.detail and "build-essential" in numpy.advice
    assert doctor.kernel_finding({"error": "no numpy"}).ok == "missing"
    two = doctor.device_finding({"cuda": True, "devices": ["X", "Y"]})
    assert two.ok == "ok" and "X (cuda:0 to cuda:1)" in two.detail
    for found in ({"cuda": False, "devices": []}, {"error": "no torch"}):
        assert "does not work" in doctor.device_finding(dict(found)).detail


def test_doctor_on_terminals() -> None:
    from tui.commands.doctor import terminal

    (good,) = terminal(
        {"TERM": "xterm", "COLORTERM": "truecolor", "LANG": "C.UTF-8"}, os.terminal_size((120, 36))
    )
    assert good.ok == "ok" and "120x36, 24-bit" in good.detail
    (poor,) = terminal({"TERM": "dumb", "TMUX": "x", "SSH_CONNECTION": "y"}, os.terminal_size((60, 20)))
    assert poor.ok == "note" and "tmux over SSH" in poor.detail
    for words in ("80x24", "UTF-8", "terminal-features", "commands work anywhere"):
        assert words in poor.advice
