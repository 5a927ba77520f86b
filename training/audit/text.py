"""Rows to comparable text: normalised words, n-grams and shingles as 64-bit integers.

Used by the detectors. Chinese, Japanese and Korean characters count as one word each, so that texts without
spaces are compared too.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

TEXT_KEYS = (
    "instruction",
    "question",
    "prompt",
    "input",
    "context",
    "output",
    "reference",
    "text",
    "options",
)
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """Lower-case words after NFKC; punctuation and underscores separate, CJK characters stand alone."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def pieces(row: dict[str, Any]) -> list[str]:
    """The text fields of a data row in a fixed order; each option of a multiple choice is a piece of its own."""
    found: list[str] = []
    for key in TEXT_KEYS:
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        found += [item for item in values if isinstance(item, str) and item.strip()]
    return found


def word_hash(word: str) -> int:
    """A 64-bit hash that is the same in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class Vocabulary:
    """64-bit hashes of words, computed once per distinct word."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def encode(self, text_words: Sequence[str]) -> np.ndarray:
        """uint64 array, one hash per word."""
        known = self._known
        out = np.empty(len(text_words), dtype=np.uint64)
        for index, word in enumerate(text_words):
            value = known.get(word)
            if value is None:
                value = known[word] = word_hash(word)
            out[index] = value
        return out


_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


def ngrams(codes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all n-grams of `codes` (uint64), in order; empty when there are fewer than n words.

    h = ((c_1 * m + c_2) * m + ...) with a xor-shift after each step, modulo 2^64.
    """
    if len(codes) < n:
        return np.empty(0, dtype=np.uint64)
    count = len(codes) - n + 1
    out = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(n):
            out = (out + codes[offset : offset + count]) * _MULTIPLIER
            out ^= out >> _SHIFT
    return out


def shingles(codes: np.ndarray, n: int = 5) -> np.ndarray:
    """The set (sorted, unique) of n-word shingles; a text of fewer words is one shingle of all its words."""
    if 0 < len(codes) < n:
        return ngrams(codes, len(codes))
    return np.unique(ngrams(codes, n))


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted unique arrays; 0 when both are empty."""
    if not len(left) or not len(right):
        return 0.0
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)
