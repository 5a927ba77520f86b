"""Several files on one line of a form: `data  pt_train.jsonl, notes.csv ▾`. Used by the train screen."""

from __future__ import annotations

from collections.abc import Iterable

from tui.widgets.choice import Several

BETWEEN = "\0"  # the one character no path holds


class Files(Several):
    """Any number of files. `value` is their paths with a zero character between; `chosen` the paths. `touched`: the
    person chose them."""

    touched = False

    DEFAULT_CSS = "Files { height: 1; }"

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(self.value.split(BETWEEN)) if self.value else ()

    def set_chosen(self, paths: Iterable[str]) -> None:
        """Choose these, as far as they are among the options. Posts nothing."""
        wanted = set(paths)
        self.value = BETWEEN.join(path for path, _ in self.options if path in wanted)

    def _choose(self, value: str | None) -> None:
        self.touched = self.touched or value is not None
        super()._choose(value)

    @property
    def words(self) -> str:
        names = [words for value, words in self.options if value in self.chosen]
        if len(names) > 1:
            return f"{'all ' if len(names) == len(self.options) else ''}{len(names)} files"
        return names[0] if names else "none"

    def action_pick(self) -> None:
        from tui.screens.dialogs import PickSeveralScreen

        def picked(values: tuple[str, ...] | None) -> None:
            self._choose(None if values is None else BETWEEN.join(values))

        if self.options:
            self.app.push_screen(PickSeveralScreen(self.label, self.options, self.chosen), picked)
