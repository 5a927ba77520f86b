"""GGUF files as the output of a recipe: named, written all or none, verified before they get their names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import (
    BadAdapterError,
    BadModelError,
    BadRecipeError,
    CancelledError,
    ChildFailedError,
    NoSpaceError,
    TargetExistsError,
)
from engine.gguf import mixture as mixtures
from engine.gguf import outputs
from engine.gguf.mixture import Mixture
from engine.gguf.outputs import gguf_paths, write_ggufs
from engine.gguf.reader import GgufFile
from engine.gguf.verify import verify_gguf
from engine.jobs.events import EventWriter
from engine.weights.tensorfile import file_sha256
from tests.conftest import MakeAdapter
from tests.engine.gguf.conftest import Family, merged_by_torch, to_gguf


@pytest.fixture
def family(families: dict[str, Family]) -> Family:
    return families["llama"]


def mixture(family: Family) -> Mixture:
    return Mixture(family.base, family.adapters, family.weights)


def test_names_beside_a_checkpoint_and_alone(tmp_path: Path) -> None:
    assert gguf_paths(tmp_path / "pt0.3", ["Q8_0", "q4_k_m"], alone=False) == {
        "q8_0": tmp_path / "pt0.3-q8_0.gguf",
        "q4_k_m": tmp_path / "pt0.3-q4_k_m.gguf",
    }
    assert gguf_paths(tmp_path / "m.gguf", ["f16"], alone=True) == {"f16": tmp_path / "m.gguf"}
    assert gguf_paths(tmp_path / "m.v2.gguf", ["f16", "q8_0"], alone=True) == {
        "f16": tmp_path / "m.v2-f16.gguf",
        "q8_0": tmp_path / "m.v2-q8_0.gguf",
    }
    for types, path, says in (
        ([], "m.gguf", "no type"),
        (["q8_0", "Q8_0"], "m.gguf", "twice"),
        (["q9"], "m.gguf", "does not exist"),
        (["q8_0"], "m", r"ends in \.gguf"),
    ):
        with pytest.raises(BadRecipeError, match=says):
            gguf_paths(tmp_path / path, types, alone=True)


def test_several_types_at_once_are_those_made_one_by_one(family: Family, tmp_path: Path) -> None:
    """One exact file serves all types that llama.cpp quantises; every file is verified."""
    files = gguf_paths(tmp_path / "m.gguf", ["q8_0", "q4_k_m", "q6_k", "f32"], alone=True)
    results = write_ggufs(mixture(family), files, EventWriter())
    assert [result.path for result in results] == list(files.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.values())
    for result in results:
        assert result.exit_code == 0 and result.verdict is not None and result.verdict.ok
        assert result.verdict.verdict.asked == family.weights
        assert (result.bytes, result.sha256) == (result.path.stat().st_size, file_sha256(result.path))
        alone = tmp_path / f"alone-{result.type}.gguf"
        write_ggufs(mixture(family), {result.type: alone}, EventWriter(), verify=False)
        assert file_sha256(alone) == result.sha256


def test_weights_by_tensor(family: Family, tmp_path: Path) -> None:
    """As a plan gives them: every tensor by name; a tensor that is not named has weight 0."""
    names = [f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(2) for part in ("up", "down", "gate")]
    weights = {"pt": dict.fromkeys(names, 0.5), "sft": {names[0]: 0.25}}
    what = Mixture(family.base, family.adapters, weights, {"pt": {"mlp": 0.5}, "sft": {"layers 0-0": 0.25}})
    result = write_ggufs(what, {"q8_0": tmp_path / "m.gguf"}, EventWriter())[0]
    assert result.verdict is not None and result.verdict.ok
    asked = result.verdict.verdict.asked or {}
    assert 0.1 < asked["pt"] < 0.5 and 0 < asked["sft"] < 0.25  # what these weights fit to over all modules
    fields = GgufFile.open(result.path).metadata
    assert json.loads(fields["medmerge.source"])["adapters"]["pt"]["weight"] == {"mlp": 0.5}


def test_a_pre_tokenizer_named_by_the_user(family: Family, tmp_path: Path) -> None:
    """An equal pre-tokenizer written in a way that is not recognised, named with --pre: made, verified, and read
    later without --pre as far as it can be."""
    base = shutil.copytree(family.base, tmp_path / "base")
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"String": "no such text"}, "behavior": "Isolated",
                           "invert": False}, raw["pre_tokenizer"]],
    }  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(BadModelError, match="none that is known"):
        write_ggufs(base, {"q8_0": tmp_path / "m.gguf"}, EventWriter())
    result = write_ggufs(base, {"q8_0": tmp_path / "m.gguf"}, EventWriter(), pre="gpt-2")[0]
    assert result.exit_code == 0
    later = verify_gguf(result.path, base, {}, None, EventWriter())
    assert later.ok and any("pre-tokenizer" in note for note in later.verdict.warnings)


def test_of_a_finished_merge(family: Family, tmp_path: Path) -> None:
    merged = merged_by_torch(family, tmp_path / "merged", lambda name: family.weights)
    files = gguf_paths(merged, ["q8_0", "q4_k_m"], alone=False)
    results = write_ggufs(merged, files, EventWriter())
    assert [result.exit_code for result in results] == [0, 0]
    assert [result.path.name for result in results] == ["merged-q8_0.gguf", "merged-q4_k_m.gguf"]
    assert not list(merged.glob("*.gguf"))
    assert file_sha256(results[1].path) == file_sha256(to_gguf(merged, tmp_path / "other.gguf", "q4_k_m"))


def test_a_file_that_is_not_what_was_asked_never_gets_its_name(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that scales one adapter wrongly: the independent reading of the finished file says so."""
    right = mixtures.delta_rows

    def wrong(factor: Any, weight: float, first: int, count: int) -> Any:
        return right(factor, 0.5 * weight if weight == 0.7 else weight, first, count)

    monkeypatch.setattr(mixtures, "delta_rows", wrong)
    (tmp_path / "m-q8_0.gguf.rejected").write_text("an older one")
    files = gguf_paths(tmp_path / "m.gguf", ["q8_0", "q4_k_m"], alone=True)
    results = write_ggufs(mixture(family), files, EventWriter())
    assert [result.exit_code for result in results] == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m-q4_k_m.gguf.rejected", "m-q8_0.gguf.rejected", "m-q8_0.gguf.rejected-2",
    ]  # fmt: skip
    assert all(result.path.stat().st_size == result.bytes for result in results)


class Stops(EventWriter):
    """Raises when a phase begins."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def progress(self, *given: Any, phase: str = "", **more: Any) -> None:
        if phase == self.phase:
            raise CancelledError("cancelled")


@pytest.mark.parametrize("phase", ["write", "check"])
def test_all_or_none(family: Family, tmp_path: Path, phase: str) -> None:
    files = gguf_paths(tmp_path / "m.gguf", ["q8_0", "q4_k_m"], alone=True)
    with pytest.raises(CancelledError):
        write_ggufs(mixture(family), files, Stops(phase))
    assert not list(tmp_path.iterdir())


def test_none_when_llama_cpp_refuses_the_last(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise ChildFailedError("llama.cpp could not quantise")

    monkeypatch.setattr(outputs, "quantise", refuse)
    files = gguf_paths(tmp_path / "m.gguf", ["q8_0", "q4_k_m"], alone=True)
    with pytest.raises(ChildFailedError):
        write_ggufs(mixture(family), files, EventWriter())
    assert not list(tmp_path.iterdir())


def test_space_for_all_files_is_needed_before_the_first(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("engine.atomic.shutil.disk_usage", lambda path: usage._replace(free=150_000_000))
    write_ggufs(mixture(family), {"q8_0": tmp_path / "one.gguf"}, EventWriter(), verify=False)
    with pytest.raises(NoSpaceError, match="3 GGUF"):
        files = gguf_paths(tmp_path / "m.gguf", ["q8_0", "q4_k_m", "f16"], alone=True)
        write_ggufs(mixture(family), files, EventWriter())
    assert [path.name for path in tmp_path.iterdir()] == ["one.gguf"]


def test_refusals_before_anything_is_written(
    family: Family, make_adapter: MakeAdapter, families: dict[str, Family], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    target = {"q8_0": tmp_path / "out" / "m.gguf"}
    dora = make_adapter(family.base, seed=7, use_dora=True)
    table = make_adapter(families["qwen3"].base, seed=8, target_modules=["embed_tokens"])
    broken = shutil.copytree(family.adapters["pt"], tmp_path / "broken")
    state = load_file(broken / "adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, broken / "adapter_model.safetensors")
    quantised = shutil.copytree(family.base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    cases: list[tuple[Mixture, type[Exception], str]] = [
        (Mixture(family.base, {"pt": dora}, {"pt": 1.0}), BadAdapterError, "DoRA"),
        (Mixture(families["qwen3"].base, {"pt": table}, {"pt": 1.0}), BadAdapterError, "embed"),
        (Mixture(family.base, {"pt": broken}, {"pt": 1.0}), BadAdapterError, "NaN"),
        (Mixture(quantised, family.adapters, family.weights), BadModelError, "quantization_config"),
        (Mixture(family.base, family.adapters, {"pt": 0.3}), BadRecipeError, "weight for each"),
        (Mixture(family.base, family.adapters, {"pt": 0.3, "sft": float("nan")}), BadRecipeError, "nan"),
    ]
    for what, error, says in cases:
        with pytest.raises(error, match=says):
            write_ggufs(what, target, EventWriter())
    assert not (tmp_path / "out").exists()
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(TargetExistsError):
        write_ggufs(mixture(family), {"q8_0": tmp_path / "there.gguf"}, EventWriter())
