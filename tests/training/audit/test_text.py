"""Words and n-grams: the vectorised code against plain Python sets of words."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.audit.grams import Sequences, inside, jaccard, shingle_sets, shingles
from training.audit.text import encode, words

TEXTS = st.lists(st.text(alphabet="aB1_ é胸痛ｗ.\n-ßİ한", max_size=40), max_size=8)


def test_words_are_normalised() -> None:
    assert words("Ｈeparin—5 000 IU/ml, snake_case β-blocker") == [
        "heparin", "5", "000", "iu", "ml", "snake", "case", "β", "blocker",
    ]  # fmt: skip
    assert words("胸痛 2小时") == ["胸", "痛", "2", "小", "时"]
    assert words("ﬁbrosis H₂O") == ["fibrosis", "h2o"]


@given(TEXTS)
def test_codes_are_equal_exactly_where_words_are(texts: list[str]) -> None:
    encoded = encode(texts)
    flat = [word for text in texts for word in words(text)]
    assert [len(encoded.of(i)) for i in range(len(texts))] == [len(words(text)) for text in texts]
    known: dict[int, str] = {}
    for code, word in zip(encoded.codes.tolist(), flat, strict=True):
        assert known.setdefault(code, word) == word
    assert len(known) == len(set(flat))
    alone = [encode([text]).codes.tolist() for text in texts]
    assert [code for codes in alone for code in codes] == encoded.codes.tolist()
    assert encoded.cjk.tolist() == [word in "胸痛한" for word in flat]


@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=12), max_size=6), st.integers(1, 6))
def test_ngrams_are_equal_exactly_where_runs_are(texts: list[list[str]], n: int) -> None:
    encoded = encode([" ".join(text) for text in texts])
    flat = [word for text in texts for word in text]
    grams = Sequences(encoded.codes).ngrams(n).tolist()
    runs = [tuple(flat[i : i + n]) for i in range(len(flat) - n + 1)]
    assert len(grams) == len(runs)
    assert len(set(grams)) == len(set(runs)) == len(set(zip(grams, runs, strict=True)))
    owner = [i for i, text in enumerate(texts) for _ in text]
    expected = [owner[i] == owner[i + n - 1] for i in range(len(runs))]
    assert inside(encoded.starts, n).tolist() == expected


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_jaccard_equals_that_of_sets(left: list[str], right: list[str]) -> None:
    def reference(text: list[str]) -> set[tuple[str, ...]]:
        size = min(5, len(text)) or 1
        return {tuple(text[k : k + size]) for k in range(len(text) - size + 1)}

    encoded = encode([" ".join(left), " ".join(right)])
    sets = [shingles(encoded.of(i)) for i in range(2)]
    flat, first = shingle_sets(encoded.codes, encoded.starts)
    assert all(np.array_equal(flat[first[i] : first[i + 1]], sets[i]) for i in range(2))
    union = reference(left) | reference(right)
    expected = len(reference(left) & reference(right)) / len(union) if left and right else 0.0
    assert jaccard(*sets) == expected
