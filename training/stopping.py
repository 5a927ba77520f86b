"""How a run is stopped between two steps without losing one: SIGTERM at any moment. Used by `training.fit`.

While the optimizer moves the weights (`enter` to `leave`) a stop is only noted, and the step ends first. At any
other moment it raises CancelledError at once: a step may take minutes, and who cancels waits. Several processes
must stop at the same step, so there (`immediate=False`) it is always noted only, and the trainer asks after each
step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from engine.errors import CancelledError


class Stopper:
    """Takes SIGTERM over while it is entered as a context, in the main thread."""

    def __init__(self, immediate: bool = True) -> None:
        self.immediate = immediate
        self.asked = False
        self._moving = False
        self._before: Any = None

    def ask(self) -> None:
        """Note that the run shall stop."""
        self.asked = True

    def enter(self) -> None:
        """From here on the weights move: a stop waits."""
        self._moving = True

    def leave(self) -> None:
        """The step is whole."""
        self._moving = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self.immediate and not self._moving and not again:
            raise CancelledError("cancelled")

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            # Once stopped, a second signal must not break the cleaning up.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self.asked else self._before)
