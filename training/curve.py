"""A run's curve on disk, RUN/curve.jsonl: what the app plots and compares, complete also after a resume.

One JSON object a line: {step, loss, lr, grad_norm, tok_s, tokens, padding, memory} or {step, eval_loss,
eval_perplexity}. Only the run's first process writes it; a torn last line (a kill, a full disk) is dropped by readers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.atomic import write_text

NAME = "curve.jsonl"


class CurveFile:
    """Appends points; `rewind` takes back those after a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torn = False

    def append(self, point: dict[str, Any]) -> None:
        """Add a point. A full disk loses it, never the run."""
        line = json.dumps(point) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._torn else line)
            self._torn = False
        except OSError:
            self._torn = True

    def rewind(self, step: int, measured: bool) -> None:
        """Keep the points up to `step`; an evaluation at `step` itself only if it is `measured`, as the checkpoint
        says: else it is measured again."""
        kept = [
            p
            for p in read(self.path)
            if p["step"] < step or (p["step"] == step and ("loss" in p or measured))
        ]
        write_text(self.path, "".join(json.dumps(point) + "\n" for point in kept))


def read(path: Path) -> list[dict[str, Any]]:
    """All whole points of a curve, in order; [] when there is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    points = []
    for line in lines[:-1]:  # what follows the last line break is torn
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and isinstance(point.get("step"), int):
            points.append(point)
    return points
