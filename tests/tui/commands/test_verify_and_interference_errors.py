"""`medmerge verify` and `medmerge interference` when something is wrong: exit codes, words, and JSON on stdout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.workspace import Workspace
from tests.conftest import MakeAdapter, build_model
from tui.cli import main
from tui.commands.verify import render_manifest


@pytest.fixture(scope="module")
def made(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with bases tiny and wide, adapters pt, sft, twin (of pt) and wide, and merges/m. Copy it."""
    root = tmp_path_factory.mktemp("made") / "w"
    workspace = Workspace(root).create()
    shutil.copytree(tiny_llama, workspace.bases / "tiny")
    build_model("llama", workspace.bases / "wide", hidden_size=96)
    for seed, name in ((1, "pt"), (2, "sft")):
        shutil.copytree(make_adapter(tiny_llama, seed=seed, rank=4), workspace.adapters / name)
    shutil.copytree(workspace.adapters / "pt", workspace.adapters / "twin")
    shutil.copytree(make_adapter(workspace.bases / "wide", seed=3), workspace.adapters / "wide")
    flags = [
        "--adapter",
        f"pt={workspace.adapters / 'pt'}:0.3",
        "--adapter",
        f"sft={workspace.adapters / 'sft'}:0.7",
    ]
    out = str(workspace.merges / "m")
    argv = ["merge", "--base", str(workspace.bases / "tiny"), *flags, "--out", out, "--workspace", str(root)]
    assert main([*argv, "--no-verify"]) == 0
    return root


@pytest.fixture
def filled(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of it, found through the environment from another folder."""
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.setenv("MEDMERGE_WORKSPACE", str(tmp_path / "w"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Workspace(tmp_path / "w")


BASE = ["--base", "bases/tiny"]
ADAPTERS = ["--adapter", "pt=adapters/pt:0.3", "--adapter", "sft=adapters/sft:0.7"]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    """Run with --json and without: the same exit code; stdout holds one JSON document, or nothing. The error."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    printed = capsys.readouterr()
    document = json.loads(printed.out)  # one document and nothing else
    assert document["exit_code"] == code and document["error"] and isinstance(document["hint"], str)
    assert document["error"].splitlines()[0] in printed.err and "Traceback" not in printed.err
    if "job" in document:  # a process each: what is printed without --json is the same code, tested once
        return str(document["error"])
    assert main(argv) == code
    printed = capsys.readouterr()
    assert not printed.out and document["error"].splitlines()[0] in printed.err
    return str(document["error"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["merges/none", *BASE, *ADAPTERS], "merges/none does not exist"),
        (["merges/m", "--recipe", "none.yaml"], "cannot read the recipe"),
        (["merges/m", "--recipe", "r.yaml", *BASE], "--recipe says all that is asked"),
        (["merges/m", *BASE], "needs --base and at least one --adapter"),
        (["merges/m", *ADAPTERS], "needs --base"),
        (["merges/m", "--base", "bases/none", *ADAPTERS], "base bases/none does not exist"),
        (["merges/m", *BASE, "--adapter", "pt=adapters/none"], "adapter adapters/none does not exist"),
        (["merges/m", *BASE, "--adapter", "adapters/pt"], "is not LABEL=PATH"),
        (["merges/m", *BASE, *ADAPTERS[:2], *ADAPTERS[:2]], "two adapters are labelled pt"),
        (["merges/m", *BASE, *ADAPTERS[:2], "--adapter", "sft=adapters/sft"], "sft has no weight"),
        (["merges/m", "--model", "a=bases/none"], "model bases/none does not exist"),
        (["merges/m", "--model", "a=bases/tiny", *ADAPTERS], "--model stands for itself"),
        (["merges/m", "--model", "a=bases/tiny:1", "--model", "b=bases/tiny"], "b has no weight"),
        (
            ["merges/m", "--model", "a=bases/tiny", "--model", "b=bases/wide"],
            "[384, 96], and BF16 [384, 64] in",
        ),
        (["merges/m", "--model", "a=bases/tiny", "--recipe", "r.yaml"], "--recipe says all that is asked"),
        (["merges/m/config.json", "--manifest"], "config.json.json is missing"),
        (["bases/tiny", "--manifest"], "medmerge.json is missing"),
        (["adapters", *BASE, *ADAPTERS], "config.json is missing"),
        (["merges/m", "--base", "adapters/pt", *ADAPTERS], "adapters/pt"),
        (["merges/m", *BASE, "--adapter", "pt=bases/tiny:0.3"], "bases/tiny/adapter_config.json"),
        (["merges/m", *BASE, "--adapter", "pt=adapters/wide:0.3"], "adapters/wide"),
    ],
)
def test_verify_refuses_wrong_questions(
    filled: Workspace, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert says in refused(capsys, ["verify", *argv])


@pytest.mark.parametrize("base", [[], BASE], ids=["mean", "from the base"])
def test_what_is_in_a_merge_of_models(
    filled: Workspace, capsys: pytest.CaptureFixture[str], base: list[str]
) -> None:
    """Without weights they are found; with them they are checked, and wrong ones are named."""
    build_model("llama", filled.bases / "a", seed=5)
    build_model("llama", filled.bases / "b", seed=6)
    pair = ["--model", "a=bases/a", "--model", "b=bases/b"]
    given = ["--model", "a=bases/a:0.25", "--model", "b=bases/b:0.75"]
    document = {"method": "soup", "models": {}, "output": {"path": str(filled.merges / "soup")}}
    for label, weight in (("a", 0.25), ("b", 0.75)):
        document["models"][label] = {"path": str(filled.bases / label), "weight": weight}
    (filled.root / "soup.json").write_text(json.dumps(document))
    assert main(["merge", str(filled.root / "soup.json"), "--no-verify"]) == 0
    for models, code in ((pair, 0), (given, 0), ([given[0], "a=bases/a:0.75", *given[2:]], 1)):
        capsys.readouterr()
        assert main(["verify", "merges/soup", *models, *base, "--json"]) == code
        verdict = json.loads(capsys.readouterr().out)
        assert verdict["effective_weights"] == pytest.approx({"a": 0.25, "b": 0.75}, abs=0.01)
        assert verdict["guessed_weights"] == (
            pytest.approx({"a": 0.25, "b": 0.75}) if models is pair else None
        )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda w: truncate(w.bases / "tiny" / "model.safetensors"), "bases/tiny/model.safetensors"),
        (lambda w: truncate(w.adapters / "pt" / "adapter_model.safetensors"), "adapters/pt/adapter_model"),
        (lambda w: (w.adapters / "pt" / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda w: fifo(w.adapters / "pt" / "adapter_config.json"), "adapter_config.json"),
        (lambda w: fifo(w.merges / "m" / "config.json"), "merges/m/config.json"),
    ],
)
def test_verify_names_the_broken_file(
    filled: Workspace, capsys: pytest.CaptureFixture[str], spoil: Callable[[Workspace], Any], says: str
) -> None:
    spoil(filled)
    assert says in refused(capsys, ["verify", "merges/m", *BASE, *ADAPTERS])


def test_an_error_found_by_the_job_is_printed_in_words_too(
    filled: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(filled.bases / "tiny" / "model.safetensors")
    assert main(["verify", "merges/m", *BASE, *ADAPTERS]) == 2
    printed = capsys.readouterr()
    assert not printed.out and "→" in printed.err and "bases/tiny/model.safetensors" in printed.err
    assert "Traceback" not in printed.err


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("adapters", "code"),
    [
        (["pt=adapters/pt:0.3", "sft=adapters/sft:0.7"], 0),
        (["pt=adapters/pt", "sft=adapters/sft"], 0),
        (["pt=adapters/pt:0.7", "sft=adapters/sft:0.3"], 1),
        (["pt=adapters/pt:0.3"], 1),
        (["pt=adapters/pt", "twin=adapters/twin", "sft=adapters/sft"], 4),  # two that cannot be told apart
    ],
)
def test_the_answers_of_verify_are_exit_codes(
    filled: Workspace, capsys: pytest.CaptureFixture[str], adapters: list[str], code: int
) -> None:
    argv = ["verify", "merges/m", *BASE, *(word for adapter in adapters for word in ("--adapter", adapter))]
    assert main([*argv, "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0) and answer["message"] and answer["exit_code"] == code


@pytest.mark.parametrize(
    ("spoil", "code", "key", "says"),
    [
        (lambda w: None, 0, "", "as the manifest says"),
        (lambda w: truncate(w.merges / "m" / "model.safetensors"), 1, "changed", "changed: "),
        (lambda w: (w.merges / "m" / "stale.safetensors").touch(), 1, "extra", "not in the manifest: "),
        (lambda w: (w.merges / "m" / "config.json").unlink(), 1, "missing", "missing: "),
    ],
)
def test_the_answers_of_a_manifest_check_are_exit_codes(
    filled: Workspace,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Workspace], Any],
    code: int,
    key: str,
    says: str,
) -> None:
    spoil(filled)
    assert main(["verify", "merges/m", "--manifest", "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == code and answer["ok"] is (code == 0)
    assert not key or len(answer[key]) == 1
    assert says in render_manifest(answer)


def test_a_manifest_whose_inputs_changed_or_are_gone(
    filled: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(filled.merges / "own")
    assert main(["merge", *BASE, *ADAPTERS, "--out", out, "--no-verify"]) == 0
    weights = filled.adapters / "sft" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert main(["verify", out, "--manifest"]) == 1
    printed = capsys.readouterr().out
    assert "adapter sft" in printed and f"input changed: {weights}" in printed
    weights.unlink()
    assert main(["verify", out, "--manifest"]) == 4
    printed = capsys.readouterr().out
    assert printed.startswith("?") and f"input no longer there: {weights}" in printed


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "needs two adapters"),
        (["--adapter", "pt=adapters/pt"], "needs two adapters"),
        (["--adapter", "pt=adapters/pt", "--adapter", "pt=adapters/sft"], "two adapters are labelled pt"),
        (["--adapter", "pt=adapters/pt", "--adapter", "adapters/sft"], "is not LABEL=PATH"),
        (["--adapter", "pt=adapters/pt", "--adapter", "x=adapters/none"], "adapters/none does not exist"),
        (["--adapter", "pt=adapters/pt", "--adapter", "x=bases/tiny"], "adapter_config.json is missing"),
        (
            ["--base", "bases/none", "--adapter", "pt=adapters/pt", "--adapter", "x=adapters/sft"],
            "bases/none",
        ),
        (
            ["--base", "adapters/pt", "--adapter", "pt=adapters/pt", "--adapter", "x=adapters/sft"],
            "adapters/pt",
        ),
        (
            ["--base", "bases/wide", "--adapter", "pt=adapters/pt", "--adapter", "x=adapters/sft"],
            "adapters/pt",
        ),
        (["--adapter", "pt=adapters/pt", "--adapter", "x=adapters/wide"], "adapters/wide"),
    ],
)
def test_interference_refuses_wrong_questions(
    filled: Workspace, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert says in refused(capsys, ["interference", *argv])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: truncate(path / "adapter_model.safetensors"), "adapter_model.safetensors"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda path: fifo(path / "adapter_config.json"), "adapter_config.json"),
    ],
)
def test_interference_names_the_broken_file(
    filled: Workspace, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], says: str
) -> None:
    spoil(filled.adapters / "sft")
    argv = ["interference", "--adapter", "pt=adapters/pt", "--adapter", "sft=adapters/sft"]
    assert says in refused(capsys, argv)


@pytest.mark.parametrize("command", ["verify", "interference"])
def test_options_that_do_not_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "merges/m", "--wieght", "3"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out and "usage: medmerge" in printed.err


def test_json_is_all_there_is_on_stdout_when_it_goes_well(
    filled: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["interference", "--adapter", "pt=adapters/pt", "--adapter", "sft=adapters/sft", "--json"]
    assert main(argv) == 0
    assert {"modules", "overall"} <= json.loads(capsys.readouterr().out).keys()
