"""Chat: two panes, one prompt, weights that change while one talks; crashes and thoughts are words on screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.jobs import EventWriter
from engine.merge.job import run_merge
from engine.template_check import Trained, choose
from tests.conftest import MakeAdapter
from tests.tui.fake_backend import BASE, CHOSEN, PT, SFT, FakeBackend, job, show, text_of, until
from tui.app import MedmergeApp
from tui.chatting import live_source, template_warnings, without_thoughts
from tui.screens.chat import ChatScreen
from tui.widgets.choice import Choice
from tui.widgets.slider import WeightSlider
from tui.widgets.stream import StreamPane


@pytest.fixture
def live(tmp_path: Path) -> tuple[MedmergeApp, FakeBackend]:
    """An app whose live mixture is prepared."""
    gguf = tmp_path / "qwen3-14b-abc-q4_k_m.gguf"
    gguf.write_bytes(b"GGUF")
    params = {"base": BASE.path, "adapters": {"pt": PT.path, "sft": SFT.path}, "type": "auto"}
    result = {"base": str(gguf), "adapters": {"pt": "/ws/pt-lora.gguf", "sft": "/ws/sft-lora.gguf"}}
    backend = FakeBackend(jobs=[job(1, "live", "done", exit_code=0, params=params, result=result)])
    return MedmergeApp(backend, CHOSEN), backend


def pane(app: MedmergeApp, name: str) -> StreamPane:
    return app.screen.query_one(f"#{name}-pane", StreamPane)


def busy(app: MedmergeApp) -> bool:
    assert isinstance(app.screen, ChatScreen)
    return any(answer.busy for answer in app.screen._answers.values())


async def test_both_panes_answer_the_same_prompt_with_their_own_weights(
    live: tuple[MedmergeApp, FakeBackend],
) -> None:
    app, backend = live
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        await until(pilot, lambda: app.focused is not None and app.focused.id == "prompt")
        await pilot.press(*"food", "enter")
        await until(pilot, lambda: backend.models and len(backend.models[0].asked) == 2 and not busy(app))
        assert len(backend.models) == 1, "panes on the same file share one process"
        model = backend.models[0]
        assert model.scales == {"left": {"pt": 0.0, "sft": 1.0}, "right": {"pt": 0.3, "sft": 0.7}}
        for name in ("left", "right"):
            assert [turn.text for turn in pane(app, name).turns] == ["food", "Metformin is taken with food."]
            assert "38 tok/s" in text_of(app, f"#{name}-foot") and "complete" in text_of(app, f"#{name}-foot")
        left, right = (entry for entry in model.asked)
        assert left[1:] == right[1:], "same conversation, template, seed and sampling"


async def test_weights_change_while_you_talk(live: tuple[MedmergeApp, FakeBackend]) -> None:
    app, backend = live
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        await until(pilot, lambda: not app.screen.query_one("#pt", WeightSlider).disabled)
        assert "live q4_k_m" in text_of(app, "#right-head")
        assert "preview: unrounded deltas on a q4_k_m base" in text_of(app, "#right-foot")
        app.screen.query_one("#prompt").focus()
        await pilot.press("h", "i", "enter")
        await until(pilot, lambda: backend.models and len(backend.models[0].asked) == 2 and not busy(app))
        app.screen.query_one("#pt").focus()
        await pilot.press("right", "right", "w", "end", "r")
        await until(pilot, lambda: len(backend.models[0].asked) == 4 and not busy(app))
        assert backend.models[0].scales == {"left": {"pt": 1.0, "sft": 1.0}, "right": {"pt": 0.4, "sft": 0.7}}
        turns = [turn.role for turn in pane(app, "right").turns]
        assert turns == ["user", "answer"], "again replaces the answer"


async def test_stop_and_go_on(live: tuple[MedmergeApp, FakeBackend]) -> None:
    app, backend = live
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        await until(pilot, lambda: app.focused is not None)
        await pilot.press(*"wait", "enter")
        await until(pilot, lambda: backend.models and len(backend.models[0].asked) == 2)
        await pilot.press("m", "enter")  # still answering: refused, the text stays
        await until(pilot, lambda: app._notifications)
        assert len(backend.models[0].asked) == 2
        await pilot.press("escape", "x")
        await until(pilot, lambda: not busy(app))
        assert "stopped" in text_of(app, "#left-foot")
        app.screen.query_one("#prompt").focus()
        await pilot.press("o", "k", "enter")
        await until(pilot, lambda: len(backend.models[0].asked) == 4 and not busy(app))
        roles = [message["role"] for message in backend.models[0].asked[-1][1]]
        assert roles == ["user", "assistant", "user"]


async def test_thoughts_are_folded_and_counted(live: tuple[MedmergeApp, FakeBackend]) -> None:
    app, backend = live
    backend.answers = ["<think>is it a pill? yes</think> Take it with food."]
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        await until(pilot, lambda: app.focused is not None)
        await pilot.press("h", "enter")
        await until(pilot, lambda: backend.models and not busy(app) and len(pane(app, "left").turns) == 2)
        await until(pilot, lambda: "think" in text_of(app, "#left-foot"))
        shown = lines(pane(app, "left"))
        assert "▸ thought 3 tokens" in shown and not any("pill" in line for line in shown)
        await pilot.press("escape", "t")
        shown = lines(pane(app, "left"))
        assert "▾ thought 3 tokens" in shown and any("pill" in line for line in shown)
        app.screen.query_one("#prompt").focus()
        await pilot.press("h", "enter")
        await until(pilot, lambda: len(backend.models[0].asked) == 4 and not busy(app))
        sent = backend.models[0].asked[-1][1]
        assert sent[1] == {"role": "assistant", "content": "Take it with food."}


async def test_a_child_that_dies_is_words_and_the_next_question_works(
    live: tuple[MedmergeApp, FakeBackend],
) -> None:
    app, backend = live
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        await until(pilot, lambda: app.focused is not None)
        await pilot.press(*"die", "enter")
        await until(
            pilot, lambda: any(turn.role == "error" for turn in pane(app, "left").turns) and not busy(app)
        )
        assert "SIGKILL" in pane(app, "left").turns[-1].text
        await pilot.press(*"live", "enter")
        await until(pilot, lambda: pane(app, "left").turns[-1].role == "answer" and not busy(app))
        assert backend.models[0].asked[-1][1][-1]["content"] == "live"


async def test_without_a_model_it_says_how_to_get_one(app: MedmergeApp, backend: FakeBackend) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        assert "makes the base and your adapters ready" in text_of(app, "#notice")
        await pilot.press("l")
        await until(pilot, lambda: backend.started)
        assert backend.started[0].target == "engine.gguf.job:run_live"
        assert backend.started[0].params["adapters"] == {"pt": PT.path, "sft": SFT.path}


async def test_a_final_gguf_beside_the_live_mixture(live: tuple[MedmergeApp, FakeBackend]) -> None:
    app, backend = live
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        await until(pilot, lambda: app.focused is not None)
        await pilot.press("escape", "o")
        await until(pilot, lambda: "PickScreen" in type(app.screen).__name__)
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(app.screen, ChatScreen))
        assert "final" in text_of(app, "#right-head")
        assert app.screen.query_one("#pt", WeightSlider).disabled, "a final file has no weights to change"
        app.screen.query_one("#prompt").focus()
        await pilot.press("h", "enter")
        await until(pilot, lambda: len(backend.models) == 2 and not busy(app))
        assert {model.path.name for model in backend.models} == {
            "qwen3-14b-abc-q4_k_m.gguf",
            "pt30-sft70-q4_k_m.gguf",
        }
    assert all(model.closed for model in backend.models), "leaving the app ends the processes"


async def test_template_that_was_not_trained_with_is_said(app: MedmergeApp) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await show(pilot, "chat")
        await until(
            pilot, lambda: "adapter SFT was trained with template qwen3_nothink" in text_of(app, "#warning")
        )
        app.screen.query_one("#template", Choice).set_reactive(
            Choice.value, "chatml"
        )  # writes the same texts
        app.screen._warn()  # type: ignore[attr-defined]
        await until(pilot, lambda: "SFT" not in text_of(app, "#warning"))


def test_warnings_of_what_is_in_the_panes(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Adapters that are mixed in, and those inside a merge that a pane talks to."""
    adapter = make_adapter(tiny_llama, rank=2)
    note = {"kind": "sft", "template": "llama3", "template_text": None}
    (adapter / "training.json").write_text(json.dumps(note))
    recipe = {
        "base": str(tiny_llama),
        "adapters": {"sft": {"path": str(adapter), "weight": 1}},
        "output": {"path": str(tmp_path / "m.gguf"), "kind": "gguf", "gguf": ["f16"]},
    }
    run_merge({"recipe": recipe, "verify": False}, EventWriter())
    own = Trained("SFT", "model", choose("model", tiny_llama).sha256)
    (said,) = template_warnings("model", str(tiny_llama), [own], [str(tmp_path / "m.gguf")])
    assert "adapter sft in m.gguf was trained with template llama3" in said
    assert "choose llama3 as template" in said
    (said,) = template_warnings("llama3", str(tiny_llama), [own], [str(tmp_path / "m.gguf")])
    assert "adapter SFT was trained with template model" in said
    assert template_warnings("model", str(tiny_llama), [own], ["/nowhere.gguf"]) == []


def test_thoughts_do_not_go_back_into_the_conversation() -> None:
    assert without_thoughts("<think>a\nb</think>\n\nYes.") == "Yes."
    assert without_thoughts("<think>never closed") == ""
    assert without_thoughts("plain") == "plain"


def test_live_source_of_another_shape_is_none() -> None:
    assert live_source({}) is None and live_source({"base": 3, "adapters": {}}) is None


def lines(view: StreamPane) -> list[str]:
    """What the pane shows, line by line."""
    return [view.render_line(y).text.rstrip() for y in range(view.size.height)]
