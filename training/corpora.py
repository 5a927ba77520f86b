"""Training data files: JSON lines read strictly, rows as they are used.

PT rows: {"id", "text", "source"}. SFT rows: alpaca {"instruction", "input", "output", "system"?} or
{"messages": [{"role", "content"}, ...]}. A broken line is an error that names the file and the line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadDataError


@dataclass(frozen=True)
class Sample:
    """One training row: a text (pt) or a conversation ending with an assistant's turn (sft), and where it stood."""

    file: Path
    line: int  # counted from 1
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class DataFile:
    """What the manifest says about a data file."""

    file: str
    sha256: str
    rows: int


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank.

    Raises BadDataError naming file and line for bytes that are not UTF-8, broken JSON, and lines that are not objects.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise BadDataError(f"cannot read {path}: {error.strerror}", "give a JSON-lines file") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadDataError(
                    f"{path}, line {number}: not valid JSON ({error})", "one JSON object on each line, UTF-8"
                ) from error
            if not isinstance(row, dict):
                raise BadDataError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
            yield number, row


def read_samples(path: Path, kind: str) -> list[Sample]:
    """All rows of a file for a run of that kind. Raises BadDataError naming file, line and key."""
    samples = []
    for number, row in read_jsonl(path):
        if kind == "pt":
            samples.append(Sample(path, number, text=_text(row, "text", path, number)))
        else:
            samples.append(Sample(path, number, messages=_conversation(row, path, number)))
    if not samples:
        raise BadDataError(f"{path} holds no rows")
    return samples


def _text(row: dict[str, Any], key: str, path: Path, number: int, *, empty: bool = False) -> str:
    value = row.get(key, "" if empty else None)
    if not isinstance(value, str) or not (empty or value.strip()):
        found = "missing" if key not in row else f"{value!r:.60}"
        raise BadDataError(f"{path}, line {number}: {key!r} must be a text that is not empty, found {found}")
    return value


def _conversation(row: dict[str, Any], path: Path, number: int) -> tuple[dict[str, str], ...]:
    if "messages" not in row:
        question = _text(row, "instruction", path, number)
        extra = _text(row, "input", path, number, empty=True)
        system = _text(row, "system", path, number, empty=True)
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": f"{question}\n{extra}" if extra else question})
        turns.append({"role": "assistant", "content": _text(row, "output", path, number)})
        return tuple(turns)
    turns = row["messages"]
    good = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not good or not turns or turns[-1]["role"] != "assistant":
        raise BadDataError(
            f"{path}, line {number}: 'messages' must be a list of {{role, content}} that ends with an assistant's turn"
        )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def describe(path: Path, rows: int) -> DataFile:
    return DataFile(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), rows)


def hold_out(samples: Sequence[Sample], count: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, held out): `count` samples chosen by hash of their content and the seed, order kept.

    Equal contents go to the same side. Never more than half of the samples are held out.
    """
    count = min(count, len(samples) // 2)

    def key(sample: Sample) -> str:
        content = sample.text or json.dumps(sample.messages, ensure_ascii=False)
        return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()

    keys = [key(sample) for sample in samples]
    chosen = set(sorted(set(keys))[:count])
    training = [sample for sample, value in zip(samples, keys, strict=True) if value not in chosen]
    held = [sample for sample, value in zip(samples, keys, strict=True) if value in chosen]
    return training, held
