"""Targets that the job tests run in real child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from engine.jobs import EventWriter


def count(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    total = params["total"]
    for done in range(1, total + 1):
        events.progress(done, total, "steps")
        events.metric(done, loss=1 / done)
    return {"sum": sum(range(1, total + 1)), "exit_code": params.get("exit_code", 0)}


def echo(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    events.warning(params["path"])
    return params


def refuse(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    raise BadInputError("row 3 is broken", "mend it")


def crash(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    return {"never": 1 // 0}


def not_finite(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    events.metric(1, loss=float("nan"))
    return {"loss": float("inf")}


def wait_with_worker(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Starts a worker in a session of its own, writes both pids, and waits until cancelled."""
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(params["pids"]).write_text(f"{os.getpid()} {worker.pid}")
    events.log("ready")
    try:
        time.sleep(600)
    finally:
        Path(params["cleaned"]).write_text("yes")
    return {}
