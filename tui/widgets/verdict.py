"""A verdict as pictures in text: three marks per adapter on one scale, gauges, findings, a table of modules.

Pure functions of a VerdictView; the report screen puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from tui.parts import fact
from tui.safe_text import plain
from tui.snapshots import LOSS_WORTH_SAYING, ModuleView, VerdictView
from tui.text import cut, fit, weight
from tui.theme import label_style

ASKED, EXPECTED, FOUND = "▼", "▲", "●"
LABEL_CELLS = 10
_ENDS = (0.05, 0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.75, 0.8, 1.0, 1.25, 1.5, 2.0)
DTYPES = {
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def marks_content(verdict: VerdictView, width: int, tall: bool) -> Content:
    """For each adapter its numbers and a rail with the marks asked, expected and found; one scale for all.

    Where marks fall into one cell of a rail the last of asked, expected, found is seen; `tall` gives asked and
    expected a line of their own above and below it. Empty where the method has no effective weights.
    """
    if not verdict.found:
        return Content("")
    first = verdict.asked or verdict.likely
    values = [*first.values(), *verdict.expected.values(), *verdict.found.values()]
    low, high = _scale(values)
    cells = max(10, min(width, 110) - LABEL_CELLS - 1)
    name = "asked" if verdict.asked else "likely"

    def at(value: float | None) -> int | None:
        return None if value is None else round((value - low) / (high - low) * (cells - 1))

    lines = []
    for label, found in verdict.found.items():
        style = label_style(label)
        asked, expected = first.get(label), verdict.expected.get(label)
        numbers = [(ASKED, name, asked, 3), (EXPECTED, "expected", expected, 4), (FOUND, "found", found, 4)]
        words = Content("   ").join(
            Content.assemble((f"{mark} ", style), (f"{what} ", "$faint"), f"{value:.{digits}f}")
            for mark, what, value, digits in numbers
            if value is not None
        )
        lines.append(Content.assemble((fit(label.upper(), LABEL_CELLS), f"bold {style}")) + words)
        spots = [(at(asked), ASKED), (at(expected), EXPECTED), (at(found), FOUND)]
        rail = [(" " * LABEL_CELLS, ""), *_rail(spots[2:] if tall else spots, cells, style)]
        above, below = (
            _alone(at(value), mark, style) for value, mark in ((asked, ASKED), (expected, EXPECTED))
        )
        lines += [above, Content.assemble(*rail), below] if tall else [Content.assemble(*rail)]
    ends = f"{low:g}", f"{high:g}"
    axis = " " * LABEL_CELLS + ends[0] + " " * max(1, cells - len(ends[0]) - len(ends[1])) + ends[1]
    return Content("\n").join([*lines, Content.styled(axis, "$faint")])


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """(low, high): 0 and the next round number above the largest; below 0 the same on the other side."""
    top, bottom = max([*values, 0.0]), min([*values, 0.0])

    def end(size: float) -> float:
        return next((step for step in _ENDS if size <= step), size)

    return (-end(-bottom) if bottom < 0 else 0.0), (end(top) if top > 0 or bottom >= 0 else 0.0)


def _alone(spot: int | None, mark: str, style: str) -> Content:
    return Content("") if spot is None else Content.assemble(" " * (LABEL_CELLS + spot), (mark, style))


def _rail(spots: Sequence[tuple[int | None, str]], cells: int, style: str) -> list[tuple[str, str]]:
    """A line of `cells`, the marks on it in the adapter's colour."""
    placed = {spot: mark for spot, mark in spots if spot is not None}
    parts, before = [], 0
    for spot, mark in sorted(placed.items()):
        parts += [("─" * (spot - before), "$rule"), (mark, f"bold {style}")]
        before = spot + 1
    return [*parts, ("─" * (cells - before), "$rule")]


def gauges_content(verdict: VerdictView, width: int) -> Content:
    """Residual against its floor, the shares of unchanged and of wrong elements: what is known of them."""
    cells = max(12, min(40, width - 59))
    dtype = DTYPES.get(verdict.dtype, verdict.dtype.lower()) or "the dtype"
    lines = []
    if verdict.residual is not None:
        floor = verdict.floor or 0.0
        high = max(2 * floor, verdict.residual * 1.05, 1e-9)
        above = verdict.residual > floor * 1.02 + 1e-4
        done = min(cells, round(verdict.residual / high * cells))
        at = min(cells - 1, round(floor / high * cells))
        rail = ["━" if i < done else "─" for i in range(cells)]
        style = "$error" if above else "$primary"
        drawn = Content.assemble(
            ("".join(rail[: min(at, done)]), style), ("".join(rail[min(at, done) : at]), "$rule"),
            ("┃", "bold"), ("".join(rail[at + 1 : max(at + 1, done)]), style),
            ("".join(rail[max(at + 1, done) :]), "$rule"),
        )  # fmt: skip
        words = f" {verdict.residual:.4f}"
        ground = f"   ┃ {dtype} rounding alone leaves {floor:.4f}" if verdict.floor is not None else ""
        lines.append(_gauge("residual", drawn, words, ground))
    if verdict.unchanged_share is not None:
        why = "   of the elements keep the base's value"
        lines.append(_share("unchanged", verdict.unchanged_share, cells, "$primary", why))
    if verdict.elements:
        share = verdict.differing / verdict.elements
        why = f"   {verdict.differing:,} of {verdict.elements:,} elements are wrong"
        lines.append(_share("differing", share, cells, "$error", why))
    elif verdict.differing_share is not None:
        lines.append(_share("differing", verdict.differing_share, cells, "$error", "   of the elements"))
    return Content("\n").join(
        line if line.cell_length <= width else line.truncate(width, ellipsis=True) for line in lines
    )


def _gauge(what: str, drawn: Content, words: str, why: str) -> Content:
    return Content.assemble((f"{what:<{LABEL_CELLS}}", "$faint"), drawn, words, (why, "$faint"))


def _share(what: str, share: float, cells: int, style: str, why: str) -> Content:
    done = round(min(max(share, 0.0), 1.0) * cells)
    if share > 0 and done == 0:
        done = 1  # a little is not nothing
    drawn = Content.assemble(("━" * done, style), ("─" * (cells - done), "$rule"))
    words = f" {share:6.1%}" if share == 0 or share >= 0.001 else " <0.1%"
    return _gauge(what, drawn, words, why)


def loss_content(verdict: VerdictView, width: int) -> Content:
    """What rounding took of each weight, and the finer dtype where that is more than 2%."""
    shares = {
        label: lost / verdict.asked[label] for label, lost in verdict.loss.items() if verdict.asked.get(label)
    }
    if not shares:
        return Content("")
    words = Content("   ").join(
        Content.assemble((f"{cut(label.upper(), 12)} ", f"bold {label_style(label)}"), f"{share:.1%}")
        + Content.styled(f" ({verdict.loss[label]:.4f} of {weight(verdict.asked[label])})", "$faint")
        for label, share in shares.items()
    )
    if max(shares.values()) > LOSS_WORTH_SAYING and verdict.dtype in ("BF16", "F16"):
        finer = "fp16 or fp32 keeps it" if verdict.dtype == "BF16" else "fp32 keeps it"
        words += Content.styled(f"   {finer}", "$warning")
    return fact("rounding", Content.assemble(("takes  ", "$faint"), words), width)


def findings_content(verdict: VerdictView, width: int) -> Content:
    """Each finding with its code, what it is about, and its sentence; then the warnings."""
    lines = []
    style = "$warning" if verdict.ok is None else "$error"
    for finding in verdict.findings:
        if finding.code == "ok":
            continue
        told = finding.detail
        if finding.message and finding.message not in verdict.message:  # the sentence above says it
            told = (
                finding.message
                if finding.detail in finding.message
                else f"{finding.detail}: {finding.message}"
            )
        head = Content.assemble((plain(finding.code), f"bold {style}"), "   ", cut(told, 600))
        lines.append(_wrapped(head, "✗ " if verdict.ok is False else "? ", width, style))
    lines += [_wrapped(Content(plain(line)), "! ", width, "$warning") for line in verdict.warnings]
    return Content("\n").join(lines)


def _wrapped(words: Content, mark: str, width: int, style: str) -> Content:
    lines = words.wrap(max(20, width - len(mark)))
    return Content.styled(mark, style) + Content("\n" + " " * len(mark)).join(lines)


def modules_content(modules: Sequence[ModuleView], labels: Sequence[str], width: int) -> Content:
    """A table, one module a line: wrong elements, the weights found in it, residual, error against ideal rounding."""
    heads = ["differ", "unchanged", *(f"found {label}" for label in labels)]
    if any(module.residual is not None for module in modules):
        heads.append("residual")
    heads.append("error")
    columns = [max(6, min(14, len(head))) for head in heads]
    while len(columns) > 2 and width - sum(columns) - 2 * len(columns) < 24:  # the narrow one shows the first
        heads.pop(heads.index("residual") if "residual" in heads else 1 if "unchanged" in heads else -1)
        columns = [max(6, min(14, len(head))) for head in heads]
    longest = max((len(module.name) for module in modules), default=10)
    room = max(16, min(longest, width - sum(columns) - 2 * len(columns)))
    head = Content.assemble((fit("module", room), "$faint")) + Content.styled(
        "".join(f"  {cut(name, size):>{size}}" for name, size in zip(heads, columns, strict=True)), "$faint"
    )
    lines = [head]
    for module in modules:
        values = _values(module, labels)
        cells = "".join(f"  {values[name]:>{size}}" for name, size in zip(heads, columns, strict=True))
        lines.append(
            Content.assemble(
                _end(module.name, room), (cells, "$error" if module.differing else "$foreground")
            )
        )
    return Content("\n").join(lines)


def _values(module: ModuleView, labels: Sequence[str]) -> dict[str, str]:
    count = module.elements or 1
    differ = module.differing / count
    return {
        "differ": "0" if not module.differing else f"{differ:.2%}" if differ >= 0.0001 else f"{module.differing:,}",
        "unchanged": f"{module.unchanged / count:.1%}",
        **{f"found {x}": f"{module.found[x]:.4f}" if x in module.found else "–" for x in labels},
        "residual": "–" if module.residual is None else f"{module.residual:.4f}",
        "error": "–" if module.error is None else f"{module.error:.3f}",
    }  # fmt: skip


def _end(name: str, width: int) -> str:
    """A name's end tells modules apart: what is too long loses its first parts."""
    name = plain(name)
    while len(name) > width and "." in name:
        name = name.partition(".")[2]
    return fit(name, width)
