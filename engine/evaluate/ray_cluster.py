"""A Ray cluster for one run: the user's, or one on this machine that is started and ended here.

Only `ray_executor` calls this. Ray takes over signals, paths and the home folder as it starts; here it gets none
of them: SIGTERM stays the job's, workers find only installed code, what Ray writes goes to a folder that is
removed, and a cluster of ours listens on the loopback address alone, with a key of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from engine.errors import BadInputError, CancelledError, ChildFailedError

STORE_BYTES = 128 * 2**20  # for objects between processes: rows of a batch, samples of a cell
CORES_EACH = (
    8  # a CPU worker by default: beyond that the small models of a sweep gain little from more threads
)
CONNECT_SECONDS = 5.0
SERVERS = ("gcs_server", "raylet")  # Ray's own processes that a driver cannot outlive
_TOKEN = secrets.token_hex(32)  # Ray remembers the first one a process gives


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has. memory in bytes."""

    cpus: int
    gpus: int
    memory: int


@dataclass(frozen=True)
class Crew:
    """How many workers, and what each gets; `cpus` is also its number of threads."""

    workers: int
    cpus: int
    gpus: int


def plan_crew(nodes: Sequence[Node], workers: int, cuda: bool, nbytes: int, cells: int) -> Crew:
    """Workers for this many cells: one per GPU on GPUs, else one per 8 cores as far as memory holds their models.

    workers: how many the user asked for, 0 for the default. nbytes: memory a worker's model takes. Each gets as
    many cores as all of them can have alike.

    Raises:
        BadInputError: the machines have no room for so many, or no GPU where cells are to run on one.
    """

    def room(cpus: int) -> int:
        return sum(min(node.cpus // cpus, node.gpus if cuda else node.cpus) for node in nodes)

    most = room(1)
    if most == 0:
        what = "GPUs" if cuda and not any(node.gpus for node in nodes) else "CPUs"
        raise BadInputError(f"the Ray cluster has no {what} for workers", "see: ray status")
    if workers > most:
        raise BadInputError(
            f"{workers} workers were asked for, and the Ray cluster has {'GPUs' if cuda else 'CPUs'} for {most}",
            "ask for fewer (--workers)",
        )
    if not workers:
        by_node = [
            max(1, min(node.cpus // CORES_EACH, node.memory // max(1, nbytes))) for node in nodes if node.cpus
        ]
        workers = most if cuda else sum(by_node)
    workers = max(1, min(workers, cells))
    cpus = next(n for n in range(max(node.cpus for node in nodes), 0, -1) if room(n) >= workers)
    return Crew(workers, cpus, int(cuda))


@contextlib.contextmanager
def cluster(address: str, workers: int, cuda: bool) -> Iterator[list[Node]]:
    """A connection to the cluster at `address` ("" starts one here for `workers`), ended at the end.

    Raises:
        BadInputError: ray is not installed, or there is no cluster at the address that takes us.
        ChildFailedError: Ray cannot start here.
        CancelledError: SIGTERM came while Ray was starting.
    """
    ours = address in ("", "local")
    if not ours:
        _reachable(address)
    with contextlib.ExitStack() as stack:
        folder = _folder(stack)
        stack.enter_context(_environment(_settings(ours)))
        try:
            import ray
        except ImportError as error:
            raise BadInputError(
                f"--executor ray needs ray, which is not here ({error})", "pip install 'medmerge-tui[ray]'"
            ) from error
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options: dict[str, Any] = {"address": address}
        if ours:
            options = {
                "address": "local", "num_cpus": max(cores, workers), "include_dashboard": False,
                "object_store_memory": STORE_BYTES, "_temp_dir": str(folder),
            }  # fmt: skip
            if not cuda:
                options["num_gpus"] = 0
        logging.getLogger("ray").setLevel(logging.ERROR)
        before = set(_children())
        family: set[psutil.Process] = set()
        stack.callback(_end, ray, family)
        try:
            # Ray puts the current folder on every worker's path: a user's own engine/ there would shadow ours.
            with contextlib.chdir(folder), _own_sigterm(ours):
                ray.init(
                    log_to_driver=False, configure_logging=False, logging_level=logging.ERROR,
                    namespace=f"medmerge-{os.getpid()}", **options,
                )  # fmt: skip
        except SystemExit as error:  # Ray's answer to SIGTERM while it starts
            raise CancelledError("cancelled") from error
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            if ours:
                raise ChildFailedError(f"Ray cannot start on this machine: {_words(error)}") from error
            raise _unreachable(address, _words(error)) from error
        finally:
            family.update(set(_children()) - before)
        yield [
            Node(
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
                int(node["Resources"].get("memory", 0)),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]


def _words(error: BaseException) -> str:
    """The first line of a message of Ray, which may go on for a page; with its cause."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first if error.__cause__ is None else f"{first} ({_words(error.__cause__)})"


def _unreachable(address: str, why: str) -> BadInputError:
    return BadInputError(
        f"no Ray cluster can be used at {address}: {why}",
        "start one (ray start --head), and give HOST:6379 from one of its machines; leave --ray-address out to "
        "use this machine alone",
    )


def _reachable(address: str) -> None:
    """Raises BadInputError when nothing listens there: Ray itself would try for a minute."""
    if "://" in address:
        raise BadInputError(
            f"--ray-address {address} is a client's address, which cannot stream rows",
            "run on a machine of the cluster, with HOST:PORT as `ray start` shows it",
        )
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not colon or not host or not port.isdigit():
        raise BadInputError(f"--ray-address is {address!r}", "HOST:PORT, for example 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _settings(ours: bool) -> dict[str, str]:
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    if ours:
        settings |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # with this Ray binds to 127.0.0.1, on any system
            "RAY_AUTH_TOKEN": _TOKEN,  # without one Ray writes its own below the home folder
        }
    else:
        settings["RAY_NUM_REDIS_GET_RETRIES"] = (
            "1"  # of 40 s, for a listener that is no cluster; 20 otherwise
        )
    return settings


def _folder(stack: contextlib.ExitStack) -> Path:
    """A folder for what Ray writes. Its sockets' paths have to fit in 107 bytes, so a long TMPDIR is no use."""
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="medmerge-ray-", dir="/tmp" if len(parent) > 20 else parent))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set yet, for as long as this lasts."""
    before = os.environ.copy()
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if name.startswith("RAY_"):  # Ray adds some of its own
                del os.environ[name]


@contextlib.contextmanager
def _own_sigterm(ours: bool) -> Iterator[None]:
    """Put back the handler that Ray replaces with one that ends the process without a word.

    `medmerge jobs cancel` sends SIGTERM to a job and to all it started, and a driver whose raylet is gone is ended by
    Ray on the spot. So the processes of a cluster of ours start with SIGTERM blocked, which they inherit: the job ends
    them. Until they have started it waits for us too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if ours else set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def held_sigterm() -> Iterator[Callable[[], None]]:
    """SIGTERM waits until the function given is called: an exception that its handler raises inside Ray's compiled
    code comes out as a SystemError, or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    handler = signal.getsignal(signal.SIGTERM)
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    given = False

    def check() -> None:
        nonlocal given
        if came and not given:
            given = True  # the handler is not set again: the job's ignores further signals
            signal.signal(signal.SIGTERM, handler)
            signal.raise_signal(signal.SIGTERM)

    try:
        yield check
        check()
    finally:
        if not given:
            signal.signal(signal.SIGTERM, handler)


def _children(parent: psutil.Process | None = None) -> list[psutil.Process]:
    try:
        return (parent or psutil.Process()).children(recursive=True)
    except psutil.Error:
        return []


def _end(ray: Any, family: set[psutil.Process]) -> None:
    """Leave the cluster. family: what Ray started here; none of it, and of what that started, stays.

    Ray gives each of its processes a second to end by SIGTERM, which is blocked there; those that look after nobody
    are killed first, so that a cancelled job ends well within its grace.
    """
    everyone = family | {child for parent in family for child in _children(parent)}
    _kill([p for p in family if _told(p, "ppid") == os.getpid() and _told(p, "name") not in SERVERS])
    ray.shutdown()
    _kill(list(everyone))


def _told(process: psutil.Process, name: str) -> Any:
    try:
        return getattr(process, name)()
    except psutil.Error:
        return None


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=2)
