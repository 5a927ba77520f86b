"""Texts to word codes: every word a 64-bit number, whole batches of texts at a time. Used by grams, index and scan.

A word is a run of letters and digits of any script after NFKC and lower-casing; everything else separates.
Chinese, Japanese and Korean characters count as one word each, so that texts without spaces are compared too.
`words` says the same in plain Python, one text at a time: for excerpts, and as the reference in tests.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CJK_RANGES = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xAC00, 0xD7AF), (0x20000, 0x323AF))
_CJK = "".join(f"{chr(low)}-{chr(high)}" for low, high in CJK_RANGES)
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_CODES = 0x110000
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)


def normalised(text: str) -> str:
    """Lower case after NFKC (full-width forms, ligatures and superscripts become plain)."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()


def words(text: str) -> list[str]:
    """Lower-case words after NFKC; punctuation and underscores separate, CJK characters stand alone."""
    return _WORD.findall(normalised(text))


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) in the text as written, for excerpts; NFKC is applied to each word by itself."""
    return [(normalised(match[0]), *match.span()) for match in _WORD.finditer(text)]


@dataclass(frozen=True)
class Words:
    """The words of a batch of texts.

    Attributes:
        codes: uint64 [words], a hash of each word, the same in every process and on every machine.
        starts: int64 [texts + 1]; the words of text i are codes[starts[i]:starts[i + 1]].
        cjk: bool [words], whether the word is a CJK character.
    """

    codes: np.ndarray
    starts: np.ndarray
    cjk: np.ndarray

    def of(self, text: int) -> np.ndarray:
        return self.codes[self.starts[text] : self.starts[text + 1]]


def encode(texts: Sequence[str]) -> Words:
    """Words of all texts at once: sum over a word's characters of mix(character) * BASE^position, then mixed.

    About 100 MB of English a second and core; the vector steps are in numpy, only NFKC is done text by text.
    Raises UnicodeEncodeError for half a surrogate pair.
    """
    plain = [normalised(text) for text in texts]
    starts = np.zeros(len(plain) + 1, dtype=np.int64)
    # One separator before every text: no word crosses a border.
    np.cumsum([len(text) + 1 for text in plain], out=starts[1:])
    joined = "\n" + "\n".join(plain) if plain else ""
    if joined.isascii():
        letters = np.frombuffer(joined.encode("ascii"), dtype=np.uint8)
    else:
        letters = np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32)
    classes, mixes = _tables()
    kinds = classes[letters]
    first = kinds != 0
    first[1:] &= (kinds[1:] != kinds[:-1]) | (kinds[1:] == 2)
    places = np.flatnonzero(first)
    offsets = np.searchsorted(places, starts)
    if not len(places):
        return Words(np.empty(0, dtype=np.uint64), offsets, np.empty(0, dtype=bool))
    powers, inverses = _powers(_rounded(len(letters)))
    terms = mixes[letters]
    terms *= powers[: len(letters)]
    codes = np.add.reduceat(terms, places)  # a segment runs to the next word: separators add 0
    codes *= inverses[places]
    return Words(mixed(codes), offsets, kinds[places] == 2)


def mixed(values: np.ndarray) -> np.ndarray:
    """A bijective scramble of uint64 values (splitmix64's finaliser), in place where it can be."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """For every code point: 0 separator, 1 letter or digit, 2 CJK; and a fixed random number, 0 for separators."""
    classes = np.fromiter((chr(code).isalnum() for code in range(_CODES)), dtype=np.uint8, count=_CODES)
    for low, high in CJK_RANGES:
        classes[low : high + 1] = 2
    mixes = mixed(np.arange(1, _CODES + 1, dtype=np.uint64) * np.uint64(_BASE))
    mixes[classes == 0] = 0
    return classes, mixes


def _rounded(count: int) -> int:
    return 1 << max(16, (count - 1).bit_length())


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2^64 for i < count."""
    return powers_of(_BASE, count), powers_of(_INVERSE, count)


def powers_of(base: int, count: int) -> np.ndarray:
    """base^i modulo 2^64 for i < count, by doubling."""
    out = np.ones(count, dtype=np.uint64)
    done = 1
    while done < count:
        step = min(done, count - done)
        out[done : done + step] = out[:step] * np.uint64(pow(base, done, 1 << 64))
        done += step
    return out
