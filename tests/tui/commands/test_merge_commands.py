"""`medmerge adapters`, `plan` and `merge` as a person or a script types them: output, JSON and exit codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.workspace import Workspace
from tests.conftest import MakeAdapter, MakeVariant
from tui.cli import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def filled(
    workspace: Workspace, tiny_llama: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A workspace with a base and adapters pt and sft, found through the environment, in a folder elsewhere."""
    shutil.copytree(tiny_llama, workspace.bases / "tiny")
    for label, folder in zip(("pt", "sft"), pair, strict=True):
        shutil.copytree(folder, workspace.adapters / label)
    monkeypatch.setenv("MEDMERGE_WORKSPACE", str(workspace.root))
    (workspace.root.parent / "elsewhere").mkdir()
    monkeypatch.chdir(workspace.root.parent / "elsewhere")
    return workspace


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    return make_adapter(tiny_llama, seed=1), make_adapter(tiny_llama, seed=2, rank=4)


FLAGS = ["--base", "bases/tiny", "--adapter", "pt=adapters/pt:0.3", "--adapter", "sft=adapters/sft:0.7"]


def json_out(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_adapters_names_variants(variant: MakeVariant, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(variant("dora_rslora").adapter)
    assert main(["adapters", folder, "--json"]) == 0
    (row,) = json_out(capsys)["adapters"]
    assert row["variants"] == ["rsLoRA", "DoRA"] and row["live"] is False and row["modules"] == 14
    assert main(["adapters", folder]) == 0
    assert "rsLoRA; DoRA (a merge applies all of it; live mixtures cannot)" in capsys.readouterr().out


def test_merge_by_flags_then_again(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    out = filled.merges / "m"
    assert main(["merge", *FLAGS, "--method", "linear", "--out", str(out), "--json"]) == 0
    result = json_out(capsys)
    assert result["out"] == str(out) and result["verdict"]["ok"] and (out / "model.safetensors").is_file()
    for label, asked in (("pt", 0.3), ("sft", 0.7)):
        assert result["verdict"]["asked"][label] == asked
        found, expected = result["verdict"]["effective_weights"], result["verdict"]["expected_weights"]
        assert found[label] == pytest.approx(expected[label], abs=0.001)
    assert main(["merge", *FLAGS, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert "already there" in printed.err and not printed.out


def test_merge_by_recipe_in_words(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = filled.root / "recipe.yaml"
    recipe.write_text(
        "base: bases/tiny\nmethod: task_arithmetic\nadapters:\n  pt: {path: adapters/pt, weight: 0.5}\n"
        "output: {path: merges/r, dtype: float32}\n"
    )
    assert main(["merge", str(recipe), "--no-verify"]) == 0
    printed = capsys.readouterr().out
    assert "not verified" in printed and str(filled.merges / "r") in printed
    manifest = json.loads((filled.merges / "r" / "medmerge.json").read_text())
    assert manifest["recipe"]["method"] == "task_arithmetic" and manifest["verification"]["done"] is False


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--base is missing"),
        (["--base", "bases/tiny", "--out", "m"], "--adapter is missing"),
        ([*FLAGS], "--out is missing"),
        ([*FLAGS[:2], "--adapter", "pt=adapters/pt", "--out", "m"], "has no weight"),
        ([*FLAGS[:2], "--adapter", "adapters/pt:0.3", "--out", "m"], "is not LABEL=PATH"),
        ([*FLAGS[:2], "--adapter", "pt=adapters/pt:nan", "--out", "m"], "no finite weight"),
        ([*FLAGS, *FLAGS[2:4], "--out", "m"], "two adapters are labelled pt"),
        ([*FLAGS, "--method", "slurp", "--out", "m"], "did you mean 'slerp'"),
        (["--model", "a=bases/tiny", "--method", "soup"], "--out is missing"),
        ([*FLAGS, "--dtype", "q4_k_m", "--out", "m"], "dtype 'q4_k_m'"),
        (["--base", "no/such", *FLAGS[2:], "--out", "m"], "no/such does not exist"),
        (["none.yaml"], "cannot read the recipe"),
        (["none.yaml", *FLAGS], "a recipe file and --base together"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    filled: Workspace, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert main(["merge", *argv]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and not printed.out
    assert not list(filled.merges.iterdir()) and not list(Path.cwd().iterdir())
    assert not list(filled.jobs.iterdir())


def test_bad_inputs_found_by_the_job_are_exit_code_2(
    filled: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = filled.bases / "tiny" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main(["merge", *FLAGS, "--out", "m", "--json"]) == 2
    error = json_out(capsys)
    assert str(shard) in error["error"] and error["exit_code"] == 2 and error["hint"]
    assert not list(Path.cwd().iterdir())


def test_plan(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FLAGS, "--json"]) == 0
    plan = json_out(capsys)
    assert plan["bytes_written"] == (filled.bases / "tiny" / "model.safetensors").stat().st_size
    assert plan["tensors"][0]["parts"]["pt"] == {"weight": 0.3, "scale": 2.0, "rank": 8}
    assert main(["plan", *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert "pt 0.3 + sft 0.7 on tiny, bfloat16" in printed and "lost to rounding" in printed
    assert not list(filled.merges.iterdir()) and not list(Path.cwd().iterdir())


def test_adapters(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    broken = filled.adapters / "broken"
    shutil.copytree(filled.adapters / "pt", broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert main(["adapters", "--json"]) == 0
    rows = {row["name"]: row for row in json_out(capsys)["adapters"]}
    assert rows["pt"]["rank"] == 8 and rows["pt"]["scales"] == [2.0] and rows["pt"]["health"]["ok"]
    assert rows["pt"]["kind"] == "pt" and len(rows["pt"]["sha256"]) == 64 and rows["pt"]["usable"]
    assert not rows["broken"]["usable"] and "DoRA" in rows["broken"]["error"]
    assert main(["adapters", "adapters/sft", str(filled.adapters / "broken")]) == 0
    printed = capsys.readouterr().out
    assert "all linear" in printed and "not usable" in printed and "DoRA" in printed
    assert main(["adapters", "adapters/none"]) == 2
    assert main(["adapters", str(broken / "adapter_config.json")]) == 2


def test_terminal_escapes_in_foreign_files_are_not_printed(
    filled: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((filled.adapters / "pt" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "\x1b[31mred\x1b]0;title\x07"
    (filled.adapters / "pt" / "adapter_config.json").write_text(json.dumps(config))
    config["peft_type"] = "\x1b[2J"
    (filled.adapters / "sft" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["adapters"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed


def test_merging_imports_no_model_library() -> None:
    code = """
        import sys
        import engine.merge.execute, engine.merge.forecast, engine.merge.job, engine.weights.discover
        import tui.commands.adapters, tui.commands.merge, tui.commands.plan
        bad = {"torch", "transformers", "peft", "llama_cpp", "accelerate"} & sys.modules.keys()
        sys.exit(str(bad) if bad else 0)
    """
    import textwrap

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_models_by_a_mergekit_config_and_verified_by_it(
    filled: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models made, mixed by a mergekit config, and the mixture held against that config without a manifest."""
    for label in ("pt", "sft"):
        flags = ["--base", "bases/tiny", "--adapter", f"{label}=adapters/{label}:1", "--no-verify"]
        assert main(["merge", *flags, "--out", str(filled.merges / label)]) == 0
    config = filled.root / "mergekit.yaml"
    config.write_text(
        "merge_method: slerp\nbase_model: merges/pt\nmodels:\n  - model: merges/pt\n  - model: merges/sft\n"
        "parameters:\n  t: [{filter: mlp, value: 0.2}, {value: 0.6}]\ndtype: bfloat16\n"
    )
    out = filled.merges / "mixed"
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert "every element is right" in capsys.readouterr().out
    (out / "medmerge.json").unlink()
    (out / "verification.json").unlink()
    assert main(["verify", str(out), "--recipe", str(config), "--json"]) == 0
    assert json_out(capsys)["method"] == "slerp"
    config.write_text(config.read_text().replace("0.2", "0.3"))
    assert main(["verify", str(out), "--recipe", str(config)]) == 1
    assert main(["verify", str(out), "--recipe", str(config), "--base", "bases/tiny"]) == 2
    capsys.readouterr()
    assert main(["plan", str(config), "--out", "x"]) == 0
    table = capsys.readouterr().out
    assert "mlp.*" in table and "slerp(" in table


def test_plans_table_shows_every_entrys_numbers(
    filled: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of the reference model, weights of 0, densities by selector, t as a gradient."""

    def cells(**recipe: Any) -> list[list[str]]:
        path = filled.root / "plan.yaml"
        path.write_text(json.dumps({"output": "x", **recipe}))
        assert main(["plan", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        first = next(n for n, line in enumerate(lines) if line.startswith("layers"))
        return [re.split(r"  +", line.strip()) for line in lines[first:] if line.strip()]

    for label in ("pt", "sft"):
        flags = ["--base", "bases/tiny", "--adapter", f"{label}=adapters/{label}:1", "--no-verify"]
        assert main(["merge", *flags, "--out", str(filled.merges / label)]) == 0
    capsys.readouterr()
    models = {"a": {"path": "merges/pt", "weight": {"default": 1, "mlp": 3}}, "b": {"path": "merges/sft"}}
    found = cells(method="linear", models=models)
    assert found[0] == ["layers", "tensors", "weight a", "weight b"]
    assert ["0-1", "mlp.*", "0.75", "0.25"] in found
    assert next(row[2:] for row in found if row[1].endswith("self_attn.*")) == ["0.5", "0.5"]
    found = cells(method="slerp", models=models, parameters={"t": [0.2, 0.8]})
    assert {row[0]: row[-1] for row in found if row[0] in "01"} == {"0": "0.2", "1": "0.8"}
    adapters = {
        "pt": {"path": "adapters/pt", "weight": {"default": 0, "mlp": 0.5}, "density": {"default": 1, "mlp": 0.2}},
        "sft": {"path": "adapters/sft", "weight": 0.7},
    }  # fmt: skip
    found = cells(method="ties", base="bases/tiny", adapters=adapters)
    assert found[0][2:] == ["weight pt", "weight sft", "density pt", "density sft"]
    assert ["0-1", "mlp.*", "0.5", "0.7", "0.2", "0.5"] in found
    assert ["0-1", "self_attn.*", "0", "0.7", "1", "0.5"] in found
    del adapters["sft"]
    adapters["pt"].pop("density")
    assert cells(base="bases/tiny", adapters=adapters)[1:2] == [["0-1", "mlp.*", "0.5"]]


def test_methods_and_output_kinds_by_flags(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    ties = [*FLAGS, "--method", "ties", "--density", "0.4", "--dtype", "float16", "--gguf", "q8_0"]
    assert main(["merge", *ties, "--out", str(filled.merges / "ties"), "--json"]) == 0
    result = json_out(capsys)
    assert result["verdict"]["method"] == "ties" and result["verdict"]["effective_weights"] is None
    assert [file["verdict"]["verdict"] for file in result["ggufs"]] == ["ok"]
    assert (filled.merges / "ties-q8_0.gguf").is_file()
    assert (
        main(["merge", *FLAGS, "--kind", "adapter", "--rank", "4", "--out", str(filled.adapters / "both")])
        == 0
    )
    assert "one adapter of rank 4" in capsys.readouterr().out
    assert (
        main(["merge", *FLAGS, "--kind", "adapter", "--rank", "0", "--out", str(filled.adapters / "no")]) == 2
    )
    assert "output.rank should be a whole number from 1, and is 0" in capsys.readouterr().err
    alone = filled.root / "alone.gguf"
    assert main(["merge", *FLAGS, "--kind", "gguf", "--gguf", "q8_0", "--out", str(alone)]) == 0
    assert alone.is_file() and not list(filled.root.glob("*.partial*"))
    assert main(["merge", *ties, "--kind", "gguf", "--out", str(filled.root / "no.gguf")]) == 2
    assert "leave output.kind out" in capsys.readouterr().err
    assert main(["merge", *FLAGS, "--t", "0.5", "--out", str(filled.merges / "no")]) == 2
    assert "t means nothing to linear" in capsys.readouterr().err


def test_plan_says_what_the_dtype_cannot_hold(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of 1e7 leave float16's range: the plan refuses, in the words of the merge, and no folder is made."""
    large = ["--base", "bases/tiny", "--adapter", "pt=adapters/pt:1e7", "--dtype", "float16"]
    for command in ("plan", "merge"):
        assert main([command, *large, "--out", str(filled.merges / "m")]) == 2
        assert "more than F16 can hold" in capsys.readouterr().err
    assert not list(filled.merges.iterdir())


def test_the_plan_knows_what_comes_out(
    filled: Workspace, variant: MakeVariant, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes of every kind of output as they are then written; what the merge would refuse, the plan refuses."""
    for kind, out, file in (
        (["--kind", "adapter", "--rank", "3"], "both", "both/adapter_model.safetensors"),
        (["--kind", "gguf", "--gguf", "q8_0"], "m.gguf", "m.gguf"),
        (["--gguf", "f16"], "m", "m-f16.gguf"),
    ):
        flags = [*FLAGS, *kind, "--out", str(filled.merges / out)]
        assert main(["plan", *flags, "--json"]) == 0
        (size,) = json_out(capsys)["outputs"].values()
        assert main(["plan", *flags]) == 0 and "writes" in capsys.readouterr().out
        assert main(["merge", *flags, "--no-verify"]) == 0
        written = (filled.merges / file).stat().st_size
        assert abs(written - size) <= 0.15 * written  # a GGUF's metadata is not foreseen to the byte
        capsys.readouterr()
    dora = variant("dora")
    mine = ["--base", str(dora.base), "--adapter", f"d={dora.adapter}:1", "--out"]
    assert main(["plan", *mine, "x", "--kind", "adapter"]) == 2
    assert main(["plan", *mine, "x.gguf", "--kind", "gguf", "--gguf", "q8_0"]) == 2
    assert main(["plan", *FLAGS, "--out", "x", "--gguf", "q9_0"]) == 2
    assert main(["plan", *FLAGS[:2], "--adapter", "pt=adapters/pt:0", "--out", "x", "--kind", "adapter"]) == 2


def test_strict_base_refuses_another_base(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"name": "tiny", "sha256": "0" * 64, "shards": 1}
    (filled.adapters / "sft" / "training.json").write_text(json.dumps({"kind": "sft", "base": base}))
    flags = ["--base", "bases/tiny", "--adapter", "sft=adapters/sft:0.7"]
    merge = ["merge", *flags, "--out", str(filled.merges / "m"), "--json"]
    assert main([*merge, "--strict-base"]) == 2
    out, err = capsys.readouterr()
    assert "another hash" in json.loads(out)["error"] and "--strict-base" in err
    assert not list(filled.merges.iterdir())
    assert main(merge) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["trained_on"] == {"sft": {"name": "tiny", "sha256": "0" * 64, "same": False}}
    said = next(words for words in result["warnings"] if "another hash" in words)
    assert f"warning: {said}" in err
    gguf = ["gguf", *flags, "--type", "f16", "--out", str(filled.gguf / "m.gguf"), "--json"]
    assert main([*gguf, "--strict-base"]) == 2 and not list(filled.gguf.iterdir())
    assert "another hash" in json.loads(capsys.readouterr().out)["error"]
