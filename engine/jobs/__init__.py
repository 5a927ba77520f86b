"""Detached background processes: spec, launch, events, store.

A job is a folder `WORKSPACE/jobs/ID/` with `spec.json` (what was asked), `job.json` (its state, replaced
atomically), `events.jsonl` (appended by the job's own process), `log.txt` (its stdout and stderr).
Only the job's process writes job.json and events.jsonl; everyone else reads.
"""

from engine.jobs.events import Event, EventTail, EventWriter
from engine.jobs.launch import cancel, launch
from engine.jobs.spec import JobSpec
from engine.jobs.store import JobStore, JobView

__all__ = ["Event", "EventTail", "EventWriter", "JobSpec", "JobStore", "JobView", "cancel", "launch"]
