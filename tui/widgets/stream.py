"""A pane of fixed size into which text streams: lines are wrapped here, once, and only the last paragraph again.

A Markdown reflow per token would cost several times the key latency; this pane redraws at most a few lines.
Text is data: control characters are shown as "�", markup is never read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.segment import Segment
from textual import events
from textual.content import Content
from textual.geometry import Size
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.safe_text import plain

THINK = re.compile(r"<think>(.*?)(</think>|\Z)", re.DOTALL)


@dataclass
class Turn:
    """One piece of the conversation: a question, an answer (raw, think blocks included) or a note."""

    role: str  # user, answer, note, error
    text: str = ""
    think_tokens: int | None = None  # known when the answer is done


class StreamPane(ScrollView, can_focus=True):
    """The conversation of one pane. `think_open` unfolds think blocks, which are always counted."""

    COMPONENT_CLASSES = {"stream--user", "stream--answer", "stream--think", "stream--note", "stream--error"}
    DEFAULT_CSS = """
    StreamPane { height: 1fr; padding: 0 1; scrollbar-size-vertical: 1; }
    StreamPane > .stream--user { color: $faint; text-style: bold; }
    StreamPane > .stream--answer { color: $foreground; }
    StreamPane > .stream--think { color: $faint; text-style: italic; }
    StreamPane > .stream--note { color: $faint; }
    StreamPane > .stream--error { color: $error; }
    """

    think_open = reactive(False)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.turns: list[Turn] = []
        self._wrapped: list[list[tuple[str, str]]] = []  # per turn: (text, component) lines
        self._wrap_width = 0

    # ---- content -----------------------------------------------------------------------------------------

    def add(self, turn: Turn) -> Turn:
        """Put a new turn at the end."""
        self.turns.append(turn)
        self._wrapped.append(self._wrap(turn))
        self._resized(follow=True)
        return turn

    def changed(self) -> None:
        """The text of the last turn grew."""
        if self.turns:
            self._wrapped[-1] = self._wrap(self.turns[-1])
            self._resized(follow=True)

    def drop_last(self) -> None:
        """Take the last turn away."""
        if self.turns:
            del self.turns[-1], self._wrapped[-1]
            self._resized(follow=True)

    def wipe(self) -> None:
        self.turns.clear()
        self._wrapped.clear()
        self._resized(follow=True)

    def watch_think_open(self) -> None:
        self._wrap_all()

    def on_resize(self, event: events.Resize) -> None:
        if self.scrollable_content_region.width != self._wrap_width:
            self._wrap_all()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self.refresh()

    # ---- wrapping ------------------------------------------------------------------------------------------

    def _wrap_all(self) -> None:
        self._wrap_width = self.scrollable_content_region.width
        self._wrapped = [self._wrap(turn) for turn in self.turns]
        self._resized(follow=True)

    def _wrap(self, turn: Turn) -> list[tuple[str, str]]:
        width = self.scrollable_content_region.width
        if width < 4:
            return []
        if turn.role != "answer":
            mark = "› " if turn.role == "user" else ""
            lines = _lines(mark + turn.text, width, f"stream--{turn.role}")
            return [*lines, ("", "stream--note")]
        out: list[tuple[str, str]] = []
        position = 0
        for match in THINK.finditer(turn.text):
            out += _lines(turn.text[position : match.start()].strip("\n"), width, "stream--answer")
            out += self._thought(turn, match[1].strip(), closed=bool(match[2]), width=width)
            position = match.end()
        rest = turn.text[position:].lstrip("\n") if position else turn.text
        return [*out, *_lines(rest, width, "stream--answer"), ("", "stream--note")]

    def _thought(self, turn: Turn, text: str, closed: bool, width: int) -> list[tuple[str, str]]:
        if not text and closed:
            return [("▸ thought nothing (empty block)", "stream--think")]
        count = (
            f"{turn.think_tokens} tokens" if turn.think_tokens is not None else f"{len(text.split())} words"
        )
        verb = "thought" if closed else "thinking"
        head = (f"{'▾' if self.think_open else '▸'} {verb} {count}", "stream--think")
        return [head, *(_lines(text, width, "stream--think") if self.think_open else [])]

    def _resized(self, follow: bool) -> None:
        at_end = self.scroll_offset.y >= self.max_scroll_y - 1
        total = sum(len(lines) for lines in self._wrapped)
        self.virtual_size = Size(self.scrollable_content_region.width, total)
        self.refresh()
        if follow and at_end:
            self.scroll_end(animate=False, immediate=True)

    # ---- drawing ---------------------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        index = self.scroll_offset.y + y
        for lines in self._wrapped:
            if index < len(lines):
                text, component = lines[index]
                style = self.get_component_rich_style(component)
                return Strip([Segment(text, style)]).adjust_cell_length(width, self.rich_style)
            index -= len(lines)
        return Strip.blank(width, self.rich_style)


def _lines(text: str, width: int, component: str) -> list[tuple[str, str]]:
    """Foreign text, made safe and wrapped to `width` cells."""
    if not text:
        return []
    lines: list[tuple[str, str]] = []
    for paragraph in plain(text, lines=True).expandtabs(4).split("\n"):
        wrapped = Content(paragraph).wrap(width) if paragraph else [Content("")]
        lines += [(line.plain, component) for line in wrapped]
    return lines
