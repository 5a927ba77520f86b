"""Starts and cancels jobs. The child is a session of its own, at lower priority, with its own log file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from engine.errors import ChildFailedError
from engine.jobs.spec import JobSpec
from engine.jobs.store import JobStore, JobView

GRACE_SECONDS = 10.0
SLOW_TO_STOP = {"train": 90.0}  # by kind: several processes end their step together, then save it


def launch(spec: JobSpec, jobs_folder: Path) -> JobView:
    """Start `spec` as a detached process and return its view at once.

    The child runs `python -P -m engine.jobs.child FOLDER`: -P keeps a user's own folder named `training/`
    in the current directory from being imported. It survives this process, the terminal and SSH.
    """
    store = JobStore(jobs_folder)
    job = store.create(spec)
    package_root = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ, PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false")
    # Waiting OpenMP threads sleep instead of spinning: beside other work on the same cores torch is then 10x faster.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [package_root, environment.get("PYTHONPATH", "")])
    )
    try:
        with (job.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.jobs.child", str(job.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
    except OSError as error:
        raise ChildFailedError(f"cannot start a job process: {error}") from error
    _CHILDREN.append(process)  # reaped by `reap`, so that no zombie looks alive
    return store.get(job.id)


_CHILDREN: list[subprocess.Popen[bytes]] = []


def reap() -> None:
    """Collect finished children of this very process (jobs started by others are their parents' or init's)."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]


def cancel(job: JobView, grace: float | None = None) -> bool:
    """Stop a job and everything it started: SIGTERM, then SIGKILL after `grace` seconds (by default by its kind).

    Descendants are found by pid and checked by start time (workers may have sessions of their own).
    Returns False when the job had already ended. Blocks up to `grace` seconds.
    """
    job = _once_started(job)
    grace = SLOW_TO_STOP.get(job.spec.kind, GRACE_SECONDS) if grace is None else grace
    if job.final or job.pid is None:
        return False
    try:
        root = psutil.Process(job.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    for process in family:
        _signal(process, kill=False)
    _, alive = psutil.wait_procs(family, timeout=grace)
    for process in alive:
        _signal(process, kill=True)
    psutil.wait_procs(alive, timeout=2)
    reap()
    return True


def _once_started(job: JobView, seconds: float = 5.0) -> JobView:
    """The job as it is now; one that is just starting gets a moment to say its pid."""
    store, deadline = JobStore(job.folder.parent), time.monotonic() + seconds
    job = store.get(job.id)
    while job.state == "starting" and job.pid is None and time.monotonic() < deadline:
        time.sleep(0.05)
        job = store.get(job.id)
    return job


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        if process.is_running():  # compares start time too: a reused pid is not ours
            process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        pass
