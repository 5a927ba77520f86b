"""Evaluate: curves of the sweep, tables that fill, numbers with their intervals, starting runs."""

from __future__ import annotations

from dataclasses import replace

from textual.widgets import DataTable

from tests.tui.fake_backend import FULL, TABLE, FakeBackend, job, metric, show, text_of, until
from tui import curves, metrics
from tui.app import MedmergeApp
from tui.snapshots import JobFeed
from tui.widgets.plot import PlotPanel


def table(app: MedmergeApp) -> list[list[str]]:
    view = app.screen.query_one("#table", DataTable)
    return [[str(cell) for cell in view.get_row_at(row)] for row in range(view.row_count)]


async def test_the_sweep_is_the_first_thing_seen(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "evaluate")
        await until(pilot, lambda: app.screen.query_one("#plots").display)
        scores = app.screen.query_one("#scores", PlotPanel).shown
        text = app.screen.query_one("#perplexity", PlotPanel).shown
        assert scores and text
        bleu, accuracy, floor, chance = scores
        assert bleu.points == ((0.0, 25.1), (0.3, 14.4), (0.5, 10.3), (1.0, 1.0))
        assert bleu.band[0] == (0.0, 24.1, 26.1) and not bleu.dotted
        assert floor.points == ((0.0, 8.2), (0.3, 4.7), (0.5, 4.0), (1.0, 1.1)) and floor.dotted
        assert [y for _, y in accuracy.points] == [26.0, 26.3, 26.5, 27.0]
        assert {y for _, y in chance.points} == {25.0} and chance.dotted
        assert [y for _, y in text[0].points] == [11.5, 8.6, 7.1, 6.0]


async def test_table_has_intervals_floors_and_marks(app: MedmergeApp) -> None:
    async with app.run_test(size=(160, 40)) as pilot:
        await show(pilot, "evaluate")
        await until(pilot, lambda: len(table(app)) == 4)
        first, last = table(app)[0], table(app)[3]
        assert first[0] == "SFT" and first[1] == "25.1 [24.1 26.1] (8.2)  "
        assert last[0] == "PT" and last[1].endswith("!"), "BLEU 1.0 is under its floor 1.1"
        assert first[3].endswith("!"), "an interval that holds chance is at chance"
        assert "25.1" in text_of(app, "#words") and "n 48" in text_of(app, "#words")
        await pilot.press("v")
        await until(pilot, lambda: table(app)[0][1].strip() == "2/10")
        await pilot.press("v")
        await until(pilot, lambda: len(table(app)[0]) == 5)


async def test_the_table_fills_while_the_job_runs(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.rows = ()
    backend.view = replace(FULL, runs=())
    backend.jobs = [job(1, "sweep", params={"out": "/ws/runs/new"}, done=1.0, total=20.0)]
    async with app.run_test(size=(160, 40)) as pilot:
        await show(pilot, "evaluate")
        await until(pilot, lambda: "first rows come" in text_of(app, "#empty"))
        told = [row.to_dict() for row in TABLE if row.metric == "bleu"]
        backend.feeds = {"sweep-1": JobFeed(rows=tuple(told[:1]))}
        await until(pilot, lambda: len(table(app)) == 1)
        again = {**told[0], "value": 24.0}  # told anew when another seed was done
        backend.feeds = {"sweep-1": JobFeed(rows=(told[0], again, told[1]))}
        await until(pilot, lambda: len(table(app)) == 2)
        assert table(app)[0][1].startswith("24.0")


async def test_a_run_that_cannot_be_read_says_why(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.fail["table"] = "cells.json: its format is 'x'"
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "evaluate")
        await until(pilot, lambda: "cells.json" in text_of(app, "#empty"))


def test_few_samples_are_shown_as_counts_and_tests_as_signs() -> None:
    few = metric(0.3, "refusal_rate", 100.0, "safety/violence", n=5, low=47.8, high=100.0)
    assert metrics.cell_text(few).strip() == "5/5"
    alike = metric(0.3, "bleu", 14.0, floor=4.0, p=0.4, versus="SFT")
    assert metrics.cell_text(alike).endswith("≈")
    assert "not distinguishable from SFT (p = 0.4)" in metrics.cell_words(alike).plain
    assert metrics.cell_text(None) == "·"
    assert metrics.cell_text(replace(alike, value=None)) == "–"


def test_one_mixture_makes_no_curve() -> None:
    assert curves.curves_of(TABLE[:4]) == {}
    assert set(curves.curves_of(TABLE)) == {"scores", "perplexity", "refusals"}
