"""How two adapters interfere, as text: the overall numbers and the overlap by layer for each kind of module."""

from __future__ import annotations

from textual.content import Content

from tui.parts import FACT_WIDTH
from tui.snapshots import OverlapView
from tui.strip import cells, largest

KINDS = (("q_proj", "q"), ("v_proj", "v"), ("o_proj", "o"), ("up_proj", "up"), ("down_proj", "down"))


LEAST_CELLS = 5  # of one kind's strip


def overlap_content(view: OverlapView, width: int) -> Content:
    """`cosine 0.08 · sign conflict 49% · shared subspace 11%`, and below it a strip of the cosine by layer for each
    kind, all on one scale. `width` is the cells of a line; the second is indented as `tui.parts.fact` does."""
    parts = []
    if view.cosine is not None:
        parts.append(f"cosine {view.cosine:.2f}")
    if view.sign_conflict is not None:
        parts.append(f"sign conflict {view.sign_conflict:.0%}")
    if view.subspace is not None:
        parts.append(f"shared subspace {view.subspace:.0%}")
    line = Content(" · ".join(parts) or "no module in common")
    lines = dict(view.by_kind)
    shown = [(short, lines[kind]) for kind, short in KINDS if kind in lines]
    if not shown:
        return line
    room = (width - sum(len(short) + 1 for short, _ in shown) - 3 * (len(shown) - 1)) // len(shown)
    if room < LEAST_CELLS:
        return line
    top = largest([values for _, values in shown])
    graphs = [
        Content.assemble((f"{short} ", "$faint"), (cells(values, top, room), "$primary"))
        for short, values in shown
    ]
    scale = Content.styled(f"   by layer, █ {top:.2f}", "$faint")
    if line.cell_length + scale.cell_length <= width:
        line += scale
    return line + Content("\n" + " " * FACT_WIDTH) + Content("   ").join(graphs)
