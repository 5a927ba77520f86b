"""One of several training processes: `accelerate launch ... -m training.worker RUN`.

Reads RUN/worker.json, which `training.processes` wrote. The first process writes events, checkpoints, adapter and
result; each writes its own error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from engine.atomic import write_json
from engine.claim import is_alive
from engine.errors import MedmergeError
from engine.jobs.events import EventWriter
from training import processes
from training.config import from_mapping


class Silent(EventWriter):
    """Events of the other processes: nobody reads them."""

    def emit(self, type_: str, **data: Any) -> None:
        pass


def main(run_folder: Path) -> int:
    """Train this process's part; 0, or the exit code of what went wrong."""
    rank = int(os.environ.get("RANK", "0"))
    order = json.loads((run_folder / processes.ORDER).read_text(encoding="utf-8"))
    threading.Thread(target=_die_with, args=order["parent"], daemon=True).start()
    events = EventWriter(run_folder / processes.EVENTS) if rank == 0 else Silent()
    try:
        result = _fit(order, run_folder, events)
        if rank == 0:
            write_json(run_folder / processes.RESULT, result)
        return 0
    except MedmergeError as error:
        said = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    except Exception as error:  # noqa: BLE001 - the process boundary: the parent tells the person
        traceback.print_exc()
        hint = f"the traceback is in {run_folder / processes.LOG}"
        said = {"message": f"{type(error).__name__}: {error}", "hint": hint, "exit_code": 3}
    write_json(run_folder / f"worker-error-{rank}.json", said)
    return int(str(said["exit_code"]))


def _die_with(pid: int, start: float) -> None:
    """End at once when the job's own process is gone (kill -9): nobody may write beside a run that is resumed."""
    while is_alive(pid, start):
        time.sleep(0.5)
    os._exit(4)


def _fit(order: dict[str, Any], run_folder: Path, events: EventWriter) -> dict[str, Any]:
    from training.fit import fit
    from training.prepare import arrange, load_tokenizer
    from training.tokens import TokenStore

    config = from_mapping(order["config"], "worker.json")
    prepared = arrange(config, TokenStore(Path(order["tokens"])))
    tokenizer = load_tokenizer(Path(config.base))
    return fit(config, run_folder, prepared, tokenizer, order["story"], events, bool(order["resume"]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
