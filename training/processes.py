"""A run in several processes of this machine, through accelerate. Called by `training.run`.

The job's own process prepares the data, starts the workers (`training.worker`), passes their events on, and ends
them when it is stopped. The workers read everything from the run folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from engine.atomic import start_time, write_json
from engine.errors import BadInputError, BadRecipeError, CancelledError, ChildFailedError, MedmergeError
from engine.jobs.events import EventTail, EventWriter
from training.config import TrainConfig

ORDER = "worker.json"
EVENTS = "worker-events.jsonl"
RESULT = "worker-result.json"
LOG = "workers.log"
POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0  # workers end their step and save it


def wanted(config: TrainConfig) -> int:
    """How many processes the run takes: what is asked, else one for each visible GPU (as far as they can share the
    accumulation evenly), else one.

    Raises BadRecipeError for more processes than GPUs, and for a number that does not divide the accumulation.
    """
    import torch

    devices = torch.cuda.device_count()
    most = max(devices, 1)
    # One for each GPU, or as many as can share the accumulation evenly.
    count = config.processes or max(n for n in range(1, most + 1) if config.accumulation % n == 0)
    if devices and count > devices:
        raise BadRecipeError(f"processes is {count}, and this machine has {devices} GPUs")
    if config.distributed == "fsdp" and count == 1:
        raise BadRecipeError("distributed: fsdp needs more than one process", "leave it out on one GPU")
    if config.accumulation % count:
        raise BadRecipeError(
            f"accumulation is {config.accumulation}, and {count} processes cannot share it evenly",
            f"accumulation counts over all processes: give a multiple of {count}",
        )
    if config.quantization != "none" and config.distributed == "fsdp":
        raise BadRecipeError("a 4-bit base cannot be sharded here", "use distributed: ddp with quantization")
    return count


def use_one_device() -> None:
    """Hide all GPUs but the first: one process with several would split batches in another way (DataParallel)."""
    import torch

    if torch.cuda.device_count() > 1 and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def launch(
    config: TrainConfig,
    run_folder: Path,
    tokens: Path,
    story: dict[str, Any],
    events: EventWriter,
    resume: bool,
    count: int,
) -> dict[str, Any]:
    """Train in `count` processes; the first one's result. Raises what a worker raised, by its words."""
    for name in (EVENTS, RESULT, *(path.name for path in run_folder.glob("worker-error-*.json"))):
        (run_folder / name).unlink(missing_ok=True)
    order = {
        "config": dataclasses.asdict(config),
        "tokens": str(tokens),
        "story": story,
        "resume": resume,
        "parent": [os.getpid(), start_time(os.getpid())],
    }
    write_json(run_folder / ORDER, order)
    tail = EventTail(run_folder / EVENTS)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if not _has_cuda():
        environment["ACCELERATE_USE_CPU"] = "true"
    with (run_folder / LOG).open("ab") as log:
        launcher = subprocess.Popen(
            _command(run_folder, count), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while launcher.poll() is None:
                _pass_on(tail, events)
                time.sleep(POLL_SECONDS)
        except BaseException:
            _end(launcher)
            _pass_on(tail, events)
            error = _error(run_folder)
            if isinstance(error, CancelledError):
                raise error from None
            raise
    _pass_on(tail, events)
    try:
        result = json.loads((run_folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _error(run_folder) or ChildFailedError(
            f"the {count} training processes ended with code {launcher.returncode} and no result",
            f"what they printed is in {run_folder / LOG}; checkpoints are kept: resume the run",
        ) from None
    return dict(result)


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _command(run_folder: Path, count: int) -> list[str]:
    """`accelerate launch` of the workers; on a CPU too, where gloo connects them."""
    return [
        sys.executable, "-P", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "--module", "training.worker", str(run_folder),
    ]  # fmt: skip


def _pass_on(tail: EventTail, events: EventWriter) -> None:
    for event in tail.poll():
        events.emit(event.type, **event.data)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Ask the workers to stop (they save a checkpoint), then make sure that nothing is left running."""
    try:
        family = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        if process.is_running():
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for process in alive:
        process.kill()
    try:
        launcher.wait(5)
    except subprocess.TimeoutExpired:
        launcher.kill()


def _error(run_folder: Path) -> MedmergeError | None:
    """What a worker said went wrong; a real failure before the cancellations that follow from it."""
    found: list[MedmergeError] = []
    for path in sorted(run_folder.glob("worker-error-*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            kinds = {CancelledError.exit_code: CancelledError, BadInputError.exit_code: BadInputError}
            kind = kinds.get(int(said["exit_code"]), MedmergeError)
            error = kind(str(said["message"]), str(said["hint"]))
            found.append(error)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    found.sort(key=lambda error: isinstance(error, CancelledError))
    return found[0] if found else None
