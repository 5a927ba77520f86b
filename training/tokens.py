"""Encoded documents on disk: token ids and which of them carry loss, read as memory maps.

Written once a run by `training.prepare`, so that a corpus of any size is encoded in one pass and never sits in
memory; kept in the run folder until the run is done, so that a resumed run does not encode again.

    ids.u32      token ids of all documents, one after the other (uint32, little endian)
    trained.u8   1 where the token carries loss, else 0
    lengths.u32  tokens of each document
    loss.u32     tokens of each document that carry loss
    keys.b16     16 bytes a document: the hash of its content (equal contents have equal keys)
    copies.u16   how often an epoch uses it
    tokens.json  what it was made from; written last, so that a half-made folder is not taken for a whole one
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from engine.atomic import fsync_path, write_json
from training.masking import IGNORE, Encoded

NOTE = "tokens.json"
KEY_BYTES = 16
FLUSH_TOKENS = 1 << 20


class TokenWriter:
    """Appends documents to a new store; whole only after `finish`. As a context it removes what an error left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._files = {name: (folder / name).open("wb") for name in _FILES}
        self._ids: list[int] = []
        self._trained: list[bool] = []

    def add(self, document: Encoded, key: bytes, copies: int = 1) -> None:
        """One document; a copy count of 0 keeps it out of training (not out of the store)."""
        self._ids += document.ids
        self._trained += [label != IGNORE for label in document.labels]
        self._files["lengths.u32"].write(np.uint32(len(document.ids)).tobytes())
        self._files["loss.u32"].write(np.uint32(document.trained).tobytes())
        self._files["keys.b16"].write(key[:KEY_BYTES])
        self._files["copies.u16"].write(np.uint16(copies).tobytes())
        if len(self._ids) >= FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        self._files["ids.u32"].write(np.asarray(self._ids, dtype="<u4").tobytes())
        self._files["trained.u8"].write(np.asarray(self._trained, dtype=np.uint8).tobytes())
        self._ids, self._trained = [], []

    def finish(self, note: dict[str, Any]) -> TokenStore:
        """Write everything and the note; the store, opened."""
        self._flush()
        self._close()
        for name in _FILES:
            fsync_path(self.folder / name)
        write_json(self.folder / NOTE, note)
        return TokenStore(self.folder)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


_FILES = ("ids.u32", "trained.u8", "lengths.u32", "loss.u32", "keys.b16", "copies.u16")


class TokenStore(Sequence[Encoded]):
    """The documents of a finished store, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        self.lengths = np.fromfile(folder / "lengths.u32", dtype="<u4").astype(np.int64)
        self.loss = np.fromfile(folder / "loss.u32", dtype="<u4").astype(np.int64)
        self.copies = np.fromfile(folder / "copies.u16", dtype="<u2").astype(np.int64)
        self.keys = np.fromfile(folder / "keys.b16", dtype=f"V{KEY_BYTES}")
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._ids = _map(folder / "ids.u32", "<u4")
        self._trained = _map(folder / "trained.u8", "u1")
        if not len(self._ids) == len(self._trained) == int(self._starts[-1]):
            raise ValueError(f"{folder} is torn: its files differ in length")

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, document: int, start: int, end: int) -> Encoded:
        """Tokens start..end of a document, with their labels."""
        first = int(self._starts[document])
        ids = self._ids[first + start : first + end].astype(np.int64)
        labels = np.where(self._trained[first + start : first + end] != 0, ids, IGNORE)
        return Encoded(ids.tolist(), labels.tolist())


def _map(path: Path, dtype: str) -> np.ndarray:
    """A read-only memory map; an empty file cannot be mapped and is an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def open_store(folder: Path, note: dict[str, Any]) -> TokenStore | None:
    """The store in `folder` if it is whole and was made from what `note` says, else None."""
    try:
        store = TokenStore(folder)
    except (OSError, ValueError, TypeError):
        return None
    return store if {key: store.note.get(key) for key in note} == note else None
