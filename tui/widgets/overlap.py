"""How two adapters interfere, as text: the overall numbers and the overlap by layer for each kind of module."""

from __future__ import annotations

from textual.content import Content

from tui.snapshots import OverlapView
from tui.strip import cells, largest

KINDS = (("q_proj", "q"), ("v_proj", "v"), ("o_proj", "o"), ("up_proj", "up"), ("down_proj", "down"))


def overlap_content(view: OverlapView, width: int, tall: bool) -> Content:
    """`cosine 0.08 · sign conflict 49% · shared subspace 11%`, and when `tall` a strip of the cosine by layer for each
    kind, all on one scale."""
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
    if not tall or not shown:
        return line
    room = max(6, (width - 10) // len(shown) - 7)
    top = largest([values for _, values in shown])
    graphs = [
        Content.assemble((f"{short} ", "$faint"), (cells(values, top, room), "$primary"))
        for short, values in shown
    ]
    head = f"\n          cosine by layer, █ {top:.2f}   "
    return line + Content.styled(head, "$faint") + Content("   ").join(graphs)
