"""Adapters and jobs: what is in the lists, what is said of it, what the keys do."""

from __future__ import annotations

from dataclasses import replace

from engine.template_check import Trained
from tests.tui.fake_backend import (
    BASE,
    CHOSEN,
    EMPTY,
    FULL,
    MISFIT,
    OLD,
    PT,
    SFT,
    FakeBackend,
    job,
    show,
    text_of,
    until,
)
from tui.app import MedmergeApp
from tui.screens.adapters import AdaptersScreen
from tui.screens.dialogs import ConfirmScreen, TextScreen
from tui.screens.jobs import JobsScreen
from tui.snapshots import JobFeed, Selection


def adapters(app: MedmergeApp) -> AdaptersScreen:
    assert isinstance(app.screen, AdaptersScreen)
    return app.screen


def jobs(app: MedmergeApp) -> JobsScreen:
    assert isinstance(app.screen, JobsScreen)
    return app.screen


async def test_adapters_are_listed_usable_first_with_their_reason(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "adapters")
        rows = adapters(app).rows
        names = [row.name for row in rows.rows]
        assert names == ["pt-medcorpus", "sft-medinstruct", "sft-old", "pt-small", "pickled"]
        drawn = [str(rows.get_option_at_index(index).prompt) for index in range(5)]
        assert "✓" in drawn[0] and "!" in drawn[2] and "✗" in drawn[3] and "pickle" in drawn[4]
        await until(pilot, lambda: "by layer, 0 to 39" in text_of(app, "#detail"))
        assert "clean, 0 leaks" in text_of(app, "#detail")
        rows.choose(MISFIT.path)
        await until(pilot, lambda: "[5120, 5120]" in text_of(app, "#detail"))
        rows.choose(OLD.path)
        await until(pilot, lambda: "names another base" in text_of(app, "#detail"))


async def test_the_base_an_adapter_was_trained_on_is_said() -> None:
    for same, words in (
        (True, "same hash as the chosen base"),
        (False, "trained on first: the chosen base has another hash"),
        (None, "trained on first, hash not compared yet"),
    ):
        row = replace(PT, trained_on="first", same_base=same, trained=Trained("pt", plain=True))
        app = MedmergeApp(FakeBackend(replace(FULL, adapters=(row,))), CHOSEN)
        async with app.run_test(size=(120, 36)) as pilot:
            await show(pilot, "adapters")
            await until(
                pilot, lambda app=app, words=words: words in " ".join(text_of(app, "#detail").split())
            )
            assert "none: trained on plain text" in text_of(app, "#detail")


async def test_choosing_pt_and_sft(backend: FakeBackend) -> None:
    app = MedmergeApp(backend, Selection(BASE.path))
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "adapters")
        await pilot.press("down", "s")
        await until(pilot, lambda: app.selection.sft == SFT.path)
        assert app.selection.pt == PT.path, "the only PT adapter that fits was chosen at the start"
        await pilot.press("up", "p")
        await until(pilot, lambda: app.selection.pt == "")
        await pilot.press("p")
        await until(pilot, lambda: app.selection.pt == PT.path)
        await pilot.press("p")
        await until(pilot, lambda: app.selection.pt == "")
        adapters(app).rows.choose(MISFIT.path)
        await pilot.press("p")
        await until(pilot, lambda: app._notifications)
        assert app.selection.pt == "", "an adapter that does not fit cannot be chosen"


async def test_the_chosen_base_is_asked_about(backend: FakeBackend) -> None:
    other = replace(BASE, path="/ws/bases/other", name="other")
    broken = replace(BASE, path="/ws/bases/broken", name="broken", error="config.json is missing")
    backend.view = replace(FULL, models=(BASE, other, broken))
    app = MedmergeApp(backend, Selection())
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "adapters")
        assert "none chosen" in text_of(app, "#base")
        await pilot.press("b", "down", "enter")
        await until(pilot, lambda: app.selection.base == other.path)
        await pilot.press("b", "down", "enter")
        await until(pilot, lambda: app._notifications)
        assert app.selection.base == other.path


async def test_find_filters_and_escape_shows_all(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "adapters")
        await pilot.press("/", *"sft", "enter")
        await until(pilot, lambda: len(adapters(app).rows.rows) == 2)
        await pilot.press("/", *"zzz")
        await until(pilot, lambda: "no adapter has" in str(adapters(app).rows.get_option_at_index(0).prompt))
        await pilot.press("escape", "escape")
        await until(pilot, lambda: len(adapters(app).rows.rows) == 5)
        assert app.current_mode == "adapters"


async def test_an_empty_workspace_says_what_to_do(backend: FakeBackend) -> None:
    backend.view = EMPTY
    app = MedmergeApp(backend, Selection())
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "adapters")
        assert "/ws/adapters" in str(adapters(app).rows.get_option_at_index(0).prompt)
        await show(pilot, "jobs")
        assert "No jobs yet" in str(jobs(app).rows.get_option_at_index(0).prompt)
        await show(pilot, "evaluate")
        assert "choose them first" in text_of(app, "#empty")


async def test_nothing_jumps_while_jobs_change(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.jobs = [
        job(3),
        job(2, "train", done=10, total=100, unit="steps"),
        job(1, state="done", exit_code=0),
    ]
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "jobs")
        await until(pilot, lambda: len(jobs(app).rows.rows) == 3)
        await pilot.press("down")
        backend.jobs = [job(4), *backend.jobs]
        await until(pilot, lambda: len(jobs(app).rows.rows) == 4)
        current = jobs(app).rows.current
        assert current is not None and current.id == "train-2", "the highlight stays on its job"
        backend.jobs[2] = replace(backend.jobs[2], done=50.0)
        await until(pilot, lambda: "50%" in str(jobs(app).rows.get_option_at_index(2).prompt))
        assert jobs(app).rows.highlighted == 2


async def test_cancel_asks_first(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.jobs = [job(1)]
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "jobs")
        await until(pilot, lambda: jobs(app).rows.current)
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, JobsScreen))
        assert backend.cancelled == []
        await pilot.press("x", "y")
        await until(pilot, lambda: backend.cancelled == ["merge-1"])
        await until(pilot, lambda: jobs(app).rows.rows[0].state == "cancelled")
        await pilot.press("x")
        await pilot.pause()
        assert isinstance(app.screen, JobsScreen), "an ended job is not cancelled again"


async def test_log_events_and_whole_log(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.jobs = [job(1, "train")]
    backend.feeds = {
        "train-1": JobFeed({"loss": ((1, 3.0), (2, 2.5))}, {"loss": 2.5}, (), ("! careful", "going"))
    }
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "jobs")
        await until(pilot, lambda: "! careful" in text_of(app, "#detail"))
        assert "2.500" in text_of(app, "#detail")
        await pilot.press("l")
        await until(pilot, lambda: isinstance(app.screen, TextScreen))
        assert "line two" in text_of(app, "#text")


async def test_enter_opens_the_screen_of_a_job(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.jobs = [job(1, "sweep")]
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "jobs")
        await until(pilot, lambda: jobs(app).rows.current)
        await pilot.press("enter")
        await until(pilot, lambda: app.current_mode == "evaluate")
