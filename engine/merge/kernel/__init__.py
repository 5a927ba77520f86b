"""The inner loops of the merge: compiled C where `pip install` could build it, numpy where it could not.

`kernel()` gives the one in use; the environment variable MEDMERGE_KERNEL=plain asks for numpy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from typing import cast

from engine.merge.kernel import compiled
from engine.merge.kernel.plain import PlainKernel

_chosen: list[PlainKernel] = []


def kernel() -> PlainKernel:
    """The one in use: what `use_device` asked for, else the compiled kernel, else the plain one."""
    return _chosen[-1] if _chosen else host_kernel()


@cache
def host_kernel() -> PlainKernel:
    if os.environ.get("MEDMERGE_KERNEL") != "plain":
        path = compiled.find_library()
        found = compiled.load(path) if path else None
        if found is not None:
            return found
    return PlainKernel()


@contextlib.contextmanager
def use_device(device: str) -> Iterator[None]:
    """Products and sums on a torch device ("cuda", "cuda:1") within the block; "cpu" changes nothing.

    Raises BadInputError when the device is not there.
    """
    if device == "cpu":
        yield
        return
    from engine.merge.kernel.device import DeviceKernel

    _chosen.append(cast(PlainKernel, DeviceKernel(host_kernel(), device)))
    try:
        yield
    finally:
        _chosen.pop()
