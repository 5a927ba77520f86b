"""Few frozen pictures: the screens a newcomer sees first, small and middle-sized. No clocks, no animation.

After a wanted change: pytest tests/tui/test_snapshots.py --snapshot-update, and look at what changed.
"""

from __future__ import annotations

from typing import Any

import pytest
from textual.pilot import Pilot

from tests.tui.fake_backend import CHOSEN, FakeBackend, show, text_of, until
from tui.app import MedmergeApp

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
            pilot, lambda: "writes" in text_of(app, "#plan") and "verified" in text_of(app, "#verdict")
        )

    app = MedmergeApp(FakeBackend(), CHOSEN)
    assert snap_compare(app, terminal_size=size, run_before=settle)
