"""GGUF files as a backend: the same prompts, tokens, letters and texts as the checkpoint they were made from."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadDataError, BadModelError, CancelledError
from engine.evaluate import job, parse_config
from engine.evaluate.backends.gguf import GgufBackend
from engine.evaluate.cells import Cell, Identity, plan_cells
from engine.evaluate.config import EvalConfig, GgufFile
from engine.evaluate.execute import CellWork
from engine.evaluate.live import LiveModel
from engine.evaluate.rows import Row
from engine.gguf.convert import Conversion, convert
from engine.jobs.events import EventWriter
from engine.weights import Checkpoint
from tests.conftest import build_model
from tests.engine.evaluate.test_job import params, rows_on_disk

RANDOM = {"qwen3": (9, 302), "llama": (5, 98)}  # seed; a token that the model made from it is fond of


def to_gguf(folder: Path, out: Path, kind: str) -> Path:
    convert(Conversion.plan(folder), out, kind, EventWriter())
    return out


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A float32 model with decided opinions (its last norm is large), which ends answers at two tokens."""
    from safetensors.torch import load_file, save_file

    seed, end = RANDOM[request.param]
    folder = build_model(
        request.param, tmp_path_factory.mktemp("model") / "m", seed, "float32", tie_word_embeddings=False
    )
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 12
    save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [2, end]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def ggufs(checkpoint, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: to_gguf(checkpoint, folder / f"{kind}.gguf", kind) for kind in ("f32", "q8_0")}


@pytest.fixture
def config(checkpoint, ggufs, data) -> dict[str, Any]:
    """All kinds of cells on a checkpoint (in float32) and on two files made from it."""
    return {
        "base": str(checkpoint),
        "gguf": [{"name": kind, "path": str(path)} for kind, path in ggufs.items()],
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 3,
        "templates": ["model", "qwen3_empty_think"],
        "decoding": [
            {"name": "greedy", "max_new_tokens": 12},
            {"name": "warm", "temperature": 0.4, "top_p": 0.9, "top_k": 40, "max_new_tokens": 12},
        ],
        "tasks": [
            {"name": "qa", "kind": "generation", "data": str(data["generation"]), "system": "Be brief."},
            {"name": "mc", "kind": "multiple_choice", "data": str(data["multiple_choice"])},
            {"name": "mo", "kind": "multiple_choice", "data": str(data["multiple_choice"]), "scoring": "options"},
            {"name": "mg", "kind": "multiple_choice", "data": str(data["multiple_choice"]), "scoring": "generated"},
            {"name": "safety", "kind": "probes", "data": str(data["probes"])},
            {"name": "text", "kind": "perplexity", "data": str(data["perplexity"]), "max_tokens": 60},
        ],
    }  # fmt: skip


def cells_of(config: EvalConfig) -> list[Cell]:
    identity = Identity(
        "m", "", {}, "float32", "float32", "cpu", {file.name: file.name for file in config.gguf}
    )
    return plan_cells(config, identity)


def rows_of(work: Any) -> dict[str, Row]:
    return {row["id"]: row for batch in work.batches for row in work.run(batch)}


def test_a_float32_file_gives_what_its_checkpoint_gives(config, checkpoint):
    """Log-likelihoods (llama.cpp keeps keys and values in 16 bits), letters, greedy texts, and drawn ones as long as
    no draw falls between two nearly equal tokens."""
    parsed = parse_config(config)
    samples = {task.name: job.samples_of(task) for task in parsed.tasks}
    live = LiveModel(Checkpoint.open(checkpoint), {}, "float32", "float32", "cpu")
    backend = GgufBackend(parsed.gguf[0], "cpu", threads=1)
    kinds, drawn, finishes = set(), [], set()
    try:
        for cell in (cell for cell in cells_of(parsed) if cell.model is None):
            ours = backend.work(cell, samples[cell.task.name])
            theirs = CellWork(live, cell, samples[cell.task.name])
            assert ours.prompts == theirs.prompts
            found, right = rows_of(ours), rows_of(theirs)
            assert found.keys() == right.keys() == {sample.id for sample in samples[cell.task.name]}
            kinds.add(cell.kind)
            for key, row in right.items():
                if cell.seed is not None:
                    drawn.append((found[key]["raw"], row["raw"]))
                    continue
                finishes.add(row.get("finish"))
                close = [name for name in ("logprob", "logprobs") if name in row]
                assert {k: v for k, v in found[key].items() if k not in close} == {
                    k: v for k, v in row.items() if k not in close
                }, cell.title
                for name in close:
                    assert found[key][name] == pytest.approx(row[name], abs=1e-3 * row.get("tokens", 4))
    finally:
        backend.close()
    assert kinds == {
        "generation", "references", "multiple_choice", "generated_choice", "probes", "perplexity",
    }  # fmt: skip
    assert finishes >= {"stop", "length"}
    assert sum(a == b for a, b in drawn) >= 0.8 * len(drawn) and len(set(drawn)) >= 0.5 * len(drawn)


def test_tokens_are_those_of_the_checkpoint(checkpoint, ggufs):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(checkpoint)
    backend = GgufBackend(GgufFile("f", ggufs["f32"]), "cpu")
    try:
        for text in (
            "<|im_start|>user\nWhat is the dose?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "Question: 500 mg\nA. yes\nAnswer:",
            "患者 β-blocker naïve\t\t \n 🙂",
        ):
            ids = reference(text, add_special_tokens=False)["input_ids"]
            assert backend.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
            assert backend.tokenizer(text)["input_ids"] == reference(text)["input_ids"]
            assert backend.tokenizer.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    finally:
        backend.close()


def test_a_batch_does_not_depend_on_what_ran_before(config):
    """What makes a resumed cell equal: the same batch, asked first or last, gives the same numbers to the bit."""
    parsed = parse_config(config)
    samples = {task.name: job.samples_of(task) for task in parsed.tasks}
    backend = GgufBackend(parsed.gguf[1], "cpu", threads=1)
    try:
        for cell in (cell for cell in cells_of(parsed) if cell.model == parsed.gguf[1]):
            if cell.template == "qwen3_empty_think":
                continue
            work = backend.work(cell, samples[cell.task.name])
            assert len(work.batches) > 1
            forth = {tuple(batch): work.run(batch) for batch in work.batches}
            assert {tuple(batch): work.run(batch) for batch in reversed(work.batches)} == forth
    finally:
        backend.close()


class StopOnce(EventWriter):
    """Cancels the job at its n-th progress event, once, as a signal does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def progress(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise CancelledError("cancelled")


@pytest.mark.parametrize("checkpoint", ["qwen3"], indirect=True)
@pytest.mark.parametrize("after", [3, 12])
def test_a_run_of_files_and_its_resumption(after, config, tmp_path):
    """Checkpoint, float32 and Q8_0 in one run; and a run of the files alone, stopped and resumed."""
    config["templates"], config["decoding"] = ["model"], config["decoding"][1:]
    config["tasks"] = [task for task in config["tasks"] if task["name"] in ("qa", "mo", "text")]
    whole, broken = tmp_path / "one" / "whole", tmp_path / "two" / "broken"
    if after == 3:
        result = job.run(params(config, whole), EventWriter())
    else:
        del config["base"]
        result = job.run(params(config, whole), EventWriter())
    assert result["exit_code"] == 0 and not result["failed"]
    labels = {row["model"] for row in result["rows"]}
    assert {"f32", "q8_0"} <= labels and len(labels) == (3 if after == 3 else 2)
    for row in result["rows"]:
        assert row["value"] is None or math.isfinite(row["value"])
    found = {(r["model"], r["task"], r["metric"]): r["value"] for r in result["rows"]}
    assert found["q8_0", "text", "perplexity"] != found["f32", "text", "perplexity"]
    assert found["q8_0", "text", "perplexity"] == pytest.approx(found["f32", "text", "perplexity"], rel=0.2)
    with pytest.raises(CancelledError):
        job.run(params(config, broken), StopOnce(after))
    job.run(params(config, broken, resume=True), EventWriter())
    assert rows_on_disk(broken) == rows_on_disk(whole)


@pytest.mark.parametrize("checkpoint", ["qwen3"], indirect=True)
def test_files_that_cannot_be_asked(config, ggufs, checkpoint, tmp_path):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(ggufs["f32"].read_bytes()[:100_000])
    with pytest.raises(BadModelError, match=r"llama\.cpp cannot load .*torn\.gguf"):
        GgufBackend(GgufFile("torn", torn), "cpu")
    with pytest.raises(BadModelError, match="cannot read"):
        GgufBackend(GgufFile("gone", tmp_path / "gone.gguf"), "cpu")
    # one bad file costs its own cells: the other's are measured
    config["gguf"] = [{"name": "torn", "path": str(torn)}, {"name": "whole", "path": str(ggufs["q8_0"])}]
    config["tasks"] = [task for task in config["tasks"] if task["name"] == "text"]
    del config["base"]
    result = job.run(params(config, tmp_path / "runs" / "a"), EventWriter())
    assert result["exit_code"] == 3 and list(result["failed"]) == ["torn · text"]
    assert "the file is damaged" in result["failed"]["torn · text"]
    assert {row["model"] for row in result["rows"]} == {"whole"}


@pytest.mark.parametrize("checkpoint", ["qwen3"], indirect=True)
def test_no_tokenizer_no_template_and_too_long(config, checkpoint, ggufs, tmp_path, write_jsonl):
    bare = copy_without(checkpoint, tmp_path, "chat_template.jinja")
    parsed = parse_config(config)
    cell = next(cell for cell in cells_of(parsed) if cell.kind == "generation" and cell.template == "model")
    samples = job.samples_of(cell.task)
    backend = GgufBackend(GgufFile("bare", bare), "cpu")
    try:
        with pytest.raises(BadModelError, match=r"no chat template[\s\S]*qwen3_nothink"):
            backend.work(cell, samples)
        chatml = replace(cell, template="chatml")
        assert backend.work(chatml, samples).prompts[0].startswith("<|im_start|>system\nBe brief.")
        long = replace(samples[0], id="the-long-one", prompt="What is pain? " * 200)
        with pytest.raises(BadDataError, match=r"sample the-long-one: it has \d+ tokens.*bare\.gguf is 256"):
            backend.work(chatml, [*samples, long])
    finally:
        backend.close()
    mute = tmp_path / "mute.gguf"
    without_tokenizer(ggufs["f32"], mute)
    with pytest.raises(BadModelError, match=r"mute\.gguf"):
        GgufBackend(GgufFile("mute", mute), "cpu")


def copy_without(checkpoint: Path, tmp_path: Path, name: str) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / name).unlink()
    return to_gguf(folder, tmp_path / "bare.gguf", "f32")


def without_tokenizer(source: Path, target: Path) -> None:
    """The file again with no tokenizer.ggml keys but a model named `no_vocab`, as llama.cpp writes such files."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "qwen3")
    for field in reader.fields.values():
        skipped = (
            field.name.startswith(("GGUF.", "tokenizer.", "medmerge."))
            or field.name == "general.architecture"
        )
        if not skipped:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
