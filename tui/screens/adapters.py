"""Adapters answers: what have I got, and is it healthy? Chooses the base, the PT and the SFT adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static

from tui.actions import Action
from tui.parts import fact
from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.screens.dialogs import PickScreen
from tui.snapshots import AdapterDetail, AdapterRow, Overview
from tui.text import cut, fit, parameters, size, sparkline
from tui.theme import label_style
from tui.widgets.field import Field
from tui.widgets.rows import RowList
from tui.widgets.sized import SizedScroll


class AdaptersScreen(MedScreen):
    NAME = "adapters"
    CSS_PATH = "adapters.tcss"
    QUESTION = "Adapters: what have I got, and is it healthy?"
    BINDINGS = [
        Binding("p", "use('pt')", "use as PT"),
        Binding("s", "use('sft')", "use as SFT"),
        Binding("b", "base", "base"),
        Binding("slash", "find", "find", key_display="/"),
        Binding("m", "merge", "merge"),
        Binding("u", "reread", "read again", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._details: dict[str, AdapterDetail] = {}
        self._filter = ""

    def body(self) -> ComposeResult:
        yield Static(id="base")
        with Horizontal(id="columns"):
            with Vertical(id="left"):
                yield Field(placeholder="part of a name", id="find")
                yield RowList[AdapterRow](self._line, lambda row: row.path, id="list")
            with SizedScroll(id="right", can_focus=True):
                yield Static(id="detail")

    def on_mount(self) -> None:
        self.query_one("#find").display = False
        self.rows.focus()

    @property
    def rows(self) -> RowList[AdapterRow]:
        return self.query_one("#list", RowList)

    def show_workspace(self, overview: Overview) -> None:
        base = overview.model(self.med.selection.base)
        if base:
            facts = (
                base.dtype.lower(),
                parameters(base.parameters),
                f"{base.layers} layers",
                size(base.nbytes),
            )
            name = (cut(base.name, max(20, self.size.width - 50)), "bold")
            words = Content.assemble(("Base  ", "$faint"), name, (f"   {' · '.join(facts)}", "$faint"))
        else:
            words = Content.assemble(("Base  ", "$faint"), ("none chosen: press b", "$warning"))
        self.query_one("#base", Static).update(words)
        wanted = self._filter.lower()
        found = [row for row in overview.adapters if wanted in row.name.lower()]
        found.sort(key=lambda row: (not row.usable, row.kind != "pt", row.name))
        self.rows.empty = self._empty(overview)
        self.rows.show(found)
        self._show_detail()

    def _empty(self, overview: Overview) -> Content:
        if overview.adapters:
            return Content(f"no adapter has {self._filter!r} in its name; esc shows all")
        return Content(
            "No adapters here yet.\n\n"
            f"Put PEFT folders into {plain(overview.root)}/adapters,\n"
            "train one (5), or make the demo (1)."
        )

    def _line(self, row: AdapterRow, width: int) -> Content:
        selection = self.med.selection
        chosen = next((label for label, path in selection.labels().items() if path == row.path), "")
        if row.error:
            name = fit(row.name, min(28, width - 24))
            reason = row.error.replace(f"{row.path}/", "")
            return Content.assemble(
                ("✗ ", "$error"), (name, "$faint"), " ", (cut(reason, width - 32), "$error")
            )
        mark = ("● ", f"${chosen}") if chosen else ("○ ", "$faint")
        kind = (f"{row.kind.upper() or '?':<4}", f"bold {label_style(row.kind)}")
        state = ("✓", "$success")
        if row.misfit or row.warning:
            state = ("✗", "$error") if row.misfit else ("!", "$warning")
        name = fit(row.name, max(10, width - 26))
        facts = (f"r{row.rank:<4}{size(row.nbytes):>8} ", "$faint")
        return Content.assemble(mark, (name, "$faint" if row.misfit else ""), " ", kind, facts, state)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self._show_detail()

    def _show_detail(self) -> None:
        row = self.rows.current
        detail = self._details.get(row.path) if row else None
        self.query_one("#detail", Static).update(self._detail(row, detail) if row else Content(""))
        if row and not row.error and detail is None:
            path = row.path
            self.ask("adapter", lambda: self.med.backend.detail(path))
        self.refresh_bindings()

    def answered(self, question: str, value: Any) -> None:
        if isinstance(value, AdapterDetail):
            self._details[value.path] = value
            self._show_detail()

    def _detail(self, row: AdapterRow, detail: AdapterDetail | None) -> Content:
        style = f"bold {label_style(row.kind)}"
        lines = [Content.assemble((plain(row.name), "bold"), "   ", (row.kind.upper(), style)), Content("")]
        if row.error:
            lines += [Content.styled("✗ cannot be used", "bold $error"), Content(plain(row.error))]
            if row.hint:
                lines.append(Content.styled(f"→ {plain(row.hint)}", "$faint"))
            return Content("\n").join(lines)
        width = self.query_one("#right").scrollable_content_region.width
        scales = ", ".join(f"{scale:g}" for scale in row.scales)
        lines.append(
            fact("LoRA", f"rank {row.rank}, scale {scales}, {row.dtype.lower()}, {size(row.nbytes)}", width)
        )
        lines.append(fact("changes", f"{row.modules} modules: {', '.join(row.targets)}", width))
        if row.variants:
            lines.append(fact("also", "; ".join(row.variants), width))
        judged = _mark("✓", "$success", "every factor fits the chosen base")
        if row.misfit:
            judged = _mark("✗", "$error", row.misfit)
        elif row.warning:
            judged = _mark("!", "$warning", row.warning)
        elif not self.med.selection.base:
            judged = Content.styled("none chosen to compare with: press b", "$faint")
        lines.append(fact("base", judged, width))
        if row.trained_on and self.med.selection.base and not row.misfit:
            lines.append(fact("", _trained_on(row), width))
        lines.append(fact("template", _template(row), width))
        lines += self._read_facts(row, detail, width)
        lines += [Content(""), Content.styled(plain(row.path), "$faint")]
        return Content("\n").join(lines)

    def _read_facts(self, row: AdapterRow, detail: AdapterDetail | None, width: int) -> list[Content]:
        if detail is None:
            return [fact("health", "reading …")]
        if detail.error:
            return [fact("health", _mark("✗", "$error", detail.error), width)]
        style = f"${row.kind}" if row.kind in ("pt", "sft") else "$primary"
        judged = _mark("✓", "$success", "all numbers finite, no zero B")
        if detail.not_finite:
            many = f"NaN or infinity in {len(detail.not_finite)} tensors, first {detail.not_finite[0]}"
            judged = _mark("✗", "$error", many)
        elif detail.zero_b:
            many = f"B is all zero in {len(detail.zero_b)} of {row.modules} modules: they change nothing"
            judged = _mark("!", "$warning", many)
        lines = [fact("health", judged, width)]
        room = max(12, min(60, width - 12))
        if detail.norms:
            words = f"by layer, 0 to {len(detail.norms) - 1}; largest {max(detail.norms):.3g}"
            lines += [Content(""), fact("norm", Content.styled(sparkline(detail.norms, room), style))]
            lines.append(fact("", Content.styled(words, "$faint")))
        if detail.curve:
            losses = [loss for _, loss in detail.curve]
            words = f"{losses[0]:.2f} → {losses[-1]:.2f} in {detail.curve[-1][0]:,.0f} steps"
            lines += [
                Content(""),
                fact("loss", Content.styled(sparkline(losses, room, from_zero=False), style)),
            ]
            lines.append(fact("", Content.styled(words, "$faint")))
        if detail.facts:
            lines.append(Content(""))
        lines += [fact(what, value, width) for what, value in detail.facts]
        return lines

    # ---- keys ----------------------------------------------------------------------------------------

    def action_use(self, label: str) -> None:
        row = self.rows.current
        if row is None:
            return
        if not row.usable:
            self.notify(plain(row.error or row.misfit), severity="warning", markup=False)
            return
        already = getattr(self.med.selection, label) == row.path
        self.med.choose_adapter(label, "" if already else row.path)

    def action_base(self) -> None:
        overview = self.med.overview
        if overview is None or not overview.models:
            self.notify("there is no model in bases/ yet", severity="warning")
            return
        choices: list[tuple[str, str | Content]] = []
        for row in overview.models:
            facts = f" ✗ {plain(row.error)}" if row.error else f" {row.dtype.lower()} {size(row.nbytes)}"
            choices.append((row.path, Content.assemble(fit(row.name, 44), (facts, "$faint"))))
        self.app.push_screen(
            PickScreen("The base model", choices, self.med.selection.base), self._base_picked
        )

    def _base_picked(self, path: str | None) -> None:
        overview = self.med.overview
        row = overview.model(path) if overview and path else None
        if row is None:
            return
        if row.error:
            self.notify(plain(row.error), severity="warning", markup=False)
            return
        self.med.choose(replace(self.med.selection, base=row.path))

    def action_find(self) -> None:
        box = self.query_one("#find", Input)
        box.display = True
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._filter = event.value.strip()
        if self.med.overview:
            self.show_workspace(self.med.overview)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.rows.focus()

    def on_descendant_blur(self) -> None:
        box = self.query_one("#find", Input)
        if box.display and not box.value and not box.has_focus:
            box.display = False

    def action_back(self) -> None:
        box = self.query_one("#find", Input)
        if box.display:
            box.value = ""
            box.display = False
            self.rows.focus()
        else:
            super().action_back()

    def action_merge(self) -> None:
        self.med.show("merge")

    def action_reread(self) -> None:
        self._details.clear()
        self.med.read_workspace()

    def command(self) -> Action | None:
        from tui.actions import inspect

        row = self.rows.current
        return inspect(self.med.backend.root, row.path) if row else None


def _trained_on(row: AdapterRow) -> Content:
    """Whether the chosen base is the one it was trained on, as far as that is known without reading its weights."""
    if row.same_base:
        return _mark("✓", "$success", "same hash as the chosen base")
    if row.same_base is False:
        return _mark("!", "$warning", f"trained on {row.trained_on}: the chosen base has another hash")
    return Content.styled(f"trained on {plain(row.trained_on)}, hash not compared yet", "$faint")


def _template(row: AdapterRow) -> str:
    if row.trained and row.trained.plain:
        return "none: trained on plain text"
    return row.template or "unknown: nothing says what it was trained with"


def _mark(mark: str, style: str, words: str) -> Content:
    """A judgement: its mark in colour, and the words in it too unless all is well."""
    return Content.assemble((f"{mark} ", style), (plain(words), "" if mark == "✓" else style))
