"""Reads all jobs of a workspace a few times a second, in one place; screens only get immutable results.

A job that has ended is read once and remembered. Events are read from where the last poll stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tui.foreign import measured
from tui.snapshots import JobFeed, JobRow

if TYPE_CHECKING:
    from engine.jobs import EventTail, JobView
    from engine.jobs.events import Event

KEPT_LOG_LINES = 400


@dataclass
class _Followed:
    """A job's event reader and all it has said, growing."""

    tail: EventTail
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            data = event.data
            if event.type == "metric":
                self._metric(data)
            elif event.type == "row":
                self.rows.append(data)
            elif event.type in ("log", "warning", "error"):
                mark = {"log": "", "warning": "! ", "error": "✗ "}[event.type]
                self.log.append(mark + str(data.get("message", "")))
                if data.get("hint"):
                    self.log.append(f"  → {data['hint']}")
        del self.log[:-KEPT_LOG_LINES]

    def _metric(self, data: dict[str, Any]) -> None:
        step = data.get("step")
        if not isinstance(step, int | float):
            return
        for name, value in data.items():
            number = measured(value)
            if name != "step" and number is not None:
                self.curves.setdefault(name, []).append((float(step), number))
                self.latest[name] = number

    def feed(self) -> JobFeed:
        return JobFeed(
            {name: tuple(points) for name, points in self.curves.items()},
            dict(self.latest),
            tuple(self.rows),
            tuple(self.log),
        )


class JobWatch:
    """Polls the jobs folder. One poll at a time (the app never has two in flight)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ended: dict[str, JobRow] = {}
        self._followed: dict[str, _Followed] = {}

    def poll(self, wanted: frozenset[str] = frozenset()) -> tuple[tuple[JobRow, ...], dict[str, JobFeed]]:
        """All jobs, newest first, and the feeds that grew: of jobs still running and of the `wanted` ones."""
        from engine.errors import BadInputError
        from engine.jobs import JobStore
        from engine.jobs.launch import reap

        reap()
        store = JobStore(self.folder)
        rows, feeds = [], {}
        for job_id in store.ids():
            row = self._ended.get(job_id)
            if row is None:
                try:
                    row = job_row(store.get(job_id))
                except BadInputError:
                    continue  # a folder someone is just making, or broke: the others still count
            if job_id not in self._ended or job_id in wanted:
                feed = self._read(job_id, store)
                if feed:
                    feeds[job_id] = feed
            if row.final:
                self._ended[job_id] = row
            rows.append(row)
        return tuple(rows), feeds

    def _read(self, job_id: str, store: Any) -> JobFeed | None:
        from engine.jobs import EventTail

        followed = self._followed.get(job_id)
        first = followed is None
        if followed is None:
            followed = self._followed[job_id] = _Followed(EventTail(self.folder / job_id / "events.jsonl"))
        events = followed.tail.poll()
        followed.take(events)
        return followed.feed() if events or first else None


def job_row(view: JobView) -> JobRow:
    """A JobView as a row. Progress values that are not numbers are left out."""
    progress = view.progress

    def number(key: str) -> float | None:
        value = progress.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    return JobRow(
        id=view.id,
        kind=view.spec.kind,
        title=view.spec.title or view.spec.kind,
        state=view.state,
        created=view.created,
        started=view.started,
        finished=view.finished,
        done=number("done") or 0.0,
        total=number("total"),
        unit=str(progress.get("unit") or ""),
        phase=str(progress.get("phase") or ""),
        message=str(progress.get("message") or ""),
        rate=number("rate"),
        eta_s=number("eta_s"),
        exit_code=view.exit_code,
        error=view.error,
        hint=view.hint,
        command=view.spec.command,
        folder=str(view.folder),
        params=view.spec.params,
        result=view.result,
    )
