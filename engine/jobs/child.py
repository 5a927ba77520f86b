"""What a job's process runs: `python -P -m engine.jobs.child FOLDER`.

Imports the target named in spec.json, calls it, and writes job.json: running, then done, failed or
cancelled. SIGTERM becomes CancelledError in the main thread, so targets clean up with plain `finally`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from engine.atomic import start_time, write_json
from engine.errors import CancelledError, MedmergeError
from engine.jobs.events import EventWriter, _plain
from engine.jobs.spec import JobSpec


def _on_term(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; a second one must not break the clean-up
    raise CancelledError("cancelled")


def run_job(folder: Path) -> int:
    """Run the job in `folder` to its end; returns its exit code, which job.json holds as well."""
    signal.signal(signal.SIGTERM, _on_term)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # ctrl+c in the terminal goes to the one who follows, not to us
    try:
        os.nice(5)
    except OSError:
        pass
    state: dict[str, Any] = {
        "state": "running",
        "pid": os.getpid(),
        "pid_start": start_time(os.getpid()),
        "started": time.time(),
    }
    write_json(folder / "job.json", state)
    with EventWriter(folder / "events.jsonl") as events:
        outcome = _call(folder, events)
        state.update(outcome, finished=time.time())
        if "result" in outcome:
            events.emit("result", result=outcome["result"])
        else:
            events.emit(
                "error", message=outcome["error"], hint=outcome["hint"], exit_code=outcome["exit_code"]
            )
        write_json(folder / "job.json", state)
        events.emit("finished", state=state["state"], exit_code=state["exit_code"])
    return int(state["exit_code"])


def _call(folder: Path, events: EventWriter) -> dict[str, Any]:
    """The outcome as fields of job.json: state, exit_code, and result or error and hint."""
    try:
        spec = JobSpec.read(folder / "spec.json")
        events.emit("started", kind=spec.kind, title=spec.title, pid=os.getpid())
        module, _, name = spec.target.partition(":")
        target = getattr(importlib.import_module(module), name)
        result = _plain(target(dict(spec.params), events) or {})
        return {"state": "done", "exit_code": int(result.get("exit_code", 0)), "result": result}
    except MedmergeError as error:
        state = "cancelled" if isinstance(error, CancelledError) else "failed"
        return {"state": state, "exit_code": error.exit_code, "error": error.message, "hint": error.hint}
    except MemoryError:
        return {
            "state": "failed",
            "exit_code": 3,
            "error": "out of memory",
            "hint": "lower the batch size or the cutoff, or close other programs",
        }
    except Exception as error:  # noqa: BLE001 - the process boundary: everything must end in job.json
        traceback.print_exc()
        return {
            "state": "failed",
            "exit_code": 3,
            "error": f"{type(error).__name__}: {error}",
            "hint": f"this is a defect of medmerge; the traceback is in {folder / 'log.txt'}",
        }


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1])))
