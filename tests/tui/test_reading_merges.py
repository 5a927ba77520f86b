"""Merges on disk as the app lists them, made by the real engine; the measured plan from its real job."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import BadInputError, CancelledError
from engine.jobs import EventWriter
from engine.merge.job import run_merge, run_verify
from engine.workspace import Workspace
from tests.conftest import MakeAdapter
from tui import actions
from tui.actions import Mixture
from tui.backend import LocalBackend
from tui.forecaster import Forecaster
from tui.foreign import number, read_json_object
from tui.results import forecast_view, verdict
from tui.snapshots import VerdictView


@pytest.fixture
def mixture(tmp_path: Path, tiny_llama: Path, make_adapter: MakeAdapter) -> Mixture:
    """Two adapters of the tiny model in a workspace at tmp_path/ws."""
    root = Workspace(tmp_path / "ws").create().root
    shutil.copytree(tiny_llama, root / "bases" / "tiny")
    for label, seed in (("pt", 1), ("sft", 2)):
        shutil.copytree(make_adapter(tiny_llama, seed=seed), root / "adapters" / label)
    adapters = {label: str(root / "adapters" / label) for label in ("pt", "sft")}
    return Mixture(str(root / "bases/tiny"), adapters, {"pt": 0.3, "sft": 0.7}, str(root / "merges/m"))


def merge(mixture: Mixture, tmp_path: Path) -> None:
    with EventWriter(tmp_path / "events.jsonl") as events:
        result = run_merge(actions.merge(tmp_path, mixture).params, events)
    assert result["exit_code"] == 0


def verify(path: Path, tmp_path: Path) -> VerdictView:
    with EventWriter(tmp_path / "events.jsonl") as events:
        return verdict(run_verify(actions.verify(tmp_path, str(path)).params, events))


def test_merges_of_every_kind_are_listed_with_their_reports(mixture: Mixture, tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "ws")
    merge(mixture, tmp_path)
    ties = replace(mixture, out=str(tmp_path / "ws/merges/t"), method="ties", parameters={"density": 0.4})
    merge(ties, tmp_path)
    merge(replace(mixture, out=str(tmp_path / "ws/adapters/both"), kind="adapter"), tmp_path)
    rows = {row.name: row for row in backend.overview("").merges}
    assert set(rows) == {"m", "t", "both"}
    assert rows["m"].method == "linear" and rows["m"].weights == (("pt", 0.3), ("sft", 0.7))
    assert rows["m"].verdict and rows["m"].verdict.ok and not rows["m"].rejected
    assert dict(rows["t"].parameters) == {"density": "0.4", "lambda": "1", "normalize": "yes"}
    assert rows["both"].kind == "adapter" and rows["both"].nbytes > 0 and rows["both"].verdict
    whole = backend.report(rows["m"].path)
    assert whole and whole.elements > 0 and len(whole.modules) == len({m.name for m in whole.modules}) > 0
    assert whole.found.keys() == {"pt", "sft"} and whole.loss.keys() == {"pt", "sft"}
    assert whole.found["pt"] == pytest.approx(whole.asked["pt"] - whole.loss["pt"], abs=1e-3)
    not_linear = backend.report(rows["t"].path)
    assert not_linear and not_linear.ok and not not_linear.found and not_linear.residual is None


def test_any_method_is_verified_again_where_the_workspace_was_moved_to(
    mixture: Mixture, tmp_path: Path
) -> None:
    dare = replace(mixture, method="dare_ties", parameters={"density": 0.6, "seed": 42})
    merge(dare, tmp_path)
    moved = tmp_path / "elsewhere"
    (tmp_path / "ws").rename(moved)
    said = verify(moved / "merges/m", tmp_path)
    assert said.ok and said.elements > 0
    note = json.loads((moved / "merges/m/medmerge.json").read_text())
    note["recipe"]["parameters"]["seed"] = 8
    (moved / "merges/m/medmerge.json").write_text(json.dumps(note))
    said = verify(moved / "merges/m", tmp_path)
    assert (
        said.ok is False and said.findings[0].code == "other_weights" and "seed 42" in said.findings[0].detail
    )


def test_a_merged_adapter_cannot_be_verified_again(mixture: Mixture, tmp_path: Path) -> None:
    out = tmp_path / "ws/adapters/both"
    merge(replace(mixture, out=str(out), kind="adapter"), tmp_path)
    with pytest.raises(BadInputError, match="merged adapter"):
        verify(out, tmp_path)


def test_what_was_refused_is_listed_as_that(mixture: Mixture, tmp_path: Path) -> None:
    merge(mixture, tmp_path)
    (tmp_path / "ws/merges/m").rename(tmp_path / "ws/merges/m.rejected")
    broken = tmp_path / "ws/merges/x.rejected-2"
    broken.mkdir()
    rows = {row.name: row for row in LocalBackend(tmp_path / "ws").overview("").merges}
    assert rows["m.rejected"].rejected and rows["m.rejected"].weights and not rows["m.rejected"].error
    assert rows["x.rejected-2"].rejected and rows["x.rejected-2"].error and not rows["x.rejected-2"].manifest


def test_ggufs_beside_a_merge_are_found(tmp_path: Path) -> None:
    root = Workspace(tmp_path).create().root
    for name in ("merges/m-q8_0.gguf", "gguf/a.gguf", "merges/m-q4_0.gguf.rejected"):
        (root / name).write_bytes(b"GGUF")
    assert {row.name for row in LocalBackend(root).overview("").ggufs} == {"m-q8_0.gguf", "a.gguf"}


def test_the_plan_of_an_adapter_counts_its_ranks_only(mixture: Mixture, tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "ws")
    out = tmp_path / "ws/adapters/both"
    planned = backend.plan(replace(mixture, out=str(out), kind="adapter"))
    merge(replace(mixture, out=str(out), kind="adapter"), tmp_path)
    size = (out / "adapter_model.safetensors").stat().st_size
    assert planned.written == pytest.approx(size, rel=0.25) and planned.dtype == "float32"


def test_the_forecast_is_that_of_the_plan_job(mixture: Mixture, tmp_path: Path) -> None:
    plan = LocalBackend(tmp_path / "ws").forecast(mixture)
    assert plan.measured and plan.memory > 0 and plan.lost.keys() == {"pt", "sft"}
    assert plan.free > 0 and plan.touched > 0 and plan.dtype == "bfloat16"
    merge(mixture, tmp_path)
    said = LocalBackend(tmp_path / "ws").report(mixture.out)
    assert said and plan.expected["sft"] == pytest.approx(said.expected["sft"], abs=0.02)
    assert not (tmp_path / "ws/jobs").exists() or not list((tmp_path / "ws/jobs").iterdir())


def test_a_refused_plan_says_why_and_a_stopped_one_ends(mixture: Mixture, tmp_path: Path) -> None:
    forecaster = Forecaster()
    with pytest.raises(BadInputError, match="density is 2"):
        forecaster.forecast(
            actions.plan(tmp_path, replace(mixture, method="ties", parameters={"density": 2}))
        )
    forecaster._lock.acquire()  # one runs; a newer one comes while the older waits
    raised: list[type[BaseException]] = []

    def older() -> None:
        try:
            forecaster.forecast(actions.plan(tmp_path, mixture))
        except CancelledError as error:
            raised.append(type(error))

    thread = threading.Thread(target=older)
    before = forecaster._newest
    thread.start()
    while forecaster._newest == before:
        pass
    forecaster.stop()
    forecaster._lock.release()
    thread.join(20)
    assert raised == [CancelledError]


def test_a_weight_of_zero_loses_nothing() -> None:
    said = {
        "bytes_read": 1, "bytes_written": 1, "free_bytes": 2, "rounding_loss": {"pt": 1.0, "sft": 0.5},
        "recipe": {"adapters": {"pt": {"weight": 0.0}, "sft": {"weight": 0.7}}},
        "advice": ["bfloat16 will round away about 50% of sft", "2 GB are needed"], "warnings": ["w"],
    }  # fmt: skip
    plan = forecast_view(said)
    assert plan.lost == {"sft": 0.5} and plan.warnings == ("w", "2 GB are needed")
    with pytest.raises(BadInputError, match="free_bytes"):
        forecast_view({**said, "free_bytes": "much"})


def test_values_of_foreign_files(tmp_path: Path) -> None:
    assert [number(v) for v in (1, 2.5, True, "3", float("nan"), 10**400, None)] == [1.0, 2.5, *[None] * 5]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert read_json_object(tmp_path / "deep.json") == {} and read_json_object(tmp_path / "none") == {}
