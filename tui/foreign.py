"""Values of JSON files that anyone may have written: what is not of the expected kind counts as not there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is none to read: notes beside results are optional."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """A finite number as a float, else None (also for true, text, NaN and integers beyond any float)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers."""
    if not isinstance(values, dict):
        return {}
    return {str(key): float(value) for key, value in values.items() if number(value) is not None}


def measured(value: Any) -> float | None:
    """A measured value: a number, or NaN and infinity, which JSON lines here spell "nan", "inf", "-inf"; else None."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
