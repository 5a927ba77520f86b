"""Chat answers: how do they talk? Two panes, one prompt, and the weights under the fingers while they answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Input, Static

from engine.errors import MedmergeError
from engine.template_check import Trained
from tui import actions
from tui.actions import Action
from tui.chatting import Desk, Seat, Source, live_source, template_warnings, without_thoughts
from tui.parts import job_line, weights_content
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.dialogs import PickScreen
from tui.snapshots import JobFeed, JobRow, Overview
from tui.text import cut, size
from tui.widgets.choice import Choice
from tui.widgets.field import Field
from tui.widgets.slider import WeightSlider
from tui.widgets.stream import StreamPane, Turn

PANES = ("left", "right")
START_WEIGHTS = {"left": {"pt": 0.0, "sft": 1.0}, "right": {"pt": 0.3, "sft": 0.7}}
DECODINGS = {
    "greedy": (0.0, 1.0),
    "T 0.2  p 0.7": (0.2, 0.7),
    "T 0.6  p 0.8": (0.6, 0.8),
    "T 0.95  p 0.7": (0.95, 0.7),
}  # (temperature, top-p): greedy, and the grid of arXiv 2601.18350
LIVE_TYPE = "auto"  # f16 for a small base, q4_k_m for a big one
DRAW_SECONDS = 0.08
MAX_TOKENS = 512


@dataclass
class Answering:
    """An answer under way (or the last one) of a pane."""

    turn: Turn | None = None
    tokens: int = 0
    started: float = 0.0
    busy: bool = False
    dirty: bool = False
    rate: float | None = None
    end: str = ""
    facts: list[str] = field(default_factory=list)


class ChatScreen(MedScreen):
    NAME = "chat"
    CSS_PATH = "chat.tcss"
    QUESTION = "Chat: how do they talk? Two panes, one prompt, weights under your fingers."
    BINDINGS = [
        Binding("i", "prompt", "ask"),
        Binding("r", "again", "again"),
        Binding("x", "stop", "stop"),
        Binding("w", "other_pane", "other pane", tooltip="whose weights and model are set"),
        Binding("o", "source", "model"),
        Binding("l", "prepare", "prepare live"),
        Binding("t", "thoughts", "thoughts", show=False),
        Binding("n", "new", "new conversation", show=False),
        Binding("m", "export", "merge these weights", show=False),
        Binding("up", "app.focus_previous", "previous field", show=False),
        Binding("down", "app.focus_next", "next field", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._seats = {pane: Seat(pane, weights=dict(START_WEIGHTS[pane])) for pane in PANES}
        self._answers = {pane: Answering() for pane in PANES}
        self._steered = "right"  # the pane whose weights the sliders set
        self._live: Source | None = None
        self._desk: Desk | None = None
        self._asked: list[str] = []
        self._seed_add = 0

    @property
    def desk(self) -> Desk:
        if self._desk is None:
            self._desk = Desk(self.med.backend.chat_model)
        return self._desk

    def body(self) -> ComposeResult:
        with Horizontal(id="panes"):
            for pane in PANES:
                with Vertical(id=f"{pane}-column", classes="column"):
                    yield Static(id=f"{pane}-head", classes="head")
                    yield StreamPane(id=f"{pane}-pane")
                    yield Static(id=f"{pane}-foot", classes="foot")
        yield Static(id="notice")
        with Horizontal(id="weights"):
            yield Static(id="steered")
            yield WeightSlider("pt", 0.3, id="pt")
            yield WeightSlider("sft", 0.7, id="sft")
        with Horizontal(id="settings"):
            yield Choice("template", (("model", "model"),), id="template")
            yield Choice("decoding", tuple((name, name) for name in DECODINGS), id="decoding")
            yield Static(Content("seed "), classes="label")
            yield Field("42", id="seed", digits=True)
        yield Static(id="warning")
        with Horizontal(id="ask"):
            yield Static(Content.styled("›", "bold $primary"), id="mark")
            yield Field(placeholder="ask both", id="prompt")

    def on_mount(self) -> None:
        self.set_interval(DRAW_SECONDS, self._draw_new)
        self.ask("templates", _template_names)
        self._heads()

    async def on_unmount(self) -> None:
        if self._desk is not None:
            await self._desk.close()

    # ---- showing -------------------------------------------------------------------------------------------

    def answered(self, question: str, value: Any) -> None:
        if question == "templates":
            self.query_one("#template", Choice).set_options(
                [("model", "model's own"), *((n, n) for n in value)]
            )
        elif question == "template warnings":
            self._show_warnings(value)

    def show_workspace(self, overview: Overview) -> None:
        self._find_live()
        self._warn()

    def show_jobs(self, jobs: tuple[JobRow, ...], feeds: dict[str, JobFeed]) -> None:
        self._find_live()
        preparing = next((job for job in jobs if job.kind == "live" and not job.final), None)
        if preparing:
            self._notice(job_line(preparing, self.size.width - 6))
        elif self._seated:
            self._notice(Content(""))
        else:
            self._notice(self._empty())

    @property
    def _seated(self) -> bool:
        return any(seat.source for seat in self._seats.values())

    def _empty(self) -> Content:
        failed = next((job for job in self.med.jobs if job.kind == "live"), None)
        if failed and failed.state == "failed":
            return Content.styled(f"✗ {plain(failed.error)}", "$error")
        selection = self.med.selection
        if not selection.base:
            return Content("No base is chosen yet: press 2 to choose one, or 1 to be led there.")
        return Content.assemble(
            ("l", "bold $primary"), " makes the base and your adapters ready to mix while they talk (once).   ",
            ("o", "bold $primary"), " opens a GGUF you have made.",
        )  # fmt: skip

    def _notice(self, words: Content) -> None:
        notice = self.query_one("#notice", Static)
        notice.update(words)
        notice.display = len(words) > 0

    def _find_live(self) -> None:
        """Seat both panes on the newest live preparation of the chosen base and adapters."""
        selection, found = self.med.selection, None
        for job in self.med.jobs:
            if job.kind != "live" or job.state != "done" or job.exit_code:
                continue
            if job.params.get("base") == selection.base and job.params.get("adapters") == selection.labels():
                found = live_source(job.result)
                if found and not Path(found.path).exists():
                    found = None
                break
        if found != self._live:  # another base or adapter was chosen, or one was prepared anew
            self._live = found
            for pane in PANES:
                seat = self._seats[pane]
                if seat.source is None or seat.source.live:
                    seat.source, seat.scaled = found, None
            self._warn()
            if found and self.focused is None and self.is_current:
                self.query_one("#prompt").focus()
        self._heads()

    def _warn(self) -> None:
        """Have it said when the template is not the one that what sits in the panes was trained with.

        Files say which text "model" is, and what a merge or GGUF is made of: they are read in a thread, and the
        answer comes back as "template warnings".
        """
        overview, template = self.med.overview, self.query_one("#template", Choice).value
        selection, live = self.med.selection, []
        for label, path in selection.labels().items():
            row = overview.adapter(path) if overview else None
            if row is not None and not row.error:
                live.append(replace(row.trained or Trained("", row.template), label=label.upper()))
        final = {s.source.path for s in self._seats.values() if s.source and not s.source.live}
        mixing = not self._seated or any(s.source and s.source.live for s in self._seats.values())
        base = selection.base
        self.ask(
            "template warnings",
            lambda: template_warnings(
                template, base if mixing else "", live if mixing else [], sorted(final)
            ),
        )

    def _show_warnings(self, said: list[str]) -> None:
        warning = self.query_one("#warning", Static)
        warning.update(Content.styled("\n".join(f"! {plain(words)}" for words in said), "$warning"))
        warning.display = bool(said)

    def _heads(self) -> None:
        for pane in PANES:
            seat = self._seats[pane]
            head = self.query_one(f"#{pane}-head", Static)
            steered = Content.styled("▸ " if pane == self._steered else "  ", "bold $primary")
            if seat.source is None:
                words = Content.styled("no model yet", "$faint")
            elif seat.source.live:
                words = weights_content(seat.weights) + Content.styled(
                    f"   {plain(seat.source.name)}", "$faint"
                )
            else:
                words = Content.assemble((cut(seat.source.name, 40), "bold"), ("   final", "$faint"))
            head.update(steered + words)
            self._foot(pane)
        live = self._seats[self._steered].source
        for label in ("pt", "sft"):
            slider = self.query_one(f"#{label}", WeightSlider)
            slider.disabled = live is None or label not in dict(live.adapters)
            slider.set_reactive(WeightSlider.value, self._seats[self._steered].weights.get(label, 0.0))
            slider.refresh()
        self.query_one("#steered", Static).update(Content.styled(f"{self._steered} pane  ", "$faint"))
        self.refresh_bindings()

    def _foot(self, pane: str) -> None:
        answer, seat = self._answers[pane], self._seats[pane]
        parts = []
        if answer.busy and not answer.tokens:
            parts.append("reading the prompt …" if answer.started else "loading …")
        if answer.tokens:
            parts.append(f"{answer.tokens} tokens")
        rate = answer.rate
        if rate is None and answer.tokens > 1 and answer.busy:
            rate = answer.tokens / max(1e-6, time.monotonic() - answer.started)
        if rate:
            parts.append(f"{rate:.0f} tok/s")
        parts += answer.facts
        if answer.end:
            parts.append(answer.end)
        if seat.source and seat.source.live and not parts:
            parts.append(f"preview: unrounded deltas on a {seat.source.name.removeprefix('live ')} base")
        self.query_one(f"#{pane}-foot", Static).update(Content.styled(plain(" · ".join(parts)), "$faint"))

    def _draw_new(self) -> None:
        """Draw what has streamed in since the last time, a dozen times a second at most."""
        for pane in PANES:
            answer = self._answers[pane]
            if answer.dirty:
                answer.dirty = False
                self.query_one(f"#{pane}-pane", StreamPane).changed()
                self._foot(pane)

    # ---- talking ---------------------------------------------------------------------------------------------

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.input.id != "prompt":
            self.query_one("#prompt").focus()
            return
        text = event.value.strip()
        if not text:
            return
        if not self._seated:
            self.notify("there is no model yet: esc, then l prepares the live mixture", severity="warning")
            return
        if any(answer.busy for answer in self._answers.values()):
            self.notify("still answering: esc, then x stops it", severity="warning")
            return
        event.input.value = ""
        self._asked.append(text)
        for pane in PANES:
            seat = self._seats[pane]
            if seat.source is not None:
                seat.messages.append({"role": "user", "content": text})
                self.query_one(f"#{pane}-pane", StreamPane).add(Turn("user", text))
                self._begin(pane)

    def _begin(self, pane: str) -> None:
        self._answers[pane] = Answering(busy=True)
        self._foot(pane)
        self.run_worker(self._answer(pane), name=f"answer {pane}", group=f"answer-{pane}", exclusive=True)
        self.refresh_bindings()

    async def _answer(self, pane: str) -> None:
        """Stream one answer into its pane; every failure becomes words in the pane."""
        from engine.chat.protocol import Done, Failed, Sampling, Token

        seat, answer = self._seats[pane], self._answers[pane]
        view = self.query_one(f"#{pane}-pane", StreamPane)
        source = seat.source
        assert source is not None
        temperature, top_p = DECODINGS[self.query_one("#decoding", Choice).value]
        sampling = Sampling(temperature, top_p, 0, self._seed, MAX_TOKENS)
        template = self.query_one("#template", Choice).value
        try:
            model = await self.desk.seat(pane, source)
            if source.live:
                await model.set_scales(pane, seat.weights)
                seat.scaled = dict(seat.weights)
            answer.started = time.monotonic()
            answer.turn = view.add(Turn("answer"))
            async for event in model.ask(pane, list(seat.messages), template, sampling):
                if isinstance(event, Token):
                    answer.turn.text += event.text
                    answer.tokens += 1
                    answer.dirty = True
                elif isinstance(event, Done):
                    self._finished(answer, event)
                    seat.messages.append({"role": "assistant", "content": without_thoughts(answer.turn.text)})
                elif isinstance(event, Failed):
                    view.add(
                        Turn("error", f"{event.message}\n→ {event.hint}" if event.hint else event.message)
                    )
        except (MedmergeError, OSError, ImportError) as error:
            view.add(Turn("error", str(error)))
        finally:
            answer.busy = False
            if seat.messages and seat.messages[-1]["role"] == "user" and not answer.end:
                seat.messages.pop()  # it was not answered: the next question does not follow it
            view.changed()
            self._foot(pane)
            self.refresh_bindings()

    def _finished(self, answer: Answering, done: Any) -> None:
        answer.tokens, answer.rate = done.tokens, done.tokens_per_s
        answer.end = {
            "end": "",
            "length": "cut at the limit",
            "stopped": "stopped",
            "context": "context full",
        }.get(done.reason, done.reason) or "complete"
        if done.think_tokens and answer.turn:
            answer.turn.think_tokens = done.think_tokens
            answer.facts.append(f"think {done.think_tokens / max(1, done.tokens):.0%}")
        answer.dirty = True

    @property
    def _seed(self) -> int:
        text = self.query_one("#seed", Input).value
        return (int(text) if text.isdigit() else 42) + self._seed_add

    # ---- keys --------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "stop":
            return any(answer.busy for answer in self._answers.values())
        if action == "again":
            return any(seat.messages for seat in self._seats.values())
        return True

    def action_prompt(self) -> None:
        self.query_one("#prompt").focus()

    def action_stop(self) -> None:
        for pane in PANES:
            model = self.desk.model(pane)
            if self._answers[pane].busy and model is not None:
                model.stop(pane)

    def action_again(self) -> None:
        """The last question once more: other weights may be set; when sampling, with the next seed."""
        if any(answer.busy for answer in self._answers.values()):
            self.notify("still answering: x stops it", severity="warning")
            return
        greedy = DECODINGS[self.query_one("#decoding", Choice).value][0] == 0
        self._seed_add = 0 if greedy else self._seed_add + 1
        for pane in PANES:
            seat, view = self._seats[pane], self.query_one(f"#{pane}-pane", StreamPane)
            if seat.messages and seat.messages[-1]["role"] == "assistant" and seat.source:
                seat.messages.pop()
                if view.turns and view.turns[-1].role == "answer":
                    view.drop_last()
                self._begin(pane)

    def action_other_pane(self) -> None:
        self._steered = "left" if self._steered == "right" else "right"
        self._heads()

    def action_thoughts(self) -> None:
        for pane in self.query(StreamPane):
            pane.think_open = not pane.think_open

    def action_new(self) -> None:
        for pane in PANES:
            if not self._answers[pane].busy:
                self._seats[pane].messages.clear()
                self._answers[pane] = Answering()
                self.query_one(f"#{pane}-pane", StreamPane).wipe()
                self._foot(pane)

    def action_source(self) -> None:
        """Choose what the steered pane talks to."""
        overview = self.med.overview
        choices: list[tuple[str, str | Content]] = []
        if self._live:
            choices.append(("", Content("live mixture: weights may change while you talk")))
        for row in overview.ggufs if overview else ():
            if row.kind == "model":
                choices.append((row.path, f"{row.name}   {size(row.nbytes)}"))
        if not choices:
            self.notify(
                "no GGUF yet: l prepares the live mixture, or make one in Merge (g)", severity="warning"
            )
            return
        pane = self._steered
        self.app.push_screen(
            PickScreen(f"Model of the {pane} pane", choices), lambda path: self._sit(pane, path)
        )

    def _sit(self, pane: str, path: str | None) -> None:
        if path is None:
            return
        seat = self._seats[pane]
        seat.source = Source(path, Path(path).name) if path else self._live
        seat.scaled = None
        self._heads()
        self._warn()
        self._notice(Content(""))

    def command(self) -> Action | None:
        seat = self._seats[self._steered]
        if seat.source is None:
            return self._live_action()
        return actions.chat(self.med.backend.root, seat.source.path, dict(seat.source.adapters), seat.weights)

    def _live_action(self) -> Action | None:
        selection = self.med.selection
        if not selection.base or not selection.labels():
            return None
        return actions.live(self.med.backend.root, selection.base, selection.labels(), LIVE_TYPE)

    def action_prepare(self) -> None:
        action = self._live_action()
        if action is None:
            self.notify("choose a base and adapters first: press 2", severity="warning")
            return
        self.med.start_job(action)

    def action_export(self) -> None:
        """Take the steered pane's weights to the merge screen."""
        weights: Mapping[str, float] = self._seats[self._steered].weights
        self.med.show_merge(dict(weights))

    def on_weight_slider_changed(self, event: WeightSlider.Changed) -> None:
        self._seats[self._steered].weights[event.slider.label] = event.value
        self._heads()

    def on_choice_changed(self, event: Choice.Changed) -> None:
        self._seed_add = 0
        self._warn()


def _template_names() -> list[str]:
    from engine.templates import BUILTIN

    return sorted(BUILTIN)
