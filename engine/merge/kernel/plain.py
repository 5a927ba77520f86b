"""The merge's inner loops in numpy: what the compiled ones are tested against, and used where they are missing.

All work on one block of rows. `Buffer` is an array of raw bytes; dtypes are BF16, F16 and F32 as safetensors
names them. Arrays given as `out` or changed in place are flat and contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Buffer = npt.NDArray[np.uint8]

LARGEST = {"BF16": 3.3895313892515355e38, "F16": 65504.0, "F32": 3.4028234663852886e38}
SCRATCH = 6 * 1024  # floats `linear` needs for itself
HIGH_BINS = 1 << 16  # bins of the upper 16 of a magnitude's 31 bits
LOW_BINS = 1 << 15


@dataclass(frozen=True)
class Packed:
    """Two factors ready for `low_rank`: left (rows, R), and right (R, columns) in the kernel's own order."""

    left: Float32
    right: Float32
    ranks: int
    columns: int


class PlainKernel:
    """The functions of kernel.c in numpy."""

    compiled = False
    block_elements = (
        1 << 18
    )  # half a MiB of bf16 in and out (measured: 10% less CPU time than half or double)

    @property
    def name(self) -> str:
        return "numpy (no compiled kernel)"

    def pack(self, left: Float32, right: Float32) -> Packed:
        """left (rows, R) and right (R, columns), float32, for `low_rank` and `linear`."""
        return Packed(np.ascontiguousarray(left), np.ascontiguousarray(right), right.shape[0], right.shape[1])

    def low_rank(self, factors: Packed, first: int, rows: int, out: Float32) -> None:
        """out = (left @ right)[first : first + rows], summed in float32."""
        np.matmul(factors.left[first : first + rows], factors.right, out=out.reshape(rows, factors.columns))

    def linear(
        self,
        base: Buffer,
        base_dtype: str,
        coefficient: float,
        extra: Float32 | None,
        factors: Packed | None,
        first: int,
        rows: int,
        columns: int,
        scratch: Float32,
        out: Buffer,
        dtype: str,
    ) -> float:
        """out = round(coefficient * base + extra + rows of left @ right); returns the largest magnitude.

        A result of infinity or NaN says that something in the base was not finite, or the sum overflowed
        float32; the bytes in `out` then mean nothing. `scratch` holds
        SCRATCH floats.
        """
        count = rows * columns
        values = widen(base, base_dtype, count)
        values *= np.float32(coefficient)
        if factors is not None:
            delta = np.empty(count, np.float32)
            self.low_rank(factors, first, rows, delta)
            values += delta
        if extra is not None:
            values += extra
        most = _largest(values)
        narrow(values, dtype, out)
        return most

    def scaled(self, x: Buffer, dtype: str, coefficient: float, add: bool, out: Float32) -> None:
        """out = coefficient * x, or out += coefficient * x."""
        values = widen(x, dtype, out.size)
        values *= np.float32(coefficient)
        if add:
            out += values
        else:
            out[:] = values

    def difference(self, x: Buffer, x_dtype: str, w: Buffer, w_dtype: str, out: Float32) -> None:
        """out = x - w in float32."""
        np.subtract(widen(x, x_dtype, out.size), widen(w, w_dtype, out.size), out=out)

    def largest(self, x: Buffer, dtype: str, count: int) -> float:
        """The largest magnitude; infinity or NaN when there is one."""
        return _largest(widen(x, dtype, count))

    def dots(self, p: Float32, q: Float32) -> Float64:
        """(p.p, q.q, p.q), products and sums in float64."""
        one, two = p.astype(np.float64), q.astype(np.float64)
        return np.array([one @ one, two @ two, one @ two])

    def histogram(self, d: Float32, counts: Int64) -> None:
        """counts[bits >> 15] += 1 for the magnitude bits of every element (HIGH_BINS)."""
        counts += np.bincount((d.view(np.uint32) & 0x7FFFFFFF) >> 15, minlength=HIGH_BINS)

    def histogram_within(self, d: Float32, part: int, counts: Int64) -> None:
        """counts[bits & 0x7FFF] += 1 for the elements in one bin of `histogram` (LOW_BINS)."""
        bits = d.view(np.uint32) & 0x7FFFFFFF
        counts += np.bincount(bits[bits >> 15 == part] & 0x7FFF, minlength=LOW_BINS)

    def trim(self, d: Float32, threshold: float) -> None:
        """What is smaller in size than the threshold becomes 0."""
        d[np.abs(d) < np.float32(threshold)] = 0.0

    def elect(self, d: Float32, weights: Float32, normalize: bool, lam: float, out: Float32) -> None:
        """TIES' sign election over d (entries, n): see docs/merging.md. `out` (n,) may be d[0]."""
        weighted = d * weights[:, None]
        agrees = np.sign(weighted) == np.where(weighted.sum(axis=0) >= 0, 1, -1)
        total = np.where(agrees, weighted, 0).sum(axis=0)
        if normalize:
            divisor = np.where(agrees, weights[:, None], 0).sum(axis=0)
            total /= np.where(np.abs(divisor) < 1e-8, np.float32(1), divisor)
        np.multiply(total, np.float32(lam), out=out)

    def dare(self, d: Float32, first: int, key: tuple[int, int], density: float, scale: float) -> None:
        """Keep element first + i where its Philox draw is below density * 2^32, times `scale`; else 0."""
        skip = first % 8  # four outputs of 64 bits make eight draws
        source = np.random.Philox(key=np.array(key, np.uint64), counter=first // 8)
        draws = source.random_raw((skip + d.size + 1) // 2).view(np.uint32)[skip : skip + d.size]
        keep = draws < np.uint64(int(density * 2**32))
        d *= np.float32(scale)
        d[~keep] = 0.0

    def start_writing(self, descriptor: int, offset: int, count: int) -> None:
        """A hint to begin writing to the disk; nothing here."""


def widen(data: Buffer, dtype: str, count: int) -> Float32:
    """The first `count` elements of raw bytes as new float32 values; exact."""
    if dtype == "BF16":
        return (data[: 2 * count].view("<u2").astype(np.uint32) << 16).view(np.float32)
    kind, size = {"F16": ("<f2", 2), "F32": ("<f4", 4)}[dtype]
    return data[: size * count].view(kind).astype(np.float32)


def narrow(values: Float32, dtype: str, out: Buffer) -> None:
    """Float32 values rounded once to `dtype` (nearest, ties to even) as raw bytes."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            bits = values.view(np.uint32)
            out[: 2 * values.size].view("<u2")[:] = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        elif dtype == "F16":
            out[: 2 * values.size].view("<f2")[:] = values
        else:
            out[: 4 * values.size].view("<f4")[:] = values


def _largest(values: Float32) -> float:
    bits = values.view(np.uint32) & 0x7FFFFFFF
    return float(bits.max(initial=np.uint32(0)).view(np.float32))
