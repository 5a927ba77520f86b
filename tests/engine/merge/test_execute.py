"""What can go wrong around a merge: inputs that are refused, full disks, kills, rejected results, manifests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import (
    BadAdapterError,
    BadInputError,
    BadModelError,
    BadRecipeError,
    BadTensorFileError,
    MedmergeError,
    NoSpaceError,
    TargetExistsError,
)
from engine.jobs import EventWriter
from engine.merge import execute, work
from engine.merge.job import run_merge, run_plan, run_verify
from engine.merge.manifest_check import check_manifest
from engine.weights import Adapter, Checkpoint
from tests.conftest import MakeAdapter, build_model
from tests.engine.merge.references import assert_is_merge

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def pt(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, seed=1, name="pt")


def recipe(base: Path, adapter: Path, out: Path, weight: Any = 0.3, **output: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "adapters": {"pt": {"path": str(adapter), "weight": weight}},
        "output": {"path": str(out), **output},
    }


def run(document: dict[str, Any], verify: bool = False) -> dict[str, Any]:
    return run_merge({"recipe": document, "verify": verify}, EventWriter())


def poke(folder: Path, name: str, value: bytes, file: str = "model.safetensors") -> None:
    """Overwrite the first bytes of one tensor."""
    from engine.weights import TensorFile

    info = TensorFile.open(folder / file).tensors[name]
    data = bytearray((folder / file).read_bytes())
    data[info.start : info.start + len(value)] = value
    (folder / file).write_bytes(data)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def no_model(base: Path, adapter: Path) -> None:
    (base / "config.json").unlink()


def truncated(base: Path, adapter: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def nan_in_changed_tensor(base: Path, adapter: Path) -> None:
    poke(base, Q_PROJ, np.uint16(0x7FC0).tobytes())


def infinity_in_changed_tensor(base: Path, adapter: Path) -> None:
    poke(base, Q_PROJ, np.uint16(0xFF80).tobytes())


def nan_in_copied_tensor(base: Path, adapter: Path) -> None:
    poke(base, "model.norm.weight", np.uint16(0xFFFF).tobytes())


def nan_in_adapter(base: Path, adapter: Path) -> None:
    poke(adapter, LORA_A, np.float32(np.nan).tobytes(), "adapter_model.safetensors")


def pickle_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def quantised_base(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def renamed_key(base: Path, adapter: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({k.replace("layers.1.", "layers.7."): v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (no_model, BadModelError, "config.json"),
        (truncated, BadTensorFileError, "model.safetensors"),
        (nan_in_changed_tensor, BadModelError, Q_PROJ),
        (infinity_in_changed_tensor, BadModelError, Q_PROJ),
        (nan_in_copied_tensor, BadModelError, "model.norm.weight"),
        (nan_in_adapter, BadAdapterError, LORA_A),
        (pickle_adapter, BadAdapterError, "adapter_model.bin"),
        (quantised_base, BadModelError, "quantization_config"),
        (renamed_key, BadAdapterError, "model.layers.7."),
    ],
)
def test_bad_inputs_are_named_and_nothing_is_left(
    tiny_llama: Path,
    pt: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path], None],
    error: type[MedmergeError],
    names: str,
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_llama, base)
    shutil.copytree(pt, adapter)
    spoil(base, adapter)
    with pytest.raises(error) as caught:
        run(recipe(base, adapter, tmp_path / "merges" / "m"))
    assert names in caught.value.message and caught.value.exit_code == 2
    assert not list((tmp_path / "merges").glob("*"))


def test_adapter_of_another_base_names_tensor_and_shapes(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    wider = build_model("llama", tmp_path / "wider", hidden_size=96)
    with pytest.raises(BadAdapterError, match=r"down_proj.*\[96, 160\].*\[64, 160\]"):
        run(recipe(tiny_llama, make_adapter(wider), tmp_path / "m"))


def test_overflow_in_float16_names_the_tensor(tiny_llama: Path, pt: Path, tmp_path: Path) -> None:
    with pytest.raises(BadAdapterError, match=r"model\.layers.*more than F16 can hold"):
        run(recipe(tiny_llama, pt, tmp_path / "m", weight=1e7, dtype="float16"))
    assert not list(tmp_path.iterdir())
    run(recipe(tiny_llama, pt, tmp_path / "m", weight=1e7, dtype="bfloat16"))  # bf16 has the range


def test_existing_targets_and_overlaps_are_refused(tiny_llama: Path, pt: Path, tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    shutil.copytree(tiny_llama, base)
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("there", "dangling"):
        with pytest.raises(TargetExistsError):
            run(recipe(base, pt, tmp_path / name))
    with pytest.raises(BadRecipeError, match="is inside the base"):
        run(recipe(base, pt, base / "merge"))
    with pytest.raises(BadRecipeError, match="is inside adapter pt"):
        run(recipe(base, pt, pt / "merge"))
    (tmp_path / "alias").symlink_to(tmp_path / "models")
    with pytest.raises(BadRecipeError, match="is inside the base"):
        run(recipe(base, pt, tmp_path / "alias" / "base" / "merge"))
    assert sorted(path.name for path in base.iterdir()) == sorted(path.name for path in tiny_llama.iterdir())


def test_no_space_is_seen_before(
    tiny_llama: Path, pt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(NoSpaceError, match="the merge needs"):
        run(recipe(tiny_llama, pt, tmp_path / "merges" / "m"))
    assert not (tmp_path / "merges").exists() or not list((tmp_path / "merges").iterdir())


def test_file_size_limit_during_writing_leaves_nothing(tiny_llama: Path, pt: Path, tmp_path: Path) -> None:
    """The kernel refuses to grow the file (RLIMIT_FSIZE), as it does on a full disk or quota."""
    code = f"""
        import resource, sys
        from engine.errors import NoSpaceError
        from engine.jobs import EventWriter
        from engine.merge.job import run_merge
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            run_merge({{"recipe": {recipe(tiny_llama, pt, tmp_path / "merges" / "m")!r}}}, EventWriter())
        except NoSpaceError as error:
            sys.exit(error.exit_code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert not list((tmp_path / "merges").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 kB; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_nothing(
    tiny_llama: Path, pt: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoSpaceError, match="the merge needs"):
        run(recipe(tiny_llama, pt, small_disk / "m"))
    monkeypatch.setattr(execute, "need_space", lambda *args: None)
    with pytest.raises(NoSpaceError, match=r"no room for .*model\.safetensors"):
        run(recipe(tiny_llama, pt, small_disk / "m"))
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: None)  # a file system that cannot reserve
    with pytest.raises(NoSpaceError, match=r"no room for .*model\.safetensors"):
        run(recipe(tiny_llama, pt, small_disk / "m"))
    assert not list(small_disk.iterdir())


SLOW_MERGE = """
    import sys, time
    from engine.jobs import EventWriter
    from engine.merge import schedule, stream
    from engine.merge.job import run_merge
    schedule.BLOCK_ELEMENTS = 256
    add = stream._Progress.add
    def slow(self, count, message):
        add(self, count, message)
        if self.done > 50_000:
            print("half way", flush=True)
            time.sleep(60)
    stream._Progress.add = slow
    run_merge({"recipe": RECIPE, "verify": False}, EventWriter())
"""


@pytest.fixture
def half_way(tiny_llama: Path, pt: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of merging into tmp_path/merges/m."""
    code = textwrap.dedent(SLOW_MERGE).replace(
        "RECIPE", repr(recipe(tiny_llama, pt, tmp_path / "merges" / "m"))
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "half way" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_kill_9_leaves_no_result_and_a_second_run_succeeds(
    tiny_llama: Path, pt: Path, tmp_path: Path, half_way: subprocess.Popen[str]
) -> None:
    merges = tmp_path / "merges"
    assert sorted(path.name for path in merges.iterdir()) == [".m.partial.lock", "m.partial"]
    with pytest.raises(BadInputError, match="is being written by process"):
        run(recipe(tiny_llama, pt, merges / "m"))
    half_way.send_signal(signal.SIGKILL)
    half_way.wait()
    assert sorted(path.name for path in merges.iterdir()) == [".m.partial.lock", "m.partial"]
    run(recipe(tiny_llama, pt, merges / "m"))
    assert [path.name for path in merges.iterdir()] == ["m"]
    assert not list((merges / "m").glob(".*"))
    assert_is_merge(merges / "m", tiny_llama, [(pt, 0.3)])


def test_cancelling_a_job_stops_its_threads_and_leaves_nothing(
    tiny_llama: Path, pt: Path, tmp_path: Path
) -> None:
    from engine.jobs import JobSpec, JobStore, cancel, launch

    (tmp_path / "slow_target.py").write_text(
        textwrap.dedent(SLOW_MERGE)
        .replace("time.sleep(60)", "time.sleep(0.2)")
        .replace(
            'run_merge({"recipe": RECIPE, "verify": False}, EventWriter())',
            "def run(params, events):\n    return run_merge(params, events)",
        )
    )
    spec = JobSpec(
        "merge",
        "slow_target:run",
        {"recipe": recipe(tiny_llama, pt, tmp_path / "merges" / "m"), "verify": False},
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        job = launch(spec, tmp_path / "jobs")
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    store, tail, deadline = JobStore(tmp_path / "jobs"), job.tail(), time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(event.type == "progress" and event.data["done"] > 50_000 for event in tail.poll()):
            break
        time.sleep(0.02)
    assert cancel(store.get(job.id))
    ended = store.get(job.id)
    assert (ended.state, ended.exit_code) == ("cancelled", 130)
    assert not list((tmp_path / "merges").iterdir())


def test_a_merge_is_verified_and_says_so(tiny_llama: Path, pt: Path, tmp_path: Path) -> None:
    result = run(recipe(tiny_llama, pt, tmp_path / "m"), verify=True)
    assert result["exit_code"] == 0 and result["verdict"]["ok"] and result["out"] == str(tmp_path / "m")
    kept = json.loads((tmp_path / "m" / "medmerge.json").read_text())["verification"]
    assert kept["done"] and kept["ok"] and kept["asked"] == {"pt": 0.3}


def test_weights_by_tensor_are_verified(tiny_llama: Path, pt: Path, tmp_path: Path) -> None:
    weights = {"default": 0.6, "layer 1": 0.2, "*.mlp.*": 0.0}
    result = run(recipe(tiny_llama, pt, tmp_path / "m", weight=weights), verify=True)
    assert result["exit_code"] == 0, result["verdict"]["message"]


def test_a_wrong_merge_is_rejected_and_kept_aside(
    tiny_llama: Path, pt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = work.stack

    def twice(parts: Any, tensor: Any) -> Any:
        return [replace(packed, left=packed.left * np.float32(2)) for packed in right(parts, tensor)]

    monkeypatch.setattr(work, "stack", twice)
    for name in ("m.rejected", "m.rejected-2"):
        result = run(recipe(tiny_llama, pt, tmp_path / "m"), verify=True)
        assert result["exit_code"] == 1 and result["out"] == str(tmp_path / name)
        assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()
        manifest = json.loads((tmp_path / name / "medmerge.json").read_text())
        assert manifest["verification"]["ok"] is False
    assert not list((tmp_path / "m.rejected").glob(".*"))


def test_manifest_check_finds_what_changed(tiny_llama: Path, pt: Path, tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "m"
    shutil.copytree(tiny_llama, base)
    shutil.copytree(pt, adapter)
    run(recipe(base, adapter, out))
    params = {"merged": str(out), "manifest": True}
    whole = run_verify(params, EventWriter())
    assert whole["ok"] and whole["exit_code"] == 0 and whole["checked"] >= 12
    shutil.rmtree(base)
    gone = run_verify(params, EventWriter())
    assert gone["exit_code"] == 4 and str(base / "model.safetensors") in gone["inputs_missing"]
    poke(out, Q_PROJ, b"\x01")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (out / "tokenizer.json").unlink()
    spoiled = check_manifest(out, EventWriter())
    assert spoiled["exit_code"] == 1 and not spoiled["ok"]
    assert spoiled["changed"] == [str(out / "model.safetensors")]
    assert spoiled["missing"] == [str(out / "tokenizer.json")]
    assert spoiled["extra"] == [str(out / "model-00001-of-00002.safetensors")]


ESCAPING = '{"output": {"files": {"../../etc/passwd": "00"}}, "base": {}, "adapters": {}}'


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "not json",
        '{"format": "medmerge.merge/1"}',
        '{"format": "medmerge.merge/1", ' + ESCAPING[1:],
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "medmerge.json").write_text(text)
    with pytest.raises(BadInputError):
        check_manifest(tmp_path, EventWriter())


def test_plan_says_what_the_merge_then_does(tiny_llama: Path, pt: Path, tmp_path: Path) -> None:
    document = recipe(tiny_llama, pt, tmp_path / "m", weight={"default": 0.4, "*.mlp.*": 0.0})
    plan = run_plan({"recipe": document}, EventWriter())
    assert not (tmp_path / "m").exists() and not list(tmp_path.iterdir())
    changed = {entry["name"] for entry in plan["tensors"]}
    assert changed == {
        name for name in Adapter.open(pt).match(Checkpoint.open(tiny_llama)) if ".mlp." not in name
    }
    assert plan["tensors_changed"] + plan["tensors_copied"] == len(Checkpoint.open(tiny_llama).tensors)
    assert plan["fits"] and plan["memory_bytes"] < 250e6 and plan["expected_weights"] == {"pt": None}
    assert plan["adapters"]["pt"]["selectors"] == {"default": 8, "*.mlp.*": 6}
    assert run(document)["bytes_written"] == plan["bytes_written"]


def test_plan_foretells_the_rounding_loss(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """The forecast from samples agrees with the verification's own fit over every element."""
    small = make_adapter(tiny_llama, b_std=0.0003, seed=8)
    document = recipe(tiny_llama, small, tmp_path / "m", weight=0.5)
    plan = run_plan({"recipe": document}, EventWriter())
    verdict = run(document, verify=True)["verdict"]
    assert plan["rounding_loss"]["pt"] > 0.02 and "float32" in plan["advice"][0]
    assert plan["expected_weights"]["pt"] == pytest.approx(verdict["expected_weights"]["pt"], abs=0.02)
    assert plan["unchanged_share"] == pytest.approx(verdict["unchanged_share"], abs=0.05)
    exact = run_plan(
        {"recipe": recipe(tiny_llama, small, tmp_path / "n", 0.5, dtype="float32")}, EventWriter()
    )
    assert abs(exact["rounding_loss"]["pt"]) < 1e-3 and not exact["advice"]
