"""Vocabularies that differ: which row of each model's tables stands for which row of the reference's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadModelError
from engine.merge.verify.deltas import is_embedding
from engine.merge.verify.rounding import Array


def is_table(name: str) -> bool:
    """Whether a tensor has one row (or number) a token."""
    return is_embedding(name) or name.endswith(
        ("lm_head.weight", "embed_out.weight", "word_embeddings.weight", "lm_head.bias")
    )


def token_ids(folder: Path) -> dict[str, int] | None:
    """Every token's row, from tokenizer.json (its model's vocabulary and the added tokens); None without one.

    Raises BadModelError when it cannot be read as a list of tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = (document.get("model") or {}).get("vocab")
        if isinstance(vocabulary, list):  # Unigram: [token, score] in order
            found = {str(pair[0]): i for i, pair in enumerate(vocabulary)}
        else:
            found = {str(token): int(i) for token, i in (vocabulary or {}).items()}
        for added in document.get("added_tokens") or []:
            found[str(added["content"])] = int(added["id"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadModelError(
            f"{path} cannot be read: {error}", "merging vocabularies token by token needs every tokenizer"
        ) from error
    return found


def common_rows(
    own: Mapping[str, int], rows: int, others: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int]
) -> dict[str, Array]:
    """For each model an array (rows,): its row for each of the reference's rows, -1 where not every model has it."""
    found = {label: np.full(rows, -1, dtype=np.int64) for label in others}
    for token, i in own.items():
        places = {label: ids.get(token, -1) for label, ids in others.items()}
        if i < rows and all(0 <= place < sizes[label] for label, place in places.items()):
            for label, place in places.items():
                found[label][i] = place
    return found
