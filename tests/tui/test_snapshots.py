"""Few frozen pictures: the screens a newcomer sees first, small and middle-sized. No clocks, no animation.

After a wanted change: pytest tests/tui/test_snapshots.py --snapshot-update, and look at what changed.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.tui.fake_backend import BAD_MERGE, CHOSEN, FakeBackend, show, text_of, until
from tests.tui.test_report import WHOLE
from tui.app import MedmergeApp
from tui.screens.report import ReportScreen

SIZES = [(80, 24), (120, 36)]


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])
def test_home(snap_compare: Any, size: tuple[int, int]) -> None:
    async def settle(pilot: Pilot[None]) -> None:
        await show(pilot, "home")
        await until(pilot, lambda: "best" in text_of(app, "#next"))

    app = MedmergeApp(FakeBackend(), CHOSEN)
    assert snap_compare(app, terminal_size=size, run_before=settle)


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])
def test_merge(snap_compare: Any, size: tuple[int, int]) -> None:
    async def settle(pilot: Pilot[None]) -> None:
        await show(pilot, "merge")
        await until(
            pilot, lambda: "memory" in text_of(app, "#plan") and "verified" in text_of(app, "#verdict")
        )

    app = MedmergeApp(FakeBackend(), CHOSEN)
    assert snap_compare(app, terminal_size=size, run_before=settle)


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])
def test_report(snap_compare: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    async def settle(pilot: Pilot[None]) -> None:
        await show(pilot, "home")
        app.show_report(BAD_MERGE.path)
        await until(pilot, lambda: isinstance(app.screen, ReportScreen) and app.screen.is_mounted)
        await until(pilot, lambda: "29 of 30" in text_of(app, "#where"))

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    backend = FakeBackend()
    backend.reports = {BAD_MERGE.path: WHOLE}
    app = MedmergeApp(backend, CHOSEN)
    assert snap_compare(app, terminal_size=size, run_before=settle)
