"""GGUF files by header: metadata, and where every tensor's bytes lie. Used to verify files, also other tools'.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, typed key/value
pairs, tensor infos (dimensions from the fastest to the slowest), padding, data. Every length is checked against
the file before it is believed. Written apart from the `gguf` package's reader, which keeps a numpy view for every
token of the vocabulary (hundreds of MB for a large one).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import BadTensorFileError

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_TENSORS = 1_000_000
_MAX_KEYS = 100_000
_MAX_ITEMS = 50_000_000  # of one array


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. `shape` is row-major, as in a checkpoint (llama.cpp lists it reversed); `type` as "Q4_K"."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    start: int  # absolute byte offset
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return self.elements // self.columns

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


@dataclass(frozen=True)
class GgufFile:
    """A GGUF by its header. `metadata` values are numbers, text, or lists of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    size: int

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read and check the header.

        Raises BadTensorFileError: missing, not a GGUF, a version or type that is not known, a key or tensor
        twice, lengths or offsets that do not fit the file.
        """
        if not path.is_file():
            raise BadTensorFileError(f"{path} is not a file", "give a .gguf file")
        try:
            with path.open("rb") as file:
                return _Header(path, file, os.fstat(file.fileno()).st_size).read()
        except OSError as error:
            raise BadTensorFileError(f"cannot read {path}: {error.strerror}") from error


class _Header:
    """A cursor over the header that never reads past the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def read(self) -> GgufFile:
        if self.size < 24 or self._take(4) != b"GGUF":
            raise self._broken("it does not start with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._broken(f"its version is {version}, and versions 2 and 3 (little-endian) are read")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        if tensor_count > _MAX_TENSORS or key_count > _MAX_KEYS:
            raise self._broken(f"it claims {tensor_count} tensors and {key_count} keys")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._text()
            if key in metadata:
                raise self._broken(f"the key {key!r:.80} is there twice")
            metadata[key] = self._value(self._number("I"), nested=False)
        infos = [self._info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment is {alignment!r}, expected a power of two")
        data = -(-self.file.tell() // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._broken(f"the tensor {name!r:.80} is there twice")
            tensors[name] = self._place(name, shape, kind, data + offset, alignment)
        self._check_overlap(list(tensors.values()))
        return GgufFile(self.path, metadata, tensors, self.size)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._broken(f"tensor {name!r:.80} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        return name, shape, self._number("I"), self._number("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int, alignment: int) -> GgufTensor:
        import gguf

        try:
            type_ = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise self._broken(f"tensor {name!r:.80} has the unknown type {kind}") from None
        block, size = gguf.GGML_QUANT_SIZES[type_]
        elements = math.prod(shape)
        if elements == 0 or shape[-1] % block or start % alignment:
            raise self._broken(
                f"tensor {name!r:.80} ({type_.name} {list(shape)} at byte {start}) is malformed"
            )
        nbytes = elements // block * size
        if start + nbytes > self.size:
            raise self._broken(
                f"tensor {name!r:.80} ends at byte {start + nbytes}, and the file has {self.size}"
            )
        return GgufTensor(name, str(type_.name), shape, self.path, start, nbytes)

    def _check_overlap(self, tensors: list[GgufTensor]) -> None:
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            if tensor.start < end:
                raise self._broken(f"tensor {tensor.name!r:.80} overlaps the one before it")
            end = tensor.start + tensor.nbytes

    def _value(self, kind: int, nested: bool) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY or nested:
            raise self._broken(f"a value has the unknown type {kind}")
        item, count = self._number("I"), self._number("Q")
        if count > _MAX_ITEMS:
            raise self._broken(f"an array claims {count} items")
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(size * count)))
        if count * 8 > self.size:
            raise self._broken(f"an array claims {count} texts")
        return [self._value(item, nested=True) for _ in range(count)]

    def _text(self) -> str:
        # Vocabularies of some tools hold bytes that are no UTF-8; they are kept, and never shown raw.
        return self._take(self._number("Q")).decode("utf-8", "surrogateescape")

    def _number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self._take(size))[0]

    def _take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self._broken(f"its header asks for {count} bytes that are not there")
        return self.file.read(count)

    def _broken(self, why: str) -> BadTensorFileError:
        return BadTensorFileError(
            f"{self.path} is not a usable GGUF file: {why}", "it may be truncated: download or make it again"
        )


def read_raw(tensor: GgufTensor, first: int, count: int) -> bytes:
    """The stored bytes of rows `first : first + count`. Raises BadTensorFileError when the file shrank."""
    wanted = count * tensor.row_bytes
    with tensor.file.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), wanted, tensor.start + first * tensor.row_bytes)
    if len(data) < wanted:
        raise BadTensorFileError(f"{tensor.file} ended inside tensor {tensor.name}", "it is truncated")
    return data
