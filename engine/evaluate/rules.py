"""One hash of everything that turns stored rows into the numbers of a table: the stamp of table.json.

A table made by other rules is computed anew (summary.load_table). Reads files' bytes and imports nothing heavy.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

_HERE = Path(__file__).parent
_SOURCES = (
    "comparable.py", "halves.py", "letters.py", "metrics.py", "reasoning.py", "series.py", "statistics.py",
    "tables.py", "think.py", "wording.py",
)  # fmt: skip
_FOLDERS = ("instructions", "overlap", "refusals")


@lru_cache
def rules_sha256() -> str:
    """SHA-256 over the names and bytes of those sources and of the refusal classifier's weights."""
    files = [_HERE / name for name in _SOURCES]
    files += [path for folder in _FOLDERS for path in (_HERE / folder).rglob("*.py")]
    files.append(_HERE / "refusals" / "data" / "weights.json")
    digest = hashlib.sha256()
    for path in sorted(files):
        inside = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(_HERE).as_posix()} {inside}\n".encode())
    return digest.hexdigest()
