"""Merge: weights by keys, typing and mouse; plan; run; the verdict in words."""

from __future__ import annotations

from dataclasses import replace

from tests.tui.fake_backend import FULL, PT, SFT, SQUARED, FakeBackend, job, show, text_of, until
from tui.app import MedmergeApp
from tui.snapshots import Selection
from tui.widgets.field import Field
from tui.widgets.slider import WeightSlider


def weights(app: MedmergeApp) -> tuple[float, float]:
    return app.screen.query_one("#pt", WeightSlider).value, app.screen.query_one("#sft", WeightSlider).value


async def test_arrow_keys_typing_and_ends(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await pilot.press("right", "right", "shift+left")
        assert weights(app) == (0.39, 0.7)
        await pilot.press(".", "1", "2", "5", "enter")
        assert weights(app)[0] == 0.125
        await pilot.press("down", "end")
        assert weights(app) == (0.125, 1.0)
        await pilot.press("0", ".", "4", "escape")  # leaves the number, not the screen
        assert weights(app) == (0.125, 1.0) and app.current_mode == "merge"
        await pilot.press("-", "9", "9", "enter")
        assert weights(app)[1] == 1.0  # nobody means -99


async def test_mouse_sets_and_drags_a_weight(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        slider = app.screen.query_one("#pt", WeightSlider)
        first, cells = slider._bar
        await pilot.mouse_down("#pt", offset=(first, 0))
        assert slider.value == 0.0
        await pilot.hover("#pt", offset=(first + cells - 1, 0))
        assert slider.value == 1.0
        await pilot.mouse_up("#pt", offset=(first + cells - 1, 0))
        await pilot.hover("#pt", offset=(first + 3, 0))
        assert slider.value == 1.0


async def test_the_name_follows_the_weights_until_it_is_typed(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        name = app.screen.query_one("#name", Field)
        assert name.value == "pt30-sft70-2"  # pt30-sft70 is there already
        await pilot.press("right")
        await until(pilot, lambda: name.value == "pt35-sft70")
        await pilot.press("n", "end", "x", "enter", "right")
        await pilot.pause()
        assert name.value == "pt35-sft70x"
        await pilot.press("m")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].params["recipe"]["output"]["path"] == "/ws/merges/pt35-sft70x"
        assert backend.started[0].params["recipe"]["adapters"]["pt"] == {"path": PT.path, "weight": 0.4}


async def test_merge_uses_the_weights_of_the_moment(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await pilot.press("right", "right", "m")
        await until(pilot, lambda: backend.started)
        recipe = backend.started[0].params["recipe"]
        assert recipe["adapters"]["pt"]["weight"] == 0.4
        assert recipe["output"] == {"path": "/ws/merges/pt40-sft70", "dtype": "bfloat16"}


async def test_plan_shows_cost_and_errors(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await until(pilot, lambda: "writes 29.5 GB" in text_of(app, "#plan"))
        assert "free 412.0 GB" in text_of(app, "#plan")
        backend.fail["plan"] = "adapter q_proj is [64, 64], and the base has [5120, 5120]"
        await pilot.press("right")
        await until(pilot, lambda: "[5120, 5120]" in text_of(app, "#plan"))


async def test_progress_then_verdict(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        backend.jobs = [job(7, title="merge x", done=3.0, total=10.0, unit="B", phase="merge")]
        await until(pilot, lambda: "30%" in text_of(app, "#verdict"))
        said = {
            "ok": False, "verdict": "swapped", "message": "pt and sft are swapped: found 0.700 / 0.300",
            "findings": [{"code": "swapped", "detail": "", "message": "pt and sft are swapped"}],
            "asked": {"pt": 0.3, "sft": 0.7}, "expected_weights": {"pt": 0.298, "sft": 0.695},
            "effective_weights": {"pt": 0.695, "sft": 0.298}, "residual": 0.057, "rounding_floor": 0.057,
            "exit_code": 1,
        }  # fmt: skip
        backend.finish("merge-7", exit_code=1, result={"verdict": said, "out": "/ws/merges/x.rejected"})
        await until(pilot, lambda: "swapped" in text_of(app, "#verdict"))
        told = text_of(app, "#verdict")
        assert "✗" in told and "0.30 / 0.70" in told and "0.6950 / 0.2980" in told


async def test_verdict_of_the_highlighted_merge(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await until(pilot, lambda: "✓ verified" in text_of(app, "#verdict"))
        app.screen.query_one("#list").focus()
        await pilot.press("down")
        await until(pilot, lambda: "applied twice" in text_of(app, "#verdict"))
        assert SQUARED.message in text_of(app, "#verdict")


async def test_verify_asks_the_merges_own_manifest(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await pilot.press("v")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].params == {"merged": "/ws/merges/pt30-sft70"}
        assert backend.started[0].command == "medmerge verify /ws/merges/pt30-sft70 --workspace /ws"


async def test_a_taken_name_is_refused(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await pilot.press("n", "ctrl+u", *"theirs", "enter", "m")
        await until(pilot, lambda: app._notifications)
        assert backend.started == []


async def test_nothing_chosen_says_what_to_do(backend: FakeBackend) -> None:
    backend.view = replace(FULL, adapters=())
    app = MedmergeApp(backend, Selection())
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "merge")
        assert "Choose a base" in text_of(app, "#plan")
        await pilot.press("m")
        await until(pilot, lambda: app._notifications)
        assert backend.started == []
