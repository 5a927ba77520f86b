"""Tables and samples written to WORKSPACE/exports, where a person finds them; nothing is written over.

Called by `tui.backend` in threads.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tui.snapshots import SampleRow

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow

TABLE_FORMATS = (("csv", "CSV"), ("md", "Markdown"), ("tex", "LaTeX"), ("json", "JSON"))
SAMPLE_FORMATS = (("jsonl", "JSON lines"), ("csv", "CSV"))


def free_path(folder: Path, name: str, suffix: str) -> Path:
    """A file of that name that is not there yet: NAME.csv, NAME-2.csv, ..."""
    stem = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "table"
    path, number = folder / f"{stem}.{suffix}", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.{suffix}", number + 1
    return path


def export_table(root: Path, name: str, rows: Sequence[MetricRow], suffix: str) -> Path:
    """Write these rows in one of TABLE_FORMATS; returns the file."""
    from tui.commands import report

    rows = [replace(row) for row in rows]
    if suffix == "json":
        text = json.dumps({"rows": [row.to_dict() for row in rows]}, ensure_ascii=False, indent=1)
    elif suffix == "csv":
        text = report.csv_text(rows)
    else:
        text = (report.markdown if suffix == "md" else report.latex)(rows, every=True)
    return _write(root, name, suffix, text)


def export_samples(
    root: Path, name: str, sets: Sequence[tuple[str, Sequence[SampleRow]]], suffix: str
) -> Path:
    """Write the samples of (model, rows) in one of SAMPLE_FORMATS; returns the file."""
    records = [_record(model, row) for model, rows in sets for row in rows]
    if suffix == "jsonl":
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        return _write(root, name, suffix, text)
    out = io.StringIO()
    fields = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    for record in records:
        flat = {
            key: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
            for key, value in record.items()
        }
        writer.writerow(flat)
    return _write(root, name, suffix, out.getvalue().rstrip("\n"))


def _record(model: str, row: SampleRow) -> dict[str, Any]:
    record: dict[str, Any] = {
        "model": model, "id": row.id, "seed": row.seed, "prompt": row.prompt, "reference": row.reference,
        "answer": row.text, "thought": row.thought, "think": row.think, "right": row.right, "label": row.label,
        "automatic_label": row.automatic, "by_hand": row.by_hand, "score": row.score, "cell": row.cell,
    }  # fmt: skip
    if row.options:
        options = [{"text": text, "logprob": score} for text, score in row.options]
        record |= {"options": options, "right_option": row.answer, "chosen_option": row.chosen}
    return record


def _write(root: Path, name: str, suffix: str, text: str) -> Path:
    from engine.atomic import write_text

    folder = root / "exports"
    folder.mkdir(parents=True, exist_ok=True)
    path = free_path(folder, name, suffix)
    write_text(path, text + "\n")
    return path
