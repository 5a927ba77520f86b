"""What the train screen draws: a run's line, the strip of numbers, what became of a run, the audit's
verdict. Pure functions over snapshots; text of files is made safe here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textual.content import Content

from tui.parts import STATE_MARKS, job_line
from tui.safe_text import plain
from tui.text import cut, fit, size
from tui.training_runs import STOPPED, AuditView, RunView

MARKS = {**STATE_MARKS, "stopped": ("–", "$faint"), "adapter": ("✓", "$faint")}
LEAKS_SHOWN = 3

# series, words, how the number is written, how soon it gives way where there is no room
NUMBERS = (
    ("loss", "loss", "{:.3f}", 0),
    ("eval_loss", "held out", "{:.3f}", 0),
    ("eval_perplexity", "perplexity", "{:.2f}", 2),
    ("lr", "lr", "{:.1e}", 0),
    ("grad_norm", "grad", "{:.2f}", 0),
    ("tok_s", "tok/s", "{:,.0f}", 0),
    ("tokens", "tokens", "", 1),
    ("padding", "padding", "{:.1%}", 1),
    ("memory", "memory", "", 1),
)
COLUMN = 9  # cells, at least
SETTINGS_FROM = 124  # cells of the list from which it shows what the runs were trained with


# ---- the list of runs ----------------------------------------------------------------------------------------


def _columns(width: int) -> tuple[int, bool, bool]:
    """Cells for the name, and whether held-out loss with tok/s and the time have room."""
    rates, when = width >= 66, width >= 84
    width = min(width, SETTINGS_FROM - 30)
    name = width - 2 - 16 - 8 - (18 if rates else 9) - (14 if when else 0)
    return max(8, min(36, name)), rates, when


def runs_header(width: int) -> Content:
    name, rates, when = _columns(width)
    line = f"  {'run':<{name}} {'steps':<15}{'loss':>8}{'held out':>9}"
    line += f"{'tok/s':>9}" if rates else ""
    line += f"{'when':>14}" if when else ""
    line += "   settings" if width >= SETTINGS_FROM else ""
    return Content.styled(line, "$faint")


def run_line(run: RunView, width: int, colour: str, overlaid: bool) -> Content:
    """One run: its colour in the plot (an empty dot: not in it), state and steps, losses, speed, when."""
    name, rates, when = _columns(width)
    mark, style = MARKS.get(run.state, ("?", "$faint"))
    numbers = _number(run.last("loss"), "{:.3f}", 8) + _number(run.last("eval_loss"), "{:.3f}", 9)
    if rates:
        numbers += _number(run.last("tok_s"), "{:,.0f}", 9)
    if when:
        numbers += Content.styled(f"{_when(run.when):>14}", "$faint")
    if width >= SETTINGS_FROM:
        numbers += Content.styled(
            "   " + cut(settings_words(run.config), width - SETTINGS_FROM + 24), "$faint"
        )
    return Content.assemble(
        ("● " if overlaid else "○ ", f"${colour}"), fit(run.name, name), " ",
        (f"{mark} ", style), fit(steps_words(run), 13), numbers,
    )  # fmt: skip


def steps_words(run: RunView) -> str:
    """`412/1,180` while it runs or where it stopped, `1,180` when it is whole."""
    if not run.step and run.state in STOPPED:
        return run.state
    if run.total > run.step and run.state not in ("done", "adapter"):
        return f"{run.step:,.0f}/{run.total:,.0f}"
    return f"{run.step:,.0f}"


def settings_words(config: Mapping[str, Any]) -> str:
    """What tells a run from another: `demo-sft · lr 0.0005 · rank 8 · 2 epochs`, as far as its settings say."""
    words = [str(config["preset"])] if config.get("preset") else []
    for key, form in (
        ("learning_rate", "lr {:g}"),
        ("rank", "rank {:g}"),
        ("epochs", "{:g} epochs"),
        ("shots", "{:g} shots"),
    ):
        value = config.get(key)
        if isinstance(value, int | float) and value:
            words.append(form.format(value))
    return " · ".join(words)


def _number(value: float | None, form: str, width: int) -> Content:
    if value is None:
        return Content.styled(f"{'–':>{width}}", "$faint")
    if not math.isfinite(value):
        return Content.styled(f"{_not_finite(value):>{width}}", "$error")
    return Content(f"{form.format(value):>{width}}")


def _not_finite(value: float | None) -> str:
    return "NaN" if value is None or math.isnan(value) else "inf"


def _short(count: float) -> str:
    return (
        f"{count / 1e9:.2f} B"
        if count >= 1e9
        else f"{count / 1e6:.2f} M"
        if count >= 1e6
        else f"{count:,.0f}"
    )


def _when(seconds: float) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(seconds)) if seconds > 0 else ""


# ---- the selected run ----------------------------------------------------------------------------------------


def strip(run: RunView | None, width: int) -> Content:
    """Words above numbers, in columns of equal width, so that nothing moves while they change. Those without room
    give way from the end; series the run does not have are left out."""
    if run is None:
        return Content("\n")
    there = [entry for entry in NUMBERS if entry[0] in run.curves]
    for given_up in (2, 1):
        if len(there) * COLUMN - 2 > width:
            there = [entry for entry in there if entry[3] < given_up]
    if not there:
        return Content("\n")
    column = min(13, max(COLUMN, width // len(there)))
    above = Content.styled(
        "".join(f"{words:<{max(column, len(words) + 1)}}" for _, words, _, _ in there), "$faint"
    )
    below = Content("")
    for key, words, form, _ in there:
        value, room = run.last(key), max(column, len(words) + 1)
        if value is None or not math.isfinite(value):
            below += Content.styled(f"{_not_finite(value):<{room}}", "bold $error")
        else:
            text = (
                size(value) if key == "memory" else _short(value) if key == "tokens" else form.format(value)
            )
            text = "0" if not value else text
            below += Content.styled(f"{text:<{room}}", "bold")
    return Content("\n").join([above, below])


def status(run: RunView | None, width: int, height: int = 2) -> Content:
    """What the selected run is doing, or what became of it and what can be done now."""
    if run is None:
        return Content("")
    lines = []
    if run.job is not None and run.live:
        lines.append(job_line(run.job, width))
    elif run.state == "failed" and run.job:
        lines += Content.styled(f"✗ {plain(run.job.error or 'failed')}", "$error").wrap(max(20, width))[:3]
        if run.job.hint:
            lines += Content.styled(f"→ {plain(run.job.hint)}", "").wrap(max(20, width))[:2]
    elif run.state == "lost":
        lines.append(Content.styled("✗ its process is gone without a last word", "$error"))
    elif run.state == "done":
        words = f"✓ {plain(Path(run.adapter).name)} is in Adapters" if run.adapter else "✓ done"
        lines.append(
            Content.assemble((words, "$success"), ("   2", "bold $primary"), (" shows it", "$faint"))
        )
    elif run.state == "adapter":
        lines.append(Content.styled("the curve this adapter was trained with", "$faint"))
    else:
        lines.append(Content.styled(f"– stopped at step {run.step:,.0f}", "$faint"))
    broken = run.broken_at
    if broken is not None:
        lines.append(
            Content.styled(f"! the loss is not a number at step {broken:,.0f}: a gap in the curve", "$error")
        )
    if run.resumable:
        hint = Content.assemble(("r", "bold $primary"), (" goes on from its last checkpoint", "$faint"))
        if run.state in ("cancelled", "stopped"):
            lines[0] = lines[0] + Content("   ") + hint
        else:
            lines.append(hint)
    elif run.state in STOPPED and not run.live:
        lines.append(Content.styled("it has no checkpoint: t starts anew", "$faint"))
    return Content("\n").join(lines)


# ---- the audit -----------------------------------------------------------------------------------------------


def audit_words(view: AuditView, width: int, any_tests: bool, any_data: bool = True) -> Content:
    """The verdict on the chosen files, first whether anything leaks."""
    key = ("u", "bold $primary")
    head = ("audit  ", "$faint")
    if not any_data:
        return Content.assemble(head, ("choose data first", "$faint"))
    if view.state == "running":
        return Content.assemble(head, ("looking for test rows in the data …", "$primary"))
    if view.state == "failed":
        error = view.job.error if view.job else ""
        lines = Content.assemble(head, (f"✗ {plain(error or 'the audit failed')}", "$error")).wrap(
            max(20, width)
        )[:3]
        hint = view.job.hint if view.job else ""
        return Content("\n").join(
            [*lines, *([Content.styled(f"→ {cut(hint, width - 2)}", "")] if hint else [])]
        )
    if view.state == "none" or view.leaks is None:
        words = "not done yet" if any_tests else "no test set chosen"
        does = " does it" if any_tests else " finds repeated rows"
        return Content.assemble(head, (f"{words}   ", "$faint"), key, (does, "$faint"))
    lines = []
    if view.leaks == 0 and any_tests:
        of = f"0 of {view.test_rows:,} test rows in the data" if view.test_rows else "no test row in the data"
        lines.append(Content.assemble(head, ("✓ clean  ", "bold $success"), (of, "")))
    elif view.leaks == 0:
        lines.append(Content.assemble(head, ("no test set chosen", "$warning")))
    else:
        rows = f", {view.leaking_rows:,} rows" if view.leaking_rows else ""
        words = f"✗ {view.leaks:,} leak{'s' if view.leaks > 1 else ''}"
        lists = [("   v", "bold $primary"), (" lists them", "$faint")] if view.found else []
        lines.append(Content.assemble(head, (words, "bold $error"), rows, *lists))
        lines += [
            Content.styled(cut(f"  {leak_words(leak)}", width), "") for leak in view.examples[:LEAKS_SHOWN]
        ]
    facts = []
    if view.dropped:
        facts.append(f"{view.dropped:,} rows dropped")
    if view.repeats is not None:
        facts.append(f"{view.repeats:,} repeated row{'' if view.repeats == 1 else 's'}")
    facts.append(f"by {'an audit' if view.source == 'audit' else plain(view.source)}, {_when(view.when)}")
    lines.append(Content.styled(cut("       " + " · ".join(facts), width), "$faint"))
    if view.changed:
        lines.append(
            Content.assemble(("       ! a file changed since   ", "$warning"), key, (" again", "$faint"))
        )
    return Content("\n").join(lines)


def leak_words(leak: Mapping[str, Any]) -> str:
    """`sft_train.jsonl row 5 = medqa.jsonl row 9 (exact, 1.00)`."""
    score = leak.get("score")
    number = f", {score:.2f}" if isinstance(score, int | float) else ""
    return (
        f"{Path(str(leak.get('train_file'))).name} row {leak.get('train_row')} = "
        f"{Path(str(leak.get('test_file'))).name} row {leak.get('test_row')} ({leak.get('detector')}{number})"
    )


def leak_page(view: AuditView) -> Content:
    """Some leaks with both texts, what they share standing out, then all that were kept."""
    lines = [Content.styled(f"{view.leaks or 0:,} leaks; rows are counted from 0", "$faint"), Content("")]
    for example in view.examples:
        lines.append(Content.styled(plain(leak_words(example)), "bold"))
        lines += [_side(words, example.get(words)) for words in ("train", "test")]
        lines.append(Content(""))
    lines += [Content(plain(leak_words(leak))) for leak in view.found]
    if view.leaks and len(view.found) < view.leaks:
        lines.append(Content.styled(f"… and {view.leaks - len(view.found):,} more: medmerge audit", "$faint"))
    return Content("\n").join(lines)


def _side(words: str, pieces: Any) -> Content:
    """One side of an example: [[text, whether the other side has it too], ...]."""
    line = Content.styled(f"{words:<7}", "$faint")
    for piece in pieces if isinstance(pieces, list) else ():
        if isinstance(piece, list) and len(piece) == 2:
            line += Content.styled(plain(str(piece[0])), "$warning" if piece[1] else "$faint")
    return line
