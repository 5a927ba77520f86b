"""What a job is asked to do: a target function named as text, and JSON parameters for it.

The target is text ("engine.merge.job:run"), so that the engine can start jobs of packages above it without
importing them. A target is `def run(params: dict, events: EventWriter) -> dict`; what it returns is JSON
and may hold `exit_code` (0 done, 1 the check said no, 4 could not tell).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadInputError


@dataclass(frozen=True)
class JobSpec:
    """One job as asked. `command` is the equivalent command line, for people ("copy as command")."""

    kind: str  # merge, verify, gguf, train, eval, sweep, demo, audit, interference
    target: str  # "package.module:function"
    params: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    command: str = ""

    def to_json(self) -> str:
        """JSON that can be written as UTF-8: odd bytes of a file's name, "\\udcff" in Python, stay as that escape."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode("utf-8")

    @classmethod
    def read(cls, path: Path) -> JobSpec:
        """Read spec.json. Raises BadInputError naming the file when it is not one of ours."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BadInputError(f"{path} is not a job specification: {error}") from error
