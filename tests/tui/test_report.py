"""The report of a merge: marks on one scale, gauges, findings, modules; reached from everywhere, verified again."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.tui.fake_backend import (
    BAD_MERGE,
    CHOSEN,
    FULL,
    GOOD,
    MERGE,
    SQUARED,
    FakeBackend,
    job,
    show,
    text_of,
    until,
)
from tui.app import MedmergeApp
from tui.screens.report import ReportScreen
from tui.snapshots import FindingView, GgufRow, ModuleView, VerdictView
from tui.widgets.verdict import findings_content, gauges_content, loss_content, marks_content, modules_content

MODULES = tuple(
    ModuleView(f"model.layers.{i}.mlp.down_proj", 1000, i, 400 + i, 1.0, 0.2, {"pt": 0.29, "sft": 0.68})
    for i in range(30)
)
WHOLE = replace(
    SQUARED, dtype="BF16", elements=30_000, differing=435, loss={"pt": 0.002, "sft": 0.005}, modules=MODULES,
    worst=MODULES[:-11:-1], warnings=("no tokenizer",),
)  # fmt: skip
TIES = VerdictView(
    True, "ok", "every element is right: ties of pt / sft", {"pt": 1.0, "sft": 1.0}, unchanged_share=0.4,
    differing_share=0.0, findings=(FindingView("ok"),), elements=30_000, dtype="BF16",
    modules=tuple(replace(m, differing=0, residual=None, found={}) for m in MODULES),
)  # fmt: skip


def at(line: str, mark: str) -> int:
    assert line.count(mark) == 1, (mark, line)
    return line.index(mark)


def test_marks_stand_at_their_weights_on_one_scale() -> None:
    verdict = VerdictView(True, "ok", "", {"a": 0.2, "b": 0.8}, {"a": 0.4, "b": 0.6}, {"a": 0.0, "b": 0.8})
    lines = marks_content(verdict, 91, tall=True).plain.split("\n")
    assert lines[-1].split() == ["0", "0.8"]
    cells = 80  # 91 less the labels and one
    for row, (asked, expected, found) in enumerate(((0.2, 0.4, 0.0), (0.8, 0.6, 0.8))):
        above, rail, below = lines[4 * row + 1 : 4 * row + 4]
        for line, mark, value in ((above, "▼", asked), (rail, "●", found), (below, "▲", expected)):
            assert at(line, mark) == 10 + round(value / 0.8 * (cells - 1))


def test_negative_weights_widen_the_scale_to_the_left() -> None:
    verdict = VerdictView(True, "ok", "", {"a": -0.5}, {"a": -0.5}, {"a": 0.5})
    lines = marks_content(verdict, 91, tall=False).plain.split("\n")
    assert lines[-1].split() == ["-0.5", "0.5"]
    assert at(lines[1], "▲") == 10 and at(lines[1], "●") == 89


@pytest.mark.parametrize("width", [76, 116, 200])
def test_nothing_is_wider_than_its_room(width: int) -> None:
    parts = [marks_content(WHOLE, width, True), gauges_content(WHOLE, width), loss_content(WHOLE, width)]
    parts += [findings_content(WHOLE, width), modules_content(MODULES, ["pt", "sft"], width)]
    for line in "\n".join(part.plain for part in parts).split("\n"):
        assert len(line) <= width


def test_the_gauge_puts_the_floor_where_it_is() -> None:
    def rail(residual: float, floor: float) -> str:
        line = gauges_content(replace(GOOD, residual=residual, floor=floor), 116).plain.split("\n")[0]
        return line[10:50]

    assert rail(0.1, 0.1).index("┃") == 20 and rail(0.1, 0.1).count("━") == 20
    assert rail(0.4, 0.1).index("┃") < 12 and rail(0.4, 0.1).count("━") > 35
    assert "━" not in rail(0.0, 0.1)


def test_a_loss_above_two_percent_offers_a_finer_dtype() -> None:
    small = replace(GOOD, loss={"pt": 0.003}, dtype="BF16")
    assert "PT 1.0%" in loss_content(small, 116).plain and "fp16" not in loss_content(small, 116).plain
    assert "fp16 or fp32" in loss_content(replace(small, loss={"pt": 0.03}), 116).plain


def test_long_names_lose_their_beginning_and_layers_stay_apart() -> None:
    names = [f"base_model.model.language_model.model.layers.{i}.self_attn.q_proj" for i in (1, 11)]
    text = modules_content([ModuleView(name, 10, 1) for name in names], ["pt", "sft"], 60).plain
    assert "1.self_attn.q_proj" in text and "11.self_attn.q_proj" in text and "base_model" not in text


async def test_from_the_list_and_back(backend: FakeBackend) -> None:
    backend.reports = {BAD_MERGE.path: WHOLE, MERGE.path: TIES}
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        app.screen.query_one("#list").focus()
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(app.screen, ReportScreen))
        await until(pilot, lambda: "weight_squared" in text_of(app, "#report"))
        told = text_of(app, "#report")
        assert "not what was asked" in told and "asked 0.300" in told and "found 0.0900" in told
        assert "435 of 30,000 elements are wrong" in told and "no tokenizer" in told
        where = text_of(app, "#where")
        assert "29 of 30 have wrong elements" in where and "layers.29." in where and "layers.3." not in where
        await pilot.press("a")
        assert "layers.3." in text_of(app, "#where")
        await pilot.press("n")
        await until(
            pilot, lambda: "not linear" in text_of(app, "#report") or "ties of pt" in text_of(app, "#report")
        )
        assert "none of 30 has a wrong element" in text_of(app, "#where")
        await pilot.press("escape")
        assert app.current_mode == "merge" and not isinstance(app.screen, ReportScreen)


async def test_from_home_and_a_number_leads_away(backend: FakeBackend) -> None:
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(80, 24)) as pilot:
        await show(pilot, "home")
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, ReportScreen))
        await until(pilot, lambda: "asked 0.300" in text_of(app, "#report"))  # what the manifest says
        await pilot.press("3")
        await until(pilot, lambda: app.current_mode == "merge")
        await pilot.press("1")
        await until(pilot, lambda: app.current_mode == "home")
        assert not isinstance(app.screen, ReportScreen)


async def test_from_the_palette(backend: FakeBackend) -> None:
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "adapters")
        await pilot.press("ctrl+p")
        await pilot.press(*"report: theirs")
        await until(
            pilot, lambda: "report: theirs" in str(app.screen.query_one("OptionList").options[0].prompt)
        )  # type: ignore[attr-defined]
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ReportScreen) and app.screen.path == BAD_MERGE.path)


async def test_a_merge_without_verdict_offers_one_and_shows_it(backend: FakeBackend) -> None:
    backend.view = replace(FULL, merges=(replace(MERGE, verdict=None),))
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "home")
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, ReportScreen))
        assert "not verified" in text_of(app, "#report")
        await pilot.press("v")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].params == {"merged": MERGE.path}
        said = {"ok": True, "verdict": "ok", "message": "every element is right: at last", "exit_code": 0}
        backend.finish(app.jobs[0].id, result=said)
        await until(pilot, lambda: "every element is right: at last" in text_of(app, "#report"))
        assert re.search(r"read back again on .* \(job verify-101\)", text_of(app, "#report"))


async def test_what_can_be_verified_depends_on_the_merge(backend: FakeBackend) -> None:
    foreign = replace(MERGE, manifest=False, verdict=None, adapters=(), weights=(), method="", base="")
    backend.view = replace(
        FULL,
        merges=(replace(foreign, path="/ws/merges/theirs", name="theirs"), replace(MERGE, kind="adapter")),
    )
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "home")
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, ReportScreen))
        await pilot.press("v")
        await until(pilot, lambda: len(backend.started) == 1)
        params = backend.started[0].params
        assert params["weights"] is None and params["adapters"] == CHOSEN.labels()
        await pilot.press("n", "v")
        await until(pilot, lambda: len(backend.started) == 2)
        assert backend.started[1].params == {"merged": MERGE.path, "manifest": True}
        backend.finish(app.jobs[0].id, exit_code=1, result={"ok": False, "message": "config.json changed"})
        await until(pilot, lambda: "✗ config.json changed" in text_of(app, "#report"))


async def test_a_refused_merge_and_its_ggufs(backend: FakeBackend) -> None:
    refused = replace(MERGE, path="/ws/merges/m.rejected", name="m.rejected", verdict=SQUARED, rejected=True)
    made = [{"out": "/ws/merges/pt30-sft70-q8_0.gguf", "verdict": {"ok": True, "verdict": "ok"}}]
    files = (
        GgufRow(made[0]["out"], "pt30-sft70-q8_0.gguf", 5),
        GgufRow("/ws/gguf/x.gguf", "pt30-sft70-2-q8_0.gguf"),
    )  # type: ignore[arg-type]
    backend.view = replace(FULL, merges=(refused, MERGE), ggufs=files)
    backend.jobs = [job(1, "merge", "done", exit_code=0, result={"ggufs": made})]
    app = MedmergeApp(backend, CHOSEN)
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "merge")
        await until(pilot, lambda: "✗ refused" in str(app.screen.rows.get_option_at_index(0).prompt))  # type: ignore[attr-defined]
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, ReportScreen))
        assert "kept for study" in text_of(app, "#report") and "GGUF" not in text_of(app, "#where")
        await pilot.press("n")
        assert "pt30-sft70-q8_0.gguf   5 B   ✓ verified" in text_of(app, "#where")
        assert "pt30-sft70-2" not in text_of(app, "#where")
