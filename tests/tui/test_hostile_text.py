"""Text from files and models is data: no escape sequence reaches the terminal, no markup is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.tui.fake_backend import BASE, CHOSEN, FULL, MERGE, PT, SFT, TABLE, FakeBackend, job, show, until
from tui.app import MedmergeApp
from tui.screens.report import ReportScreen
from tui.snapshots import (
    FindingView,
    JobFeed,
    ModuleView,
    Piece,
    PreviewView,
    SampleView,
    TrainRun,
    VerdictView,
)
from tui.widgets.stream import StreamPane, Turn

EVIL = "\x1b]0;owned\x07\x1b[31m[bold red]x[/]\u202egnp.exe[@click=app.quit]c[/]\x9b5n\r"
NAMES = ("home", "adapters", "merge", "chat", "train", "evaluate", "jobs")


def drawn(app: MedmergeApp) -> str:
    """Every character on the screen."""
    return "\n".join(
        "".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips()
    )


def assert_tame(app: MedmergeApp) -> None:
    text = drawn(app)
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}


async def test_names_errors_logs_and_verdicts_are_tame_on_every_screen() -> None:
    bad = VerdictView(
        False, EVIL, EVIL, {EVIL: 0.3}, {EVIL: 0.3}, {EVIL: 0.1}, findings=(FindingView(EVIL, EVIL, EVIL),),
        warnings=(EVIL,), dtype=EVIL, modules=(ModuleView(EVIL, 1, 1),), loss={EVIL: 0.1},
    )  # fmt: skip
    view = replace(
        FULL,
        root=f"/ws/{EVIL}",
        models=(replace(BASE, name=EVIL),),
        adapters=(
            replace(PT, name=EVIL, warning=EVIL, targets=(EVIL,), template=EVIL),
            replace(SFT, error=EVIL, hint=EVIL),
        ),
        merges=(replace(MERGE, name=EVIL, verdict=bad, weights=((EVIL, 0.3),)),),
        problems=(EVIL,),
    )
    jobs = [
        job(2, "train", title=EVIL, message=EVIL, phase=EVIL, command=EVIL, total=2.0, done=1.0, unit=EVIL),
        job(1, "merge", "failed", title=EVIL, error=EVIL, hint=EVIL),
    ]
    backend = FakeBackend(view, jobs)
    backend.feeds = {"train-2": JobFeed(log=(EVIL, f"! {EVIL}"))}
    told = {"preset": EVIL, "output": f"/ws/{EVIL}", "kind": EVIL}
    backend.trained = (
        TrainRun("/ws/runs/x", EVIL, "", 1.0, told, {EVIL: ((1.0, 1.0),), "loss": ((1.0, 1.0),)}),
    )
    backend.preview_view = PreviewView(
        (SampleView(EVIL, 1, 1, 0, (Piece(EVIL, True),), EVIL),), EVIL, warnings=(EVIL,)
    )
    backend.rows = tuple(replace(row, model=EVIL, task=EVIL, detail=EVIL, method=EVIL) for row in TABLE[:4])
    app = MedmergeApp(backend, replace(CHOSEN, sft=""))
    async with app.run_test(size=(120, 36)) as pilot:
        for name in NAMES:
            await show(pilot, name)
            await pilot.pause(0.1)
            assert_tame(app)
            assert "[bold red]" in drawn(app) or name in ("chat", "merge"), f"{name}: markup was read"
            if name == "train":
                await pilot.press("p")
                await until(pilot, lambda: backend.previews)
                await pilot.pause(0.1)
                assert_tame(app)
        app.show_report(MERGE.path)
        await until(pilot, lambda: isinstance(app.screen, ReportScreen))
        await pilot.pause(0.1)
        assert_tame(app)
        assert "[bold red]" in drawn(app)
        assert app.is_running


async def test_model_output_is_tame_and_its_markup_is_shown() -> None:
    app = MedmergeApp(FakeBackend(), CHOSEN)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        pane = app.screen.query_one("#left-pane", StreamPane)
        turn = pane.add(Turn("answer"))
        for piece in ("\x1b", "]52;c;", "aGk=", "\x07", "[bold]", "wide 日本語 ", "\U0001f9ea" * 40):
            turn.text += piece  # an escape sequence may come in pieces
            pane.changed()
        await until(pilot, lambda: "[bold]" in drawn(app))
        assert_tame(app)
        assert "日本語" in drawn(app)


async def test_notifications_do_not_read_markup() -> None:
    backend = FakeBackend()
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(120, 36), notifications=True) as pilot:
        await show(pilot, "merge")
        backend.fail["start"] = EVIL
        await pilot.press("m")
        await until(pilot, lambda: "[bold" in drawn(app))
        assert_tame(app)


def test_a_path_with_quotes_stays_one_word_of_the_command() -> None:
    import shlex

    from tui import actions

    mixture = actions.Mixture("/b '; rm -rf $HOME", {"pt": "/a b"}, {"pt": 0.3}, "/out\nx")
    words = shlex.split(actions.merge(Path("/w s"), mixture).command)
    assert "/b '; rm -rf $HOME" in words and "pt=/a b:0.3" in words and "/out\nx" in words
