"""Single values of a YAML document, checked: used by the readers of configs and tasks, and by the JSON Schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a field may hold besides its type: `limit: Annotated[int | None, Limits(least=1)] = None`."""

    choices: Sequence[str] = ()
    least: int | None = None  # of whole numbers
    low: float = -math.inf
    high: float = math.inf
