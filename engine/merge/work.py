"""One tensor being merged: its factors loaded, what must be known of the whole tensor first, then block by block.

    linear       out = round(b W + sum_i w_i d_i)
    slerp        the same, with b and w_i from the angle between P = W + w_1 d_1 and Q = W + w_2 d_2
    dare_linear  d_i masked at random and divided by the density
    ties         d_i trimmed to its largest elements, then a sign election (dare_ties: masked, then elected)

W is the reference, d_i the true delta of each part: low-rank products, whole tensors, vectors or DoRA's. What
must be known of the whole tensor (slerp's angle, TIES' thresholds, DoRA's column norms) is gathered in stages
over the same blocks before any of it is written. Reductions are in float64 and added in block order, so threads
do not change the result.
"""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass, field

import numpy as np

from engine.merge.blocks import Block, Buffers
from engine.merge.files import OpenFiles
from engine.merge.kernel import kernel
from engine.merge.kernel.plain import HIGH_BINS, LOW_BINS, Buffer, Float32, Float64, Int64, Packed
from engine.merge.layout import Part, TensorPlan, longer
from engine.merge.recipe import LINEAR, Recipe
from engine.merge.terms import Loaded, load, stack
from engine.weights.changes import Dora

PARALLEL = 0.9995  # |cosine| above which slerp is a straight line, as in mergekit and in Shoemake's own text


@dataclass
class Stage:
    """One pass over the blocks of a tensor before it is written."""

    blocks_left: int
    sums: dict[int, Float64] = field(default_factory=dict)  # by block, added in their order
    counts: list[Int64] = field(
        default_factory=list
    )  # histograms, one for each part; whole numbers, any order


class Work:
    """One tensor. `load`, then every block through stages 1..`stages`, then every block through `merge`."""

    def __init__(self, tensor: TensorPlan, recipe: Recipe, files: OpenFiles, blocks: int) -> None:
        """`blocks`: how many of them `gather` will see in each pass."""
        self.tensor, self.recipe = tensor, recipe
        self._files, self._blocks = files, blocks
        self._method = "linear" if recipe.method in LINEAR else recipe.method
        self._parts: list[Loaded] = []
        self._coefficient = tensor.base_weight
        self._packed: list[Packed] = []  # one, or one for each expert
        self._thresholds: list[float] = []
        self._bins: list[tuple[int, int]] = []  # TIES: the bin the threshold lies in, and its rank within it
        self._lock = threading.Lock()
        self._stage = Stage(blocks)
        self._done = [threading.Event() for _ in range(self.stages + 1)]

    @property
    def stages(self) -> int:
        """Passes needed before the tensor can be written."""
        if not self.tensor.parts:
            return 0
        columns = any(part.change is not None and _needs_columns(part) for part in self.tensor.parts)
        trims = any(part.density < 1 for part in self.tensor.parts)
        return columns + {"slerp": 1, "ties": 2 if trims else 0}.get(self._method, 0)

    def load(self) -> None:
        """Read the factors (stage 0)."""
        alone = self._method != "linear"
        self._parts = [load(part, self.tensor, self._files, alone) for part in self.tensor.parts]
        if self._method == "ties":
            self._thresholds = [0.0] * len(self._parts)
        if self.stages == 0:
            self._settle()
        self._done[0].set()

    def wait(self, stage: int, stopped: threading.Event) -> None:
        """Until the passes before `stage` are over."""
        while not self._done[stage - 1].wait(0.05):
            if stopped.is_set():
                return

    def gather(self, stage: int, block: Block, base: Buffer, buffers: Buffers) -> None:
        """One block of one pass; the worker that ends a pass settles what it was for."""
        columns = sum(_needs_columns(part) for part in self.tensor.parts) > 0
        with np.errstate(all="ignore"):
            if columns and stage == 1:
                found = {i: p.column_squares(block, base, buffers.values(block.elements))
                         for i, p in enumerate(self._parts) if p.needs_columns}  # fmt: skip
                self._add_columns(block, found)
            elif self._method == "slerp":
                p, q = self._ends(block, base, buffers)
                self._add_sums(block, kernel().dots(p, q))
            else:
                self._count(stage - columns, block, base, buffers)
        with self._lock:
            self._stage.blocks_left -= 1
            last = self._stage.blocks_left == 0
        if last:
            self._settle_stage(stage, columns)

    def merge(self, block: Block, base: Buffer, out: Buffer, buffers: Buffers) -> float:
        """Write one block's bytes into `out`; returns the largest magnitude before rounding (NaN or infinity too)."""
        source, target = self.tensor.source, self.tensor.target
        if block.first >= source.rows:
            return self._new_rows(block, out)
        extra = self._extra(block, base, buffers)
        factors, first = None, block.first
        if self._packed:
            rows = self._packed[0].left.shape[0]
            factors, first = self._packed[block.first // rows], block.first % rows
        return kernel().linear(
            base, source.dtype, self._coefficient, extra, factors, first, block.rows, block.columns,
            buffers.scratch, out, target.dtype,
        )  # fmt: skip

    def _extra(self, block: Block, base: Buffer, buffers: Buffers) -> Float32 | None:
        """What is added beside the low-rank product: nothing, whole tensors, or what trimming left."""
        if self._method in ("linear", "slerp"):
            extra, add = buffers.extra[: block.elements], False
            for loaded in self._parts:
                if loaded.dense and loaded.weight != 0.0:
                    loaded.add_scaled(block, base, extra, add, buffers)
                    add = True
            return extra if add else None
        deltas = self._deltas(block, base, buffers)
        density = [loaded.part.density for loaded in self._parts]
        for i, loaded in enumerate(self._parts):
            if self._method == "ties" and density[i] < 1:
                kernel().trim(deltas[i], self._thresholds[i])
            elif self._method != "ties" and density[i] < 1:
                scale = 1 / density[i] if self.recipe.parameters.rescale else 1.0
                key = dare_key(self.recipe.parameters.seed, loaded.part.label, self.tensor.target.name)
                kernel().dare(deltas[i], block.first * block.columns, key, density[i], scale)
        weights = np.array([loaded.weight for loaded in self._parts], np.float32)
        extra = buffers.extra[: block.elements]
        if self._method == "dare_linear":
            np.matmul(weights, deltas, out=extra)
        else:
            kernel().elect(deltas, weights, self.recipe.normalize, self.recipe.parameters.lam, extra)
        return extra

    def _new_rows(self, block: Block, out: Buffer) -> float:
        """Rows the reference does not have: the weighted mean of the entries that have them."""
        total, by = np.zeros(block.elements, np.float32), 0.0
        for loaded in self._parts:
            if longer(loaded.part.change) >= block.first + block.rows:
                total += np.float32(loaded.part.weight) * loaded.new_rows(block)
                by += loaded.part.weight
        total /= np.float32(by if abs(by) >= 1e-8 else 1.0)
        return kernel().linear(
            total.view(np.uint8), "F32", 1.0, None, None, 0, block.rows, block.columns, total, out,
            self.tensor.target.dtype,
        )  # fmt: skip

    def _deltas(self, block: Block, base: Buffer, buffers: Buffers) -> Float32:
        deltas = buffers.deltas(block.elements)[: len(self._parts)]
        for i, loaded in enumerate(self._parts):
            loaded.delta(block, base, deltas[i])
        return deltas

    def _ends(self, block: Block, base: Buffer, buffers: Buffers) -> tuple[Float32, Float32]:
        """P and Q of slerp."""
        deltas = buffers.deltas(block.elements)
        for i, loaded in enumerate(self._parts):
            loaded.delta(block, base, deltas[i])
            deltas[i] *= np.float32(loaded.part.weight)
            kernel().scaled(base, self.tensor.source.dtype, 1.0, True, deltas[i])
        return deltas[0], deltas[1]

    def _count(self, stage: int, block: Block, base: Buffer, buffers: Buffers) -> None:
        """TIES: histograms of |d|, coarse in the first pass, of the one bin that matters in the second."""
        deltas = self._deltas(block, base, buffers)
        counts = []
        for i, loaded in enumerate(self._parts):
            found = np.zeros(HIGH_BINS if stage == 1 else LOW_BINS, np.int64)
            if loaded.part.density < 1 and stage == 1:
                kernel().histogram(deltas[i], found)
            elif loaded.part.density < 1:
                kernel().histogram_within(deltas[i], self._bins[i][0], found)
            counts.append(found)
        with self._lock:
            if not self._stage.counts:
                self._stage.counts = counts
            else:
                for total, found in zip(self._stage.counts, counts, strict=True):
                    total += found

    def _add_sums(self, block: Block, sums: Float64) -> None:
        with self._lock:
            self._stage.sums[block.number] = sums

    def _add_columns(self, block: Block, found: dict[int, Float64]) -> None:
        with self._lock:
            for i, squares in found.items():
                self._stage.sums[block.number * len(self._parts) + i] = squares

    def _settle_stage(self, stage: int, columns: bool) -> None:
        done, self._stage = self._stage, Stage(self._blocks)
        if columns and stage == 1:
            for i, loaded in enumerate(self._parts):
                if loaded.needs_columns:
                    own = [done.sums[key] for key in sorted(done.sums) if key % len(self._parts) == i]
                    loaded.set_columns(np.sqrt(np.sum(own, axis=0)))
        elif self._method == "slerp":
            self._set_slerp(np.sum([done.sums[number] for number in sorted(done.sums)], axis=0))
        elif stage - columns == 1:
            self._bins = [self._bin(i, counts) for i, counts in enumerate(done.counts)]
        else:
            for i, counts in enumerate(done.counts):
                if self._parts[i].part.density < 1:
                    part, rank = self._bins[i]
                    above = np.cumsum(counts[::-1])
                    low = LOW_BINS - 1 - int(np.searchsorted(above, rank))
                    self._thresholds[i] = float(np.uint32(part << 15 | low).view(np.float32))
        if stage == self.stages:
            self._settle()
        self._done[stage].set()

    def _bin(self, i: int, counts: Int64) -> tuple[int, int]:
        """The histogram bin of the k-th largest |d|, and which of that bin's elements it is (from 1)."""
        loaded = self._parts[i]
        keep = max(1, min(int(loaded.part.density * self.tensor.source.elements), int(counts.sum())))
        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, keep))
        if place >= HIGH_BINS:
            return 0, 1
        return HIGH_BINS - 1 - place, keep - (int(above[place - 1]) if place else 0)

    def _set_slerp(self, sums: Float64) -> None:
        """The coefficients of P and Q, and from them what the reference and each delta count."""
        first, second = slerp_coefficients(sums, self.tensor.t)
        self._coefficient = first + second
        for loaded, coefficient in zip(self._parts, (first, second), strict=True):
            loaded.weight = coefficient * loaded.part.weight

    def _settle(self) -> None:
        """Everything is known: fold weights into the low-rank factors and the reference's coefficient."""
        if self._method in ("linear", "slerp"):
            self._packed = stack(self._parts, self.tensor)
            self._coefficient -= sum(loaded.weight for loaded in self._parts if loaded.dense and loaded.whole)


def _needs_columns(part: Part) -> bool:
    return isinstance(part.change, Dora) and part.change.low_rank.transposed


def slerp_coefficients(sums: Float64, t: float) -> tuple[float, float]:
    """What P and Q count, from (P.P, Q.Q, P.Q) over the whole tensor: sin((1-t)a)/sin a and sin(ta)/sin a.

    With a the angle between P and Q (Shoemake 1985). A straight line, (1 - t, t), where they are nearly
    parallel (|cos a| > PARALLEL) or one is zero.
    """
    size = math.sqrt(float(sums[0])) * math.sqrt(float(sums[1]))
    cosine = float(sums[2]) / size if size > 0 else 1.0
    if not abs(cosine) <= PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def dare_key(seed: int, label: str, tensor: str) -> tuple[int, int]:
    """The Philox key of one entry's mask on one tensor."""
    digest = hashlib.sha256(f"medmerge.dare/1\n{seed}\n{label}\n{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
