"""The base an adapter names in training.json against the base it is used with: merges, plans, GGUFs, evaluations."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import engine.weights.checkpoint
from engine.errors import BadModelError
from engine.gguf import job as gguf_job
from engine.jobs import EventWriter
from engine.merge.job import run_merge, run_plan
from engine.merge.manifest import SCHEMA
from engine.weights import Checkpoint
from engine.weights.identity import noted_sha256, weights_sha256
from tests.conftest import MakeAdapter
from training.artifact import base_identity

OTHER = "0" * 64


def warnings(events: EventWriter) -> list[str]:
    return [event.data["message"] for event in events.kept if event.type == "warning"]


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, rank=2)


def trained(adapter: Path, **base: Any) -> Path:
    (adapter / "training.json").write_text(json.dumps({"kind": "sft", "template": "model", "base": base}))
    return adapter


def recipe(base: Path, adapter: Path, out: Path, **output: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "adapters": {"a": {"path": str(adapter), "weight": 0.5}},
        "output": {"path": str(out), **output},
    }


def test_one_identity(tiny_llama: Path, tiny_llama_sharded: Path, tmp_path: Path) -> None:
    single = sha(tiny_llama / "model.safetensors")
    assert base_identity(tiny_llama) == {"name": tiny_llama.name, "sha256": single, "shards": 1}
    files = sorted(tiny_llama_sharded.glob("*.safetensors"))
    lines = "\n".join(sha(path) for path in files)
    joined = hashlib.sha256(lines.encode()).hexdigest()
    assert base_identity(tiny_llama_sharded) == {
        "name": tiny_llama_sharded.name, "sha256": joined, "shards": len(files),
    }  # fmt: skip
    assert weights_sha256({"b": "2", "a": "1"}) == hashlib.sha256(b"1\n2").hexdigest()
    with pytest.raises(BadModelError):
        base_identity(tmp_path)


@pytest.mark.parametrize(
    "named, base, same, says",
    [
        ("right", "single", True, []),
        ("right", "sharded", True, []),
        ("wrong", "single", False, ["was trained on tiny-llama,", "another hash", "saved anew"]),
        ("wrong", "sharded", False, ["another hash"]),
        ("other name", "single", False, ["was trained on llama-9b,", "which is called tiny-llama,"]),
        ("layout", "sharded", None, ["in one file", "cannot be told"]),
        ("unsaid layout", "sharded", None, ["cannot be told"]),
        ("no hash", "single", "absent", []),
        ("foreign", "single", "absent", []),
    ],
)
def test_a_merge_compares_the_bytes_it_reads(
    tiny_llama: Path, tiny_llama_sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    named: str, base: str, same: Any, says: list[str],
) -> None:  # fmt: skip
    import jsonschema

    folder = tiny_llama if base == "single" else tiny_llama_sharded
    right = base_identity(folder)
    told: dict[str, Any] = {
        "right": right,
        "wrong": right | {"sha256": OTHER},
        "other name": right | {"sha256": OTHER, "name": "llama-9b"},
        "layout": base_identity(tiny_llama),
        "unsaid layout": {"name": "tiny", "sha256": OTHER},
        "no hash": {"name": "tiny-llama"},
        "foreign": None,
    }[named]
    if told is not None:
        trained(adapter, **told)

    def not_again(path: Path) -> str:
        raise AssertionError(f"{path} is read a second time")

    monkeypatch.setattr(engine.weights.checkpoint, "file_sha256", not_again)
    events = EventWriter()
    result = run_merge({"recipe": recipe(folder, adapter, tmp_path / "m")}, events)
    assert result["exit_code"] == 0 and result["verdict"]["ok"], "it is made all the same"
    manifest = json.loads((tmp_path / "m" / "medmerge.json").read_text())
    jsonschema.validators.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(manifest)
    expected = None if same == "absent" else {"name": told["name"], "sha256": told["sha256"], "same": same}
    assert manifest["adapters"]["a"]["trained_on"] == expected
    assert result["trained_on"] == ({"a": expected} if expected else {})
    said = [words for words in warnings(events) if "was trained on" in words]
    assert len(said) == bool(says) and all(part in said[0] for part in says)
    assert set(said) <= set(result["warnings"])


@pytest.mark.parametrize("output", [{}, {"kind": "adapter"}, {"kind": "gguf", "gguf": ["f16"]}])
def test_strict_refuses_another_base_and_leaves_nothing(
    tiny_llama: Path, tiny_llama_sharded: Path, adapter: Path, tmp_path: Path, output: dict[str, Any]
) -> None:
    out = tmp_path / "here" / ("m.gguf" if output.get("kind") == "gguf" else "m")
    out.parent.mkdir()
    trained(adapter, **base_identity(tiny_llama))

    def merge(base: Path) -> dict[str, Any]:
        return run_merge(
            {"recipe": recipe(base, adapter, out, **output), "strict_base": True, "verify": False},
            EventWriter(),
        )

    with pytest.raises(BadModelError, match=r"cannot be told(?s:.)*--strict-base"):
        merge(tiny_llama_sharded)
    trained(adapter, **(base_identity(tiny_llama) | {"sha256": OTHER}))
    with pytest.raises(BadModelError, match=r"another hash(?s:.)*--strict-base") as refused:
        merge(tiny_llama)
    assert refused.value.exit_code == 2 and not list(out.parent.iterdir())
    trained(adapter, **base_identity(tiny_llama))
    result = merge(tiny_llama)
    assert result["exit_code"] == 0 and result["trained_on"]["a"]["same"] is True
    assert result["manifest"]["adapters"]["a"]["trained_on"]["same"] is True


def test_a_plan_compares_what_is_known_and_reads_no_weights(
    tiny_llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    identity = base_identity(base)
    trained(adapter, **(identity | {"sha256": OTHER}))

    def no_reading(path: Path) -> str:
        raise AssertionError(f"{path} is hashed for a plan")

    monkeypatch.setattr(engine.weights.checkpoint, "file_sha256", no_reading)

    def plan() -> tuple[Any, list[str]]:
        result = run_plan({"recipe": recipe(base, adapter, tmp_path / "m")}, EventWriter())
        return result["adapters"]["a"]["trained_on"]["same"], result["warnings"]

    assert plan()[0] is None and not any("hash" in words for words in plan()[1])
    weights = base / "model.safetensors"
    note: dict[str, Any] = {
        "name": "b", "files": {weights.name: {"bytes": weights.stat().st_size, "sha256": sha(weights)}},
    }  # fmt: skip
    (base / "medmerge.json").write_text(json.dumps(note))
    assert plan()[0] is False and any("another hash" in words for words in plan()[1])
    trained(adapter, **(identity | {"name": "renamed"}))
    assert plan()[0] is True and not any("another base" in words for words in plan()[1]), (
        "known to be the same"
    )
    note["files"][weights.name]["bytes"] += 1
    (base / "medmerge.json").write_text(json.dumps(note))
    assert plan()[0] is None, "a note about another file"
    assert any("names another base" in words for words in plan()[1])


def test_notes_that_say_the_hashes(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    run_merge({"recipe": recipe(tiny_llama, adapter, tmp_path / "m"), "verify": False}, EventWriter())
    merged = Checkpoint.open(tmp_path / "m")
    assert noted_sha256(merged) == {"model.safetensors": sha(tmp_path / "m" / "model.safetensors")}
    assert noted_sha256(Checkpoint.open(tiny_llama)) is None
    for text in ("{", "[]", '{"files": []}', '{"files": {}}', '{"files": {"model.safetensors": "short"}}'):
        (tmp_path / "m" / "medmerge.json").write_text(text)
        assert noted_sha256(merged) is None


def test_ggufs_of_base_and_adapters(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    def make(out: str, strict: bool = False, **params: Any) -> tuple[dict[str, Any], list[str]]:
        events = EventWriter()
        given = {"base": str(tiny_llama), "out": str(tmp_path / out), "verify": False, "strict_base": strict}
        return gguf_job.run(given | params, events), warnings(events)

    mixture = {"adapters": {"a": {"path": str(adapter), "weight": 0.5}}}
    trained(adapter, **base_identity(tiny_llama))
    result, said = make("right.gguf", **mixture)
    assert result["trained_on"]["a"]["same"] is True and result["warnings"] == said == []
    trained(adapter, **(base_identity(tiny_llama) | {"sha256": OTHER}))
    result, said = make("wrong.gguf", **mixture)
    assert (
        result["trained_on"]["a"]["same"] is False
        and result["warnings"] == said
        and "another hash" in said[0]
    )
    for params in (mixture, {"source": str(adapter)}):
        with pytest.raises(BadModelError, match="another hash"):
            make("strict.gguf", True, **params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right.gguf", "wrong.gguf"]
    result, said = make("lora.gguf", source=str(adapter))
    assert result["trained_on"][adapter.name]["same"] is None and said == [], (
        "the base's weights were not read"
    )
