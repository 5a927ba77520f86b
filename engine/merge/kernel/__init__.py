"""The inner loops of the merge: compiled C where `pip install` could build it, numpy where it could not.

`kernel()` gives the one in use; the environment variable MEDMERGE_KERNEL=plain asks for numpy.
"""

from __future__ import annotations

import os
from functools import cache

from engine.merge.kernel import compiled
from engine.merge.kernel.plain import PlainKernel


@cache
def kernel() -> PlainKernel:
    """The compiled kernel, else the plain one."""
    if os.environ.get("MEDMERGE_KERNEL") != "plain":
        path = compiled.find_library()
        found = compiled.load(path) if path else None
        if found is not None:
            return found
    return PlainKernel()
