"""`medmerge jobs`: list, show, logs, follow and cancel background jobs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from engine.errors import BadInputError
from engine.jobs import JobStore, JobView, cancel
from tui.commands.common import (
    Commands,
    duration,
    follow,
    print_json,
    progress_text,
    report,
    table,
    workspace_of,
)
from tui.safe_text import plain

ACTIONS = ("list", "show", "logs", "follow", "cancel")


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "jobs",
        "background jobs: list, show, logs, follow, cancel",
        description="Jobs run detached: closing the terminal or losing SSH does not stop them.",
        examples="  medmerge jobs\n  medmerge jobs follow merge-20260101-120000\n  medmerge jobs cancel train",
    )
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
    parser.add_argument(
        "id", nargs="?", help="a job's id, or an unambiguous beginning of it; default: the newest"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    store = JobStore(workspace_of(args).jobs)
    if args.action == "list":
        return _list(store, args.json)
    job = _pick(store, args.id)
    if args.action == "show":
        print_json(as_dict(job)) if args.json else print(_show(job))
    elif args.action == "logs":
        text = job.log_path.read_text(encoding="utf-8", errors="replace") if job.log_path.is_file() else ""
        sys.stdout.write(json.dumps({"log": text}) + "\n" if args.json else plain(text, lines=True))
    elif args.action == "follow":
        job = follow(job, store, cancel_on_interrupt=False)
        return report(job, args.json, render=lambda result: _show(job))
    elif args.action == "cancel":
        stopped = cancel(job)
        job = store.get(job.id)
        if args.json:
            print_json({"cancelled": stopped, **as_dict(job)})
        else:
            print(f"{job.id}: {job.state}" if stopped else f"{job.id} had already ended ({job.state})")
    return 0


def as_dict(job: JobView) -> dict[str, Any]:
    """A job as JSON: what was asked, its state, progress and result."""
    return {
        "id": job.id,
        "kind": job.spec.kind,
        "title": job.spec.title,
        "state": job.state,
        "exit_code": job.exit_code,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "pid": job.pid,
        "progress": job.progress,
        "error": job.error,
        "hint": job.hint,
        "result": job.result,
        "folder": str(job.folder),
        "command": job.spec.command,
    }


def _pick(store: JobStore, job_id: str | None) -> JobView:
    if job_id:
        return store.get(job_id)
    ids = store.ids()
    if not ids:
        raise BadInputError(f"there are no jobs in {store.folder}", "long commands start one with --detach")
    return store.get(ids[0])


def _list(store: JobStore, as_json: bool) -> int:
    jobs = store.list()
    if as_json:
        print_json({"jobs": [as_dict(job) for job in jobs]})
    elif not jobs:
        print(f"No jobs in {store.folder}. Long commands start one with --detach.")
    else:
        rows = [[job.id, job.state, _age(job), plain(job.spec.title), _where(job)] for job in jobs]
        print(table(["job", "state", "took", "what", "where"], rows))
    return 0


def _age(job: JobView) -> str:
    return duration((job.finished or time.time()) - job.started) if job.started else ""


def _where(job: JobView) -> str:
    if job.state == "failed":
        return job.error[:60]
    return progress_text(job.progress) if not job.final and job.progress else ""


def _show(job: JobView) -> str:
    lines = [
        f"{job.id}  {job.state}",
        f"  what     {plain(job.spec.title)}",
        f"  command  {plain(job.spec.command)}",
    ]
    if job.progress and not job.final:
        lines.append(f"  where    {progress_text(job.progress)}")
    if job.error:
        lines.append(
            f"  error    {plain(job.error)}" + (f"\n  →        {plain(job.hint)}" if job.hint else "")
        )
    lines.append(f"  folder   {job.folder}")
    return "\n".join(lines)
