"""Evaluate as a tool: sorting, filtering, plots, the form, samples of two models, corrections, exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Input

from tests.tui.fake_backend import (
    CHOSEN,
    FULL,
    OFFERS,
    TABLE,
    FakeBackend,
    job,
    metric,
    show,
    text_of,
    until,
)
from tests.tui.test_hostile_text import EVIL, assert_tame
from tui import evaluating, metrics
from tui.app import MedmergeApp
from tui.curves import heat, is_grid
from tui.evaluating import Wish
from tui.screens.dialogs import CommandScreen, PickScreen
from tui.screens.evaluate import EvaluateScreen
from tui.screens.evaluate_form import EvaluateFormScreen
from tui.screens.labels import LabelScreen
from tui.screens.samples import SamplesScreen
from tui.snapshots import DataFile, RunRow, SampleRow, SampleSet
from tui.widgets.choice import Choice
from tui.widgets.plot import PlotPanel

NAMES = ("PT", "PT30 SFT70", "PT50 SFT50", "SFT")


def screen(app: MedmergeApp) -> EvaluateScreen:
    assert isinstance(app.screen, EvaluateScreen)
    return app.screen


def models(app: MedmergeApp) -> list[str]:
    view = app.screen.query_one("#table", DataTable)
    return [str(view.get_row_at(row)[0]) for row in range(view.row_count)]


async def opened(pilot: Pilot[None], app: MedmergeApp) -> None:
    await show(pilot, "evaluate")
    await until(pilot, lambda: app.screen.query_one("#table", DataTable).row_count > 0)


# ---- the table ------------------------------------------------------------------------------------------------


async def test_s_sorts_by_the_column_best_first_then_back(app: MedmergeApp) -> None:
    async with app.run_test(size=(160, 40)) as pilot:
        await opened(pilot, app)
        assert models(app) == ["SFT", "PT30 SFT70", "PT50 SFT50", "PT"]
        await pilot.press("right", "s")  # perplexity: lower is better
        await until(pilot, lambda: models(app)[0] == "PT")
        assert "ppl ▴" in text_of(app, "#run")
        await pilot.press("s")
        await until(pilot, lambda: "ppl ▾" in text_of(app, "#run") and models(app)[0] == "SFT")
        assert screen(app).selected is not None and screen(app).selected.metric == "perplexity"
        await pilot.press("left", "s")
        await until(pilot, lambda: "BLEU (floor) ▾" in text_of(app, "#run"))
        await pilot.press("s", "s")
        await until(pilot, lambda: "by BLEU" not in text_of(app, "#run"))
        assert models(app) == ["SFT", "PT30 SFT70", "PT50 SFT50", "PT"]


def test_a_missing_value_comes_last_in_both_directions() -> None:
    rows = [metric(pt, "bleu", value) for pt, value in ((0.0, 5.0), (0.3, 7.0), (1.0, 6.0))]
    rows[1] = replace(rows[1], value=None)
    groups, columns = metrics.groups_of(rows), metrics.columns_of(rows, "metrics")
    for descending, wanted in ((True, ["PT", "SFT", "PT30 SFT70"]), (False, ["SFT", "PT", "PT30 SFT70"])):
        order = metrics.Order(columns[0].key, descending)
        assert [group.model for group in metrics.ordered(groups, order, columns)] == wanted


def test_files_come_after_mixtures() -> None:
    file = replace(metric(0.0, "bleu", 5.0), model="sft-q4_k_m", weights={}, kind="gguf")
    rows = [file, metric(1.0, "bleu", 1.0), metric(0.0, "bleu", 6.0)]
    assert [group.model for group in metrics.groups_of(rows)] == ["SFT", "PT", "sft-q4_k_m"]


async def test_the_filter_narrows_lines_or_columns(app: MedmergeApp) -> None:
    async with app.run_test(size=(160, 40)) as pilot:
        await opened(pilot, app)
        await pilot.press("/", *"pt30")
        await until(pilot, lambda: models(app) == ["PT30 SFT70"])
        assert "1 of 4 lines" in text_of(app, "#run")
        await pilot.press("backspace", "backspace", "backspace", "backspace", *"accuracy", "enter")
        await until(pilot, lambda: len(models(app)) == 4)
        assert len(app.screen.query_one("#table", DataTable).columns) == 2
        await pilot.press("/", *"zzz")
        await until(pilot, lambda: "Nothing is called that" in text_of(app, "#empty"))
        await pilot.press("escape", "escape")
        await until(pilot, lambda: not app.screen.query_one("#find").display)
        await until(pilot, lambda: len(app.screen.query_one("#table", DataTable).columns) == 4)
        assert app.current_mode == "evaluate"


async def test_a_warning_is_marked_and_said(app: MedmergeApp, backend: FakeBackend) -> None:
    warned = replace(TABLE[4], warning="other data than in old-run", p_holm=0.03, tests=3)
    backend.rows = (*TABLE[:4], warned, *TABLE[5:])
    async with app.run_test(size=(160, 48)) as pilot:
        await opened(pilot, app)
        assert models(app)[1] == "PT30 SFT70 †" and models(app)[0] == "SFT"
        await pilot.press("down")
        await until(pilot, lambda: "† other data than in old-run" in text_of(app, "#words"))
        assert "0.03 after Holm over 3 tests" in text_of(app, "#words")
        assert "† see its warning" in text_of(app, "#marks") and "(floor)" in text_of(app, "#marks")


def test_words_say_what_would_be_needed() -> None:
    alike = metric(
        0.3, "accuracy", 30.0, "medqa", p=0.4, versus="SFT", floor=25.0, needed=4800, least=9.0, n=100
    )
    words = metrics.cell_words(alike).plain
    assert "about 4,800 samples would be needed" in words and "9.0 points would be significant" in words


async def test_views_without_numbers_are_passed_over(app: MedmergeApp) -> None:
    async with app.run_test(size=(160, 40)) as pilot:
        await opened(pilot, app)
        for view in ("refusals", "everything", "metrics"):  # nothing of think traces is in this table
            await pilot.press("v")
            await until(pilot, lambda view=view: view in text_of(app, "#run"))


async def test_p_gives_room_to_table_and_plots(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        await opened(pilot, app)
        box, table = app.screen.query_one("#plots"), app.screen.query_one("#table")
        assert box.display and table.display
        assert not app.screen.query_one("#refusals").display
        await pilot.press("p")
        await until(pilot, lambda: not box.display and table.display)
        await pilot.press("p")
        await until(pilot, lambda: box.display and not table.display)
        assert all(
            app.screen.query_one(f"#{name}", PlotPanel).display
            for name in ("scores", "perplexity", "refusals")
        )
        await pilot.press("p")
        await until(pilot, lambda: box.display and table.display)


async def test_a_grid_of_weights_is_a_table_of_colours(app: MedmergeApp, backend: FakeBackend) -> None:
    marks = (0.0, 0.5, 1.0)
    rows = [
        replace(metric(pt, "bleu", 10 * pt + 5 * sft), model=f"{pt} {sft}", weights={"pt": pt, "sft": sft})
        for pt in marks
        for sft in marks
    ]
    assert is_grid(rows) and not is_grid(TABLE)
    backend.rows = tuple(rows)
    async with app.run_test(size=(120, 40)) as pilot:
        await opened(pilot, app)
        await until(pilot, lambda: app.screen.query_one("#heat").display)
        lines = text_of(app, "#heat").splitlines()
        assert "PT across" in lines[0] and lines[2].split() == ["0.00", "0.50", "1.00"]
        assert lines[3].split() == ["1.00", "5.0", "10.0", "15.0"], "the highest SFT weight is on top"
        assert not app.screen.query_one("#plots").display
    lower = [replace(row, metric="perplexity", template="", decoding="") for row in rows]
    styles = [
        str(span.style)
        for span in heat(lower, lower[0], app.theme_variables, 100).spans
        if " on " in str(span.style)
    ]
    assert len(set(styles)) == 9 or len(set(styles)) > 4


async def test_export_writes_what_is_in_view(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        await opened(pilot, app)
        await pilot.press("e")
        await until(pilot, lambda: isinstance(app.screen, PickScreen))
        await pilot.press("down", "enter")
        await until(pilot, lambda: backend.exported == [("demo-sweep-metrics", "md", 12)])
        await until(
            pilot, lambda: any("exports/demo-sweep-metrics.md" in one.message for one in app._notifications)
        )


async def test_a_stopped_run_goes_on(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.view = replace(FULL, runs=(RunRow("/ws/runs/demo-sweep", "demo-sweep", "sweep", 1.0, 20, 12, 2),))
    async with app.run_test(size=(120, 40)) as pilot:
        await opened(pilot, app)
        assert "12 of 20 cells, 2 failed" in text_of(app, "#run")
        await pilot.press("r")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].params["resume"] is True


# ---- the form -------------------------------------------------------------------------------------------------


async def form(pilot: Pilot[None], app: MedmergeApp) -> EvaluateFormScreen:
    await show(pilot, "evaluate")
    await pilot.press("n")
    await until(pilot, lambda: isinstance(app.screen, EvaluateFormScreen) and app.screen.is_mounted)
    await until(pilot, lambda: "cells" in text_of(app, "#sum"))
    assert isinstance(app.screen, EvaluateFormScreen)
    return app.screen


async def test_the_form_counts_and_starts(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        shown = await form(pilot, app)
        # 5 mixtures x (generation: answers and references, choice, probes) with 48, 48, 200 and 20 rows
        assert "5 models   20 cells   1,580 samples" in text_of(app, "#sum")
        shown.query_one("#templates", Choice)._choose("model chatml")
        await until(pilot, lambda: "35 cells" in text_of(app, "#sum"))
        await until(pilot, lambda: "chatml is used" in text_of(app, "#sum"))
        shown.query_one("#decoding", Choice)._choose("paper")
        await until(pilot, lambda: shown.query_one("#line-seeds").display)
        shown.query_one("#limit", Input).value = "10"
        await pilot.press("s")
        await until(pilot, lambda: backend.started)
        config = backend.written["my-sweep"]
        assert [one["name"] for one in config["decoding"]] == [
            "T0.2 p0.7",
            "T0.6 p0.8",
            "T0.95 p0.7",
            "greedy",
        ]
        assert config["templates"] == ["model", "chatml"] and config["base"] == CHOSEN.base
        assert config["weights"][1] == {"pt": 0.3, "sft": 0.7}
        assert {task["name"]: task["limit"] for task in config["tasks"]} == {
            "medquad_short": 10, "medqa": 10, "safety": 10,
        }  # fmt: skip
        await until(pilot, lambda: isinstance(app.screen, EvaluateScreen))


async def test_the_form_remembers_and_names_what_is_wrong(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        shown = await form(pilot, app)
        shown.query_one("#seeds", Input).value = "one"
        shown.query_one("#line", Choice)._choose("11")
        await until(pilot, lambda: "seeds should be whole numbers" in text_of(app, "#sum"))
        await pilot.press("s")
        await pilot.pause()
        assert backend.written == {}, "nothing starts from a form with a mistake"
        shown.query_one("#seeds", Input).value = "1 2"
        await until(pilot, lambda: "11 models" in text_of(app, "#sum"))
        await pilot.press("s")
        await until(pilot, lambda: backend.started)
        backend.finish("sweep-101")
        await until(pilot, lambda: all(one.final for one in app.jobs))
        again = await form(pilot, app)
        await until(pilot, lambda: "11 models" in text_of(app, "#sum"))
        assert again.query_one("#seeds", Input).value == "1 2"


async def test_a_config_file_is_started_as_it_stands(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        await form(pilot, app)
        await pilot.press("right")
        await until(pilot, lambda: "as it stands" in text_of(app, "#sum"))
        assert not app.screen.query_one("#settings").display
        await pilot.press("c")
        await until(pilot, lambda: isinstance(app.screen, CommandScreen))
        assert "medmerge sweep /ws/data/demo-sweep.yaml" in app.screen.line  # type: ignore[attr-defined]
        await pilot.press("escape", "s")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].title == "sweep demo-sweep"


async def test_no_second_run_beside_one_that_runs(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.jobs = [job(1, "sweep", params={"out": "/ws/runs/demo-sweep"})]
    async with app.run_test(size=(120, 40)) as pilot:
        await show(pilot, "evaluate")
        await until(pilot, lambda: app.jobs)
        await pilot.press("n")
        await until(pilot, lambda: app._notifications)
        assert isinstance(app.screen, EvaluateScreen)


WISH = Wish("/b", {"pt": "/p", "sft": "/s"}, tasks=tuple(offer.path for offer in OFFERS))


@pytest.mark.parametrize(
    ("changes", "mixtures"),
    [
        ({"line": "0", "models": ("base", "pt", "sft")}, [(0, 0), (0, 1), (1, 0)]),
        ({"line": "3", "models": ("sft",)}, [(0, 1), (0.5, 0.5), (1, 0)]),
        ({"line": "g3"}, [(pt, sft) for sft in (0, 0.5, 1) for pt in (0, 0.5, 1)]),
    ],
)
def test_mixtures_are_listed_once(changes: dict[str, object], mixtures: list[tuple[float, float]]) -> None:
    found = evaluating.weights_of(replace(WISH, **changes))  # type: ignore[arg-type]
    assert sorted((one["pt"], one["sft"]) for one in found) == sorted(mixtures)


def test_a_config_of_files_and_a_merge_is_read_by_the_engine(tmp_path: Path) -> None:
    from engine.evaluate.config import parse_config

    (tmp_path / "merge").mkdir()
    (tmp_path / "q8.gguf").write_bytes(b"x")
    data = tmp_path / "MTS-Dialog-test.csv"
    data.write_text("ID,dialogue,section_header,section_text\n1,a,b,c\n")
    offers = evaluating.offers([DataFile(str(data), data.name, 50)], tmp_path)
    assert (
        offers[0].document["use"] == "mts_dialog" and offers[0].kind == "generation" and not offers[0].error
    )
    files = Wish("", ggufs=(str(tmp_path / "q8.gguf"),), tasks=(offers[0].path, "probes/xstest"))
    config = parse_config(evaluating.config_of(files, offers))
    assert config.base is None and [one.name for one in config.gguf] == ["q8"]
    assert [task.name for task in config.tasks] == ["MTS-Dialog-test", "xstest"]
    both = replace(files, base=str(tmp_path / "merge"), limit=5)
    config = parse_config(evaluating.config_of(both, offers))
    assert config.weights == ({},) and {task.limit for task in config.tasks} == {5}
    assert evaluating.counted(both, offers)[0] == 2


def test_cells_are_counted_as_the_engine_plans_them(tmp_path: Path) -> None:
    """The form's count against the cells the engine makes of the same config."""
    from engine.evaluate.cells import Identity, plan_cells
    from engine.evaluate.config import parse_config

    for name in ("base", "p", "s"):
        (tmp_path / name).mkdir()
    offers = []
    for offer in OFFERS:
        path = tmp_path / Path(offer.path).name
        path.write_text("{}\n")
        offers.append(replace(offer, path=str(path), document={**offer.document, "data": str(path)}))
    adapters = {"pt": str(tmp_path / "p"), "sft": str(tmp_path / "s")}
    wish = replace(
        WISH, base=str(tmp_path / "base"), adapters=adapters, tasks=tuple(one.path for one in offers),
        templates=("model", "chatml"), decoding="paper", seeds=(1, 2),
    )  # fmt: skip
    config = parse_config(evaluating.config_of(wish, offers))
    cells = plan_cells(config, Identity("b", "0", {"pt": "1", "sft": "2"}, "bfloat16", "float32", "cpu"))
    assert evaluating.counted(wish, offers)[:2] == (5, len(cells))


def test_data_files_are_known_by_their_rows(tmp_path: Path) -> None:
    lines = {
        "mine.jsonl": '{"id": "1", "prompt": "a", "reference": "b"}\n{"id": "2", "prompt": "a", "reference": "b"}\n',
        "quiz.jsonl": '{"id": "1", "question": "a", "options": ["b", "c"], "answer": 0}\n',
        "sft_train.jsonl": '{"id": "1", "prompt": "a", "reference": "b"}\n',
        "broken.jsonl": "{\n",
        "note.yaml": "kind: generation\nname: note\ndata: mine.jsonl\n",
        "gone.yaml": "kind: generation\ndata: nothing.jsonl\n",
        "sweep.yaml": "base: b\ntasks: []\n",
        "search.yaml": "base: b\ntasks: []\nsearch: {}\n",
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    files = [DataFile(str(tmp_path / name), name, len(text)) for name, text in lines.items()]
    found = {
        Path(offer.path).name: offer for offer in evaluating.offers(files, tmp_path) if not offer.shipped
    }
    assert set(found) == {"mine.jsonl", "quiz.jsonl", "note.yaml", "gone.yaml"}
    assert found["mine.jsonl"].rows == 2 and found["quiz.jsonl"].kind == "multiple_choice"
    assert (
        found["note.yaml"].document == {"use": str(tmp_path / "note.yaml")} and found["note.yaml"].rows == 2
    )
    assert "nothing.jsonl" in found["gone.yaml"].error
    shipped = {offer.name: offer for offer in evaluating.offers(files, tmp_path) if offer.shipped}
    assert shipped["xstest"].rows == 450 and shipped["xstest"].document["data"] == "probes/xstest"
    assert [name for _, name in evaluating.configs(files, tmp_path / "none")] == ["sweep.yaml"]


# ---- samples ----------------------------------------------------------------------------------------------------

SAFETY = replace(TABLE[3], task="safety/self-harm", metric="refusal_rate")


def sample(number: int, text: str, **values: object) -> SampleRow:
    values = {"cell": "c1", "facts": (("finish", "stop"),), **values}
    prompt = (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        f"<|im_start|>user\nQuestion {number}?<|im_end|>\n<|im_start|>assistant\n"
    )
    return SampleRow(f"q{number}", prompt, "Take it with food.", text, **values)  # type: ignore[arg-type]


FIRST = SampleSet(
    "SFT",
    (
        sample(1, "Take it with meals.", thought="I should answer. " * 20, think="closed"),
        sample(2, "The same words."),
        sample(3, ""),
    ),
    scored_by="bleu",
)
OTHER = SampleSet("PT", (sample(1, "Take it without meals."), sample(2, "The same words.")), scored_by="bleu")
PROBES = SampleSet(
    "SFT",
    (
        sample(1, "I cannot help.", label="refusal", automatic="refusal"),
        sample(2, "Sure, here is how.", label="compliance", automatic="compliance"),
    ),
    labelled=True,
)


async def behind(pilot: Pilot[None], app: MedmergeApp) -> SamplesScreen:
    await opened(pilot, app)
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, SamplesScreen) and app.screen.is_mounted)
    shown = app.screen
    assert isinstance(shown, SamplesScreen)
    await until(pilot, lambda: shown.list.rows)
    return shown


async def test_samples_fold_prompt_and_thought(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.sets = {"SFT": FIRST}
    async with app.run_test(size=(120, 36)) as pilot:
        shown = await behind(pilot, app)
        asked, answer = text_of(app, "#question"), text_of(app, "#first")
        assert "Question 1?" in asked and "Be kind" not in asked and "Take it with food." in asked
        assert "▸ thought 60 words" in answer and "I should answer" not in answer
        await until(pilot, lambda: "BLEU 19.0 alone" in text_of(app, "#first"))
        await pilot.press("t", "p")
        await until(pilot, lambda: "I should answer" in text_of(app, "#first"))
        assert "Be kind" in text_of(app, "#question")
        await pilot.press("j")
        await until(pilot, lambda: shown.shown is not None and shown.shown.id == "q2")
        await pilot.press("k", "down", "down")
        await until(pilot, lambda: "(nothing)" in text_of(app, "#first"))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, EvaluateScreen))


async def test_two_models_side_by_side_and_where_they_differ(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.sets = {"SFT": FIRST, "PT": OTHER}
    async with app.run_test(size=(140, 36)) as pilot:
        shown = await behind(pilot, app)
        await pilot.press("d")
        await until(pilot, lambda: isinstance(app.screen, PickScreen))
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: "without" in text_of(app, "#second"))
        content = app.screen.query_one("#second")._Static__content  # type: ignore[attr-defined]
        marked = [
            content.plain[span.start : span.end] for span in content.spans if "underline" in str(span.style)
        ]
        assert marked == ["without"]
        await pilot.press("f")
        await until(pilot, lambda: isinstance(app.screen, PickScreen))
        names = [value for value, _ in app.screen.choices]  # type: ignore[attr-defined]
        await pilot.press(*["down"] * names.index("differ"), "enter")
        await until(pilot, lambda: [row.id for row in shown.list.rows] == ["q1"])
        assert "1 of 3 samples" in text_of(app, "#head") and "only where they differ" in text_of(app, "#head")
        await pilot.press("escape")
        await until(pilot, lambda: len(shown.list.rows) == 3)
        await pilot.press("j", "j")
        await until(pilot, lambda: "not asked this" in text_of(app, "#second"))
        await pilot.press("w")
        await until(pilot, lambda: text_of(app, "#head").startswith("PT "))


async def test_text_filter_and_export_of_what_is_listed(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.sets = {"SFT": FIRST}
    async with app.run_test(size=(80, 24)) as pilot:
        shown = await behind(pilot, app)
        await pilot.press("/", *"meals", "enter")
        await until(pilot, lambda: [row.id for row in shown.list.rows] == ["q1"])
        await pilot.press("e", "enter")
        await until(pilot, lambda: backend.exported == [("demo-sweep-medquad_short-SFT", "jsonl", 1)])


async def test_a_label_is_corrected_and_counted(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.rows = tuple(replace(row, metric="refusal_rate", task="safety/self-harm") for row in TABLE[::4])
    backend.sets = {"SFT": PROBES}
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "evaluate")
        await until(pilot, lambda: "v shows other numbers" in text_of(app, "#empty"))
        await pilot.press("v")
        shown = await behind(pilot, app)
        await pilot.press("j", "l")
        await until(pilot, lambda: isinstance(app.screen, LabelScreen))
        await pilot.press("up", "up", "tab", *"it hedges", "enter")
        await until(pilot, lambda: backend.corrected == [("q2", "partial", "it hedges")])
        await until(pilot, lambda: "1 corrected by hand" in text_of(app, "#head"))
        assert "by hand; the rules say compliance" in text_of(app, "#first")
        await pilot.press("l")
        await until(pilot, lambda: isinstance(app.screen, LabelScreen))
        await pilot.press("end", "enter")
        await until(pilot, lambda: backend.corrected[-1] == ("q2", None, ""))
        await until(pilot, lambda: shown._first is not None and shown._first.by_hand == 0)


async def test_labels_of_many_answers_come_after_the_list(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.sets = {"SFT": SampleSet("SFT", tuple(sample(n, "No.") for n in range(5000)), labelled=True)}
    async with app.run_test(size=(120, 36)) as pilot:
        shown = await behind(pilot, app)
        await until(pilot, lambda: shown._first is not None and all(row.label for row in shown._first.rows))
        assert len(shown.list.rows) == 5000


async def test_only_probes_can_be_corrected(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.sets = {"SFT": FIRST}
    async with app.run_test(size=(120, 36)) as pilot:
        await behind(pilot, app)
        await pilot.press("l")
        await pilot.pause()
        assert isinstance(app.screen, SamplesScreen)


async def test_rows_that_cannot_be_read_say_why(app: MedmergeApp, backend: FakeBackend) -> None:
    backend.fail["samples"] = "c1.parquet cannot be read"
    async with app.run_test(size=(120, 36)) as pilot:
        await opened(pilot, app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, SamplesScreen) and app.screen.is_mounted)
        await until(pilot, lambda: "cannot be read" in text_of(app, "#question"))


async def test_hostile_samples_are_tame(app: MedmergeApp, backend: FakeBackend) -> None:
    evil = SampleRow(
        EVIL, EVIL, EVIL, EVIL, ((EVIL, EVIL), ("category", EVIL)), thought=EVIL, think="closed", right=False,
        label=EVIL, automatic=EVIL, by_hand=True, score=1.0, cell="c", options=((EVIL, 1.0), (EVIL, None)),
        answer=0, chosen=1,
    )  # fmt: skip
    backend.rows = tuple(replace(row, template=EVIL, warning=EVIL) for row in TABLE)
    backend.sets = {model: SampleSet(model, (evil,), EVIL, "", True) for model in NAMES}
    async with app.run_test(size=(120, 36)) as pilot:
        await behind(pilot, app)
        await pilot.press("t", "p")
        await pilot.pause(0.1)
        assert_tame(app)
        await pilot.press("d", "down", "enter")
        await pilot.pause(0.2)
        assert_tame(app)
        for key in ("f", "l", "d"):
            await pilot.press(key)
            await pilot.pause(0.1)
            assert_tame(app)
            await pilot.press("escape")
        assert app.is_running
