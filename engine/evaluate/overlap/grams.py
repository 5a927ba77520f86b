"""What texts have in common: n-grams, and the longest common subsequence of words. Called by scores.py.

Each text is cut and counted once, whatever number of references it is compared with afterwards: the floors of a
metric need six comparisons of every answer, and the tools themselves count anew for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.evaluate.statistics import FloatArray

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """n texts as numbers: `ids` of all of them one after the other, `lengths` (n,)."""

    ids: IntArray
    lengths: IntArray

    @classmethod
    def of_words(cls, texts: Sequence[Sequence[str]]) -> Tokens:
        known: dict[str, int] = {}
        ids = [known.setdefault(word, len(known)) for words in texts for word in words]
        return cls(np.array(ids, dtype=np.int64), np.array([len(words) for words in texts], dtype=np.int64))

    @classmethod
    def of_characters(cls, texts: Sequence[str]) -> Tokens:
        code_points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
        return cls(code_points.astype(np.int64), np.array([len(text) for text in texts], dtype=np.int64))


class Grams:
    """Counts of the 1- to `orders`-grams of n outputs and n references.

    tokens: of the outputs, then of the references, numbered together. With `once`, every n-gram of a text counts as
    one however often it is there.
    """

    def __init__(self, tokens: Tokens, orders: int, once: bool = False) -> None:
        n = len(tokens.lengths) // 2
        counts = _counts(tokens, orders)
        if once:
            for matrix in counts:
                matrix.data[:] = 1
        self._outputs = [matrix[:n] for matrix in counts]
        self._references = [matrix[n:] for matrix in counts]
        self.outputs: FloatArray = _row_sums(self._outputs)  # (n, orders): n-grams of each output
        self.references: FloatArray = _row_sums(self._references)  # (n, orders)

    def matched(self, order: IntArray) -> FloatArray:
        """(n, orders): n-grams of output i that are in reference order[i], each as often as in both."""
        pairs = zip(self._outputs, self._references, strict=True)
        return _row_sums([outputs.minimum(references[order]) for outputs, references in pairs])


def _counts(tokens: Tokens, orders: int) -> list[Any]:
    """One sparse matrix an order: (texts, distinct n-grams) of counts. Numbers are exact, nothing is hashed."""
    from scipy.sparse import csr_matrix

    rows = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
    values, words = np.unique(tokens.ids, return_inverse=True)
    starts, grams, found = np.arange(len(words)), words, []
    for order in range(1, orders + 1):
        if order > 1:  # an n-gram is an (n-1)-gram and the word after it, in the same text
            ends = starts + order - 1
            inside = ends < len(words)
            inside[inside] = rows[ends[inside]] == rows[starts[inside]]
            starts, ends = starts[inside], ends[inside]
            _, grams = np.unique(grams[inside] * len(values) + words[ends], return_inverse=True)
        shape = (len(tokens.lengths), int(grams.max(initial=-1)) + 1)
        found.append(csr_matrix((np.ones(len(grams), dtype=np.int32), (rows[starts], grams)), shape=shape))
    return found


def _row_sums(matrices: Sequence[Any]) -> FloatArray:
    return np.stack([np.asarray(m.sum(axis=1), dtype=np.float64).ravel() for m in matrices], axis=1)


class Subsequences:
    """Longest common subsequences of n outputs and n references (sequences of words)."""

    def __init__(self, outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> None:
        self._outputs = outputs
        self._sizes = [len(words) for words in references]
        self._places: list[dict[str, int]] = []  # where each word of a reference is, as bits
        for words in references:
            places: dict[str, int] = {}
            for place, word in enumerate(words):
                places[word] = places.get(word, 0) | 1 << place
            self._places.append(places)

    def lengths(self, order: IntArray) -> FloatArray:
        """(n,): the length for output i and reference order[i].

        A column of the usual table is one integer, a 0 bit where the length grows (Hyyrö, AWOCA 2004): words of the
        output times words of the reference / 64 steps, where the tools fill the table cell by cell.
        """
        found = []
        for words, index in zip(self._outputs, order, strict=True):
            places, size = self._places[index], self._sizes[index]
            full = (1 << size) - 1
            column = full
            for word in words:
                equal = column & places.get(word, 0)
                column = ((column + equal) | (column - equal)) & full
            found.append(size - column.bit_count())
        return np.array(found, dtype=np.float64)
