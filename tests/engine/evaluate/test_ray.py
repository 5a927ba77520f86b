"""A sweep on Ray: the same rows as on this machine, also when a worker is killed or the run is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import BadInputError
from engine.evaluate import job, parse_config, ray_worker
from engine.evaluate.bench import stamps_of
from engine.evaluate.cells import TOGETHER
from engine.evaluate.ray_cluster import Crew, Node, plan_crew
from engine.evaluate.ray_worker import Wanted
from engine.evaluate.store import RunStore
from engine.jobs import JobSpec, JobStore, cancel, launch
from engine.jobs.events import EventWriter

pytest.importorskip("ray", reason="ray is not installed: pip install 'medmerge-tui[ray]'")
_BARE = """
import ray
ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error")
assert ray.get(ray.remote(lambda: 42).remote(), timeout=60) == 42
ray.shutdown()
"""
SAMPLES = 16  # with a batch size of 1, text comes in four pieces of four


@pytest.fixture(scope="module", autouse=True)
def ray_itself_runs_here() -> None:
    """Where Ray alone, without this program, cannot start two workers (no shared memory, no processes), nothing can
    be told: skip with Ray's own words."""
    try:
        bare = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        pytest.skip("Ray alone does not start here within 150 s")
    if bare.returncode:
        pytest.skip(f"Ray alone does not start here: {bare.stderr[-300:]}")


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Every test ends without a process of Ray, and a failed one is cleaned up after."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    for process in left:
        process.kill()
    assert not [p for p in left if "ray" in p.name()]


@pytest.fixture
def config(sweep_config, write_jsonl) -> dict[str, Any]:
    """Two mixtures x (sampled answers, reference answers, multiple choice): a dozen batches of some length."""
    rows = [
        {"id": f"q{n}", "prompt": f"What is number {n}?" + " Tell me more." * n, "reference": f"It is {n}."}
        for n in range(SAMPLES)
    ]
    sweep_config["weights"] = [{"sft": 1}, {"pt": 0.3, "sft": 0.7}]
    sweep_config["decoding"] = [{"name": "warm", "temperature": 1.0, "max_new_tokens": 48}]
    sweep_config["batch_size"] = 1
    sweep_config["tasks"] = [
        {"name": "qa", "kind": "generation", "data": str(write_jsonl("long.jsonl", rows))},
        sweep_config["tasks"][1],
    ]
    return sweep_config


def run(config: dict[str, Any], out: Path, events: EventWriter, **params: Any) -> dict[str, Any]:
    values = {"config": parse_config(config).to_dict(), "out": str(out), "mode": "sweep", **params}
    return job.run(values, events)


def on_ray(config: dict[str, Any], out: Path, events: EventWriter, **params: Any) -> dict[str, Any]:
    return run(config, out, events, executor="ray", workers=2, **params)


def cells_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    store = RunStore(run)
    return {cell["hash"]: store.frame(cell["hash"]).to_dicts() for cell in store.cells()["cells"]}


def same_rows(one: Path, other: Path) -> None:
    """Texts and letters to the letter. Log-likelihoods may differ in their last digits: other threads, other sums."""
    first, second = cells_of(one), cells_of(other)
    assert first.keys() == second.keys()
    for key, rows in first.items():
        assert len(rows) == len(second[key])
        for mine, theirs in zip(rows, second[key], strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                if name.startswith("logprob"):
                    assert theirs[name] == pytest.approx(value, abs=1e-4)
                else:
                    assert theirs[name] == value, name
    assert RunStore(one).prompts() == RunStore(other).prompts()


def ray_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}


class Watch(EventWriter):
    """Knows which worker has which cell, and kills one once the first rows of a cell of answers are there."""

    def __init__(self) -> None:
        super().__init__()
        self.killed = ""
        self.pids: dict[str, int] = {}
        self.cells: dict[str, list[str]] = {}  # worker -> titles

    def log(self, message: str) -> None:
        super().log(message)
        if found := re.match(r"(worker \d+): process (\d+) on ", message):
            self.pids[found[1]] = int(found[2])
        elif (found := re.match(r"(worker \d+): (.* · .*)", message)) is not None:
            self.cells.setdefault(found[1], []).append(found[2])

    def progress(self, done: float, total: float | None = None, **rest: Any) -> None:
        super().progress(done, total, **rest)
        message = str(rest.get("message"))
        if "warm" in message and not self.killed:
            self.killed = next(name for name, titles in self.cells.items() if titles[-1] == message)
            os.kill(self.pids[self.killed], signal.SIGKILL)


def test_two_workers_give_the_rows_of_this_machine_and_one_may_be_killed(config, tmp_path):
    run(config, tmp_path / "one" / "local", EventWriter())
    watch = Watch()
    handler, before = signal.getsignal(signal.SIGTERM), ray_variables()
    result = on_ray(config, tmp_path / "two" / "ray", watch)
    assert signal.getsignal(signal.SIGTERM) == handler and ray_variables() == before
    assert result["exit_code"] == 0 and not result["failed"]
    same_rows(tmp_path / "one" / "local", tmp_path / "two" / "ray")
    assert not list((tmp_path / "two" / "ray" / "cells").glob("*.jsonl"))
    # two worked, one of them died in a cell, and a third took its place or the other its cell
    assert len(watch.pids) >= 2 and {"worker 1", "worker 2"} <= watch.cells.keys()
    said = [event.data["message"] for event in watch.kept if event.type == "warning"]
    assert (
        len([words for words in said if re.match(watch.killed + r" died in .*warm.*: The actor", words)]) == 1
    )
    titles = [title for given in watch.cells.values() for title in given]
    assert len(titles) == len(set(titles)) + 1 == 7  # six cells, one of them given twice
    progress = [event.data for event in watch.kept if event.type == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 2 * (SAMPLES + SAMPLES + 8)


def test_a_cancelled_job_keeps_its_rows_and_is_continued_here(config, tmp_path):
    """Cancelling sends SIGTERM to the job and to Ray's processes, which are its children."""
    config["weights"] = [{"pt": 0.3, "sft": 0.7}]
    config["decoding"][0]["max_new_tokens"] = 96
    broken = tmp_path / "two" / "ray"
    values = {"config": parse_config(config).to_dict(), "out": str(broken), "mode": "sweep"}
    spec = JobSpec("sweep", "engine.evaluate.job:run", {**values, "executor": "ray", "workers": 1})
    started = launch(spec, tmp_path / "jobs")
    deadline = time.monotonic() + 240
    while not any("raw" in path.read_text() for path in broken.glob("cells/*.jsonl")):
        assert time.monotonic() < deadline and not JobStore(tmp_path / "jobs").get(started.id).final
        time.sleep(0.02)
    family = psutil.Process(JobStore(tmp_path / "jobs").get(started.id).pid).children(recursive=True)
    assert any(process.name() == "raylet" for process in family)
    assert cancel(started)
    ended = JobStore(tmp_path / "jobs").get(started.id)
    assert (ended.state, ended.exit_code) == ("cancelled", 130)
    assert not [process for process in family if process.is_running()]
    kept = [json.loads(line) for path in (broken / "cells").glob("*.jsonl") for line in path.open()]
    assert TOGETHER <= len([row for row in kept if "raw" in row]) < SAMPLES
    run(config, tmp_path / "one" / "local", EventWriter())
    run(config, broken, EventWriter(), resume=True)
    same_rows(tmp_path / "one" / "local", broken)


def test_workers_with_other_versions_or_files_measure_nothing(config, tmp_path, monkeypatch):
    of = Wanted.of

    def other(config: Any, cells: Any) -> Wanted:
        wanted = of(config, cells)
        return Wanted({**wanted.versions, "torch": "1.0"}, wanted.files, wanted.stamps)

    monkeypatch.setattr(ray_worker.Wanted, "of", other)  # in this process; the workers are their own
    events = EventWriter()
    with pytest.raises(BadInputError, match=r"no worker .* torch is \S+ there and 1.0 here") as error:
        run(config, tmp_path / "run", events, executor="ray", workers=1)
    assert "same medmerge and libraries" in error.value.hint
    assert len([e for e in events.kept if "is not used" in e.data.get("message", "")]) == 1
    assert not list((tmp_path / "run" / "cells").iterdir())


def test_a_copy_is_hashed_and_another_file_is_told(sweep_config, tmp_path):
    import shutil

    base, adapter = Path(sweep_config["base"]), Path(sweep_config["adapters"]["pt"])
    copy = tmp_path / "copy"
    shutil.copytree(base, copy / "base")
    shutil.copytree(adapter, copy / "pt")
    config = parse_config({**sweep_config, "base": str(copy / "base"), "adapters": {"pt": str(copy / "pt")},
                           "weights": [{"pt": 1}]})  # fmt: skip
    cells = job.plan_cells(config, job._identify(config, *job_models(config), EventWriter()))
    wanted = Wanted.of(config, cells)
    assert wanted.files.keys() == {copy / "base", copy / "pt"} and wanted.differences(config) == []
    # other times: told apart by content, which is the same
    for path in stamps_of(config):
        os.utime(path, (1, 1))
    assert wanted.differences(config) == []
    weights = next((copy / "pt").glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert [words.partition(" holds")[0] for words in wanted.differences(config)] == [str(copy / "pt")]
    shutil.rmtree(copy / "base")
    assert wanted.differences(config)[0] == f"{copy / 'base'} is not there"
    assert "measures by" in Wanted({}, {}, {}, "medmerge.eval/0").differences(config)[0]


def job_models(config: Any) -> tuple[Any, Any]:
    from engine.weights import Adapter, Checkpoint

    adapters = {label: Adapter.open(path) for label, path in config.adapters.items()}
    return Checkpoint.open(config.base), adapters


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster can be used at 127.0.0.1:1"),
        ("ray://127.0.0.1:1", "client's address"),
        ("somewhere", "--ray-address is 'somewhere'"),
    ],
)
def test_addresses_without_a_cluster(address, words, config, tmp_path):
    with pytest.raises(BadInputError, match=words):
        on_ray(config, tmp_path / "run", EventWriter(), ray_address=address)


GB = 2**30


@pytest.mark.parametrize(
    ("nodes", "workers", "cuda", "nbytes", "crew"),
    [
        ([Node(2, 0, 8 * GB)], 0, False, GB, Crew(1, 2, 0)),  # a small machine: one worker with all of it
        ([Node(2, 0, 8 * GB)], 2, False, GB, Crew(2, 1, 0)),
        ([Node(32, 0, 64 * GB)] * 2, 0, False, GB, Crew(8, 8, 0)),
        ([Node(32, 0, 64 * GB)] * 2, 0, False, 30 * GB, Crew(4, 16, 0)),  # memory for two on each
        ([Node(3, 0, 8 * GB), Node(5, 0, 8 * GB)], 2, False, GB, Crew(2, 3, 0)),
        ([Node(16, 4, 64 * GB)], 0, True, 30 * GB, Crew(4, 4, 1)),  # one per GPU
        ([Node(0, 0, 8 * GB), Node(16, 2, 64 * GB)], 0, True, GB, Crew(2, 8, 1)),
    ],
)
def test_crew(nodes, workers, cuda, nbytes, crew):
    assert plan_crew(nodes, workers, cuda, nbytes, cells=100) == crew


def test_crew_has_no_more_workers_than_cells_or_room():
    assert plan_crew([Node(32, 0, 64 * GB)], 0, False, GB, cells=2) == Crew(2, 16, 0)
    with pytest.raises(BadInputError, match=r"3 workers were asked for.*CPUs for 2"):
        plan_crew([Node(2, 0, GB)], 3, False, GB, 9)
    with pytest.raises(BadInputError, match="no GPUs"):
        plan_crew([Node(2, 0, GB)], 0, True, GB, 9)
