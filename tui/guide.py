"""Leads a newcomer: which step of the way is next, and what can be chosen without asking. Pure functions.

The way: a base and adapters → choose a PT and an SFT adapter → merge → verified → talk to it → evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tui.snapshots import JobRow, Overview, Selection

STEPS = ("base", "adapters", "merge", "verify", "chat", "evaluate")


@dataclass(frozen=True)
class NextStep:
    """What to do next: a sentence, a reason, and the screen (or "demo", "verify") that Enter leads to."""

    words: str
    reason: str
    go: str


def fill_selection(selection: Selection, overview: Overview) -> Selection:
    """Choose what there is only one of: the base, the PT and the SFT adapter that fit it."""
    if not overview.model(selection.base):
        usable = overview.usable_models
        selection = replace(selection, base=usable[0].path if len(usable) == 1 else "")
    for label in ("pt", "sft"):
        chosen = getattr(selection, label)
        row = overview.adapter(chosen)
        if chosen and (row is None or row.error):
            selection = replace(selection, **{label: ""})
            chosen = ""
        fitting = [row for row in overview.usable_adapters if row.kind == label]
        if not chosen and selection.base and len(fitting) == 1:
            selection = replace(selection, **{label: fitting[0].path})
    return selection


def done_steps(overview: Overview, selection: Selection) -> dict[str, bool]:
    """Which steps of the way are behind us."""
    verified = any(row.verdict is not None and row.verdict.ok for row in overview.merges)
    return {
        "base": bool(selection.base),
        "adapters": bool(selection.pt and selection.sft),
        "merge": any(not row.rejected for row in overview.merges),
        "verify": verified,
        "chat": any(row.kind == "model" for row in overview.ggufs),
        "evaluate": any(run.evaluation for run in overview.runs),
    }


def next_step(overview: Overview, selection: Selection, jobs: tuple[JobRow, ...]) -> NextStep:
    """The one thing to do next."""
    live = [job for job in jobs if not job.final]
    if any(job.kind == "demo" for job in live):
        return NextStep("The demo workspace is being made", "You can watch it and come back.", "jobs")
    if not overview.usable_models:
        broken = f" ({len(overview.models)} there cannot be used)" if overview.models else ""
        return NextStep(
            "Make the demo workspace",
            f"There is no model here yet{broken}. The demo brings a real 135M one and two adapters; "
            "or put model folders into bases/ and adapters into adapters/.",
            "demo",
        )
    if not selection.base:
        return NextStep(
            "Choose a base model", f"There are {len(overview.usable_models)} of them.", "adapters"
        )
    usable = overview.usable_adapters
    if not usable:
        if overview.adapters:
            return NextStep(
                "No adapter here fits this base", "See why, choose another base, or train one.", "adapters"
            )
        return NextStep(
            "Train an adapter", "There is a base and no adapter yet. PT first, then SFT.", "train"
        )
    if not (selection.pt and selection.sft):
        missing = " and ".join(label.upper() for label in ("pt", "sft") if not getattr(selection, label))
        fit = f"{len(usable)} adapter{'s' if len(usable) > 1 else ''} fit{'' if len(usable) > 1 else 's'} this base."
        return NextStep(f"Choose the {missing} adapter", fit, "adapters")
    done = done_steps(overview, selection)
    if not done["merge"]:
        return NextStep(
            "Merge them", "Two adapters fit this base: a weight for each makes a mixture.", "merge"
        )
    if not done["verify"]:
        return NextStep(
            "Verify the merge", "No merge here is verified yet: know that it holds what was asked.", "merge"
        )
    if not done["chat"]:
        return NextStep("Talk to it", "Change the weights while it answers, side by side.", "chat")
    if not done["evaluate"]:
        return NextStep("Measure it", "A sweep shows what each mixture gains and loses.", "evaluate")
    return NextStep(
        "See which mixture is best", "Every number comes with its interval and its floor.", "evaluate"
    )
