"""Pieces of content that several screens show the same way: a job's line, a verdict in words, weights."""

from __future__ import annotations

from textual.content import Content

from tui.safe_text import plain
from tui.snapshots import JobRow, MergeRow, VerdictView
from tui.text import bar, cut, duration, fit, quantity, weight
from tui.theme import label_style

STATE_MARKS = {
    "starting": ("·", "$faint"),
    "running": ("▸", "$primary"),
    "cancelling": ("▸", "$warning"),
    "done": ("✓", "$success"),
    "failed": ("✗", "$error"),
    "cancelled": ("–", "$faint"),
    "lost": ("✗", "$error"),
}


FACT_WIDTH = 10
FINDINGS_SHOWN = 2


def fact(what: str, value: Content | str, width: int = 0) -> Content:
    """`what      value`, the value wrapped to `width` cells with a hanging indent (0: not wrapped here)."""
    content = value if isinstance(value, Content) else Content(plain(value))
    lines = content.wrap(width - FACT_WIDTH) if width > FACT_WIDTH + 8 else [content]
    indent = Content("\n" + " " * FACT_WIDTH)
    return Content.assemble((f"{what:<{FACT_WIDTH}}", "$faint")) + indent.join(lines)


def weights_content(weights: dict[str, float]) -> Content:
    """`PT 0.30  SFT 0.70`, each in its colour."""
    parts = [
        Content.styled(f"{cut(label.upper(), 12)} {weight(value)}", label_style(label))
        for label, value in weights.items()
    ]
    return Content("  ").join(parts)


def job_line(job: JobRow, width: int) -> Content:
    """One job in `width` cells: what, bar, share, amount, ETA."""
    mark, style = STATE_MARKS.get(job.state, ("?", "$faint"))
    if job.state == "done" and job.exit_code:
        mark, style = ("✗", "$error") if job.exit_code == 1 else ("?", "$warning")
    name_width = max(16, min(44, width - (40 if job.final else 66 if width >= 90 else 50)))
    line = Content.assemble((mark, f"bold {style}"), " ", fit(job.title, name_width), " ")
    if job.final:
        took = duration(job.finished - job.started) if job.finished and job.started else ""
        words = {0: "done", 1: "the check said no", 4: "could not tell"}.get(job.exit_code or 0, "done")
        state = words if job.state == "done" else job.state
        line += Content.assemble((fit(state, 17), style), " ", (fit(took, 9), "$faint"))
        return _clip(line + Content(plain(job.error)), width)
    cells = 10 if width < 100 else 20
    if job.fraction is None:
        line += Content.styled("━" * cells, "$rule") + Content("     ")
    else:
        line += bar(job.fraction, cells) + Content(f" {job.fraction:4.0%}")
    if job.eta_s is not None and job.total and job.done < job.total:
        line += Content.styled(f"  {duration(job.eta_s)} left", "$faint")
    tail = [job.phase]
    if job.total:
        tail.append(f"{quantity(job.done, '' if job.unit != 'B' else 'B')}/{quantity(job.total, job.unit)}")
    tail.append(job.message)
    line += Content.styled("  " + plain(" · ".join(part for part in tail if part)), "$faint")
    return _clip(line, width)


def _clip(line: Content, width: int) -> Content:
    return line if line.cell_length <= width else line.truncate(max(1, width), ellipsis=True)


def verdict_line(verdict: VerdictView | None) -> Content:
    """A verdict in a few words with its mark."""
    if verdict is None:
        return Content.styled("○ not verified", "$warning")
    if verdict.ok:
        return Content.styled("✓ verified", "$success")
    if verdict.ok is None:
        return Content.styled("? could not tell", "$warning")
    return Content.styled(f"✗ {plain(verdict.message or verdict.code)}", "$error")


def merge_mark(row: MergeRow) -> Content:
    """The verdict of a merge in a few words; of one that was refused, that it was."""
    return Content.styled("✗ refused", "$error") if row.rejected else verdict_line(row.verdict)


def verdict_strip(verdict: VerdictView) -> Content:
    """The whole verdict: what was asked, what the dtype keeps, what was found, and what is left over."""
    mark, style, head = {
        True: ("✓", "$success", "verified"),
        False: ("✗", "$error", "not what was asked"),
        None: ("?", "$warning", "could not tell"),
    }[verdict.ok]
    lines = [
        Content.assemble(
            (f"{mark} {head}", f"bold {style}"), "   ", (plain(verdict.message), "" if verdict.ok else style)
        )
    ]
    columns = [("asked", verdict.asked), ("expected", verdict.expected), ("found", verdict.found)]
    numbers = [
        Content.assemble((f"{name} ", "$faint"), _slashed(values, 2 if name == "asked" else 4))
        for name, values in columns
        if values
    ]
    if verdict.residual is not None:
        floor = f" (floor {verdict.floor:.3f})" if verdict.floor is not None else ""
        numbers.append(
            Content.assemble(("residual ", "$faint"), f"{verdict.residual:.3f}", (floor, "$faint"))
        )
    if numbers:
        lines.append(Content("   ").join(numbers))
    if verdict.unchanged_share is not None and verdict.unchanged_share >= 0.05:
        lines.append(
            Content.styled(
                f"{verdict.unchanged_share:.0%} of the touched elements keep the base's value",
                "$faint",
            )
        )
    told = [finding for finding in verdict.findings if finding.code != "ok"]
    for finding in told[:FINDINGS_SHOWN]:
        said = "" if finding.message == verdict.message else finding.message
        lines.append(
            Content.assemble((f"  {plain(finding.code)}  ", style), cut(said or finding.detail, 200))
        )
    if len(told) > FINDINGS_SHOWN:
        lines.append(Content.styled(f"  and {len(told) - FINDINGS_SHOWN} more: r opens the report", "$faint"))
    return Content("\n").join(lines)


def _slashed(values: dict[str, float], digits: int) -> Content:
    parts = [
        Content.styled(weight(value) if digits == 2 else f"{value:.{digits}f}", label_style(label))
        for label, value in values.items()
    ]
    return Content.styled(" / ", "$faint").join(parts)
