"""The tables of docs/tasks.md, made from the dataclass and the presets. A test compares, so the page cannot drift.

Write them anew: `python -m engine.evaluate.tasks.doc docs/tasks.md`.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from engine.evaluate.schema import field_docs
from engine.evaluate.tasks.parse import PRESETS, preset_values
from engine.evaluate.tasks.task import FIELDS, Task
from engine.evaluate.values import limits_of

TABLES = ("fields", "rows", "presets")


def table(name: str) -> str:
    """`fields` of a task file, the fields a row of each kind has (`rows`), or the `presets`."""
    return {"fields": _fields, "rows": _rows, "presets": _presets}[name]()


def _fields() -> str:
    docs = field_docs(Task)
    rows = [(f"`{name}`", _values_of(name), docs[name]) for name in Task.__dataclass_fields__]
    return _markdown(("field", "values", "what it says"), rows)


def _values_of(name: str) -> str:
    """Choices or type, the default first: `**all** dev test`."""
    kind, limits = limits_of(Task, name)
    default = Task.__dataclass_fields__[name].default
    if limits.choices:
        return " ".join(f"**{word}**" if word == default else f"`{word}`" for word in limits.choices if word)
    if name in ("columns", "where", "replace"):
        return "mapping"
    if kind is bool:
        return "**true** false" if default else "true **false**"
    words = {int: "whole number", str: "text", Path: "path"}
    type_name = next(words[k] for k in (typing.get_args(kind) or (kind,)) if k in words)
    if default is MISSING:
        return f"{type_name}, needed"
    return type_name if default in (None, "") else f"{type_name}, **{default}**"


def _rows() -> str:
    optional = {"id", "source", "context"}
    rows = []
    for kind, names in FIELDS.items():
        needed = ", ".join(f"`{name}`" for name in names if name not in optional)
        rows.append((f"`{kind}`", needed, ", ".join(f"`{name}`" for name in names if name in optional)))
    return _markdown(("kind", "a row needs", "and may have"), rows)


def _presets() -> str:
    rows = []
    for name in PRESETS:
        values: dict[str, Any] = preset_values(name)
        kind = values["kind"] + (f", {values['scoring']}" if "scoring" in values else "")
        about = values["about"] if values.get("language", "en") == "en" else f"{values['about']} (Chinese)"
        rows.append((f"`{name}`", kind, about, values["origin"], values["licence"]))
    return _markdown(("preset", "kind", "what", "source", "licence"), rows)


def _markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def updated(text: str) -> str:
    """`text` with each table between its two markers replaced. Raises ValueError when a marker is missing."""
    for name in TABLES:
        begin, end = (
            f"<!-- {name}: python -m engine.evaluate.tasks.doc docs/tasks.md -->",
            f"<!-- end of {name} -->",
        )
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the text has no {begin} ... {end}")
        text = f"{before}{begin}\n{table(name)}\n{end}{after}"
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
