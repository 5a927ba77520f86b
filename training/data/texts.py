"""Plain text as rows {"text": …}: lines, paragraphs (separated by blank lines) or whole documents.

Called by `training.data.rows`. Line ends become \\n (a file from Windows must not train \\r); nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from training.data import encoded

SPLITS = ("auto", "line", "paragraph", "document")


def read(path: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1 where it starts, row); `auto` means paragraphs. Rows of white space only are left out."""
    if split == "line":
        return _lines(path)
    return _document(path) if split == "document" else _paragraphs(path)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in encoded.lines(path):
        if line.strip():
            yield number, {"text": _unended(line)}


def _paragraphs(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    start, size = 0, 0
    paragraph: list[str] = []
    for number, line in encoded.lines(path):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(_unended(line))
            size += len(line)
            if size > encoded.LARGEST:
                raise BadDataError(
                    f"{path}, line {start}: a paragraph longer than {encoded.LARGEST >> 20} MB",
                    "paragraphs end at blank lines; where each line is a text of its own, say split: line",
                )
        elif paragraph:
            yield start, {"text": "\n".join(paragraph)}
            paragraph, size = [], 0
    if paragraph:
        yield start, {"text": "\n".join(paragraph)}


def _document(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    parts: list[str] = []
    size = 0
    for part in encoded.chunks(path):
        parts.append(part)
        size += len(part.encode())
        if size > encoded.LARGEST:
            raise BadDataError(
                f"{path}: longer than {encoded.LARGEST >> 20} MB, too long for one document",
                "say split: paragraph (separated by blank lines) or split: line",
            )
    text = "".join(parts).replace("\r\n", "\n")
    if text.strip():
        yield 1, {"text": text}


def _unended(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
