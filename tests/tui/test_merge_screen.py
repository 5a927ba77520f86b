"""Merge: weights by keys, typing and mouse; plan; run; the verdict in words."""

from __future__ import annotations

from dataclasses import replace

from tests.tui.fake_backend import (
    BAD_MERGE,
    FORECAST,
    FULL,
    PT,
    SQUARED,
    FakeBackend,
    job,
    show,
    text_of,
    until,
)
from tui.app import MedmergeApp
from tui.screens.dialogs import PickSeveralScreen
from tui.screens.report import ReportScreen
from tui.snapshots import Selection
from tui.widgets.choice import Several
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


async def test_the_cost_is_measured_once_the_weights_rest(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await until(pilot, lambda: "about 38 s" in text_of(app, "#plan"))
        told = text_of(app, "#plan")
        assert (
            "memory 190 MB" in told
            and "PT 0.299 of 0.30 (−0.4%)" in told
            and "SFT 0.695 of 0.70 (−0.7%)" in told
        )
        assert "26% of elements unchanged" in told and not app.screen._finer()  # type: ignore[attr-defined]
        await pilot.press("right")  # other weights: what was measured is of the past at once
        await until(pilot, lambda: "0.299" not in text_of(app, "#plan"))
        await pilot.press("left")  # and known again without measuring anew
        await until(pilot, lambda: "PT 0.299 of 0.30" in text_of(app, "#plan"))


async def test_a_coarse_dtype_is_said_and_the_finer_one_offered(
    app: MedmergeApp, backend: FakeBackend
) -> None:
    backend.forecasts = {"bfloat16": {**FORECAST, "lost": {"pt": 0.12, "sft": 0.01}}}
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "merge")
        await pilot.press("f")  # nothing is known yet, and nothing happens
        await until(pilot, lambda: "(−12.0%)" in text_of(app, "#plan"))
        assert "fp16 or fp32 keep more" in text_of(app, "#plan")
        await pilot.press("f")
        await until(pilot, lambda: "fp16 keeps PT 0.299" in text_of(app, "#plan"))
        assert "keep more" not in text_of(app, "#plan")
        await pilot.press("m")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].params["recipe"]["output"]["dtype"] == "float16"
        assert backend.started[0].params["recipe"]["output"]["path"] == "/ws/merges/pt30-sft70-fp16"


async def test_methods_have_their_own_parameters(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        name = app.screen.query_one("#name", Field)
        seen = [slider for slider in ("t", "density", "seed") if app.screen.query_one(f"#{slider}").display]
        assert seen == []
        app.screen.query_one("#method").focus()
        await pilot.press("right", "right")  # slerp: from the one adapted model to the other
        await until(pilot, lambda: name.value == "pt100-sft100-slerp50")
        assert weights(app) == (1.0, 1.0) and app.screen.query_one("#t").display
        await pilot.press("down", ".", "2", "enter")
        await until(pilot, lambda: name.value == "pt100-sft100-slerp20")
        assert app.screen.mixture.recipe()["parameters"] == {"t": 0.2}  # type: ignore[attr-defined]
        await pilot.press("-", "1", "enter")  # t lies between 0 and 1
        assert app.screen.mixture.recipe()["parameters"] == {"t": 0.2}  # type: ignore[attr-defined]
        app.screen.query_one("#method").focus()
        await pilot.press("right", "right", "right")  # dare ties; the weights are what they were
        await until(pilot, lambda: weights(app) == (0.3, 0.7))
        app.screen.query_one("#seed").focus()
        await pilot.press("end", "backspace", "4", "2", "x", "enter")
        await until(pilot, lambda: name.value == "pt30-sft70-dare_ties50-seed42")
        await pilot.press("m")
        await until(pilot, lambda: backend.started)
        recipe = backend.started[0].params["recipe"]
        assert recipe["method"] == "dare_ties" and recipe["parameters"] == {"density": 0.5, "seed": 42}
        assert "--method dare_ties --density 0.5 --seed 42" in backend.started[0].command


async def test_gguf_types_are_part_of_the_recipe(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        app.screen.query_one("#gguf").focus()
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, PickSeveralScreen))
        await pilot.press("space", "down", "down", "space", "enter")
        await until(pilot, lambda: app.screen.query("#gguf"))
        await pilot.press("m")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].params["recipe"]["output"]["gguf"] == ["q4_k_m", "q8_0"]
        assert "--gguf q4_k_m --gguf q8_0" in backend.started[0].command


async def test_a_merged_adapter_goes_to_the_adapters(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "merge")
        app.screen.query_one("#gguf", Several).value = "q8_0"
        app.screen.query_one("#kind").focus()
        await pilot.press("right")
        await until(pilot, lambda: "into adapters/" in text_of(app, "#plan"))
        assert app.screen.query_one("#dtype").disabled and app.screen.query_one("#gguf").disabled
        await pilot.press("m")
        await until(pilot, lambda: backend.started)
        output = backend.started[0].params["recipe"]["output"]
        assert output == {"path": "/ws/adapters/pt30-sft70-adapter", "kind": "adapter"}


async def test_the_finished_merge_is_highlighted_and_r_reports_it(
    app: MedmergeApp, backend: FakeBackend
) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await pilot.press("right", "m")
        await until(pilot, lambda: len(app.jobs) == 1)
        made = replace(BAD_MERGE, path="/ws/merges/pt35-sft70", name="pt35-sft70", created=0.5)
        backend.view = replace(FULL, merges=(*FULL.merges, made))
        said = {"ok": True, "verdict": "ok", "message": "every element is right"}
        backend.finish(app.jobs[0].id, result={"out": made.path, "verdict": said})
        await until(pilot, lambda: app.screen.rows.current == made)  # type: ignore[attr-defined]
        assert "every element is right" in text_of(app, "#verdict")
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, ReportScreen) and app.screen.path == made.path)


async def test_nothing_chosen_says_what_to_do(backend: FakeBackend) -> None:
    backend.view = replace(FULL, adapters=())
    app = MedmergeApp(backend, Selection())
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "merge")
        assert "Choose a base" in text_of(app, "#plan")
        await pilot.press("m")
        await until(pilot, lambda: app._notifications)
        assert backend.started == []
