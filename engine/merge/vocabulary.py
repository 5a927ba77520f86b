"""Vocabularies of models to be merged, compared token by token, and rows of one table found in another.

Two fine-tunes of one base often have other added tokens. Their embedding and head tables then have rows that
mean different tokens; merged row by row they would be nonsense without any error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadModelError

TABLES = (
    "embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_out.weight", "word_embeddings.weight",
    "lm_head.bias",
)  # fmt: skip
Rows = npt.NDArray[np.int64]


def is_table(name: str) -> bool:
    """Whether a tensor has one row for each token of the vocabulary."""
    return name.endswith(TABLES)


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to row, from tokenizer.json (the model's vocabulary and its added tokens); None without one.

    Raises BadModelError when the file is there and cannot be understood.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = _model_tokens(raw["model"])
        vocabulary |= {str(token["content"]): int(token["id"]) for token in raw.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadModelError(
            f"{path} cannot be read as a tokenizer: {error}", "models are compared token by token"
        ) from error
    return vocabulary


def _model_tokens(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        return {str(token): row for row, (token, _) in enumerate(vocabulary)}
    return {str(token): int(row) for token, row in vocabulary.items()}


def differences(first: dict[str, int], second: dict[str, int]) -> list[str]:
    """What differs between two vocabularies, in words, the kinds that exist with an example each."""
    moved = [token for token, row in first.items() if second.get(token, row) != row]
    lost, new = [t for t in first if t not in second], [t for t in second if t not in first]
    return [
        f"{len(tokens):,} tokens {what} (such as {tokens[0]!r})"
        for tokens, what in (
            (lost, "only in the first"),
            (new, "only in the other"),
            (moved, "have another row"),
        )
        if tokens
    ]


def row_map(first: dict[str, int], other: dict[str, int], rows: int, other_rows: int) -> Rows:
    """For each of the first table's rows the row of the same token in the other table, -1 where it has none."""
    found = np.full(rows, -1, np.int64)
    for token, row in first.items():
        there = other.get(token, -1)
        if 0 <= row < rows and 0 <= there < other_rows:
            found[row] = there
    return found
