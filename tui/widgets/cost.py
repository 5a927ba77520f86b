"""What a merge will cost and lose to rounding, as text, before it runs."""

from __future__ import annotations

from textual.content import Content

from tui.parts import fact
from tui.safe_text import plain
from tui.snapshots import PlanView
from tui.text import cut, duration, size, weight
from tui.theme import label_style
from tui.widgets.verdict import DTYPES

FINER = {"bfloat16": "float16", "float16": "float32"}  # what is offered where a dtype rounds too much away
WARNINGS_SHOWN = 2


def plan_content(plan: PlanView | None, weights: dict[str, float], width: int, tall: bool) -> Content:
    """Bytes, memory, seconds, free disk; what the dtype keeps of each weight; warnings. `tall`: tensors as well."""
    if plan is None:
        return fact("cost", "…")
    if plan.error:
        return fact("cost", Content.styled(plain(plan.error), "$error"), width)
    parts = []
    if plan.seconds is not None:
        parts.append("about 1 s" if plan.seconds < 1 else f"about {duration(plan.seconds)}")
    if plan.memory:
        parts.append(f"memory {size(plan.memory)}")
    parts += [f"reads {size(plan.read)}", f"writes {size(plan.written)}", f"free {size(plan.free)}"]
    words = ("   " if width >= 90 else "  ").join(parts)
    cost = Content(words) if plan.fits else Content.styled(f"{words}   not enough room", "$error")
    lines = [fact("cost", cost, width)]
    if tall:
        lines.append(fact("changes", f"{plan.touched} tensors; {plan.copied} copied as they are"))
    lines.append(fact("rounding", _kept(plan, weights, width), width))
    warnings = [*_offers(plan), *plan.warnings]
    for warning in warnings[:WARNINGS_SHOWN]:
        lines.append(fact("", Content.styled(f"! {plain(warning)}", "$warning"), width))
    if len(warnings) > WARNINGS_SHOWN:
        more = f"{len(warnings) - WARNINGS_SHOWN} more; medmerge plan shows them"
        lines.append(fact("", Content.styled(more, "$faint")))
    return Content("\n").join(lines)


def _kept(plan: PlanView, weights: dict[str, float], width: int) -> Content:
    """`PT 0.296 of 0.30 (−1.3%)` for each adapter: the weight that is left of the one asked."""
    dtype = DTYPES.get(plan.dtype, plan.dtype)
    if not plan.measured:
        return Content.styled("…", "$faint")
    if plan.unchanged_share is None:
        return Content.styled("not a number for this method: it is not linear in the weights", "$faint")
    parts = []
    for label, lost in plan.lost.items():
        asked = weights.get(label)
        if asked is None:
            continue
        style = "$warning" if label in plan.too_coarse else "$faint"
        parts.append(
            Content.assemble(
                (f"{cut(label.upper(), 12)} ", f"bold {label_style(label)}"),
                (f"{asked * (1 - lost):.3f}", ""),
                (f" of {weight(asked)}", "$faint"),
                (f" (−{max(lost, 0.0):.1%})", style),
            )
        )
    if width >= 100:
        parts.append(Content.styled(f"{plan.unchanged_share:.0%} of elements unchanged", "$faint"))
    return Content.styled(f"{dtype} keeps ", "$faint") + Content("   ").join(parts)


def _offers(plan: PlanView) -> list[str]:
    if not plan.too_coarse or plan.dtype not in FINER:
        return []
    kept = "fp16 or fp32 keep more" if plan.dtype == "bfloat16" else "fp32 keeps more"
    return [f"{DTYPES[plan.dtype]} rounds much of it away; {kept}: f takes {DTYPES[FINER[plan.dtype]]}"]
