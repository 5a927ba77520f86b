"""Prints a training preview (`training.preview`): the first samples with their trained tokens marked.

Called by `tui/commands/train.py`. Texts are foreign: all of them go through `plain`, and nothing but our own colours
reaches the terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tui.safe_text import plain

LONGEST = 600  # characters of one piece; longer ones lose their middle
LEAST_WIDTH = 30
LINE_END, BORDER = "↵", "┃"
_TRAINED, _SPECIAL, _PLAIN = "\x1b[1;32m", "\x1b[36m", "\x1b[0m"  # bold green, cyan
_BOTH = "\x1b[1;36m"
_INDENT = "  "

Cell = tuple[str, str]  # a character and its colour


def render_preview(result: dict[str, Any], *, color: bool, width: int) -> str:
    """The result of `training.preview.run` as lines of at most `width` columns.

    Trained tokens are bold green, control tokens cyan; without colour trained tokens stand in ‹…›. A line end of the
    text shows as ↵.
    """
    width = max(width, LEAST_WIDTH)
    template = result["template"]
    named = f"template {plain(template['name'])}" if template else "plain text, no template"
    counted = result["counted"]
    lines = [f"{named} · cutoff {result['cutoff']:,} tokens · {_legend(result['kind'], color)}"]
    for number, sample in enumerate(result["samples"], 1):
        lines += ["", *_sample(number, sample, color, width)]
    lines += [
        "",
        f"of the first {counted['rows']:,} rows: {counted['too_long']:,} longer than the cutoff, "
        f"{counted['untrained']:,} without a token to train on",
    ]
    lines += [f"warning: {plain(warning)}" for warning in result["warnings"]]
    return "\n".join(lines)


def _legend(kind: str, color: bool) -> str:
    trained = f"{_TRAINED}trained{_PLAIN}" if color else "‹trained›"
    control = f", {_SPECIAL}control token{_PLAIN}" if color else ""
    border = f", {BORDER} a new block begins" if kind == "pt" else ""
    return f"{trained}{control}, {LINE_END} line end{border}"


def _sample(number: int, sample: dict[str, Any], color: bool, width: int) -> list[str]:
    facts = [f"{sample['length']:,} tokens", f"{sample['trained']:,} trained"]
    if sample["cut"]:
        facts.append(f"{sample['cut']:,} more lost to the cutoff")
    lines = [f"{number}. {plain(sample['place'])}: {', '.join(facts)}"]
    if sample["note"]:
        lines.append(f"{_INDENT}nothing is trained: {plain(sample['note'])}")
    cells = list(_coloured(sample["pieces"]) if color else _bracketed(sample["pieces"]))
    lines += [_INDENT + _painted(line) for line in _wrapped(cells, width - len(_INDENT))]
    if sample["left_out"]:
        lines.append(f"{_INDENT}… {sample['left_out']:,} more tokens, not shown …")
    return lines


def _coloured(pieces: list[dict[str, Any]]) -> Iterator[Cell]:
    for piece in pieces:
        style = _SPECIAL if piece["special"] else ""
        if piece["trained"]:
            style = _BOTH if piece["special"] else _TRAINED
        if piece["border"]:
            yield BORDER, ""
        for character in _shown(piece):
            yield character, style


def _bracketed(pieces: list[dict[str, Any]]) -> Iterator[Cell]:
    """Trained pieces that follow each other share one pair of brackets, which closes before the line does."""
    for trained, group in groupby(pieces, key=lambda piece: bool(piece["trained"])):
        text = "".join((BORDER if piece["border"] else "") + _shown(piece) for piece in group)
        if trained:
            text = f"‹{text[:-1]}›\n" if text.endswith("\n") else f"‹{text}›"
        for character in text:
            yield character, ""


def _shown(piece: dict[str, Any]) -> str:
    """A piece's text made safe, its line ends visible, and without its middle if it is long."""
    text = piece["text"]
    if len(text) > LONGEST:
        half = LONGEST // 2
        hidden = max(round(piece["tokens"] * (len(text) - LONGEST) / len(text)), 1)
        text = f"{text[:half]} … about {hidden:,} tokens … {text[-half:]}"
    safe = plain(text.replace("\r\n", "\n"), lines=True)
    return safe.replace("\t", " ").replace("\n", f"{LINE_END}\n")


def _wrapped(cells: list[Cell], width: int) -> Iterator[list[Cell]]:
    """Lines of at most `width` columns, broken at line ends, then at spaces, then anywhere."""
    line: list[Cell] = []
    for cell in cells:
        if cell[0] == "\n":
            yield line
            line = []
            continue
        line.append(cell)
        if _width(line) > width:
            spaces = [at for at, (character, _) in enumerate(line[:-1]) if character == " "]
            at = spaces[-1] + 1 if spaces else len(line) - 1
            yield line[:at]
            line = line[at:]
    if line:
        yield line


def _width(line: list[Cell]) -> int:
    return sum(_columns(character) for character, _ in line)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _painted(line: list[Cell]) -> str:
    """The line with its colours, each switched on once a stretch."""
    text, current = "", ""
    for character, style in line:
        if style != current:
            text += (_PLAIN if current else "") + style
            current = style
        text += character
    return text + (_PLAIN if current else "")
