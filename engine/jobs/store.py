"""Reads the jobs of a workspace: states, progress, results. Writes nothing but a new job's folder.

A job whose process is gone without a final state is `lost` (killed, machine restarted); its events stay.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.atomic import start_time
from engine.errors import BadInputError
from engine.jobs.events import EventTail
from engine.jobs.spec import JobSpec

FINAL_STATES = ("done", "failed", "cancelled", "lost")


@dataclass(frozen=True)
class JobView:
    """An immutable look at one job: what was asked and where it stands.

    `state` is one of starting, running, cancelling, done, failed, cancelled, lost.
    `exit_code` is None until the job is final. `result` is what the target returned.
    """

    id: str
    folder: Path
    spec: JobSpec
    state: str
    created: float
    started: float | None = None
    finished: float | None = None
    pid: int | None = None
    exit_code: int | None = None
    error: str = ""
    hint: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def log_path(self) -> Path:
        return self.folder / "log.txt"

    def tail(self) -> EventTail:
        """A fresh reader of this job's events, from the first one on."""
        return EventTail(self.events_path)


class JobStore:
    """All jobs below one folder (`Workspace.jobs`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, spec: JobSpec) -> JobView:
        """Make the folder of a new job; its id is `KIND-YYYYMMDD-HHMMSS[-N]`."""
        stem = f"{spec.kind}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            job_id = stem if number == 1 else f"{stem}-{number}"
            try:
                (self.folder / job_id).mkdir()
            except FileExistsError:
                continue
            (self.folder / job_id / "spec.json").write_text(spec.to_json(), encoding="utf-8")
            return self.get(job_id)
        raise BadInputError(f"too many jobs named {stem} in {self.folder}")

    def ids(self) -> list[str]:
        """Job ids, newest first."""
        if not self.folder.is_dir():
            return []
        found = [entry for entry in self.folder.iterdir() if (entry / "spec.json").is_file()]
        return [
            entry.name
            for entry in sorted(found, key=lambda e: (e / "spec.json").stat().st_mtime, reverse=True)
        ]

    def list(self) -> list[JobView]:
        """Every readable job, newest first; a broken folder is skipped rather than hiding the others."""
        views = []
        for job_id in self.ids():
            try:
                views.append(self.get(job_id))
            except BadInputError:
                continue
        return views

    def get(self, job_id: str) -> JobView:
        """One job by id, or by an unambiguous beginning of it. Raises BadInputError when there is none."""
        folder = self.folder / job_id
        if not re.fullmatch(r"[\w.-]+", job_id) or not (folder / "spec.json").is_file():
            matches = [known for known in self.ids() if known.startswith(job_id)] if job_id else []
            if len(matches) != 1:
                what = "no job" if not matches else f"{len(matches)} jobs"
                raise BadInputError(f"{what} named {job_id!r} in {self.folder}", "see: medmerge jobs list")
            job_id, folder = matches[0], self.folder / matches[0]
        spec = JobSpec.read(folder / "spec.json")
        created = (folder / "spec.json").stat().st_mtime
        state = self._state(folder)
        return JobView(
            id=job_id,
            folder=folder,
            spec=spec,
            state=_judge(state, created),
            created=created,
            started=state.get("started"),
            finished=state.get("finished"),
            pid=state.get("pid"),
            exit_code=state.get("exit_code"),
            error=state.get("error", ""),
            hint=state.get("hint", ""),
            result=state.get("result") or {},
            progress=last_progress(folder / "events.jsonl"),
        )

    @staticmethod
    def _state(folder: Path) -> dict[str, Any]:
        try:
            state = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            return state if isinstance(state, dict) else {}
        except (OSError, ValueError):
            return {}


def _judge(state: dict[str, Any], created: float) -> str:
    """The stated state, unless its process is gone: then `lost`."""
    said = str(state.get("state", "starting"))
    if said in FINAL_STATES:
        return said
    if said == "starting" and "pid" not in state:
        return "lost" if time.time() - created > 60 else "starting"
    started_at = start_time(int(state["pid"]))
    same = started_at > 0 and abs(started_at - float(state.get("pid_start", 0))) < 1.0
    return said if same else "lost"


def last_progress(path: Path) -> dict[str, Any]:
    """The newest progress event in the last 32 kB of an event file, as its dict ({} when none)."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 32768))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        if b'"progress"' in line:
            try:
                raw = json.loads(line)
            except ValueError:
                continue
            if isinstance(raw, dict) and raw.get("type") == "progress":
                return raw
    return {}
