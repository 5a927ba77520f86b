"""Jobs in real processes: results, errors, cancel with descendants, death without a word."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engine.errors import BadInputError
from engine.jobs import EventTail, EventWriter, JobSpec, JobStore, JobView, cancel, launch
from engine.jobs.launch import reap


@pytest.fixture(autouse=True)
def _targets_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def finish(job: JobView) -> JobView:
    store = JobStore(job.folder.parent)

    def ended() -> bool:
        reap()
        return store.get(job.id).final

    wait_for(ended)
    return store.get(job.id)


def start(folder: Path, name: str, **params: object) -> JobView:
    return launch(JobSpec("test", f"job_targets:{name}", params, title=name), folder)


def test_a_job_reports_progress_metrics_and_its_result(tmp_path: Path) -> None:
    job = finish(start(tmp_path, "count", total=5))
    assert (job.state, job.exit_code, job.result["sum"]) == ("done", 0, 15)
    tail = job.tail()
    events = tail.poll()
    while (
        events[-1].type != "finished"
    ):  # the state is written first, so that whoever sees this event finds it
        events += tail.poll()
    assert [e.data["loss"] for e in events if e.type == "metric"] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert job.progress["done"] == job.progress["total"] == 5
    assert [e.type for e in (events[0], *events[-2:])] == ["started", "result", "finished"]


def test_the_exit_code_of_a_check_is_kept(tmp_path: Path) -> None:
    assert finish(start(tmp_path, "count", total=1, exit_code=4)).exit_code == 4


def test_bad_input_fails_with_its_message_and_exit_code_2(tmp_path: Path) -> None:
    job = finish(start(tmp_path, "refuse"))
    assert (job.state, job.exit_code, job.error, job.hint) == ("failed", 2, "row 3 is broken", "mend it")


def test_a_defect_fails_with_3_and_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    job = finish(start(tmp_path, "crash"))
    assert (job.state, job.exit_code) == ("failed", 3)
    assert "ZeroDivisionError" in job.log_path.read_text()


def test_an_unknown_target_fails_instead_of_hanging(tmp_path: Path) -> None:
    assert finish(launch(JobSpec("test", "no.such:thing"), tmp_path)).state == "failed"


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    job = finish(start(tmp_path, "not_finite"))
    for line in job.events_path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert job.result == {"loss": "inf"}


def test_names_that_are_no_utf8_neither_kill_a_job_nor_change(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9/\xff.bin")
    job = launch(JobSpec("test", "job_targets:echo", {"path": odd, "café": "é"}, title=odd), tmp_path)
    job = finish(job)
    assert (job.state, job.error) == ("done", "") and job.result == {"path": odd, "café": "é"}
    assert JobSpec.read(job.folder / "spec.json").title == odd
    events = job.tail().poll()
    assert [e.data["message"] for e in events if e.type == "warning"] == [odd]
    assert next(e for e in events if e.type == "result").data["result"] == job.result
    for line in (job.folder / "events.jsonl").read_text("utf-8").splitlines():
        json.loads(line)


def test_cancel_ends_the_job_and_workers_in_sessions_of_their_own(tmp_path: Path) -> None:
    pids, cleaned = tmp_path / "pids", tmp_path / "cleaned"
    job = start(tmp_path / "jobs", "wait_with_worker", pids=str(pids), cleaned=str(cleaned))
    store = JobStore(tmp_path / "jobs")
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    assert cancel(store.get(job.id))
    job = finish(job)
    assert (job.state, job.exit_code) == ("cancelled", 130)
    assert cleaned.read_text() == "yes", "the target's finally did not run"
    for pid in map(int, pids.read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not cancel(job), "a finished job cannot be cancelled again"


def test_a_job_can_be_cancelled_the_moment_it_was_started(tmp_path: Path) -> None:
    job = start(tmp_path, "wait_with_worker", pids=str(tmp_path / "p"), cleaned=str(tmp_path / "c"))
    assert cancel(job)
    assert finish(job).state == "cancelled"


def test_a_killed_job_is_lost_and_its_events_stay(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    job = start(tmp_path / "jobs", "wait_with_worker", pids=str(pids), cleaned=str(tmp_path / "c"))
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    own, worker = map(int, pids.read_text().split())
    os.kill(own, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    job = finish(job)
    assert job.state == "lost"
    assert any(event.type == "log" for event in job.tail().poll())


def test_a_job_survives_the_death_of_whoever_started_it(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "from pathlib import Path; from engine.jobs import *;"
        f"launch(JobSpec('test', 'job_targets:count', {{'total': 3}}), Path({str(tmp_path)!r}));"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parent)])
    subprocess.run([sys.executable, "-c", script], env=dict(os.environ, PYTHONPATH=path), check=False)
    (job,) = JobStore(tmp_path).list()
    assert finish(job).result["sum"] == 6


def test_a_folder_of_the_users_named_like_ours_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the wrong engine')")
    monkeypatch.chdir(tmp_path)
    assert finish(start(tmp_path / "jobs", "count", total=2)).result["sum"] == 3


def test_jobs_are_found_by_an_unambiguous_beginning(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    one, two = store.create(JobSpec("merge", "x:y")), store.create(JobSpec("train", "x:y"))
    assert store.get("mer").id == one.id and store.get(two.id).id == two.id
    for wrong in ("", "nothing", "../" + one.id):
        with pytest.raises(BadInputError):
            store.get(wrong)


def test_two_jobs_of_one_second_get_ids_of_their_own(tmp_path: Path) -> None:
    ids = {JobStore(tmp_path).create(JobSpec("merge", "x:y")).id for _ in range(5)}
    assert len(ids) == 5


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.poll() == []
    path.write_bytes(b'{"t": 1, "type": "log", "message": "a"}\nnot json\n{"t": 2, "type": "lo')
    assert [event.data["message"] for event in tail.poll()] == ["a"]
    with path.open("ab") as file:
        file.write('g", "message": "β"}\n'.encode())
    assert [(event.time, event.data["message"]) for event in tail.poll()] == [(2.0, "β")]


def test_progress_is_thinned_but_the_end_of_a_phase_is_kept() -> None:
    writer = EventWriter()
    for done in range(1001):
        writer.progress(done, 1000, phase="copy")
    kept = [event for event in writer.kept if event.type == "progress"]
    assert len(kept) < 50 and kept[-1].data["done"] == 1000
