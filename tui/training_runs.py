"""Training runs as the train screen lists them: what is on disk and what jobs say, joined. Pure functions.

A run is its folder; jobs that worked on it (the first one, and those that resumed it) are found by that path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tui.snapshots import JobFeed, JobRow, Points, TrainRun

SHADES = 4  # of each kind: theme variables pt, pt-2, pt-3, pt-4
STOPPED = ("cancelled", "failed", "lost", "stopped")


@dataclass(frozen=True)
class RunView:
    """One run. `state` is that of its newest job; of a run without one "done" (its adapter is there), "stopped" or,
    where only the adapter is left, "adapter"."""

    key: str
    name: str
    kind: str
    state: str
    created: float
    when: float
    step: float = 0.0
    total: float = 0.0
    curves: dict[str, Points] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    resumable: bool = False
    job: JobRow | None = None

    @property
    def live(self) -> bool:
        return self.job is not None and not self.job.final

    def last(self, name: str) -> float | None:
        """The newest value of a series; may be NaN."""
        points = self.curves.get(name)
        return points[-1][1] if points else None

    @property
    def broken_at(self) -> float | None:
        """The first step whose loss is not a number, None where all are."""
        for name in ("loss", "eval_loss"):
            for step, value in self.curves.get(name, ()):
                if not math.isfinite(value):
                    return step
        return None


def views(
    runs: Sequence[TrainRun], jobs: Sequence[JobRow], feeds: Mapping[str, JobFeed]
) -> tuple[RunView, ...]:
    """All runs, newest first, then adapters that have only their curve. Of a run that failed before it wrote anything
    there is its job alone."""
    by_run: dict[str, list[JobRow]] = {}
    for job in sorted((job for job in jobs if job.kind == "train"), key=lambda job: job.created):
        by_run.setdefault(str(job.params.get("run") or job.id), []).append(job)
    on_disk = {run.path: run for run in runs}
    taken = {
        str((job.params.get("config") or {}).get("output")) for chain in by_run.values() for job in chain[-1:]
    }
    found = [
        _view(key, on_disk.get(key), by_run.get(key, []), feeds)
        for key in {**on_disk, **by_run}
        if key in by_run or not (key in taken and on_disk[key].adapter == key)
    ]
    return tuple(sorted(found, key=lambda view: (view.state == "adapter", -view.created, view.key)))


def _view(key: str, run: TrainRun | None, chain: list[JobRow], feeds: Mapping[str, JobFeed]) -> RunView:
    job = chain[-1] if chain else None
    since_start = _since_start(chain)
    config = _object(run.config if run and run.config else job.params.get("config") if job else {})
    output = Path(str(config.get("output") or (run.path if run else "") or (job.title if job else key))).name
    curves = join([run.curves] if run else [])
    told = since_start[-1:] if curves else since_start
    curves = join([curves, *(feeds[one.id].curves for one in told if one.id in feeds)])
    created = since_start[0].created if since_start else run.created if run else 0.0
    adapter = run.adapter if run else ""
    state = _state(run, job)
    step = max((points[-1][0] for name, points in curves.items() if points), default=0.0)
    total = float(run.steps) if run else 0.0
    if job and job.total and job.phase in ("train", "") and job.unit == "steps":
        total = job.total
        step = max(step, job.done) if not job.final else step
    ended = job.finished if job and job.final else None
    return RunView(
        key=key,
        name=output,
        kind=str(config.get("kind") or (run.kind if run else "")),
        state=state,
        created=created,
        when=ended or (run.finished if run and run.finished else created),
        step=step,
        total=total,
        curves=curves,
        config=config,
        audit=run.audit if run else {},
        adapter=adapter,
        resumable=bool(run and run.resumable and state in STOPPED),
        job=job,
    )


def _state(run: TrainRun | None, job: JobRow | None) -> str:
    """A finished adapter is the last word, unless a job came after it."""
    if job and not job.final:
        return job.state
    if run and run.adapter and (job is None or job.state == "done" or run.finished >= job.created):
        return "adapter" if run.adapter == run.path else "done"
    return job.state if job else "stopped"


def _since_start(chain: list[JobRow]) -> list[JobRow]:
    """The jobs of a run from its last start on: what was under this name before was another run."""
    starts = [index for index, job in enumerate(chain) if not job.params.get("resume")]
    return chain[starts[-1] :] if starts else chain


def join(parts: Iterable[Mapping[str, Points]]) -> dict[str, Points]:
    """One curve from several of one run, each going on from a step of the one before it: what the earlier one has from
    there on was not kept."""
    joined: dict[str, Points] = {}
    for part in parts:
        first = min((points[0][0] for points in part.values() if points), default=None)
        if first is None:
            continue
        kept = {name: tuple(point for point in points if point[0] < first) for name, points in joined.items()}
        joined = {name: kept.get(name, ()) + tuple(part.get(name, ())) for name in {**kept, **part}}
    return {name: points for name, points in joined.items() if points}


def give_colours(known: dict[str, str], runs: Iterable[RunView]) -> None:
    """Give every run without one a colour: a shade of its kind's, adapters first, then as the runs were started.

    A run keeps what it has: a new one never changes the others'.
    """
    for run in sorted(runs, key=lambda run: (run.state != "adapter", run.created, run.key)):
        if run.key in known:
            continue
        kind = run.kind if run.kind in ("pt", "sft") else "other"
        shades = [style.rpartition("-")[0] or style for style in known.values()]
        number = shades.count(kind) % SHADES
        known[run.key] = kind if number == 0 else f"{kind}-{number + 1}"


def files_of(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The paths a config names under `data` or `tests`: plain texts, or mappings with a `path`."""
    found = []
    values = config.get(key)
    for entry in values if isinstance(values, list | tuple) else ():
        path = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(path, str):
            found.append(path)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class AuditView:
    """What is known about leaks between the chosen files. `leaks` is None where it is not known; `state`: none (never
    asked), running, failed, known. `changed`: a file is newer than the audit."""

    state: str = "none"
    leaks: int | None = None
    leaking_rows: int = 0
    test_rows: int = 0
    repeats: int | None = None
    when: float = 0.0
    source: str = ""  # "audit", or the name of the run
    changed: bool = False
    found: tuple[dict[str, Any], ...] = ()  # leaks: files, rows, detector, score
    examples: tuple[dict[str, Any], ...] = ()  # some of them with their texts, what they share marked
    dropped: int = 0  # rows that the run left out because of them
    job: JobRow | None = None


def audit_of(
    train: Sequence[str],
    tests: Sequence[str],
    jobs: Sequence[JobRow],
    runs: Sequence[RunView],
    modified: Mapping[str, float],
) -> AuditView:
    """The newest verdict for exactly these files, from an audit or from a run that audited them."""
    candidates = [view for view in (_audit_job(job, train, tests) for job in jobs) if view]
    candidates += [view for view in (_audit_run(run, train, tests) for run in runs) if view]
    if not candidates:
        return AuditView()
    newest = max(candidates, key=lambda view: view.when)
    changed = any(modified.get(path, 0.0) > newest.when for path in (*train, *tests))
    if changed and newest.state == "known":
        return AuditView(**{**vars(newest), "changed": True})
    return newest


def _audit_job(job: JobRow, train: Sequence[str], tests: Sequence[str]) -> AuditView | None:
    if job.kind != "audit":
        return None
    if set(job.params.get("train") or ()) != set(train) or set(job.params.get("test") or ()) != set(tests):
        return None
    when = job.started or job.created
    if not job.final:
        return AuditView("running", when=when, source="audit", job=job)
    if job.state != "done":
        return AuditView("failed", when=when, source="audit", job=job)
    counts = _object(job.result.get("counts"))
    leaks = job.result.get("leaks")
    leaks = leaks if isinstance(leaks, list) else []
    rows = _object(counts.get("rows"))
    return AuditView(
        "known",
        leaks=len(leaks),
        leaking_rows=_count(counts.get("leaking_train_rows")),
        test_rows=sum(_count(rows.get(path)) for path in tests),
        repeats=len(job.result.get("duplicates") or []),
        when=when,
        source="audit",
        found=_objects(leaks),
        examples=_objects(job.result.get("examples")),
        job=job,
    )


def _audit_run(run: RunView, train: Sequence[str], tests: Sequence[str]) -> AuditView | None:
    leaks = run.audit.get("leaks")
    leaks = len(leaks) if isinstance(leaks, list) else leaks
    if not isinstance(leaks, int) or run.state == "adapter":
        return None
    if set(files_of(run.config, "data")) != set(train) or set(files_of(run.config, "tests")) != set(tests):
        return None
    return AuditView(
        "known",
        leaks=leaks,
        leaking_rows=_count(_object(run.audit.get("counts")).get("leaking_train_rows")),
        test_rows=sum(_count(entry.get("rows")) for entry in _objects(run.audit.get("tests"))),
        when=run.created,
        source=run.name,
        found=_objects(run.audit.get("findings")),
        dropped=_count(run.audit.get("dropped_rows")),
    )


def _objects(values: Any, most: int = 200) -> tuple[dict[str, Any], ...]:
    """The mappings among the first of a list's entries; of anything else none."""
    return (
        tuple(entry for entry in values[:most] if isinstance(entry, dict)) if isinstance(values, list) else ()
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
