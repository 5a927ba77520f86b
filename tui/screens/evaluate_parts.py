"""Lines of the evaluate screen: what run is shown and how, and what to do when there is nothing yet."""

from __future__ import annotations

from textual.content import Content

from tui.metrics import Column, Order, View
from tui.parts import job_line
from tui.safe_text import plain
from tui.snapshots import JobRow, RunRow
from tui.text import cut

KEY = "bold $primary"


def head_words(
    live: JobRow | None,
    run: RunRow | None,
    runs: int,
    view: View,
    order: Order,
    column: Column | None,
    filtered: tuple[int, int] | None,
    width: int,
) -> Content:
    """The run (or the job that makes it), the view, and how the table is sorted and filtered."""
    how = []
    if column is not None:
        how.append(f"by {column.title} {'▾' if order.descending else '▴'}")
    if filtered is not None:
        how.append(f"{filtered[0]} of {filtered[1]} lines")
    said = Content.styled(plain("".join(f"   {part}" for part in how)), "$primary")
    if live is not None:
        return job_line(live, max(30, width - said.cell_length)) + said
    if run is None:
        return Content("")
    kind = "sweep" if run.kind == "sweep" else "evaluation"
    words = Content.assemble((f"{kind}  ", "$faint"), (cut(run.name, 40), "bold"))
    if run.done < run.cells:
        failed = f", {run.failed} failed" if run.failed else ""
        words += Content.assemble(
            (f"   {run.done} of {run.cells} cells{failed}", "$warning"),
            "   ",
            ("r", KEY),
            (" goes on", "$faint"),
        )
    else:
        words += Content.styled(f"   {run.cells} cells", "$faint")
    words += Content.styled(f"   {view}", "$faint") + said
    if runs > 1:
        more = Content.assemble("   ", ("o", KEY), (f" {runs - 1} other", "$faint"))
        if words.cell_length + more.cell_length <= width:
            words += more
    return words


def empty_words(live: bool, run: bool, chosen: bool) -> Content:
    """What stands where the table will be."""
    if live:
        return Content("The first rows come when the first cell is done.")
    if run:
        return Content("Reading the run …")
    if not chosen:
        return Content("A sweep measures mixtures of two adapters: choose them first (2).")
    return Content.assemble(
        "Nothing measured yet. ", ("n", KEY), " sets up a sweep from SFT alone to PT alone: it shows what each weight "
        "costs and gains, with intervals and floors.",
    )  # fmt: skip
