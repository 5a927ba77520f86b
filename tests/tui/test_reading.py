"""The local backend on real folders: what is found, how it is judged, how jobs are followed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

from engine.jobs import EventWriter, JobSpec, JobStore
from engine.template_check import Trained
from engine.workspace import Workspace
from tests.conftest import MakeAdapter
from tui import reading
from tui.actions import Mixture
from tui.backend import LocalBackend
from tui.jobwatch import JobWatch
from tui.reading_merges import merge_row
from tui.results import verdict
from tui.snapshots import AdapterRow


def test_a_real_workspace(tmp_path: Path, tiny_llama: Path, make_adapter: MakeAdapter) -> None:
    root = Workspace(tmp_path / "ws").create().root
    (root / "bases" / "tiny").symlink_to(tiny_llama)
    for name, seed in (("my-pt", 1), ("my-sft", 2)):
        (root / "adapters" / name).symlink_to(make_adapter(tiny_llama, seed=seed))
    pickled = root / "adapters" / "old"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    (pickled / "adapter_model.bin").write_bytes(b"\x80")
    backend = LocalBackend(root)
    view = backend.overview("")
    assert [row.name for row in view.usable_models] == ["tiny"]
    rows = {row.name: row for row in view.adapters}
    assert rows["my-pt"].usable and rows["my-pt"].kind == "pt" and rows["my-sft"].kind == "sft"
    assert "pickle" in rows["old"].error and rows["old"].hint
    detail = backend.detail(rows["my-pt"].path)
    assert detail.norms and not detail.not_finite and not detail.zero_b
    adapters = {"pt": rows["my-pt"].path, "sft": rows["my-sft"].path}
    mixture = Mixture(view.models[0].path, adapters, {"pt": 0.3, "sft": 0.7}, str(root / "merges" / "m"))
    plan = backend.plan(mixture)
    assert plan.touched > 0 and plan.written > 0 and plan.fits


def test_the_base_an_adapter_was_trained_on(
    tmp_path: Path, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    """Compared by hash where the base's note says it; never by reading the weights."""
    root = Workspace(tmp_path / "ws").create().root
    base = shutil.copytree(tiny_llama, root / "bases" / "tiny")
    weights = base / "model.safetensors"
    right = hashlib.sha256(weights.read_bytes()).hexdigest()
    for name, sha256, template in (("right", right, "llama3"), ("wrong", "0" * 64, "model")):
        folder = shutil.copytree(make_adapter(tiny_llama, rank=2), root / "adapters" / name)
        note = {"kind": "pt", "template": template, "base": {"name": "first", "sha256": sha256}}
        (folder / "training.json").write_text(json.dumps(note))
    backend = LocalBackend(root)

    def rows() -> dict[str, AdapterRow]:
        return {row.name: row for row in backend.overview(str(base)).adapters}

    assert {row.same_base for row in rows().values()} == {None}
    assert {row.trained_on for row in rows().values()} == {"first"}
    note = {"files": {weights.name: {"bytes": weights.stat().st_size, "sha256": right}}}
    (base / "medmerge.json").write_text(json.dumps(note))
    found = rows()
    assert (found["right"].same_base, found["wrong"].same_base) == (True, False)
    assert found["wrong"].warning and not found["right"].warning, (
        "its config names another folder, which is the same"
    )
    assert found["right"].trained == Trained("right", "llama3")
    assert found["wrong"].trained == Trained("wrong", plain=True)


def test_verdicts_in_words() -> None:
    said = {
        "ok": False,
        "verdict": "not_identifiable",
        "findings": [{"code": "not_identifiable", "detail": "d"}],
    }
    assert verdict(said).ok is None
    said = {"ok": False, "verdict": "swapped", "exit_code": 1, "effective_weights": {"pt": 0.7, "sft": None}}
    found = verdict(said)
    assert found.ok is False and found.found == {"pt": 0.7}
    assert verdict({"ok": True}).ok is True


def test_a_broken_note_hides_nothing(tmp_path: Path) -> None:
    for content in ("", "[1]", '{"verification": 3, "recipe": {"adapters": [1]}}', "{"):
        (tmp_path / "medmerge.json").write_text(content)
        row = merge_row(tmp_path, None, None)
        assert row.verdict is None and row.weights == ()


def test_curves_leave_out_what_is_no_number() -> None:
    curve = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": "x"},
        {"loss": 1},
        3,
        {"step": 3, "loss": float("nan")},
    ]
    assert reading.curve_points(curve, "loss") == ((1.0, 2.0),)
    assert reading.curve_points("no list", "loss") == ()


def test_runs_are_told_apart(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name, file, content in (
        ("a", "train.json", {}),
        ("b", "cells.json", {"mode": "sweep", "cells": [{"hash": "1"}, {"hash": "2"}, 7]}),
        ("c", "cells.json", {"mode": "eval", "cells": "broken"}),
        ("d", "notes.txt", {}),
    ):
        (runs / name).mkdir(parents=True)
        (runs / name / file).write_text(json.dumps(content))
    (runs / "b" / "cells").mkdir()
    (runs / "b" / "cells" / "1.parquet").write_bytes(b"")
    found = {row.name: (row.kind, row.cells, row.done) for row in reading._runs([runs])}
    assert found == {"a": ("train", 0, 0), "b": ("sweep", 2, 1), "c": ("eval", 0, 0)}


def test_job_watch_follows_events_and_remembers_what_ended(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = store.create(JobSpec("train", "x:y", title="a run"))
    watch = JobWatch(tmp_path)
    jobs, feeds = watch.poll()
    assert [row.state for row in jobs] == ["starting"] and feeds[job.id].log == ()
    with EventWriter(job.events_path) as events:
        events.metric(1, loss=2.5, lr=None)
        events.warning("careful")
        events.row(metric="bleu", value=3)
        events.progress(5, 10, "steps")
        jobs, feeds = watch.poll()
        assert feeds[job.id].curves == {"loss": ((1.0, 2.5),)} and feeds[job.id].log == ("! careful",)
        assert jobs[0].fraction == 0.5
        assert watch.poll()[1] == {}, "nothing new, nothing told"
        (job.folder / "job.json").write_text(
            json.dumps({"state": "done", "exit_code": 0, "started": time.time(), "finished": time.time()})
        )
        events.metric(2, loss=2.0)
    jobs, feeds = watch.poll()
    assert jobs[0].final and feeds[job.id].latest == {"loss": 2.0}
    (job.folder / "job.json").unlink()
    assert watch.poll()[0][0].state == "done", "an ended job is read once"


def test_job_watch_passes_over_broken_folders(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "spec.json").write_text("{")
    (tmp_path / "empty").mkdir()
    good = JobStore(tmp_path).create(JobSpec("merge", "x:y"))
    assert [row.id for row in JobWatch(tmp_path).poll()[0]] == [good.id]
