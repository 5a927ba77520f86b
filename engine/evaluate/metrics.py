"""Overlap of generated text with references, with floors and ceilings. Called by tables.py.

Each metric is a matrix of per-sample statistics and a function of their sums, so that values, bootstrap
intervals and paired tests all come from the same numbers. The floor of a metric is its value when every answer is
scored against another sample's reference: what an answer unrelated to its question gets. The ceiling is its value
when every reference answers for itself: not always 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from engine.evaluate.overlap.scores import Bleu, Chrf, LlamaFactory, Measured, Rouge
from engine.evaluate.overlap.words import is_cjk

__all__ = [
    "OVERLAP",
    "Measured",
    "ceilings",
    "derangements",
    "floors",
    "is_cjk",
    "overlap",
    "overlap_and_floors",
]

OVERLAP = (
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "lf_char_bleu",
    "lf_rouge1",
    "lf_rouge2",
    "lf_rougeL",
)
SHUFFLES = 5
SHUFFLE_SEED = 7


def overlap(outputs: Sequence[str], references: Sequence[str]) -> list[Measured]:
    """All overlap metrics of outputs (n texts) against one reference each, in the order of OVERLAP."""
    return _measure(outputs, references, [list(range(len(references)))])[0]


def floors(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of each metric over SHUFFLES fixed derangements of the references ({} with one sample)."""
    return overlap_and_floors(outputs, references)[1]


def overlap_and_floors(
    outputs: Sequence[str], references: Sequence[str]
) -> tuple[list[Measured], dict[str, float]]:
    """Both at once: every text is cut and counted once, which is most of the work."""
    n = len(references)
    orders = derangements(n) if n > 1 else []
    found, *shuffled = _measure(outputs, references, [list(range(n)), *orders])
    floor = {
        of.name: float(np.mean([every[place].value for every in shuffled]))
        for place, of in enumerate(found)
        if shuffled
    }
    return found, floor


def ceilings(references: Sequence[str]) -> dict[str, float]:
    """Each metric of the references as answers to themselves: the most a perfect answer can get.

    Under 100 where references are too short for the metric: BLEU-4 of three words has no 4-gram, a 2-gram metric no
    pair in one word.
    """
    return dict(_ceilings(tuple(references)))


@lru_cache(maxsize=32)  # the same for every mixture of a sweep
def _ceilings(references: tuple[str, ...]) -> dict[str, float]:
    return {measured.name: measured.value for measured in overlap(references, references)}


def _measure(
    outputs: Sequence[str], references: Sequence[str], orders: Sequence[Sequence[int]]
) -> list[list[Measured]]:
    """The metrics once for each order of the references; one family at a time, so that memory holds one."""
    if len(outputs) != len(references):
        raise ValueError(f"{len(outputs)} outputs and {len(references)} references")
    found: list[list[Measured]] = [[] for _ in orders]
    for family in (Bleu, Chrf, Rouge, LlamaFactory):
        prepared = family(outputs, references)
        for order, measured in zip(orders, found, strict=True):
            measured += prepared.measure(np.array(order, dtype=np.int64))
    return found


def derangements(n: int, count: int = SHUFFLES, seed: int = SHUFFLE_SEED) -> list[list[int]]:
    """`count` permutations of range(n) without a fixed point, the same ones every time (n >= 2).

    A random cyclic order, each item mapped to the next (Sattolo's permutations: one cycle, so no fixed point).
    """
    found = []
    for number in range(count):
        cycle = np.random.default_rng([seed, n, number]).permutation(n)
        order = np.empty(n, dtype=int)
        order[cycle] = np.roll(cycle, -1)
        found.append([int(i) for i in order])
    return found
