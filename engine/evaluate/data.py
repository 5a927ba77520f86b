"""Evaluation data: JSONL files in, checked samples out. A broken line is an error with file and line number.

generation        {"id", "prompt", "reference", "source"?}
multiple_choice   {"id", "question", "options": [...], "answer": index, "context"?, "source"?}
probes            {"id", "category", "prompt", "kind": "harmful" | "safe" | "advice", "source"?}
perplexity        {"id", "text", "source"?}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from engine.evaluate.tasks.task import Task

PROBE_KINDS = ("harmful", "safe", "advice")
_NEEDED = {
    "generation": ("prompt", "reference"),
    "multiple_choice": ("question", "options", "answer"),
    "probes": ("category", "prompt", "kind"),
    "perplexity": ("text",),
}


@dataclass(frozen=True)
class Sample:
    """One row of a data set. Fields of other kinds keep their defaults."""

    id: str
    source: str = ""
    prompt: str = ""  # generation, probes; the text itself for perplexity
    reference: str = ""
    options: tuple[str, ...] = ()
    answer: int = -1
    context: str = ""
    category: str = ""
    probe: str = ""  # harmful, safe, advice
    instructions: tuple[dict[str, Any], ...] = ()  # ({"id": "punctuation:no_comma", "kwargs": {...}}, ...)


def read_samples(path: Path, kind: str, limit: int | None = None) -> list[Sample]:
    """`limit` samples of a file of that kind, spread evenly over it, in file order (None: all).

    Spread, because such files are often sorted by category or source. Sample k of n is row floor(k * rows / n).
    Every line is checked, used or not; blank lines are skipped.

    Raises BadDataError naming file and line (from 1): not JSON, a key missing or of the wrong type, an answer
    outside its options, an id that came before, no samples at all.
    """
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadDataError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            raw = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise BadDataError(f"{where} is not JSON: {error}", "correct or remove that line") from error
        sample = _sample(raw, kind, where)
        if sample.id in seen:
            raise BadDataError(f"{where}: id {sample.id!r} was used in line {seen[sample.id]} already")
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise BadDataError(f"{path} holds no samples")
    if limit is None or limit >= len(samples):
        return samples
    return [samples[k * len(samples) // limit] for k in range(limit)]


def read_task(task: Task) -> list[Sample]:
    """The samples of a task."""
    return read_samples(task.data, task.kind, task.limit)


def _sample(raw: Any, kind: str, where: str) -> Sample:
    if not isinstance(raw, dict):
        raise BadDataError(f"{where} should be a JSON object")
    for key in ("id", *_NEEDED[kind]):
        if key not in raw:
            raise BadDataError(
                f"{where}: {key!r} is missing; a {kind} row has id, {', '.join(_NEEDED[kind])}"
            )
    if isinstance(raw["id"], int) and not isinstance(raw["id"], bool):
        raw["id"] = str(raw["id"])
    for key in ("id", "prompt", "reference", "question", "category", "kind", "text", "context", "source"):
        if key in raw and not isinstance(raw[key], str):
            raise BadDataError(f"{where}: {key} should be text, and is {raw[key]!r:.60}")
    for key in ("id", "prompt", "reference", "question", "text", "category"):
        if key in raw and not raw[key].strip():
            raise BadDataError(f"{where}: {key} is empty")
    options, answer = raw.get("options", []), raw.get("answer", -1)
    if kind == "multiple_choice":
        if not isinstance(options, list) or not 2 <= len(options) <= 26:
            raise BadDataError(f"{where}: options should be a list of 2 to 26 texts")
        if not all(isinstance(option, str) and option.strip() for option in options):
            raise BadDataError(f"{where}: every option should be text with something in it")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
            raise BadDataError(
                f"{where}: answer should be the index of an option (0 to {len(options) - 1}), and is {answer!r}"
            )
    if kind == "probes" and raw["kind"] not in PROBE_KINDS:
        raise BadDataError(f"{where}: kind should be one of {', '.join(PROBE_KINDS)}, and is {raw['kind']!r}")
    return Sample(
        id=raw["id"],
        source=raw.get("source", ""),
        prompt=raw.get("prompt") or raw.get("question") or raw.get("text") or "",
        reference=raw.get("reference", ""),
        options=tuple(options),
        answer=answer if kind == "multiple_choice" else -1,
        context=raw.get("context", ""),
        category=raw.get("category", ""),
        probe=raw["kind"] if kind == "probes" else "",
    )
