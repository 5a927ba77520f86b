"""Where two answers differ, word by word. Pure; used by the samples screen."""

from __future__ import annotations

import difflib
import re

from textual.content import Content

from tui.safe_text import plain

MOST_WORDS = 800  # of either text; longer ones are compared no more
CHANGED = "bold underline $primary"
_WORD = re.compile(r"\S+|\s+")


def marked(first: str, second: str) -> tuple[Content, Content]:
    """Both texts (made safe), the words that only one of them has marked. Texts too long come back unmarked."""
    left, right = _WORD.findall(plain(first, lines=True)), _WORD.findall(plain(second, lines=True))
    if max(len(left), len(right)) > 2 * MOST_WORDS:
        return Content("".join(left)), Content("".join(right))
    matcher = difflib.SequenceMatcher(None, _words(left), _words(right), autojunk=False)
    kept_left: set[int] = set()
    kept_right: set[int] = set()
    for block in matcher.get_matching_blocks():
        kept_left.update(range(block.a, block.a + block.size))
        kept_right.update(range(block.b, block.b + block.size))
    return _content(left, kept_left), _content(right, kept_right)


def _words(pieces: list[str]) -> list[str]:
    return [piece for piece in pieces if not piece.isspace()]


def _content(pieces: list[str], kept: set[int]) -> Content:
    found, number = [], 0
    for piece in pieces:
        if piece.isspace():
            found.append(Content(piece))
            continue
        found.append(Content(piece) if number in kept else Content.styled(piece, CHANGED))
        number += 1
    return Content("").join(found)
