"""The comparison on the held-out half, from rows: three mixtures, their differences, and a sentence.

Weights were chosen on the dev half only, so the held-out half has not seen them. Differences are paired by sample;
their interval is a percentile bootstrap over samples (engine/evaluate/statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.errors import BadDataError
from engine.evaluate.data import Sample
from engine.evaluate.halves import HALVES, half_of
from engine.evaluate.statistics import FloatArray, bootstrap_interval, paired_bootstrap, ratio

Row = Mapping[str, Any]
CANDIDATES = ("asked", "uniform", "layerwise")
PAIRS = (("layerwise", "uniform"), ("layerwise", "asked"), ("uniform", "asked"))
SMALL = 30  # under so many held-out samples an interval is a rough one


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(dev, held out), as `half_of` says: a sample stays on its side when the file grows.

    Raises BadDataError when a half has fewer than two samples.
    """
    halves: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        halves[HALVES.index(half_of(sample.id))].append(sample)
    if min(map(len, halves)) < 2:
        raise BadDataError(
            f"{len(samples)} samples split by id into {len(halves[0])} and {len(halves[1])}: too few to choose "
            "weights on one half and judge them on the other",
            "give more samples",
        )
    return halves


def compare(rows: Mapping[str, Sequence[Row]], dev: Mapping[str, float]) -> dict[str, Any]:
    """The table.

    Args:
        rows: held-out rows ({id, sum, count, right?}) of every candidate, the same samples in the same order.
        dev: what each candidate had on the dev half.

    Returns:
        JSON: `candidates` [{name, dev, held_out, low, high, n, accuracy (multiple choice, else null)}],
        `differences` [{first, second, difference, low, high, p, n, dev_difference, verdict}], `verdict` (of
        layerwise against uniform: "gain", "loss", "no gain shown") and `message`. Values in nats per token (per
        question for multiple choice); intervals of 95%.
    """
    stats = {name: _stats(rows[name]) for name in CANDIDATES}
    candidates = []
    for name in CANDIDATES:
        low, high = bootstrap_interval(stats[name], ratio)
        right = [bool(row["right"]) for row in rows[name] if "right" in row]
        candidates.append(
            {
                "name": name,
                "dev": dev[name],
                "held_out": float(ratio(stats[name].sum(0, keepdims=True))[0]),
                "low": low,
                "high": high,
                "n": len(stats[name]),
                "accuracy": sum(right) / len(right) if right else None,
            }
        )
    differences = []
    for first, second in PAIRS:
        found = paired_bootstrap(stats[first], stats[second], ratio)
        differences.append(
            {
                "first": first, "second": second, "difference": found.difference, "low": found.low,
                "high": found.high, "p": found.p, "n": found.n,
                "dev_difference": dev[first] - dev[second], "verdict": verdict(found.low, found.high),
            }
        )  # fmt: skip
    main = differences[0]
    return {
        "candidates": candidates,
        "differences": differences,
        "verdict": main["verdict"],
        "message": sentence(main),
    }


def verdict(low: float, high: float) -> str:
    """What the interval of a difference says. An interval that is not known shows nothing."""
    if math.isfinite(low) and low > 0:
        return "gain"
    if math.isfinite(high) and high < 0:
        return "loss"
    return "no gain shown"


def sentence(difference: Mapping[str, Any]) -> str:
    where = f"on {difference['n']} held-out samples"
    size = f"{difference['difference']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}] nats"
    on_dev = f"({difference['dev_difference']:+.4f} on the dev half, where they were chosen)"
    what = {
        "gain": "layer-wise weights are better than the best uniform ones",
        "loss": "layer-wise weights are worse than the best uniform ones",
        "no gain shown": "no gain shown by layer-wise weights over the best uniform ones",
    }[str(difference["verdict"])]
    caution = "; so few samples give a rough interval" if difference["n"] < SMALL else ""
    return f"{what} {where}: {size} {on_dev}{caution}"


def _stats(rows: Sequence[Row]) -> FloatArray:
    return np.array([[row["sum"], row["count"]] for row in rows], dtype=np.float64)
