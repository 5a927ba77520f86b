"""The audit over files: rows in, findings as plain JSON out. Called by `training.audit.job` and by every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from engine.jobs.events import EventWriter
from training.audit.detectors import Document, Match, duplicates, leaks
from training.audit.text import Vocabulary, pieces
from training.corpora import read_jsonl


def read_documents(path: Path, vocabulary: Vocabulary) -> list[Document]:
    """All rows of a file. Raises BadDataError for broken lines and for rows without any text field."""
    documents = []
    for row_number, (line, row) in enumerate(read_jsonl(path)):
        texts = pieces(row)
        if isinstance(row.get("messages"), list):
            texts += [
                str(turn["content"])
                for turn in row["messages"]
                if isinstance(turn, dict) and "content" in turn
            ]
        if not texts:
            raise BadDataError(
                f"{path}, line {line}: no text field to compare", "expected text, instruction, prompt …"
            )
        documents.append(Document.of(str(path), row_number, texts, vocabulary))
    return documents


def audit_files(train: Sequence[Path], test: Sequence[Path], events: EventWriter) -> dict[str, Any]:
    """{"leaks": [...], "duplicates": [...], "counts": {...}} of training files against test files.

    Rows are counted from 0. Duplicates are looked for within the training files together, leaks between every
    training and every test row. A pair found by several detectors is listed once for each.
    """
    vocabulary = Vocabulary()
    documents: dict[str, list[Document]] = {}
    paths = [*train, *test]
    for number, path in enumerate(paths):
        events.progress(number, len(paths) + 2, "steps", f"reading {path.name}", phase="audit")
        documents[str(path)] = read_documents(path, vocabulary)
    train_documents = [document for path in train for document in documents[str(path)]]
    test_documents = [document for path in test for document in documents[str(path)]]
    events.progress(len(paths), len(paths) + 2, "steps", "comparing with the test sets", phase="audit")
    found = leaks(train_documents, test_documents) if test_documents else []
    events.progress(len(paths) + 1, len(paths) + 2, "steps", "looking for repeats", phase="audit")
    repeated = duplicates(train_documents)
    events.progress(len(paths) + 2, len(paths) + 2, "steps", phase="audit")
    return {
        "leaks": [_leak(match) for match in found],
        "duplicates": [_duplicate(match) for match in repeated],
        "counts": {
            "rows": {path: len(rows) for path, rows in documents.items()},
            "leaks": dict(Counter(match.detector for match in found)),
            "leaking_train_rows": len({(match.left.file, match.left.row) for match in found}),
            "leaked_test_rows": len({(match.right.file, match.right.row) for match in found}),
            "duplicates": dict(Counter(match.detector for match in repeated)),
        },
    }


def _leak(match: Match) -> dict[str, Any]:
    return {
        "train_file": match.left.file,
        "train_row": match.left.row,
        "test_file": match.right.file,
        "test_row": match.right.row,
        "detector": match.detector,
        "score": round(match.score, 4),
    }


def _duplicate(match: Match) -> dict[str, Any]:
    return {
        "file": match.left.file,
        "row": match.left.row,
        "of_file": match.right.file,
        "of_row": match.right.row,
        "detector": match.detector,
        "score": round(match.score, 4),
    }
