"""How much two adapters get in each other's way, from their low-rank factors alone: no base, no dense delta.

With dW = s B A and <X, Y> = sum(X * Y):

    <dW_1, dW_2>  = s_1 s_2 sum((B_1^T B_2) * (A_1 A_2^T))           an r x r product instead of out x in
    cosine        = <dW_1, dW_2> / (||dW_1|| ||dW_2||)
    norm ratio    = ||dW_1|| / ||dW_2||
    angles        = principal angles between the columns of B_1 and B_2 (column space), and between those of
                    A_1^T and A_2^T (row space), in degrees       (engine/merge/subspaces.py)
    overlap       = ||Q_1^T Q_2||_F^2 / min(r_1, r_2)             Q: orthonormal basis of one of those spaces
    sign conflict = share of elements where both are non-zero and of opposite sign, on sampled rows

The overlap is the mean squared cosine of the principal angles: 1 when one space holds the other, about r / n for
random spaces in n dimensions, which is given beside it. Random deltas have sign conflict 1/2, cosine 0, and
angles near 90 degrees when r is small beside n. Time and memory grow as width * rank^2, never as width^2.
Called by engine/merge/job.py for `medmerge interference`.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadAdapterError, BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.selectors import layer_of
from engine.merge.subspaces import Angles, principal_angles
from engine.weights.adapter import Adapter, LoraFactor
from engine.weights.tensorfile import read_rows

SAMPLED_ROWS = 64  # of each module, evenly spaced, for the signs
MOST_THREADS = 8


@dataclass(frozen=True)
class Overlap:
    """Two deltas of one module. Inner products and squared norms are of the scaled deltas, weight 1."""

    inner: float
    squares: tuple[float, float]
    columns: Angles
    rows: Angles
    conflicts: int
    signs: int  # elements the conflicts were counted on

    @property
    def cosine(self) -> float:
        size = math.sqrt(self.squares[0] * self.squares[1])
        return max(-1.0, min(1.0, self.inner / size)) if size > 0 else 0.0

    @property
    def sign_conflict(self) -> float:
        return self.conflicts / self.signs if self.signs else 0.0


def compare(adapters: Mapping[str, Path], events: EventWriter) -> dict[str, Any]:
    """Compare every pair of adapters, module by module.

    Returns:
        JSON: `modules`, one entry per shared module and pair ({name, pair, cosine, norm {label: number},
        norm_ratio, subspace_overlap, column_overlap, row_overlap, overlap_by_chance, column_angle_smallest,
        column_angle_median, row_angle_smallest, row_angle_median (degrees; null for an empty space),
        sign_conflict, sign_elements}), `overall` (the same over all modules of the first pair: the smallest
        angle of any, the median of the medians), `pairs` (overall of each pair), `strips` (one per pair, see
        `strip`), `only_in` ({label: modules no other adapter has}), `not_compared` ({label: variants} of
        adapters that change more than low-rank pairs: of DoRA the pairs are compared without the magnitudes).

    Raises:
        BadRecipeError: fewer than two adapters.
        BadAdapterError: an adapter that cannot be read, or two that fit different bases (names the module).
    """
    if len(adapters) < 2:
        raise BadRecipeError(
            "interference needs two adapters", "name them: --adapter pt=PATH --adapter sft=PATH"
        )
    opened = {label: Adapter.open(path) for label, path in adapters.items()}
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    strips: list[dict[str, Any]] = []
    shared = {pair: _shared(opened, pair) for pair in itertools.combinations(opened, 2)}
    total, done = sum(len(names) for names in shared.values()), 0
    # One module a thread: BLAS itself runs single-threaded in jobs (engine/merge/job.py).
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for pair, names in shared.items():
            found: dict[str, Overlap] = {}
            one, two = (opened[label].factors for label in pair)
            compared = pool.map(overlap, [one[name] for name in names], [two[name] for name in names])
            for name, found[name] in zip(names, compared, strict=True):
                rows.append({"name": name, "pair": list(pair), **_numbers(pair, [found[name]])})
                done += 1
                events.progress(done, total, unit="modules", message=name, phase="compare")
            pairs.append({"pair": list(pair), "modules": len(names), **_numbers(pair, list(found.values()))})
            strips.append({"pair": list(pair), **strip(found)})
    everywhere = [set(adapter.factors) for adapter in opened.values()]
    only = {
        label: sorted(set(adapter.factors) - set().union(*(s for j, s in enumerate(everywhere) if j != i)))
        for i, (label, adapter) in enumerate(opened.items())
    }
    return {
        "labels": list(opened),
        "modules": rows,
        "overall": {key: value for key, value in pairs[0].items() if key != "pair"},
        "pairs": pairs,
        "strips": strips,
        "only_in": {label: names for label, names in only.items() if names},
        "not_compared": {label: list(a.variants) for label, a in opened.items() if not a.plain},
    }


def _shared(opened: Mapping[str, Adapter], pair: tuple[str, str]) -> list[str]:
    """Modules both adapters change, in the first one's order. Raises BadAdapterError when shapes differ."""
    first, second = (opened[label] for label in pair)
    names = [name for name in first.factors if name in second.factors]
    for name in names:
        one, two = first.factors[name].shape, second.factors[name].shape
        if one != two:
            raise BadAdapterError(
                f"{name} is {list(one)} in {first.folder} and {list(two)} in {second.folder}",
                "these adapters belong to different bases",
            )
    return names


def overlap(first: LoraFactor, second: LoraFactor) -> Overlap:
    """Compare two deltas of one module of shape (out, in); costs O((out + in) r^2) and SAMPLED_ROWS rows."""
    a1, b1, a2, b2 = (read_rows(info).astype(np.float64) for info in (first.a, first.b, second.a, second.b))
    columns = (b1.T @ b1, b2.T @ b2, b1.T @ b2)
    rows = (a1 @ a1.T, a2 @ a2.T, a1 @ a2.T)
    inner = first.scale * second.scale * float(np.sum(columns[2] * rows[2]))
    squares = (
        first.scale**2 * float(np.sum(columns[0] * rows[0])),
        second.scale**2 * float(np.sum(columns[1] * rows[1])),
    )
    picked = np.unique(np.linspace(0, b1.shape[0] - 1, SAMPLED_ROWS).astype(np.int64))
    x, y = b1[picked] @ a1, b2[picked] @ a2
    there = (x != 0) & (y != 0)
    return Overlap(
        inner, squares, principal_angles(b1, b2, columns), principal_angles(a1.T, a2.T, rows),
        int(np.count_nonzero(((x < 0) != (y < 0)) & there)), int(np.count_nonzero(there)),
    )  # fmt: skip


def strip(found: Mapping[str, Overlap]) -> dict[str, Any]:
    """Modules by layer and kind, for a picture: `layers` ([int]), `kinds` ([last part of the module name]), and
    `cosine` and `sign_conflict`, each a list over kinds of lists over layers; null where there is no module.

    Several modules of a kind in one layer (experts) count as one delta. Modules outside the layers are left out.
    """
    cells: dict[tuple[str, int], list[Overlap]] = {}
    for name, part in found.items():
        layer = layer_of(f"{name}.")
        if layer is not None:
            cells.setdefault((name.rsplit(".", 1)[-1], layer), []).append(part)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = list(range(min((n for _, n in cells), default=0), max((n for _, n in cells), default=-1) + 1))
    pictures: dict[str, list[list[float | None]]] = {}
    for what in ("cosine", "sign_conflict"):
        pictures[what] = [
            [_numbers(("", ""), cells[kind, n])[what] if (kind, n) in cells else None for n in layers]
            for kind in kinds
        ]
    return {"layers": layers, "kinds": kinds, **pictures}


def _numbers(pair: tuple[str, str], parts: list[Overlap]) -> dict[str, Any]:
    """The numbers of one module, or of many together: cosines from summed products, overlaps averaged."""
    inner = sum(part.inner for part in parts)
    norms = [math.sqrt(max(0.0, sum(part.squares[i] for part in parts))) for i in (0, 1)]
    signs = sum(part.signs for part in parts)
    count = max(1, len(parts))
    columns = sum(part.columns.overlap for part in parts) / count
    rows = sum(part.rows.overlap for part in parts) / count
    chance = sum(part.columns.chance + part.rows.chance for part in parts) / (2 * count)
    return {
        "cosine": max(-1.0, min(1.0, inner / (norms[0] * norms[1]))) if all(norms) else 0.0,
        "norm": dict(zip(pair, norms, strict=True)),
        "norm_ratio": norms[0] / norms[1] if norms[1] else None,
        "subspace_overlap": (columns + rows) / 2,
        "column_overlap": columns,
        "row_overlap": rows,
        "overlap_by_chance": chance,
        **_angles("column", [part.columns for part in parts]),
        **_angles("row", [part.rows for part in parts]),
        "sign_conflict": sum(part.conflicts for part in parts) / signs if signs else 0.0,
        "sign_elements": signs,
    }


def _angles(space: str, parts: Sequence[Angles]) -> dict[str, float | None]:
    smallest = [part.smallest for part in parts if part.smallest is not None]
    medians = [part.median for part in parts if part.median is not None]
    return {
        f"{space}_angle_smallest": min(smallest, default=None),
        f"{space}_angle_median": statistics.median(medians) if medians else None,
    }
