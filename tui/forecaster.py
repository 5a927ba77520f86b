"""Runs plan jobs for the merge screen: one at a time, in a temporary folder, so that the list of jobs stays readable.

The numbers (time, memory, rounding loss) come from the same job as `medmerge plan`'s. Blocking; called in threads.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path

from engine.errors import BadInputError, CancelledError, ChildFailedError
from tui.actions import Action
from tui.results import forecast_view
from tui.snapshots import PlanView

POLL_SECONDS = 0.05
LIMIT_SECONDS = 60.0


class Forecaster:
    """One forecast at a time; a newer one ends the one that runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest = 0

    def stop(self) -> None:
        """End the one that runs; its caller gets a CancelledError."""
        self._newest += 1

    def forecast(self, action: Action) -> PlanView:
        """The result of a plan job as a PlanView.

        Raises:
            CancelledError: a newer forecast was asked for meanwhile.
            BadInputError: the plan refuses the recipe, in its own words.
            ChildFailedError: the job died, or took longer than a minute.
        """
        from engine.jobs import JobSpec, cancel, launch
        from engine.jobs.launch import reap
        from engine.jobs.store import JobStore

        self._newest += 1
        mine = self._newest
        with self._lock:
            if mine != self._newest:
                raise CancelledError("a newer plan was asked for")
            folder = Path(tempfile.mkdtemp(prefix="medmerge-plan-"))
            try:
                store = JobStore(folder)
                job = launch(JobSpec(action.kind, action.target, action.params, action.title), folder)
                deadline = time.monotonic() + LIMIT_SECONDS
                while not job.final:
                    time.sleep(POLL_SECONDS)
                    reap()
                    job = store.get(job.id)
                    late = time.monotonic() > deadline
                    if (mine != self._newest or late) and not job.final:
                        cancel(job)
                        if late:
                            raise ChildFailedError(
                                f"the plan took longer than {LIMIT_SECONDS:.0f} s", "medmerge plan shows more"
                            )
                        raise CancelledError("a newer plan was asked for")
                if job.state != "done":
                    kind = BadInputError if job.exit_code == 2 else ChildFailedError
                    raise kind(job.error or f"the plan is {job.state}", job.hint)
                return forecast_view(job.result)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
