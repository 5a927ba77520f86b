"""An answer's opening as words and pairs of words. Training and inference both come here, so they cannot drift apart.

What an answer does, it says at once; and a vocabulary of openings, of n-grams no longer than two words (the first
words: four) that several prompts share, cannot be read back into the answers it was counted on.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+[.)]|[:?!.\n]")
_FIRST = 4  # the first one, two, three and four words are features of their own


def grams(text: str, opening: int) -> set[str]:
    """The n-grams of the first `opening` characters of a plain text: `f ...` the first words, `o ...` anywhere."""
    tokens = _tokens(text[:opening].lower())
    found = {f"f {' '.join(tokens[:size])}" for size in range(1, min(_FIRST, len(tokens)) + 1)}
    found.update(f"o {gram}" for gram in _pairs(tokens))
    return found


def _tokens(text: str) -> list[str]:
    """Words, end marks, line breaks as `/`, numbers of list items as `#`."""
    return ["#" if token[0].isdigit() else "/" if token == "\n" else token for token in _TOKEN.findall(text)]


def _pairs(tokens: Sequence[str]) -> Iterator[str]:
    yield from tokens
    for first, second in itertools.pairwise(tokens):
        yield f"{first} {second}"
