"""The merge's matrix products and sums on a CUDA device: blocks go there as bytes and come back rounded.

The only module of `engine.merge` that imports torch, and only jobs that were asked for a device import it. TF32
is off, so products and sums are float32 as everywhere; the result satisfies the same verification. What is cheap
beside moving it (histograms, masks, elections) stays on the processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.errors import BadInputError
from engine.merge.kernel.plain import Buffer, Float32, Packed, PlainKernel

_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class OnDevice(Packed):
    """Factors that lie on the device as well."""

    device_left: Any = None
    device_right: Any = None


class DeviceKernel:
    """A kernel that does `pack`, `low_rank` and `linear` on a torch device and all else as `host` does."""

    compiled = True
    block_elements = 1 << 22  # a block worth a trip over the bus

    def __init__(self, host: PlainKernel, device: str) -> None:
        """`device` as torch names it ("cuda", "cuda:1"). Raises BadInputError when it is not there."""
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise BadInputError(
                f"there is no device {device!r}", "--device is cpu, cuda or cuda:1, ..."
            ) from error
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BadInputError(
                f"device {device} is not there: torch {torch.__version__} sees no CUDA",
                "leave --device out: the processor does it",
            )
        self._host = host
        torch.backends.cuda.matmul.allow_tf32 = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    @property
    def name(self) -> str:
        kind = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "processor"
        return f"torch {torch.__version__} on {kind}, {self._host.name}"

    def pack(self, left: Float32, right: Float32) -> OnDevice:
        left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
        return OnDevice(
            left, right, right.shape[0], right.shape[1],
            torch.from_numpy(left).to(self._device), torch.from_numpy(right).to(self._device),
        )  # fmt: skip

    def low_rank(self, factors: OnDevice, first: int, rows: int, out: Float32) -> None:
        product = factors.device_left[first : first + rows] @ factors.device_right
        torch.from_numpy(out).copy_(product.reshape(-1))

    def linear(
        self,
        base: Buffer,
        base_dtype: str,
        coefficient: float,
        extra: Float32 | None,
        factors: OnDevice | None,
        first: int,
        rows: int,
        columns: int,
        scratch: Float32,
        out: Buffer,
        dtype: str,
    ) -> float:
        """As PlainKernel.linear."""
        kind = _TYPES[base_dtype]
        data = torch.from_numpy(base[: rows * columns * kind.itemsize]).to(self._device)
        values = data.view(kind).float().reshape(rows, columns)
        if coefficient != 1.0:
            values = values * coefficient
        if factors is not None:
            values = torch.addmm(values, factors.device_left[first : first + rows], factors.device_right)
        if extra is not None:
            values = values + torch.from_numpy(extra).to(self._device).reshape(rows, columns)
        largest = float(values.abs().amax())
        rounded = values.to(_TYPES[dtype]).reshape(-1).view(torch.uint8)
        torch.from_numpy(out[: rounded.numel()]).copy_(rounded)
        return largest
