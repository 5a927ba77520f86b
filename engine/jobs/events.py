"""The event stream of a job: one JSON object a line in events.jsonl, written by one process, read by many.

Types: `started`, `progress` (done, total, unit, eta_s, rate, message), `metric` (step and numbers, for
curves), `log` (message), `warning` (message), `row` (a finished piece of the result, for live tables),
`result` (the target's return value), `error` (message, hint, exit_code), `finished` (state, exit_code).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl: Unix time in seconds, type, and the rest of the line as a dict."""

    time: float
    type: str
    data: dict[str, Any]


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become the strings "nan", "inf", "-inf" (readers leave a gap)."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and callable(value.item):  # numpy and torch scalars
        return _plain(value.item())
    return value


class EventWriter:
    """Appends events. With `path=None` events are kept in `self.kept` only (tests, library use).

    Progress events are thinned to at most ten a second (the last of a phase is always written), and carry
    rate and ETA measured over the last 30 s of the phase. A disk that is full loses events, never the job.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.kept: list[Event] = []
        # A file's name may be no UTF-8: its odd bytes, "\udcff" in Python, are written as that JSON escape.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace") if path else None
        self._phase = ""
        self._marks: deque[tuple[float, float]] = deque()
        self._last_progress = 0.0

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def emit(self, type_: str, **data: Any) -> None:
        """Append one event of any type; values must be JSON-able after `_plain`."""
        now = time.time()
        data = _plain(data)
        if self.path is None:
            self.kept.append(Event(now, type_, data))
        if self._file:
            try:
                self._file.write(
                    json.dumps({"t": round(now, 3), "type": type_, **data}, ensure_ascii=False) + "\n"
                )
                self._file.flush()
            except OSError:  # the disk is full: the work itself matters more than its log
                pass

    def log(self, message: str) -> None:
        self.emit("log", message=message)

    def warning(self, message: str) -> None:
        self.emit("warning", message=message)

    def metric(self, step: float, **values: Any) -> None:
        """A point on curves: `step` is x, every other number a series (loss, eval_loss, lr, tok_s, ...)."""
        self.emit("metric", step=step, **values)

    def row(self, **values: Any) -> None:
        """A finished piece of a result table, shown live."""
        self.emit("row", **values)

    def progress(
        self, done: float, total: float | None = None, unit: str = "", message: str = "", phase: str = ""
    ) -> None:
        """How far the current phase is. ETA in seconds comes from the rate over the last 30 s."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase = phase
            self._marks.clear()
            self._last_progress = 0.0
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[0][0] > 30:
            self._marks.popleft()
        last = total is not None and done >= total
        if not last and now - self._last_progress < 0.1:
            return
        self._last_progress = now
        seconds, first = now - self._marks[0][0], self._marks[0][1]
        rate = (done - first) / seconds if seconds > 0.05 else None
        eta = (total - done) / rate if rate and total is not None else None
        self.emit(
            "progress", done=done, total=total, unit=unit, message=message, phase=phase, rate=rate, eta_s=eta
        )


class EventTail:
    """Reads events.jsonl as it grows. `poll()` returns the new whole lines; a torn last line waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def poll(self) -> list[Event]:
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:  # replaced by a shorter file: start over
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            try:
                raw = json.loads(line)
                events.append(Event(float(raw.pop("t")), str(raw.pop("type")), raw))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged line is skipped; the next ones are still good
        return events
