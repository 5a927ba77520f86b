"""A job that reports progress for a given time; the terminal tests need one that lasts."""

from __future__ import annotations

import time
from typing import Any

from engine.jobs import EventWriter


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """params: seconds."""
    end = time.monotonic() + float(params["seconds"])
    while time.monotonic() < end:
        events.progress(params["seconds"] - (end - time.monotonic()), params["seconds"], "seconds")
        time.sleep(0.2)
    return {}
