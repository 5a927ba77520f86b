"""The train screen: form to run, curves of several runs, preview, audit; runs on disk survive the app."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.color import Color

from engine.workspace import Workspace
from tests.tui.fake_backend import CHOSEN, EMPTY, FULL, PT, FakeBackend, job, show, text_of, until
from tui.app import MedmergeApp
from tui.reading_runs import RunReader, read_curve
from tui.screens.dialogs import ConfirmScreen, PickSeveralScreen, TextScreen
from tui.screens.train import TrainScreen
from tui.snapshots import DataFile, JobFeed, Piece, PreviewView, SampleView, Selection, TrainRun
from tui.training_runs import RunView, give_colours, join, views
from tui.widgets.choice import Choice
from tui.widgets.field import Field
from tui.widgets.files import Files
from tui.widgets.plot import PlotPanel, Series, resting_end, thinned
from tui.widgets.samples import SamplePreview, sample_content

NAN = math.nan


def run(name: str, kind: str = "sft", created: float = 1.0, **values: Any) -> TrainRun:
    """A run on disk that stopped at step 3 of 10."""
    config = {
        "kind": kind,
        "output": f"/ws/adapters/{name}",
        "data": ["/ws/data/sft_train.jsonl"],
        "tests": [],
    }
    curves = {"loss": ((1.0, 3.0), (2.0, 2.5), (3.0, 2.0)), "eval_loss": ((0.0, 3.1), (3.0, 2.2))}
    values = {"config": config, "curves": curves, "steps": 10, "resumable": True, **values}
    return TrainRun(f"/ws/runs/{name}", name, kind, created, **values)


def screen(app: MedmergeApp) -> TrainScreen:
    assert isinstance(app.screen, TrainScreen)
    return app.screen


def plot(app: MedmergeApp) -> PlotPanel:
    return app.screen.query_one("#plot", PlotPanel)


def lines(app: MedmergeApp) -> list[str]:
    shown = screen(app).run_list
    return [str(shown.get_option_at_index(index).prompt) for index in range(len(shown.rows))]


# ---- the form --------------------------------------------------------------------------------------------------


async def test_form_makes_a_config_the_training_code_accepts(
    app: MedmergeApp, backend: FakeBackend, tmp_path: Path
) -> None:
    from training.config import from_mapping, read

    backend.root = tmp_path
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        form = screen(app).form
        await until(pilot, lambda: form.query_one("#preset", Choice).value == "demo-pt")
        await until(pilot, lambda: form.data == ("/ws/data/pt_train.jsonl",))
        assert form.tests == ("/ws/data/medquad_short.jsonl",), (
            "every set that is not trained on is a test set"
        )
        await pilot.press("f")
        await until(pilot, lambda: app.focused is form.query_one("#kind"))
        await pilot.press("right")
        await until(pilot, lambda: form.query_one("#preset", Choice).value == "demo-sft")
        await until(pilot, lambda: form.data == ("/ws/data/sft_train.jsonl",))
        assert form.query_one("#name", Field).value == "my-sft"
        form.query_one("#epochs", Field).value = "2"
        form.query_one("#mask_history", Choice).value = "yes"
        await pilot.press("t")
        await until(pilot, lambda: backend.started)
        action = backend.started[0]
        config = from_mapping(action.params["config"])
        assert (config.kind, config.epochs, config.rank, config.mask_history) == ("sft", 2.0, 8, True)
        said = set(action.params["config"]) - {"kind", "base", "data", "tests", "output", "preset"}
        assert said == {"epochs", "mask_history"}, "what the preset says is not said again"
        assert action.params["run"] == str(tmp_path / "runs" / "my-sft")
        written = read(tmp_path / "runs" / "my-sft.yaml", tmp_path)
        assert written.learning_rate == config.learning_rate, "the command line trains the same"
        assert str(tmp_path / "runs" / "my-sft.yaml") in action.command
        await until(pilot, lambda: screen(app).selected and screen(app).selected.name == "my-sft")


@pytest.mark.parametrize("field, value", [("epochs", "many"), ("name", "../x"), ("rank", "8.5")])
async def test_form_says_what_is_wrong(
    app: MedmergeApp, backend: FakeBackend, field: str, value: str
) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: screen(app).form.query_one("#preset", Choice).value == "demo-pt")
        screen(app).form.query_one(f"#{field}", Field).value = value
        await pilot.press("t")
        await until(pilot, lambda: app._notifications)
        assert backend.started == []


async def test_a_name_that_is_taken_is_refused(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: screen(app).form.data)
        screen(app).form.query_one("#name", Field).value = PT.name
        await pilot.press("t")
        await until(pilot, lambda: app.focused is screen(app).form.query_one("#name"))
        assert backend.started == []


async def test_several_files_of_any_kind_are_trained_on(app: MedmergeApp, backend: FakeBackend) -> None:
    names = ("pt_train.jsonl", "notes one.txt", "q.csv", "w.parquet", "sweep.yaml", "dataset_info.json")
    backend.view = replace(FULL, data=tuple(DataFile(f"/ws/data/{name}", name, 9) for name in names))
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        files = screen(app).form.query_one("#data", Files)
        await until(pilot, lambda: files.chosen == ("/ws/data/pt_train.jsonl",))
        assert {Path(path).suffix for path, _ in files.options} == {".jsonl", ".txt", ".csv", ".parquet"}
        assert [words for _, words in files.options].count("dataset_info.json") == 0
        files.focus()
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, PickSeveralScreen))
        await pilot.press("down", "space", "enter")
        await until(pilot, lambda: isinstance(app.screen, TrainScreen))
        await until(
            pilot, lambda: screen(app).form.data == ("/ws/data/pt_train.jsonl", "/ws/data/notes one.txt")
        )
        assert "/ws/data/notes one.txt" not in screen(app).form.tests
        config = screen(app).form.config(Path("/ws"))
        assert isinstance(config, dict) and config["data"] == list(files.chosen)


async def test_the_form_is_as_it_was_left(backend: FakeBackend) -> None:
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: screen(app).form.data)
        screen(app).form.query_one("#kind", Choice).focus()
        await pilot.press("right")
        await until(pilot, lambda: screen(app).form.query_one("#preset", Choice).value == "demo-sft")
        screen(app).form.query_one("#rank", Field).value = "64"
        screen(app).run_list.focus()
        await pilot.press("p", "l", "s")
        await until(pilot, lambda: backend.previews)
    again = MedmergeApp(backend, CHOSEN)
    async with again.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: screen(again).form.query_one("#rank", Field).value == "64")
        assert screen(again).form.kind == "sft" and screen(again).form.data == ("/ws/data/sft_train.jsonl",)
        assert screen(again)._log and screen(again)._smoothing == "strong"


# ---- curves ----------------------------------------------------------------------------------------------------


async def test_runs_are_overlaid_and_keep_their_colour(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.trained = (run("old", created=1.0), run("text", "pt", 2.0), run("older-adapter", created=0.5))
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: len(screen(app).runs) == 3)
        before = {one.name: one.style for one in plot(app).shown if one.named and one.line}
        assert len(set(before.values())) == 3
        assert before["older-adapter"] == "sft" and before["old"] == "sft-2" and before["text"] == "pt"
        variables = app.theme_variables
        for kind in ("pt", "sft"):
            hues = [
                Color.parse(variables[name]).hsl.h for name in (kind, f"{kind}-2", f"{kind}-3", f"{kind}-4")
            ]
            assert max(hues) - min(hues) < 0.15, "shades of a kind are told from the other kind's"

        params = {"run": "/ws/runs/new", "config": {"kind": "sft", "output": "/ws/adapters/new"}}
        backend.jobs = [job(9, "train", params=params, done=2.0, total=10.0, unit="steps", phase="train")]
        backend.feeds = {"train-9": JobFeed({"loss": ((1, 3.0), (2, 2.0))}, {"loss": 2.0})}
        await until(pilot, lambda: len(screen(app).runs) == 4)
        await until(pilot, lambda: any(one.name == "new" for one in plot(app).shown))
        after = {one.name: one.style for one in plot(app).shown if one.named and one.line}
        assert {**after, **before} == after, "a new run changes no other run's colour"
        assert after["new"] == "sft-3"
        assert screen(app).selected and screen(app).selected.name == "new", (
            "the list follows the run that runs"
        )
        assert "20%" in text_of(app, "#status")

        await pilot.press("space")
        assert lines(app)[0].startswith("○"), "out of the plot"
        await pilot.press("down")
        await until(pilot, lambda: all(one.name != "new" for one in plot(app).shown))
        await pilot.press("up", "space", "down")
        await until(pilot, lambda: any(one.name == "new" and one.style == "sft-3" for one in plot(app).shown))


async def test_curves_grow_while_one_looks_and_the_axis_rests(app: MedmergeApp, backend: FakeBackend) -> None:
    params = {"run": "/ws/runs/new", "config": {"kind": "pt", "output": "/ws/adapters/new"}}
    backend.jobs = [job(1, "train", params=params, total=400.0, unit="steps", phase="train")]
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        ends = []
        for count in (11, 14):
            points = tuple((float(step), 3.0 - step / 100) for step in range(1, count + 1))
            numbers = {"loss": points, "tok_s": ((count, 170.0),), "memory": ((count, 1.9e9),)}
            backend.feeds = {"train-1": JobFeed(numbers)}
            await until(
                pilot, lambda count=count: plot(app).shown and len(plot(app).shown[0].points) == count
            )
            ends.append(plot(app).limits[1])
        assert ends[0] == ends[1], "the axis does not move with every step"
        assert "tok/s" in text_of(app, "#numbers") and "1.9 GB" in text_of(app, "#numbers")


async def test_log_axis_leaves_out_what_has_no_logarithm(app: MedmergeApp, backend: FakeBackend) -> None:
    loss = ((1.0, 100.0), (2.0, 10.0), (3.0, 0.0), (4.0, -1.0), (5.0, 1.0), (6.0, 0.5))
    backend.trained = (run("odd", curves={"loss": loss}),)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: plot(app).shown)
        await pilot.press("s", "s")  # light, strong, off
        await until(pilot, lambda: plot(app).shown[0].points == loss)
        await pilot.press("l")
        await until(pilot, lambda: "log axis" in text_of(app, "#plot .title"))
        assert "2 not above 0 left out" in text_of(app, "#plot .title")
        low, high = plot(app).limits[2:]
        assert 10**low <= 0.5 and 10**high >= 100
        await pilot.press("l")
        await until(pilot, lambda: plot(app).limits[2] <= -1)


async def test_smoothing_steps_through_off_light_and_strong(app: MedmergeApp, backend: FakeBackend) -> None:
    noisy = tuple((float(step), 2.0 + (-1) ** step * 0.5) for step in range(1, 101))
    backend.trained = (run("noisy", curves={"loss": noisy}),)

    def spread() -> float:
        values = [y for _, y in plot(app).shown[0].points[20:]]
        return max(values) - min(values)

    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: plot(app).shown)
        light = spread()
        assert [one.faded for one in plot(app).shown] == [False, True], "the steps themselves lie behind"
        await pilot.press("s")
        await until(pilot, lambda: spread() < light)
        strong = spread()
        await pilot.press("s")
        await until(pilot, lambda: len(plot(app).shown) == 1)
        assert spread() == 1.0 and strong < light < 0.5


async def test_nan_is_a_gap_and_is_said(app: MedmergeApp, backend: FakeBackend) -> None:
    loss = ((1.0, 3.0), (2.0, 2.9), (3.0, NAN), (4.0, NAN), (5.0, 2.5), (6.0, NAN))
    backend.trained = (run("broken", curves={"loss": loss}),)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: "NaN" in text_of(app, "#numbers"))
        assert "not a number at step 3" in text_of(app, "#status")
        assert math.isnan(plot(app).shown[0].points[2][1])
        assert app.is_running


async def test_a_failed_run_says_why_where_one_looks(app: MedmergeApp, backend: FakeBackend) -> None:
    params = {"run": "/ws/runs/new", "config": {"kind": "pt", "output": "/ws/adapters/new"}}
    failed = job(
        1, "train", "failed", params=params, exit_code=3, error="the loss is nan at step 5", hint="lower it"
    )
    backend.jobs = [failed]
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: "the loss is nan at step 5" in text_of(app, "#status"))
        assert "→ lower it" in text_of(app, "#status") and "t starts anew" in text_of(app, "#status")
        await pilot.press("r")
        assert backend.started == [], "without a checkpoint there is nothing to go on from"


# ---- stop, resume, reopen --------------------------------------------------------------------------------------


async def test_any_stopped_run_goes_on(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.trained = (run("first", created=1.0), run("second", created=2.0))
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: len(screen(app).runs) == 2)
        await pilot.press("down")
        await until(pilot, lambda: "stopped at step 3" in text_of(app, "#status"))
        await pilot.press("r")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].params["resume"] is True
        assert backend.started[0].params["run"] == "/ws/runs/first"
        assert backend.started[0].params["config"]["output"] == "/ws/adapters/first"
        await until(pilot, lambda: screen(app).selected and screen(app).selected.live)
        assert "3/10" in lines(app)[1], "its curve so far stays"


async def test_stop_asks_first(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.jobs = [job(1, "train", params={"run": "/ws/runs/new", "config": {}})]
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: screen(app).runs)
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen))
        await pilot.press("y")
        await until(pilot, lambda: backend.cancelled == ["train-1"])


async def test_the_finished_adapter_is_in_adapters_by_itself(app: MedmergeApp, backend: FakeBackend) -> None:
    params = {"run": "/ws/runs/new", "config": {"kind": "pt", "output": "/ws/adapters/new"}}
    backend.jobs = [job(1, "train", params=params)]
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: screen(app).runs)
        backend.view = replace(
            FULL, adapters=(*FULL.adapters, replace(PT, path="/ws/adapters/new", name="new"))
        )
        backend.trained = (run("new", "pt", 1.0, adapter="/ws/adapters/new", finished=9.0),)
        backend.finish("train-1")
        await until(pilot, lambda: "new is in Adapters" in text_of(app, "#status"))
        await show(pilot, "adapters")
        rows = app.screen.query_one("#list").rows  # type: ignore[attr-defined]
        assert "new" in [row.name for row in rows]


def write_run(root: Path, name: str, points: str, **config: Any) -> Path:
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    settings = {
        "kind": "sft",
        "data": [{"path": "a.jsonl"}],
        "output": str(root / "adapters" / name),
        **config,
    }
    (folder / "train.json").write_text(json.dumps({"config": settings, "audit": {"leaks": 0}}))
    (folder / "curve.jsonl").write_text(points)
    return folder


async def test_reopening_shows_the_runs_of_before_without_their_jobs(tmp_path: Path) -> None:
    from tui.backend import LocalBackend

    workspace = Workspace(tmp_path).create()
    write_run(
        workspace.root,
        "one",
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 2, "eval_loss": 2.6}\n',
    )
    write_run(workspace.root, "two", '{"step": 1, "loss": 4.0}\n{"step": 2, "lo', kind="pt")
    app = MedmergeApp(LocalBackend(workspace.root), Selection())
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: len(screen(app).runs) == 2)
        await until(pilot, lambda: {one.name for one in plot(app).shown if one.line} == {"one", "two"})
        assert any("2.500" in line and "2.600" in line for line in lines(app))


def test_a_curve_file_is_read_with_its_gaps_and_without_its_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3.0, "tok_s": 10}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": "nan"}\nnonsense\n'
        '{"step": 4, "loss": 2.0, "lr": null}\n{"step": 3, "loss": 2.4}\n{"step": true, "loss": 1}\n{"step": 5, "loss"'
    )
    curves = read_curve(path)
    assert [step for step, _ in curves["loss"]] == [1, 2, 3], "a step back starts that part over"
    assert math.isnan(curves["loss"][1][1]) and curves["loss"][2] == (3, 2.4)
    assert curves["tok_s"] == ((1, 10),) and "lr" not in curves
    assert read_curve(tmp_path / "none") == {}


def test_runs_are_read_anew_only_when_they_changed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path).create()
    folder = write_run(tmp_path, "one", '{"step": 1, "loss": 3.0}\n')
    reader = RunReader()
    first = reader.read(workspace)
    assert first[0].curves == {"loss": ((1.0, 3.0),)} and not first[0].resumable and not first[0].adapter
    assert reader.read(workspace)[0] is first[0]
    with (folder / "curve.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 2.0}\n')
    assert len(reader.read(workspace)[0].curves["loss"]) == 2
    whole = folder / "checkpoints" / "checkpoint-2"
    whole.mkdir(parents=True)
    (whole / "checkpoint.json").write_text(json.dumps({"files": {}}))
    assert reader.read(workspace)[0].resumable
    output = tmp_path / "adapters" / "one"
    output.mkdir()
    (output / "training.json").write_text(
        json.dumps({"kind": "sft", "steps": 2, "curve": [{"step": 1, "loss": 9}]})
    )
    (done,) = reader.read(workspace)
    assert done.adapter == str(output) and len(done.curves["loss"]) == 2, "the run's own file is the truth"
    other = tmp_path / "adapters" / "theirs"
    other.mkdir()
    (other / "training.json").write_text(json.dumps({"kind": "pt", "curve": [{"step": 1, "loss": 9}]}))
    assert [one.name for one in reader.read(workspace)] in (["one", "theirs"], ["theirs", "one"])


def test_a_resumed_run_goes_on_from_its_checkpoint() -> None:
    before = {"loss": ((1.0, 3.0), (2.0, 2.9), (3.0, 2.8)), "eval_loss": ((0.0, 3.1),)}
    after = {"loss": ((3.0, 2.7), (4.0, 2.6))}
    joined = join([before, after])
    assert joined["loss"] == ((1.0, 3.0), (2.0, 2.9), (3.0, 2.7), (4.0, 2.6)) and joined["eval_loss"] == (
        (0.0, 3.1),
    )
    first = job(1, "train", "lost", params={"run": "/ws/runs/a", "config": {"kind": "pt"}})
    second = job(2, "train", params={"run": "/ws/runs/a", "resume": True, "config": {"kind": "pt"}})
    feeds = {"train-1": JobFeed(before), "train-2": JobFeed(after)}
    (view,) = views((), (second, first), feeds)
    assert view.curves == joined and view.state == "running", "without a file both jobs tell the curve"
    again = replace(second, params={"run": "/ws/runs/a", "config": {}})
    (view,) = views((), (again, first), feeds)
    assert view.curves["loss"] == after["loss"], "a new start under the same name is another run"


def test_colours_are_the_same_however_runs_come_in() -> None:
    made = [RunView(f"r{number}", f"r{number}", "pt", "done", float(number), 0.0) for number in range(6)]
    together: dict[str, str] = {}
    give_colours(together, made[::-1])
    one_by_one: dict[str, str] = {}
    for count in range(1, 7):
        give_colours(one_by_one, made[:count])
    assert together == one_by_one
    assert list(together.values()) == ["pt", "pt-2", "pt-3", "pt-4", "pt", "pt-2"]


# ---- preview and audit -----------------------------------------------------------------------------------------

SAMPLE = SampleView(
    "/ws/data/sft_train.jsonl, line 1", 12, 4, 7,
    (
        Piece("<|im_start|>", False, True), Piece("user\nWhy \x1b[31m[bold]?", False), Piece("<|im_end|>", False, True),
        Piece("\n", False), Piece("Because.", True), Piece("<|im_end|>", True, True), Piece("\n", True),
    ), "shortened",
)  # fmt: skip


async def test_preview_marks_the_trained_tokens(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.preview_view = PreviewView((SAMPLE,), "chatml", 512, 200, 3, 0, ("3 rows are cut",))
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: screen(app).form.data)
        await pilot.press("p")
        await until(pilot, lambda: "line 1" in text_of(app, "#preview .samples"))
        assert backend.previews[0]["data"] == ["/ws/data/pt_train.jsonl"]
        head = text_of(app, "#preview .head")
        assert "template chatml" in head and "3 too long" in head and "3 rows are cut" in head
        assert not screen(app).query_one("#main").display
        await pilot.press("p")
        await until(pilot, lambda: screen(app).query_one("#main").display)
        backend.fail["preview"] = "data is empty"
        await pilot.press("p")
        await until(pilot, lambda: "data is empty" in text_of(app, "#preview .head"))
        assert "→ do something else" in text_of(app, "#preview .head")
        await pilot.press("escape")
        await until(pilot, lambda: screen(app).query_one("#main").display)
        assert app.current_mode == "train"


def test_a_sample_shows_which_tokens_are_trained() -> None:
    content = sample_content(SAMPLE, "sft", 60)
    rows = content.plain.split("\n")
    assert "12 tokens, 4 trained (33%)" in rows[0] and "7 cut off" in rows[0] and rows[1] == "! shortened"
    assert rows[2:] == [" <|im_start|>user↵", " Why �[31m[bold]?<|im_end|>↵", "▌Because.<|im_end|>↵"]
    trained = [content.plain[span.start : span.end] for span in content.spans if "$sft" in str(span.style)]
    assert "Because." in trained and "<|im_end|>" in trained and "↵" in trained
    assert not any("Why" in text or "user" in text for text in trained)


async def test_an_audit_of_what_the_form_says(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: "not done yet" in text_of(app, "#audit"))
        await pilot.press("u")
        await until(pilot, lambda: backend.started)
        action = backend.started[0]
        data, tests = ["/ws/data/pt_train.jsonl"], ["/ws/data/medquad_short.jsonl"]
        assert action.params == {"train": data, "test": tests} and action.target == "training.audit.job:run"
        assert "audit --train /ws/data/pt_train.jsonl --test /ws/data/medquad_short.jsonl" in action.command
        await until(pilot, lambda: "looking for test rows" in text_of(app, "#audit"))
        counts = {"rows": {data[0]: 5000, tests[0]: 1273}, "leaking_train_rows": 0}
        backend.finish("audit-101", result={"leaks": [], "duplicates": [{}, {}], "counts": counts})
        await until(pilot, lambda: "✓ clean  0 of 1,273 test rows" in text_of(app, "#audit"))
        assert "2 repeated rows" in text_of(app, "#audit")

        leak = {
            "train_file": data[0],
            "train_row": 5,
            "test_file": tests[0],
            "test_row": 9,
            "detector": "exact",
            "score": 1.0,
        }
        example = {
            **leak,
            "train": [["We say: ", False], ["take it with food", True]],
            "test": [["take it with food", True]],
        }
        found = {
            "leaks": [leak] * 4,
            "duplicates": [],
            "examples": [example],
            "counts": {**counts, "leaking_train_rows": 4},
        }
        late = time.time() + 60
        backend.jobs.insert(
            0, job(200, "audit", "done", params=action.params, result=found, exit_code=1, started=late)
        )
        await until(pilot, lambda: "✗ 4 leaks" in text_of(app, "#audit"))
        assert "  pt_train.jsonl row 5 = " in text_of(app, "#audit")
        await pilot.press("v")
        await until(pilot, lambda: isinstance(app.screen, TextScreen))
        assert text_of(app, "#text").count("medquad_short.jsonl row 9 (exact, 1.00)") == 5
        assert "train  We say: take it with food" in text_of(app, "#text")
        await pilot.press("escape")

        changed = tuple(replace(file, modified=late + 60) for file in FULL.data)
        backend.view = replace(FULL, data=changed)
        app.read_workspace()
        await until(pilot, lambda: "a file changed since" in text_of(app, "#audit"))


async def test_the_verdict_of_a_run_counts_for_its_files(app: MedmergeApp, backend: FakeBackend) -> None:
    config = {
        "kind": "pt",
        "data": [{"path": "/ws/data/pt_train.jsonl"}],
        "tests": ["/ws/data/medquad_short.jsonl"],
    }
    audit: dict[str, Any] = {"tests": [{"rows": 48}], "leaks": 0}
    backend.trained = (run("old", "pt", 5.0, config={**config, "output": "/ws/adapters/old"}, audit=audit),)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: "0 of 48 test rows" in text_of(app, "#audit"))
        assert "by old" in text_of(app, "#audit")
        leak = {
            "train_file": "a",
            "train_row": 1,
            "test_file": "b",
            "test_row": 2,
            "detector": "exact",
            "score": 1,
        }
        leaky = {**audit, "leaks": 2, "findings": [leak] * 2, "dropped_rows": 1}
        backend.trained = (replace(backend.trained[0], audit=leaky),)
        app.read_workspace()
        backend.view = replace(FULL)
        app.read_workspace()
        await until(pilot, lambda: "✗ 2 leaks" in text_of(app, "#audit"))
        assert "1 rows dropped" in text_of(app, "#audit")


# ---- small terminals, empty workspaces, the plot itself --------------------------------------------------------


async def test_everything_is_reached_at_80x24(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.trained = tuple(run(f"run-{number}", created=float(number)) for number in range(6))
    backend.preview_view = PreviewView((SAMPLE,), "chatml", 512)
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "train")
        await until(pilot, lambda: len(screen(app).runs) == 6)
        assert not screen(app).query_one("#side").display
        assert screen(app).run_list.region.bottom <= 23 and plot(app).region.height >= 8
        await pilot.press("f")
        await until(pilot, lambda: screen(app).query_one("#side").display)
        for _ in range(30):
            await pilot.press("down")
            focused = app.focused
            assert focused is not None
            await pilot.pause()
            if focused.id == "processes":
                break
        assert focused.id == "processes" and focused.region.bottom <= 24, "it scrolled into sight"
        await pilot.press("escape", "escape")
        await until(pilot, lambda: screen(app).query_one("#main").display)
        await pilot.press("p")
        await until(pilot, lambda: screen(app).query_one("#preview", SamplePreview).region.width == 80)
        await pilot.press("escape")
        await until(pilot, lambda: screen(app).query_one("#main").display)
        assert app.current_mode == "train" and app.selection == CHOSEN


async def test_an_empty_workspace_says_what_to_do(backend: FakeBackend) -> None:
    backend.view = EMPTY
    app = MedmergeApp(backend, Selection())
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "train")
        assert "A base model is needed first" in text_of(app, "#plot .empty")
        await pilot.press("t")
        await until(pilot, lambda: app._notifications)
        backend.view = FULL
        app.read_workspace()
        await until(pilot, lambda: "No run to show yet" in text_of(app, "#plot .empty"))


def test_long_curves_are_thinned_without_losing_a_peak_or_a_gap() -> None:
    points = [(float(step), 1.0) for step in range(20_000)]
    points[7_777], points[12_345], points[15_000] = (7777.0, 50.0), (12345.0, -3.0), (15000.0, NAN)
    kept = thinned(points)
    assert len(kept) <= 800 and kept[0] == points[0] and kept[-1] == points[-1]
    assert (7777.0, 50.0) in kept and (12345.0, -3.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thinned(points[:100]) == points[:100]


def test_the_end_of_the_axis_is_round() -> None:
    assert [resting_end(step) for step in (3, 11, 40, 41, 412)] == [10, 15, 40, 50, 500]
    assert resting_end(412, 450) == 450 and resting_end(0, 300) == 300


async def test_a_lonely_point_between_gaps_is_drawn(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "train")
        panel = plot(app)
        panel.show([Series("x", ((0, 1.0), (1, NAN), (2, 1.5), (3, NAN), (4, 2.0), (5, 2.5)))])
        kinds = [type(dataset).__name__ for dataset in panel.query_one("QuietPlot")._datasets]
        assert kinds == ["LinePlot", "ScatterPlot"]
