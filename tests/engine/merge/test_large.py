"""A model far larger than this machine's memory: the plan from a sparse file, and buffers that do not grow."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.models import linear_shapes, make_base
from engine.weights.tensorfile import encode_header

ROOT = Path(__file__).resolve().parents[3]
LAYERS, HIDDEN, MIDDLE, HEADS, RANK = 40, 5120, 17408, 40, 16
PLAN = """
    import json, resource, sys
    from engine.jobs import EventWriter
    from engine.merge.job import run_plan
    plan = run_plan({"recipe": json.loads(sys.argv[1])}, EventWriter())
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
    keys = ("bytes_written", "memory_bytes", "seconds", "tensors_changed", "fits")
    print(json.dumps({**{key: plan[key] for key in keys}, "peak": peak}))
"""


def sparse_adapter(folder: Path) -> Path:
    """A rank-16 adapter on every linear layer whose numbers are a hole in the file (all 0)."""
    tensors = []
    for module, (rows, columns) in linear_shapes(LAYERS, HIDDEN, MIDDLE).items():
        prefix = f"base_model.model.{module}"
        tensors += [(f"{prefix}.lora_A.weight", "F32", (RANK, columns))]
        tensors += [(f"{prefix}.lora_B.weight", "F32", (rows, RANK))]
    folder.mkdir()
    header = encode_header(tensors)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(4 * a * b for _, _, (a, b) in tensors))
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "target_modules": ["x"]}
        )
    )
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    parameters = make_base(folder / "base", LAYERS, HIDDEN, MIDDLE, HEADS, sparse=True)
    assert parameters > 13e9
    weights = folder / "base" / "model.safetensors"
    if weights.stat().st_blocks * 512 > 1e9:
        pytest.skip("this file system has no sparse files")
    for name in ("pt", "sft"):
        sparse_adapter(folder / name)
    return folder


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_plan_of_14_billion_parameters(large: Path, method: str) -> None:
    """Bytes are exact, the forecast memory and the plan's own are under 250 MB."""
    recipe = {
        "base": str(large / "base"),
        "method": method,
        "adapters": {name: {"path": str(large / name), "weight": 0.5} for name in ("pt", "sft")},
        "output": {"path": str(large / "out")},
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PLAN), json.dumps(recipe)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["bytes_written"] == (large / "base" / "model.safetensors").stat().st_size
    assert plan["tensors_changed"] == 7 * LAYERS and plan["seconds"] > 1
    assert plan["memory_bytes"] < 250e6 and plan["peak"] < 250e6
    assert not (large / "out").exists()
