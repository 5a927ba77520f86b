"""Few frozen pictures: the screens a newcomer sees first, small and middle-sized. No clocks, no animation.

After a wanted change: pytest tests/tui/test_snapshots.py --snapshot-update, and look at what changed.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.tui.fake_backend import BAD_MERGE, CHOSEN, FakeBackend, show, text_of, until
from tests.tui.test_evaluate_screen import FIRST, OTHER
from tests.tui.test_report import WHOLE
from tui.app import MedmergeApp
from tui.screens.evaluate_form import EvaluateFormScreen
from tui.screens.report import ReportScreen
from tui.screens.samples import SamplesScreen
from tui.snapshots import Points, TrainRun

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
def test_train(snap_compare: Any, size: tuple[int, int]) -> None:
    def curves(start: float, end: float, steps: int) -> dict[str, Points]:
        fall = [(float(step), end + (start - end) * 0.97**step) for step in range(1, steps + 1)]
        loss = tuple((step, value + 0.1 * math.sin(step * 1.7)) for step, value in fall)
        numbers = {
            "lr": 3.1e-4,
            "grad_norm": 0.52,
            "tok_s": 171.0,
            "tokens": 204_800.0,
            "padding": 0.021,
            "memory": 1.9e9,
        }
        held_out = tuple(point for point in fall if point[0] % 40 == 0)
        last = {name: ((float(steps), value),) for name, value in numbers.items()}
        return {"loss": loss, "eval_loss": held_out, **last}

    def run(name: str, kind: str, created: float, steps: int, *, done: bool) -> TrainRun:
        start, end = (2.5, 1.7) if kind == "sft" else (2.8, 2.3)
        config = {"kind": kind, "output": f"/ws/adapters/{name}"}
        whole = {"adapter": f"/ws/adapters/{name}", "finished": created} if done else {}
        return TrainRun(
            f"/ws/runs/{name}",
            name,
            kind,
            created,
            config,
            curves(start, end, steps),
            steps=200,
            resumable=True,
            **whole,
        )

    async def settle(pilot: Pilot[None]) -> None:
        await show(pilot, "train")
        await until(pilot, lambda: "stopped at step 163" in text_of(app, "#status"))
        await until(pilot, lambda: "demo-pt" in str(app.screen.query_one("#preset").render()))
        await until(pilot, lambda: "not done yet" in text_of(app, "#audit"))
        await pilot.pause(0.2)

    backend = FakeBackend()
    backend.trained = (
        run("sft-rank32", "sft", 3.0, 163, done=False),
        run("sft-rank16", "sft", 2.0, 200, done=True),
        run("pt-medcorpus", "pt", 1.0, 200, done=True),
    )
    app = MedmergeApp(backend, CHOSEN)
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


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])
def test_evaluate(snap_compare: Any, size: tuple[int, int]) -> None:
    async def settle(pilot: Pilot[None]) -> None:
        await show(pilot, "evaluate")
        await until(pilot, lambda: "BLEU" in text_of(app, "#words") and "floor" in text_of(app, "#marks"))
        await pilot.press("down")
        await until(pilot, lambda: "PT30" in text_of(app, "#words"))
        await pilot.pause(0.2)

    app = MedmergeApp(FakeBackend(), CHOSEN)
    assert snap_compare(app, terminal_size=size, run_before=settle)


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])
def test_evaluate_samples(snap_compare: Any, size: tuple[int, int]) -> None:
    async def settle(pilot: Pilot[None]) -> None:
        await show(pilot, "evaluate")
        await until(pilot, lambda: "BLEU" in text_of(app, "#words"))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, SamplesScreen) and app.screen.is_mounted)
        await until(pilot, lambda: "alone" in text_of(app, "#first"))
        await pilot.press("d", "down", "down", "enter")
        await until(pilot, lambda: "alone" in text_of(app, "#second"))
        await pilot.pause(0.2)

    backend = FakeBackend()
    backend.sets = {"SFT": FIRST, "PT": OTHER}
    app = MedmergeApp(backend, CHOSEN)
    assert snap_compare(app, terminal_size=size, run_before=settle)


def test_evaluate_form(snap_compare: Any) -> None:
    async def settle(pilot: Pilot[None]) -> None:
        await show(pilot, "evaluate")
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, EvaluateFormScreen) and app.screen.is_mounted)
        await until(pilot, lambda: "1,580 samples" in text_of(app, "#sum"))
        await pilot.press("down", "down")
        await pilot.pause(0.2)

    app = MedmergeApp(FakeBackend(), CHOSEN)
    assert snap_compare(app, terminal_size=(80, 24), run_before=settle)
