"""Asks a child process one question at a time: a job whose result is all that is wanted of it.

It runs in a temporary folder, so that the list of jobs stays readable; asking anew ends the one that runs. For
answers that need what the app must not import (a tokenizer, the merge kernel). Blocking; called in threads.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from engine.errors import BadInputError, CancelledError, ChildFailedError
from tui.actions import Action

POLL_SECONDS = 0.05


class Asker:
    """One question at a time; a newer one ends the one that runs. `what` is its name in messages."""

    def __init__(self, what: str, limit_seconds: float = 60.0, otherwise: str = "") -> None:
        self.what, self.limit_seconds, self.otherwise = what, limit_seconds, otherwise
        self._lock = threading.Lock()
        self._newest = 0

    def stop(self) -> None:
        """End the one that runs; its caller gets a CancelledError."""
        self._newest += 1

    def ask(self, action: Action) -> dict[str, Any]:
        """The result of the action's job.

        Raises:
            CancelledError: a newer question was asked meanwhile.
            BadInputError: the job refuses its input, in its own words.
            ChildFailedError: the job died, or took too long.
        """
        from engine.jobs import JobSpec, cancel, launch
        from engine.jobs.launch import reap
        from engine.jobs.store import JobStore

        self._newest += 1
        mine = self._newest
        with self._lock:
            if mine != self._newest:
                raise CancelledError(f"a newer {self.what} was asked for")
            folder = Path(tempfile.mkdtemp(prefix=f"medmerge-{self.what}-"))
            try:
                store = JobStore(folder)
                job = launch(JobSpec(action.kind, action.target, action.params, action.title), folder)
                deadline = time.monotonic() + self.limit_seconds
                while not job.final:
                    time.sleep(POLL_SECONDS)
                    reap()
                    job = store.get(job.id)
                    late = time.monotonic() > deadline
                    if (mine != self._newest or late) and not job.final:
                        cancel(job)
                        if late:
                            raise ChildFailedError(
                                f"the {self.what} took longer than {self.limit_seconds:.0f} s", self.otherwise
                            )
                        raise CancelledError(f"a newer {self.what} was asked for")
                if job.state != "done":
                    kind = BadInputError if job.exit_code == 2 else ChildFailedError
                    raise kind(job.error or f"the {self.what} is {job.state}", job.hint)
                return job.result
            finally:
                shutil.rmtree(folder, ignore_errors=True)
