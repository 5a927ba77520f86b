"""The first samples as the model will see them, trained tokens marked; scrolls. Used by the train screen."""

from __future__ import annotations

from collections.abc import Callable

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from tui.safe_text import plain
from tui.snapshots import PreviewView, SampleView
from tui.text import cut
from tui.theme import label_style
from tui.widgets.sized import SizedScroll


class SamplePreview(Vertical):
    """A title, what the marks mean, and the samples. `show` one of: words, an error, a preview."""

    DEFAULT_CSS = """
    SamplePreview > .title { height: 1; text-style: bold; text-wrap: nowrap; text-overflow: ellipsis; }
    SamplePreview > .head { height: auto; margin-bottom: 1; }
    SamplePreview > SizedScroll { height: 1fr; scrollbar-size-vertical: 1; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._draw: Callable[[int], tuple[Content, Content]] | None = None

    def compose(self) -> ComposeResult:
        yield Static(Content("Samples as the model will see them"), classes="title")
        yield Static(classes="head")
        with SizedScroll(can_focus=True):
            yield Static(classes="samples")

    def show_words(self, words: Content | str) -> None:
        """Nothing to see yet: why, or that it is being read."""
        content = words if isinstance(words, Content) else Content.styled(words, "$faint")
        self._draw = lambda width: (content, Content(""))
        self.redraw()

    def show_error(self, message: str, hint: str) -> None:
        lines = [Content.styled(f"✗ {plain(message)}", "$error")]
        if hint:
            lines.append(Content(f"→ {plain(hint)}"))
        self.show_words(Content("\n").join(lines))

    def show_preview(self, view: PreviewView, kind: str) -> None:
        def draw(width: int) -> tuple[Content, Content]:
            samples = [sample_content(sample, kind, width) for sample in view.samples]
            words = Content("\n\n").join(samples) if samples else Content.styled("no sample", "$faint")
            return preview_head(view, kind), words

        self._draw = draw
        self.redraw()
        self.query_one(SizedScroll).scroll_home(animate=False)

    def redraw(self) -> None:
        """Draw for the width there is."""
        if self._draw is None:
            return
        scroll = self.query_one(SizedScroll)
        head, samples = self._draw(max(30, scroll.scrollable_content_region.width - 1))
        self.query_one(".head", Static).update(head)
        self.query_one(".samples", Static).update(samples)


def preview_head(view: PreviewView, kind: str) -> Content:
    """What the marks mean, and what was counted."""
    style = label_style(kind)
    facts = [f"template {view.template}" if view.template else "plain text"]
    if view.cutoff:
        facts.append(f"cutoff {view.cutoff:,} tokens")
    counted = [
        f"{value:,} {words}"
        for value, words in (
            (view.rows, "rows"),
            (view.too_long, "too long"),
            (view.untrained, "with nothing trained"),
        )
        if value is not None
    ]
    lines = [
        Content.assemble(
            ("▌", style), ("trained", style), ("   only read", "$faint"), ("   ", ""),
            (" special ", "$faint on $panel"), ("   ", ""), (plain(" · ".join([*facts, *counted])), "$faint"),
        )
    ]  # fmt: skip
    lines += [Content.styled(f"! {plain(words)}", "$warning") for words in view.warnings]
    return Content("\n").join(lines)


def sample_content(sample: SampleView, kind: str, width: int) -> Content:
    """One sample: a head, then its text wrapped, with a bar beside every line that holds a trained token."""
    style = label_style(kind)
    share = f"{sample.trained / sample.length:.0%}" if sample.length else "0%"
    head = Content.assemble(
        (cut(sample.place.rpartition("/")[2], max(12, width - 44)), "bold"),
        (f"   {sample.length:,} tokens, {sample.trained:,} trained ({share})", "$faint"),
        (f"   {sample.cut:,} cut off" if sample.cut else "", "$warning"),
    )
    lines = [head]
    if sample.note:
        lines.append(Content.styled(f"! {plain(sample.note)}", "$warning"))
    line, marked = Content(""), False
    body: list[tuple[Content, bool]] = []
    for piece in sample.pieces:
        look = style if piece.trained else "$faint"
        look += " on $panel" if piece.special else ""
        parts = plain(piece.text, lines=True).split("\n")
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            shown = part.replace("\t", "    ") + ("" if last else "↵")
            line += Content.styled(shown, look)
            marked = marked or (piece.trained and bool(shown))
            if not last:
                body.append((line, marked))
                line, marked = Content(""), False
    if line.plain:
        body.append((line, marked))
    for text, trained in body:
        bar = Content.styled("▌", style) if trained else Content(" ")
        lines += [bar + row for row in text.wrap(max(10, width - 1)) or [Content("")]]
    return Content("\n").join(lines)
