"""Safetensors files by header: where every tensor lies, and blocks of its rows as float32.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data. Every field is checked before it is believed. This is
the only code that merge and verification share.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import BadTensorFileError

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit

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
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(8)
                length = int.from_bytes(head, "little") if len(head) == 8 else -1
                if not 2 <= length <= min(_MAX_HEADER, size - 8):
                    raise BadTensorFileError(
                        f"{path} is not a whole safetensors file ({size} bytes, header length {length})",
                        "it may be truncated, or a Git LFS pointer: download or copy it again",
                    )
                raw = file.read(length)
        except OSError as error:
            raise BadTensorFileError(f"cannot read {path}: {error.strerror}") from error
        entries = _parse_header(path, raw)
        metadata = entries.pop("__metadata__", {})
        tensors = [_tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
        position = 8 + length
        for tensor in tensors:
            if tensor.start != position:
                raise BadTensorFileError(
                    f"{path}: tensor {tensor.name} starts at byte {tensor.start}, expected {position}"
                )
            position += tensor.nbytes
        if position != size:
            raise BadTensorFileError(
                f"{path} should have {position} bytes by its header, and has {size}",
                "it is truncated or damaged: download or copy it again",
            )
        clean = {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
        return cls(path, head + raw, clean, {tensor.name: tensor for tensor in tensors}, size)


def _parse_header(path: Path, raw: bytes) -> dict[str, object]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadTensorFileError(
            f"{path}: its header is not usable JSON ({error})", "download or copy it again"
        ) from error
    if not isinstance(entries, dict):
        raise BadTensorFileError(f"{path}: its header is no JSON object", "download or copy it again")
    return entries


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensor(path: Path, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
    try:
        if not isinstance(entry, dict):
            raise TypeError
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers_ok = all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadTensorFileError(f"{path}: the header entry of {name!r} is malformed") from error
    if not numbers_ok:
        raise BadTensorFileError(f"{path}: the header entry of {name!r} holds numbers that are not sizes")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise BadTensorFileError(f"{path}: tensor {name} has dtype {dtype!r}, which is not supported")
    if end - begin != math.prod(shape) * ITEM_SIZE[dtype] or data_start + end > size:
        raise BadTensorFileError(
            f"{path}: tensor {name} ({dtype} {list(shape)}) does not fit its {end - begin} bytes or the file's {size}",
            "the file is truncated or damaged: download or copy it again",
        )
    return TensorInfo(name, dtype, shape, path, data_start + begin, end - begin)


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
