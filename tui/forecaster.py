"""Runs plan jobs for the merge screen: the numbers (time, memory, rounding loss) come from the same job as
`medmerge plan`'s. Blocking; called in threads."""

from __future__ import annotations

from tui.actions import Action
from tui.asking import Asker
from tui.results import forecast_view
from tui.snapshots import PlanView


class Forecaster(Asker):
    """One forecast at a time; a newer one ends the one that runs."""

    def __init__(self) -> None:
        super().__init__("plan", 60.0, "medmerge plan shows more")

    def forecast(self, action: Action) -> PlanView:
        """The result of a plan job as a PlanView. Raises as `Asker.ask` does."""
        return forecast_view(self.ask(action))
