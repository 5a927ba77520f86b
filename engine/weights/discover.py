"""Finds adapters and model folders below a folder, and says why a candidate is not usable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import MedmergeError
from engine.weights.adapter import CONFIG, PICKLE, WEIGHTS, Adapter
from engine.weights.checkpoint import INDEX, SINGLE, Checkpoint

_MAX_DEPTH = 5
_NOT_RESULTS = re.compile(r"^\.|\.partial$|\.rejected(-\d+)?$")  # hidden, unfinished, failed verification


@dataclass(frozen=True)
class FoundAdapter:
    """A candidate adapter: opened, or the error that says why not."""

    path: Path
    adapter: Adapter | None
    error: MedmergeError | None = None


@dataclass(frozen=True)
class FoundModel:
    path: Path
    model: Checkpoint | None
    error: MedmergeError | None = None


def find_adapters(places: list[Path]) -> list[FoundAdapter]:
    """Every folder with an adapter's config or weights below the places (or the places themselves), by path."""
    found = []
    for folder in _folders(places):
        if any((folder / name).is_file() for name in (CONFIG, WEIGHTS, PICKLE)):
            try:
                found.append(FoundAdapter(folder, Adapter.open(folder)))
            except MedmergeError as error:
                found.append(FoundAdapter(folder, None, error))
    return found


def find_models(places: list[Path]) -> list[FoundModel]:
    """Every folder with config.json and model weights below the places, by path."""
    found = []
    for folder in _folders(places):
        if (folder / "config.json").is_file() and ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
            try:
                found.append(FoundModel(folder, Checkpoint.open(folder)))
            except MedmergeError as error:
                found.append(FoundModel(folder, None, error))
    return found


def _folders(places: list[Path]) -> Iterator[Path]:
    seen = set()
    for place in places:
        for parent, children, _ in os.walk(place, followlinks=True):
            folder = Path(parent)
            key = folder.resolve()
            if key in seen or len(folder.parts) - len(place.parts) > _MAX_DEPTH:
                children.clear()
                continue
            seen.add(key)
            children[:] = sorted(name for name in children if not _NOT_RESULTS.search(name))
            yield folder
