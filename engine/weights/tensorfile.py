"""Safetensors files by header: where every tensor lies, and blocks of its rows as float32.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data. Every field is checked before it is believed: what is
accepted here the `safetensors` library accepts too, and reads the same tensors from. This is the only code that
merge and verification share.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from engine.errors import BadTensorFileError

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
MAX_TEXT = 64 << 20  # bytes of a config or an index; the largest known index has 9 MB
_MAX_HEADER = 32 << 20  # bytes; the format allows 100 MB, and 90,000 tensors need 12
_MAX_MARKS = 4_000_000  # brackets, braces and commas in a header: what JSON costs in memory goes with them
_MAX_DIMENSIONS = 32
_MAX_NAME = 4096  # characters of a tensor's name
_MAX_SIZE = (1 << 63) - 1  # bytes and elements a file can hold at most
_DAMAGED = "it is truncated or damaged: download or copy it again"

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `start` is the absolute byte offset in `file`; `shape` is as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES

    @property
    def rows(self) -> int:
        """Rows when seen as a matrix: the product of all dimensions but the last (1 for a vector)."""
        return self.elements // self.columns if self.columns else 0

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file as its header says: tensors in the order of their data."""

    path: Path
    header: bytes  # the 8 length bytes and the JSON, exactly as stored
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    size: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header.

        Raises:
            BadTensorFileError: missing, truncated, not safetensors, a dtype or shape that does not fit its
                bytes, overlapping tensors or holes.
        """
        head, raw, size = _read_header(path)
        entries = _parse_header(path, raw)
        metadata = _metadata(path, entries.pop("__metadata__", None))
        data_start = len(head) + len(raw)
        tensors = [_tensor(path, name, entry, data_start, size) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
        position = data_start
        for tensor in tensors:
            if tensor.start != position:
                raise BadTensorFileError(
                    f"{path}: tensor {tensor.name!r} starts at byte {tensor.start}, expected {position}: "
                    "tensors overlap, or there is a hole between them",
                    _DAMAGED,
                )
            position += tensor.nbytes
        if position != size:
            raise BadTensorFileError(
                f"{path} should have {position} bytes by its header, and has {size}", _DAMAGED
            )
        return cls(path, head + raw, metadata, {tensor.name: tensor for tensor in tensors}, size)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file (or a link to one) for reading; raises OSError for anything else, and never waits.

    Opening a FIFO would wait for a writer, and reading a device may never end.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, "it is no regular file", str(path))
    return file


def read_regular(path: Path, most: int = MAX_TEXT) -> bytes:
    """A whole small file (a config, an index). Raises OSError: not a regular file, or more than `most` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(
            errno.EFBIG, f"it has more than {most} bytes, too many for what it should be", str(path)
        )
    return data


def _read_header(path: Path) -> tuple[bytes, bytes, int]:
    """(the 8 length bytes, the JSON, size of the file)."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little") if len(head) == 8 else -1
            if not 2 <= length <= size - 8:
                raise BadTensorFileError(
                    f"{path} is not a whole safetensors file ({size} bytes, header length {length})",
                    "it may be truncated, or a Git LFS pointer: download or copy it again",
                )
            if length > _MAX_HEADER:
                raise BadTensorFileError(
                    f"{path}: its header claims {length} bytes, and at most {_MAX_HEADER} are read",
                    "no model needs so many: this is no usable safetensors file",
                )
            return head, file.read(length), size
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise BadTensorFileError(f"cannot read {path}: {why}") from error


def _parse_header(path: Path, raw: bytes) -> dict[str, object]:
    marks = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    if marks > _MAX_MARKS:
        raise BadTensorFileError(
            f"{path}: its header holds {marks} JSON values, which no model needs", _DAMAGED
        )
    try:
        entries = json.loads(
            raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant
        )
        if isinstance(entries, dict):
            for name in entries:
                name.encode("utf-8")  # half a surrogate pair is no name
                if len(name) > _MAX_NAME:
                    raise ValueError(f"a name has {len(name)} characters")
    except (ValueError, RecursionError) as error:
        raise BadTensorFileError(f"{path}: its header is not usable JSON ({error})", _DAMAGED) from error
    if not isinstance(entries, dict):
        raise BadTensorFileError(f"{path}: its header is no JSON object", _DAMAGED)
    return entries


def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For `json.loads(object_pairs_hook=)`: ValueError for an object that holds a name twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the name {twice[:200]!r} is there twice")
    return found


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is no JSON")


def _metadata(path: Path, found: object) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise BadTensorFileError(f"{path}: __metadata__ should map names to texts", _DAMAGED)
    try:
        "".join([*found, *found.values()]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadTensorFileError(
            f"{path}: __metadata__ holds text that is none ({error})", _DAMAGED
        ) from error
    return found


def _tensor(path: Path, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadTensorFileError(
            f"{path}: the header entry of {name!r} is malformed: it should hold dtype, shape and data_offsets",
            _DAMAGED,
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise BadTensorFileError(
            f"{path}: the header entry of {name!r} is malformed: shape and data_offsets should be lists of sizes",
            _DAMAGED,
        )
    if not all(type(number) is int and 0 <= number <= _MAX_SIZE for number in (*shape, *offsets)):
        raise BadTensorFileError(
            f"{path}: the header entry of {name!r} holds numbers that are not sizes", _DAMAGED
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise BadTensorFileError(f"{path}: tensor {name!r} claims {len(shape)} dimensions", _DAMAGED)
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        said = repr(dtype[:40]) if isinstance(dtype, str) else f"a {type(dtype).__name__}"
        raise BadTensorFileError(f"{path}: tensor {name!r} has dtype {said}, which is not supported")
    begin, end = offsets
    if end - begin != _nbytes(shape, dtype) or data_start + end > size:
        raise BadTensorFileError(
            f"{path}: tensor {name!r} ({dtype} {shape}) does not fit its {end - begin} bytes or the file's {size}",
            _DAMAGED,
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _nbytes(shape: list[int], dtype: str) -> int:
    """Bytes of a tensor; -1 where a partial product leaves 63 bits (also when a 0 comes later)."""
    total = ITEM_SIZE[dtype]
    for dimension in shape:
        total *= dimension
        if total > _MAX_SIZE:
            return -1
    return total


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length bytes and JSON header of a new file holding (name, dtype, shape) in this order, no holes.

    Padded with spaces to a multiple of 8 bytes, as the format's own writer does.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEM_SIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_bytes(tensor: TensorInfo, offset: int = 0, count: int | None = None) -> bytes:
    """`count` bytes of the tensor's data from byte `offset` of it (all of it by default)."""
    count = tensor.nbytes - offset if count is None else count
    with tensor.file.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), count, tensor.start + offset)
        while len(data) < count:  # pread returns at most 2 GiB at once
            more = os.pread(file.fileno(), count - len(data), tensor.start + offset + len(data))
            if not more:
                raise BadTensorFileError(
                    f"{tensor.file} ended inside tensor {tensor.name}", "it is truncated"
                )
            data += more
    return data


def read_rows(tensor: TensorInfo, first: int = 0, count: int | None = None) -> Float32Array:
    """Rows `first : first + count` as float32, shape (count, columns); exact for F32, F16 and BF16.

    A tensor of more than two dimensions is seen as the matrix (product of leading dimensions, last one).
    """
    count = tensor.rows - first if count is None else count
    row_bytes = tensor.columns * ITEM_SIZE[tensor.dtype]
    return widen(read_bytes(tensor, first * row_bytes, count * row_bytes), tensor.dtype).reshape(
        count, tensor.columns
    )


def widen(data: bytes | memoryview, dtype: str) -> Float32Array:
    """Bytes of a float dtype as a flat float32 array (BF16 by shifting 16 bits; F64 is rounded)."""
    if dtype == "BF16":
        wide = np.frombuffer(data, dtype="<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    if dtype not in kinds:
        raise BadTensorFileError(f"dtype {dtype} holds no weights that can be merged")
    return np.frombuffer(data, dtype=kinds[dtype]).astype(np.float32)


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, as 64 hex digits, read in 4 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
