"""What holds on every screen: moving about, keys, help, palette, commands, themes, small and large terminals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tui.fake_backend import BASE, CHOSEN, EMPTY, FULL, PT, SFT, FakeBackend, job, show, text_of, until
from tui.app import MedmergeApp
from tui.screens.dialogs import CommandScreen
from tui.screens.help import HelpScreen
from tui.snapshots import Selection
from tui.widgets.field import Field
from tui.widgets.keybar import MAX_KEYS, KeyBar
from tui.widgets.topbar import SCREENS

NAMES = [name for name, _ in SCREENS]


async def test_digits_and_brackets_switch_screens(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: app.overview is not None)
        for number, name in enumerate(NAMES, 1):
            app.set_focus(None)
            await pilot.press(str(number))
            await until(pilot, lambda name=name: app.current_mode == name)
        await show(pilot, "home")
        await pilot.press("]")
        await until(pilot, lambda: app.current_mode == "adapters")
        await pilot.press("[", "[")
        await until(pilot, lambda: app.current_mode == "jobs")


async def test_escape_goes_home_and_never_quits(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        for name in NAMES:
            await show(pilot, name)
            await pilot.press("escape", "escape", "escape")
            await until(pilot, lambda: app.current_mode == "home")
        assert app.is_running


@pytest.mark.parametrize("size", [(80, 24), (240, 60)])
async def test_footer_has_at_most_seven_keys_and_always_help(app: MedmergeApp, size: tuple[int, int]) -> None:
    async with app.run_test(size=size) as pilot:
        for name in NAMES:
            await show(pilot, name)
            bar = app.screen.query_one(KeyBar)
            drawn = bar.render().plain
            assert 1 <= len(bar.shown()) <= MAX_KEYS and len(drawn) <= size[0]
            if not isinstance(app.focused, Field):
                assert "? help" in drawn, name


async def test_help_lists_the_keys_of_the_screen(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 60)) as pilot:
        for name in NAMES:
            await show(pilot, name)
            app.set_focus(None)
            below = app.screen
            await pilot.press("?")
            await until(pilot, lambda: isinstance(app.screen, HelpScreen))
            assert isinstance(app.screen, HelpScreen)
            told = app.screen.table().plain
            for binding in type(below).BINDINGS:
                assert binding.description in told  # type: ignore[union-attr]
            assert "copy as command" in told and "quit" in told
            await pilot.press("escape")
            await until(pilot, lambda below=below: app.screen is below)


async def test_quit_key_ends_the_app(app: MedmergeApp) -> None:
    async with app.run_test() as pilot:
        await show(pilot, "home")
        await pilot.press("q")
        await pilot.pause()
    assert app.return_code == 0


async def test_copy_as_command_shows_it_and_writes_it(app: MedmergeApp, own_state: Path) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await pilot.press("c")
        await until(pilot, lambda: isinstance(app.screen, CommandScreen))
        assert isinstance(app.screen, CommandScreen)
        written = (own_state / "medmerge" / "command.sh").read_text()
        assert written.strip() == app.screen.line == app.clipboard
        assert f"--base {BASE.path} --adapter pt={PT.path}:0.3 --adapter sft={SFT.path}:0.7" in written


async def test_commands_have_absolute_parts_a_shell_reads(app: MedmergeApp) -> None:
    import shlex

    async with app.run_test(size=(120, 36)) as pilot:
        for name in ("adapters", "merge", "chat", "train", "evaluate"):
            await show(pilot, name)
            action = app.screen.command()  # type: ignore[attr-defined]
            assert action is not None and shlex.split(action.command)[0] == "medmerge", name


async def test_selection_is_remembered(backend: FakeBackend, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    chosen = Selection(str(tmp_path / "base"), str(tmp_path / "a"), "")
    from tui import remember

    remember.save_selection(backend.root, chosen)
    assert MedmergeApp(backend).selection == chosen
    (tmp_path / "a").rmdir()
    assert MedmergeApp(backend).selection.pt == ""


async def test_what_there_is_only_one_of_is_chosen(backend: FakeBackend) -> None:
    from dataclasses import replace

    backend.view = replace(FULL, adapters=(PT, SFT))
    app = MedmergeApp(backend, Selection())
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.selection == CHOSEN)


async def test_one_adapter_is_never_both(app: MedmergeApp) -> None:
    async with app.run_test() as pilot:
        await show(pilot, "adapters")
        app.choose_adapter("sft", PT.path)
        assert app.selection.pt == "" and app.selection.sft == PT.path


async def test_workspace_that_cannot_be_read_is_a_message(backend: FakeBackend) -> None:
    backend.fail["overview"] = "workspace.toml is not valid TOML"
    app = MedmergeApp(backend, Selection())
    async with app.run_test() as pilot:
        await until(pilot, lambda: app._notifications)
        assert app.is_running


async def test_home_leads_a_newcomer(backend: FakeBackend) -> None:
    backend.view = EMPTY
    app = MedmergeApp(backend, Selection())
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Make the demo workspace" in text_of(app, "#next"))
        await pilot.press("enter")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].target == "training.demo.job:run"
        await until(pilot, lambda: "being made" in text_of(app, "#next"))
        backend.view = FULL
        backend.finish("demo-101")
        await until(pilot, lambda: app.overview is FULL)
        await until(pilot, lambda: "Choose" in text_of(app, "#next") or "best" in text_of(app, "#next"))


async def test_a_job_that_fails_is_told_with_its_reason(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.jobs = [job(1)]
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.jobs)
        backend.finish("merge-1", "failed", 3, error="no space left", hint="free some")
        await until(pilot, lambda: any("no space left" in n.message for n in app._notifications))


@pytest.mark.parametrize("theme", ["medmerge-dark", "medmerge-light", "textual-light", "gruvbox"])
async def test_themes_know_our_colours(app: MedmergeApp, theme: str) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        app.theme = theme
        await pilot.pause()
        assert app.theme_variables["pt"] != app.theme_variables["sft"]
        await show(pilot, "evaluate")
        await until(pilot, lambda: app.screen.query_one("#table").display)


async def test_palette_runs_an_action(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await pilot.press("ctrl+p")
        await until(pilot, lambda: "CommandPalette" in type(app.screen).__name__)
        await pilot.press(*"mergeoverlap")
        await pilot.pause(0.3)
        await pilot.press("down", "enter")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].kind == "interference"


async def test_plain_start_sends_no_job(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(80, 24)) as pilot:
        for name in NAMES:
            await show(pilot, name)
        assert backend.started == [] and backend.cancelled == []
