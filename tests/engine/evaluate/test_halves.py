"""Dev and test halves: fixed for ever, independent of order, balanced, and the search's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from engine.evaluate.data import Sample
from engine.evaluate.halves import half_of, halves
from engine.evaluate.search.report import split


def test_halves_never_change():
    """Written down once (sha256sum): a published number must find its half again."""
    assert half_of("a") == "dev"  # ca978112...
    assert half_of("b") == "dev"  # 3e23e816...
    assert half_of("c") == "dev"  # 2e7d2c03...
    assert half_of("3") == "dev"  # 4e074085...
    assert half_of("1") == "test"  # 6b86b273...
    assert half_of("问题") == half_of("问题")
    assert half_of("\ud800") in ("dev", "test")  # JSON may hold a lone surrogate


@given(st.lists(st.text()), st.randoms(use_true_random=False))
def test_every_id_in_one_half_whatever_the_order(ids, random):
    dev, test = halves(ids)
    assert dev | test == set(ids) and not dev & test
    shuffled = [*ids, *ids[:2]]
    random.shuffle(shuffled)
    assert halves(shuffled) == (dev, test)
    assert halves([*ids, "one more"])[0] >= dev and halves([*ids, "one more"])[1] >= test


def test_sizes_are_binomial():
    for n, salt in ((100, ""), (1273, ""), (5000, "again")):
        dev, _ = halves((f"medqa-{i}" for i in range(n)), salt)
        assert 0.001 < binom.cdf(len(dev), n, 0.5) < 0.999
    sizes = [len(halves((str(i) for i in range(100)), salt=f"s{k}")[0]) for k in range(400)]
    assert abs(np.mean(sizes) - 50) < 4 * 5 / 20 and 4.3 < np.std(sizes) < 5.7  # sd 5
    one, two = halves(map(str, range(400)))[0], halves(map(str, range(400)), "x")[0]
    assert 60 < len(one & two) < 140  # another salt is an independent split


def test_the_same_halves_as_the_search():
    samples = [Sample(id=f"q-{i}") for i in range(300)]
    dev, held_out = split(samples)
    assert halves(sample.id for sample in samples) == ({s.id for s in dev}, {s.id for s in held_out})
