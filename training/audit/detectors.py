"""Three detectors of leakage, because none of them sees what the others see.

- `exact`: a text piece equals another after normalising (case, punctuation, spacing, Unicode form).
- `near_duplicate`: Jaccard of 5-word shingles > 0.8. MinHash (128 permutations, 16 bands of 8 rows, which
  finds 95% of pairs at J = .8) proposes, the true Jaccard decides.
- `containment_8`, `containment_13`: the share of a test piece's 8-word (13-word) n-grams that stand in one
  training row. A question copied into a long article has a tiny Jaccard and a containment of 1. 70% of
  8-grams is the rule of PaLM (arXiv 2204.02311, 2022, section 8); long 13-grams (GPT-3, arXiv 2005.14165,
  appendix C) are rarer by chance, so half of them is enough here.

Everything works on `Document`s; which fields make a document is the caller's business (`report`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training.audit.text import Vocabulary, jaccard, ngrams, shingles, words

MIN_EXACT_WORDS = 4  # "yes", "Glaucoma" and the like are equal without being leaks
MIN_CONTAINED_GRAMS = 3  # one or two shared n-grams of a short sentence may be a turn of phrase
JACCARD_LIMIT = 0.8
CONTAINMENT_LIMITS = {8: 0.7, 13: 0.5}
PERMUTATIONS, BANDS = 128, 16


@dataclass(frozen=True)
class Document:
    """One row of a file as the detectors see it: its pieces and their joined words, hashed."""

    file: str
    row: int  # counted from 0
    pieces: tuple[np.ndarray, ...]  # uint64 word hashes of each text field
    joined: np.ndarray  # all pieces one after the other

    @classmethod
    def of(cls, file: str, row: int, texts: Sequence[str], vocabulary: Vocabulary) -> Document:
        encoded = tuple(vocabulary.encode(words(text)) for text in texts)
        joined = np.concatenate(encoded) if encoded else np.empty(0, dtype=np.uint64)
        return cls(file, row, encoded, joined)


@dataclass(frozen=True)
class Match:
    """Document `left` (training, or the later one) repeats document `right` (test, or the earlier one)."""

    left: Document
    right: Document
    detector: str
    score: float


def _keys(document: Document) -> Iterator[bytes]:
    for piece in {piece.tobytes(): piece for piece in (*document.pieces, document.joined)}.values():
        if len(piece) >= MIN_EXACT_WORDS:
            yield hashlib.blake2b(piece.tobytes(), digest_size=16).digest()


def exact_matches(train: Sequence[Document], test: Sequence[Document]) -> Iterator[Match]:
    """Pairs in which any piece (or the whole) of one equals any piece (or the whole) of the other."""
    index: dict[bytes, list[Document]] = defaultdict(list)
    for document in test:
        for key in _keys(document):
            index[key].append(document)
    for document in train:
        seen: set[tuple[str, int]] = set()
        for key in _keys(document):
            for other in index.get(key, ()):
                if (other.file, other.row) not in seen:
                    seen.add((other.file, other.row))
                    yield Match(document, other, "exact", 1.0)


def _bands(shingle_set: np.ndarray) -> list[tuple[int, bytes]]:
    from rensa import RMinHash

    signature = RMinHash(num_perm=PERMUTATIONS, seed=42)
    signature.update([str(value) for value in shingle_set.tolist()])
    digest = np.asarray(signature.digest(), dtype=np.uint32).reshape(BANDS, -1)
    return [(band, digest[band].tobytes()) for band in range(BANDS)]


class NearIndex:
    """MinHash index over shingle sets; `similar` returns the true Jaccard of every candidate above the limit."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._entries: list[tuple[Document, np.ndarray]] = []

    def add(self, document: Document, shingle_set: np.ndarray, bands: list[tuple[int, bytes]]) -> None:
        self._entries.append((document, shingle_set))
        for band in bands:
            self._buckets[band].append(len(self._entries) - 1)

    def similar(
        self, shingle_set: np.ndarray, bands: list[tuple[int, bytes]]
    ) -> list[tuple[Document, float]]:
        candidates = sorted({entry for band in bands for entry in self._buckets.get(band, ())})
        found = (
            (self._entries[entry][0], jaccard(shingle_set, self._entries[entry][1])) for entry in candidates
        )
        return [(document, score) for document, score in found if score > JACCARD_LIMIT]


def _units(document: Document) -> list[np.ndarray]:
    """Shingle sets worth comparing: the whole row, and each piece when there are several."""
    units = [document.joined] if len(document.pieces) < 2 else [document.joined, *document.pieces]
    return [shingles(unit) for unit in units if len(unit) >= MIN_EXACT_WORDS]


def near_matches(train: Sequence[Document], test: Sequence[Document]) -> Iterator[Match]:
    """Pairs whose whole text, or a piece of it, has a Jaccard above 0.8; the best score of each pair."""
    index = NearIndex()
    for document in test:
        for unit in _units(document):
            index.add(document, unit, _bands(unit))
    for document in train:
        best: dict[tuple[str, int], tuple[Document, float]] = {}
        for unit in _units(document):
            for other, score in index.similar(unit, _bands(unit)):
                key = (other.file, other.row)
                if key not in best or best[key][1] < score:
                    best[key] = (other, score)
        for other, score in best.values():
            yield Match(document, other, "near_duplicate", score)


def containment_matches(train: Sequence[Document], test: Sequence[Document], n: int) -> Iterator[Match]:
    """Test pieces of which one training row holds at least CONTAINMENT_LIMITS[n] of the n-grams.

    score = |n-grams of the test piece found in the training row| / |n-grams of the test piece| (as sets).
    Pieces with fewer than MIN_CONTAINED_GRAMS n-grams are left to `exact`.
    """
    limit = CONTAINMENT_LIMITS[n]
    units: list[tuple[Document, int]] = []
    index: dict[int, list[int]] = defaultdict(list)
    for document in test:
        for piece in document.pieces:
            grams = np.unique(ngrams(piece, n))
            if len(grams) < MIN_CONTAINED_GRAMS:
                continue
            for gram in grams.tolist():
                index[gram].append(len(units))
            units.append((document, len(grams)))
    known = np.array(sorted(index), dtype=np.uint64)
    for document in train:
        grams = np.intersect1d(np.unique(ngrams(document.joined, n)), known, assume_unique=True)
        counts: dict[int, int] = defaultdict(int)
        for gram in grams.tolist():
            for unit in index[gram]:
                counts[unit] += 1
        best: dict[tuple[str, int], tuple[Document, float]] = {}
        for unit, count in counts.items():
            other, size = units[unit]
            score = count / size
            key = (other.file, other.row)
            if score >= limit and (key not in best or best[key][1] < score):
                best[key] = (other, score)
        for other, score in best.values():
            yield Match(document, other, f"containment_{n}", score)


def leaks(train: Sequence[Document], test: Sequence[Document]) -> list[Match]:
    """All matches of all detectors; a pair found by several is reported once per detector."""
    found = list(exact_matches(train, test))
    found += near_matches(train, test)
    for n in CONTAINMENT_LIMITS:
        found += containment_matches(train, test, n)
    return found


def duplicates(documents: Sequence[Document]) -> list[Match]:
    """Rows that repeat an earlier row as a whole, exactly or nearly; each row is reported once."""
    found: list[Match] = []
    first: dict[bytes, Document] = {}
    index = NearIndex()
    for document in documents:
        if len(document.joined) < MIN_EXACT_WORDS:
            continue
        key = document.joined.tobytes()
        if key in first:
            found.append(Match(document, first[key], "exact", 1.0))
            continue
        first[key] = document
        unit = shingles(document.joined)
        bands = _bands(unit)
        similar = index.similar(unit, bands)
        if similar:
            earlier, score = max(similar, key=lambda pair: pair[1])
            found.append(Match(document, earlier, "near_duplicate", score))
        index.add(document, unit, bands)
    return found
