"""Prompts with {column} placeholders: split once, filled per row. Text from the data is never interpreted."""

from __future__ import annotations

import re
from collections.abc import Callable

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def split_prompt(text: str) -> list[tuple[str, str | None]]:
    """[(literal, None) or ("", column), ...]. Raises ValueError at a brace that is neither doubled nor a column."""
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for found in _PIECE.finditer(text):
        pieces.append((text[at : found.start()], None))
        mark, column = found.group(0), found.group(1)
        if column is not None and column.strip():
            pieces.append(("", column.strip()))
        elif mark in ("{{", "}}"):
            pieces.append((mark[0], None))
        else:
            raise ValueError(f"has {mark!r} at character {found.start() + 1}; write {{{{ and }}}} for braces")
        at = found.end()
    pieces.append((text[at:], None))
    return [piece for piece in pieces if piece != ("", None)]


def columns_in(text: str) -> list[str]:
    """The columns a prompt names, each once, in their order."""
    return list(dict.fromkeys(column for _, column in split_prompt(text) if column is not None))


def fill(text: str, value: Callable[[str], str]) -> str:
    """The prompt with each {column} replaced by value(column)."""
    return "".join(literal if column is None else value(column) for literal, column in split_prompt(text))
