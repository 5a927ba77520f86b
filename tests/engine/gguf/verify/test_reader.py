"""The GGUF header reader against the gguf package's, and against files made to mislead it."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadTensorFileError
from engine.gguf.blocks import dequantise
from engine.gguf.reader import GgufFile, read_raw
from tests.engine.gguf.conftest import Family, to_gguf


@pytest.fixture(scope="module")
def file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(tiny_llama, tmp_path_factory.mktemp("reader") / "m.gguf", "q8_0")


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "f16"])
def test_it_reads_what_the_gguf_package_reads(families: dict[str, Family], tmp_path: Path, kind: str) -> None:
    from gguf import GGUFReader, dequantize

    path = to_gguf(families["llama"].base, tmp_path / "m.gguf", kind)
    ours, theirs = GgufFile.open(path), GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, value in fields.items():
        found = ours.metadata[key]
        assert (list(value) if isinstance(value, list | np.ndarray) else value) == found, key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert own.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (own.start, own.nbytes) == (tensor.data_offset, tensor.n_bytes)
        right = dequantize(tensor.data, tensor.tensor_type).reshape(own.rows, own.columns)
        raw = np.frombuffer(read_raw(own, 0, own.rows), np.uint8)
        assert np.array_equal(dequantise(raw, own.type).reshape(right.shape), right)
        last = np.frombuffer(read_raw(own, own.rows - 1, 1), np.uint8)
        assert np.array_equal(dequantise(last, own.type), right[-1])


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _file(keys: bytes = b"", count: int = 0, tensors: bytes = b"", infos: int = 0, data: int = 64) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, infos, count) + keys + tensors
    return header + bytes(-len(header) % 32) + bytes(data)


def _info(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not start"),
    "not a GGUF": (b"PK" * 40, "does not start"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(64), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "version is"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64), "claims"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(64), "claims"),
    "a long text": (_file(struct.pack("<Q", 2**62), 1), "not there"),
    "a key twice": (_file((_text("a") + struct.pack("<II", 4, 1)) * 2, 2), "twice"),
    "a strange value": (_file(_text("a") + struct.pack("<I", 77), 1), "unknown type"),
    "an array of arrays": (_file(_text("a") + struct.pack("<IIQ", 9, 9, 1), 1), "unknown type"),
    "a huge array": (_file(_text("a") + struct.pack("<IIQ", 9, 4, 2**40), 1), "items"),
    "a huge array of texts": (_file(_text("a") + struct.pack("<IIQ", 9, 8, 10**6), 1), "claims"),
    "alignment 3": (_file(_text("general.alignment") + struct.pack("<II", 4, 3), 1), "alignment"),
    "a tensor twice": (_file(tensors=_info("x", [4]) * 2, infos=2), "twice"),
    "no dimensions": (_file(tensors=_info("x", []), infos=1), "dimensions"),
    "type 999": (_file(tensors=_info("x", [4], 999), infos=1), "unknown type 999"),
    "half a block": (_file(tensors=_info("x", [33], 8), infos=1), "malformed"),
    "no elements": (_file(tensors=_info("x", [0, 4]), infos=1), "malformed"),
    "an odd offset": (_file(tensors=_info("x", [4], 0, 5), infos=1), "malformed"),
    "beyond the end": (_file(tensors=_info("x", [4, 2**50]), infos=1), "ends at byte"),
    "overlapping": (_file(tensors=_info("x", [16]) + _info("y", [4], 0, 32), infos=2), "overlaps"),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_made_to_mislead(tmp_path: Path, what: str) -> None:
    raw, says = WRONG[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(BadTensorFileError, match=says):
        GgufFile.open(path)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(BadTensorFileError, match="not a file"):
            GgufFile.open(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=8)), max_size=4),
       cut=st.none() | st.integers(0, 30_000))  # fmt: skip
def test_any_damage_is_refused_or_read(file: Path, tmp_path: Path, changes: Any, cut: int | None) -> None:
    """Whatever is changed, the reader raises BadTensorFileError or gives tensors inside the file, quickly."""
    raw = bytearray(file.read_bytes())
    for place, data in changes:
        raw[place : place + len(data)] = data
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw[:cut])
    started = time.process_time()
    try:
        found = GgufFile.open(path)
    except BadTensorFileError as error:
        assert str(path) in error.message
    else:
        assert all(t.start + t.nbytes <= path.stat().st_size for t in found.tensors.values())
    assert time.process_time() - started < 2
