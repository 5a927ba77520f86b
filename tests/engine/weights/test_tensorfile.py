"""The safetensors reader against the `safetensors` library, and against files that are wrong in every way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadTensorFileError
from engine.weights.tensorfile import (
    ITEM_SIZE,
    TensorFile,
    encode_header,
    file_sha256,
    read_bytes,
    read_rows,
)

F32_2X3 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with this header, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(5, 7).to(torch.bfloat16),
        "b": torch.randn(4, 3, 2).to(torch.float16),
        "c": torch.randn(11),
        "d": torch.randn(3, 4, dtype=torch.float64).float().double(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile.open(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert info.shape == tuple(tensor.shape)
        expected = tensor.float().numpy().reshape(info.rows, info.columns)
        np.testing.assert_array_equal(read_rows(info), expected)
    np.testing.assert_array_equal(
        read_rows(file.tensors["b"], 3, 5), tensors["b"].float().numpy().reshape(12, 2)[3:8]
    )
    assert read_bytes(file.tensors["c"], 4, 8) == tensors["c"].numpy().tobytes()[4:12]


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"w": F32_2X3}, b"\0" * 23, "does not fit"),  # truncated
        ({"w": F32_2X3}, b"\0" * 25, "should have"),  # something behind the data
        ({"w": {**F32_2X3, "shape": [2, 4]}}, b"\0" * 24, "does not fit"),
        ({"w": {**F32_2X3, "dtype": "F4"}}, b"\0" * 24, "not supported"),
        ({"w": {**F32_2X3, "dtype": ["F32"]}}, b"\0" * 24, "not supported"),
        ({"w": {**F32_2X3, "shape": [-2, -3]}}, b"\0" * 24, "not sizes"),
        ({"w": {**F32_2X3, "shape": [True, 6]}}, b"\0" * 24, "not sizes"),
        ({"w": {**F32_2X3, "shape": "23"}}, b"\0" * 24, "lists of sizes"),
        ({"w": {"dtype": "F32", "shape": [6]}}, b"\0" * 24, "malformed"),
        ({"w": [1, 2]}, b"\0" * 24, "malformed"),
        ({"w": F32_2X3, "v": F32_2X3}, b"\0" * 24, "starts at byte"),  # overlapping
        ({"w": {**F32_2X3, "data_offsets": [4, 28]}}, b"\0" * 28, "starts at byte"),  # a hole
        ([1, 2, 3], b"", "no JSON object"),
        (b"{not json", b"", "not usable JSON"),
        (b"\xff\xfe{}", b"", "not usable JSON"),
        (b"[" * 200_000, b"", "not usable JSON"),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{}}', b"\0" * 4, "twice"),
    ],
)
def test_refuses_wrong_files_by_name(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    path = write(tmp_path / "wrong.safetensors", header, data)
    with pytest.raises(BadTensorFileError, match=says) as caught:
        TensorFile.open(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 8, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_refuses_what_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pointer.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadTensorFileError, match="not a whole safetensors file"):
        TensorFile.open(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(BadTensorFileError, match="cannot read"):
            TensorFile.open(path)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": F32_2X3}, b"\0" * 24)
    info = TensorFile.open(path).tensors["w"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadTensorFileError, match="truncated"):
        read_rows(info)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 2_000_000)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 2_000_000).hexdigest()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda n: n != "__metadata__"
)
entries = st.lists(
    st.tuples(names, st.sampled_from(sorted(ITEM_SIZE)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=6,
    unique_by=lambda entry: entry[0],
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=entries)
def test_encoded_headers_read_back(tmp_path: Path, entries: list[tuple[str, str, tuple[int, ...]]]) -> None:
    header = encode_header(entries, {"format": "pt"})
    size = sum(int(np.prod(shape, dtype=int)) * ITEM_SIZE[dtype] for _, dtype, shape in entries)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(size))
    file = TensorFile.open(path)
    assert file.header == header and len(header) % 8 == 0
    assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
        name: (dtype, shape) for name, dtype, shape in entries
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
likely = st.dictionaries(
    st.sampled_from(["w", "v", "__metadata__"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "X"]) | json_values,
            "shape": st.lists(st.integers(-1, 3), max_size=3) | json_values,
            "data_offsets": st.lists(st.integers(-4, 40), min_size=2, max_size=2) | json_values,
        }
    )
    | json_values,
    max_size=3,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=likely | json_values, data=st.binary(max_size=40))
def test_any_header_is_read_or_refused_by_a_typed_error(tmp_path: Path, header: object, data: bytes) -> None:
    path = write(tmp_path / "fuzz.safetensors", header, data)
    try:
        file = TensorFile.open(path)
    except BadTensorFileError:
        return
    position = len(file.header)
    for info in file.tensors.values():  # accepted: the tensors tile the file exactly
        assert info.start == position and info.nbytes == info.elements * ITEM_SIZE[info.dtype]
        position += info.nbytes
    assert position == path.stat().st_size


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), claim=st.integers(0, 2**64 - 1) | st.integers(0, 90))
def test_any_bytes_are_read_or_refused_by_a_typed_error(tmp_path: Path, content: bytes, claim: int) -> None:
    path = tmp_path / "bytes.safetensors"
    path.write_bytes(claim.to_bytes(8, "little") + content)
    try:
        TensorFile.open(path)
    except BadTensorFileError as error:
        assert str(path) in error.message
