"""Dev and test halves by sample id: weights are chosen on one, numbers reported on the other.

Called where task data are read (`half: dev | test`). The rule is the one of the layer-wise search
(engine/evaluate/search/report.py), so weights that were searched on its dev half are never judged on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

HALVES = ("dev", "test")


def half_of(sample_id: str, salt: str = "") -> str:
    """`dev` or `test`: the lowest bit of the first byte of SHA-256(id), 0 is dev.

    It depends on the id alone, so a sample keeps its half when the file grows, is sorted, filtered or limited.
    The price is that halves are not exact: the size of dev is Binomial(n, 1/2), that is n/2 +- sqrt(n) in 95 of
    100 files (40 to 60 of 100; 602 to 671 of 1,273). `salt` gives another, independent split (it is put before
    the id with a zero byte between). Parts of one document with ids of their own may fall on both sides.
    """
    text = f"{salt}\0{sample_id}" if salt else sample_id
    return HALVES[hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 2]


def halves(sample_ids: Iterable[str], salt: str = "") -> tuple[set[str], set[str]]:
    """(dev, test) of these ids, each in exactly one; order and repeats do not matter."""
    dev, test = set[str](), set[str]()
    for sample_id in sample_ids:
        (dev if half_of(sample_id, salt) == "dev" else test).add(sample_id)
    return dev, test
