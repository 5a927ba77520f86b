"""Templates compared by text where it is known and by name elsewhere, from training.json, manifests and GGUFs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import templates
from engine.errors import BadRecipeError
from engine.gguf.convert import Conversion, convert
from engine.gguf.lora import convert_adapter
from engine.gguf.trained import choose_for, trained_adapter, trained_in
from engine.jobs import EventWriter
from engine.merge.job import run_merge
from engine.template_check import Chosen, Trained, agreed, choose, from_record, judge, of_adapter, warning
from engine.weights import Adapter
from tests.conftest import MakeAdapter


def text_of(name: str, model: Path | None = None) -> dict[str, Any]:
    """`template_text` as training writes it."""
    return templates.describe(templates.load(name, model))


def taught(folder: Path, **training: Any) -> Path:
    (folder / "training.json").write_text(json.dumps({"format": "medmerge.training/1", **training}))
    return folder


@pytest.fixture
def adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, rank=2)


@pytest.mark.parametrize(
    "training, name, fit",
    [
        ({"kind": "sft", "template": "qwen3_nothink", "template_text": text_of("qwen3_nothink")}, "chatml", "fits"),
        ({"kind": "sft", "template": "chatml", "template_text": None}, "qwen3_nothink", "fits"),  # the same texts
        ({"kind": "sft", "template": "qwen3_nothink", "template_text": text_of("qwen3_nothink")}, "qwen3", "differs"),
        ({"kind": "sft", "template": "qwen3", "template_text": None}, "qwen3", "fits"),
        # The base's own template writes ChatML too, but it is another text.
        ({"kind": "sft", "template": "chatml", "template_text": text_of("chatml")}, "model", "differs"),
        ({"kind": "sft", "template": "model", "template_text": {"sha256": "0" * 64}}, "model", "differs"),
        ({"kind": "sft", "template": "model", "template_text": {"sha256": "zz"}}, "model", "fits"),  # by name
        ({"kind": "sft", "template": "model", "template_text": "no mapping"}, "llama3", "differs"),
        ({"kind": "pt", "template": "model", "template_text": None}, "llama3", "fits"),  # plain text
        ({"kind": "pt", "template": None}, "model", "fits"),
        ({"kind": "pt", "template": "llama3", "template_text": text_of("llama3")}, "model", "differs"),
        ({"kind": "sft"}, "model", "unknown"),
        (None, "model", "unknown"),
    ],
)  # fmt: skip
def test_judged_by_text_then_by_name(
    adapter: Path, tiny_llama: Path, training: dict[str, Any] | None, name: str, fit: str
) -> None:
    if training is not None:
        taught(adapter, **training)
    trained = of_adapter("a", Adapter.open(adapter))
    chosen = choose(name, tiny_llama)
    assert judge(trained, chosen) == fit
    assert judge(from_record("a", json.loads(json.dumps(trained.to_dict()))), chosen) == fit, "as recorded"
    said = warning(trained, chosen)
    assert bool(said) == (fit != "fits")
    if fit == "differs":
        assert f"template {trained.template}" in said and f"template {name}" in said
    if fit == "unknown":
        assert "template unknown" in said and f"template {name}" in said


def test_a_folder_called_pt_says_nothing(tiny_llama: Path, make_adapter: MakeAdapter) -> None:
    found = of_adapter("a", Adapter.open(make_adapter(tiny_llama, rank=2, name="pt")))
    assert Adapter.open(make_adapter(tiny_llama, rank=2, name="pt")).kind == "pt" and not found.known


def test_the_models_own_text_is_the_one_that_training_recorded(tiny_llama: Path, tmp_path: Path) -> None:
    """In the folder, and in a GGUF made from it."""
    convert(Conversion.plan(tiny_llama), tmp_path / "m.gguf", "f16", EventWriter())
    recorded = text_of("model", tiny_llama)["sha256"]
    assert (
        choose_for("model", tiny_llama)
        == choose_for("model", tmp_path / "m.gguf")
        == Chosen("model", recorded)
    )
    assert choose("model", tmp_path) == Chosen("model")  # nothing there to read
    (tmp_path / "broken.gguf").write_text("no")
    assert choose_for("model", tmp_path / "broken.gguf") == Chosen("model")
    assert trained_in(tmp_path / "broken.gguf") == []
    with pytest.raises(BadRecipeError, match="unknown template"):
        choose_for("qwen3_nothnk", tiny_llama)


def test_what_to_do_is_said() -> None:
    said = warning(
        Trained("sft", "qwen3_nothink", within="m"), Chosen("model", "1" * 64), "templates: [{name}]"
    )
    assert "adapter sft in m was trained with template qwen3_nothink" in said
    assert "choose templates: [qwen3_nothink]" in said
    said = warning(Trained("sft", "model", "0" * 64), Chosen("model", "1" * 64))
    assert "000000000000" in said and "111111111111" in said and "chat_template.jinja" in said


def test_manifests_written_before_this_was_recorded() -> None:
    assert from_record("pt", {"kind": "pt", "template": None}).plain
    assert from_record("pt", {"kind": "pt", "template": "model"}).plain
    assert from_record("sft", {"kind": "sft", "template": "chatml"}) == Trained("sft", "chatml")
    assert not from_record("x", {"kind": "", "template": None}).known


def test_agreed() -> None:
    plain, chatml = Trained("pt", plain=True), Trained("a", "chatml")
    same = Trained("b", "qwen3_nothink", text_of("qwen3_nothink")["sha256"])
    assert agreed([plain, chatml, same]) == same  # the one whose text is known
    assert agreed([plain]) == plain and agreed([]) is None
    assert agreed([chatml, Trained("c")]) is None and agreed([chatml, Trained("c", "llama3")]) is None


def test_a_merge_and_its_files_know_what_went_into_them(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Also what was inside its base before; in the folder, in a GGUF made from it, and in one made without it."""
    pt = taught(make_adapter(tiny_llama, rank=2, seed=1), kind="pt", template="model", template_text=None)
    sft = taught(
        make_adapter(tiny_llama, rank=2, seed=2),
        kind="sft",
        template="llama3",
        template_text=text_of("llama3"),
    )
    foreign = make_adapter(tiny_llama, rank=2, seed=3)

    def merge(base: Path, out: Any, **adapters: Path) -> dict[str, Any]:
        recipe = {
            "base": str(base),
            "adapters": {label: {"path": str(path), "weight": 0.5} for label, path in adapters.items()},
            "output": out,
        }
        return run_merge({"recipe": recipe, "verify": False}, EventWriter())

    merge(tiny_llama, str(tmp_path / "first"), pt=pt, sft=sft)
    merge(tmp_path / "first", str(tmp_path / "second"), other=foreign)
    llama3 = text_of("llama3")["sha256"]
    first = {("pt", "", "", True), ("sft", "llama3", llama3, False)}
    both = first | {("other", "", "", False)}

    def inside(path: Path) -> set[tuple[str, str, str, bool]]:
        found = trained_in(path)
        assert {one.within for one in found} <= {path.name}
        return {(one.label, one.template, one.sha256, one.plain) for one in found}

    assert inside(tmp_path / "first") == first and inside(tmp_path / "second") == both
    assert trained_in(tiny_llama) == []
    merge(
        tmp_path / "first",
        {"path": str(tmp_path / "alone.gguf"), "kind": "gguf", "gguf": ["f16"]},
        other=foreign,
    )
    assert inside(tmp_path / "alone.gguf") == both, "its manifest lies beside it"
    (tmp_path / "alone.gguf.json").unlink()
    assert inside(tmp_path / "alone.gguf") == both, "the file says it, too"
    convert(Conversion.plan(tmp_path / "second"), tmp_path / "second.gguf", "q8_0", EventWriter())
    assert inside(tmp_path / "second.gguf") == both
    (tmp_path / "second.gguf.json").write_text("{")
    assert trained_in(tmp_path / "second.gguf") == [Trained("", within="second.gguf")], (
        "a broken one is unknown"
    )
    merge(tiny_llama, {"path": str(tmp_path / "one"), "kind": "adapter"}, pt=pt, sft=sft)
    assert trained_adapter("one", tmp_path / "one") == Trained("one", "llama3", llama3)
    merge(tiny_llama, {"path": str(tmp_path / "plain"), "kind": "adapter"}, pt=pt)
    assert trained_adapter("one", tmp_path / "plain") == Trained("one", plain=True)
    for n, (folder, known) in enumerate(((sft, Trained("a", "llama3", llama3)), (foreign, Trained("a")))):
        convert_adapter(folder, tiny_llama, tmp_path / f"{n}.gguf", "f32", EventWriter())
        assert trained_adapter("a", tmp_path / f"{n}.gguf") == known


def test_a_merges_own_adapter_folder_that_was_moved(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    """The manifest is enough: the adapters need not be there any more."""
    taught(adapter, kind="sft", template="llama3", template_text=None)
    recipe = {
        "base": str(tiny_llama),
        "adapters": {"sft": {"path": str(shutil.copytree(adapter, tmp_path / "a")), "weight": 1}},
        "output": str(tmp_path / "m"),
    }
    run_merge({"recipe": recipe, "verify": False}, EventWriter())
    shutil.rmtree(tmp_path / "a")
    assert trained_in(tmp_path / "m") == [Trained("sft", "llama3", within="m")]
