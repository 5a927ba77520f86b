"""Preparing a live mixture: made once, found again by content, made anew when an input changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from engine.errors import BadAdapterError, BadRecipeError
from engine.gguf import job
from engine.jobs.events import EventWriter
from tests.conftest import MakeAdapter


def prepare(base: Path, adapters: dict[str, Path], out: Path, kind: str = "f16") -> dict[str, object]:
    named = {label: str(path) for label, path in adapters.items()}
    return job.run_live({"base": str(base), "adapters": named, "type": kind, "out": str(out)}, EventWriter())


def test_files_are_made_once_and_named_by_content(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    adapters = {"pt": make_adapter(tiny_llama, seed=1), "sft": make_adapter(tiny_llama, seed=2)}
    first = prepare(base, adapters, tmp_path / "gguf")
    paths = [first["base"], *first["adapters"].values()]
    assert sorted(map(str, first["made"])) == sorted(map(str, paths)) and all(
        Path(p).is_file() for p in paths
    )
    assert Path(str(first["base"])).parent == tmp_path / "gguf" / "live"
    again = prepare(base, adapters, tmp_path / "gguf")
    assert again["made"] == [] and again["adapters"] == first["adapters"] and again["base"] == first["base"]

    # an adapter trained again into the same folder, and a base changed in place
    shutil.copy(adapters["sft"] / "adapter_model.safetensors", adapters["pt"] / "adapter_model.safetensors")
    changed = prepare(base, adapters, tmp_path / "gguf")
    assert changed["base"] == first["base"]
    assert changed["adapters"]["pt"] != first["adapters"]["pt"]
    assert changed["adapters"]["sft"] == first["adapters"]["sft"]
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    os.utime(base / "model.safetensors", (1, 1))
    assert prepare(base, adapters, tmp_path / "gguf")["base"] != first["base"]


def test_auto_type_is_f16_for_a_small_base(tiny_llama: Path, tmp_path: Path) -> None:
    assert str(prepare(tiny_llama, {}, tmp_path, "auto")["base"]).endswith("-f16.gguf")


def test_an_adapter_of_another_base_is_refused_even_when_its_file_is_there(
    tiny_llama: Path, tiny_qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, seed=1, target_modules=["q_proj"])
    prepare(tiny_llama, {"a": adapter}, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(BadAdapterError, match="DoRA"):
        prepare(tiny_llama, {"a": adapter}, tmp_path)


def test_run_says_what_is_missing(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    out = str(tmp_path / "a.gguf")
    with pytest.raises(BadRecipeError, match="is an adapter"):
        job.run({"source": str(make_adapter(tiny_llama)), "out": out}, EventWriter())
    with pytest.raises(BadRecipeError, match="nothing to convert"):
        job.run({"base": str(tiny_llama), "out": out}, EventWriter())
    adapter = job.run(
        {"source": str(make_adapter(tiny_llama)), "base": str(tiny_llama), "out": out}, EventWriter()
    )
    assert (adapter["kind"], adapter["type"]) == ("adapter", "f32") and len(adapter["sha256"]) == 64
