"""Files made to mislead: whatever our reader accepts, the `safetensors` library accepts with the same tensors;
all else is refused by a typed error, quickly, in little memory, and before anything is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadModelError, BadTensorFileError, MedmergeError
from engine.weights import Checkpoint
from engine.weights.tensorfile import TensorFile, encode_header, read_bytes
from tests.engine.weights.test_tensorfile import json_values, likely

ROOT = Path(__file__).resolve().parents[3]
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, header: object, data: bytes = b"\0" * 4) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def library_reads(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """name -> (dtype, shape, bytes) as the safetensors library reads it, None when it refuses."""
    from safetensors import SafetensorError, deserialize

    try:
        return {name: (e["dtype"], list(e["shape"]), bytes(e["data"])) for name, e in deserialize(content)}
    except SafetensorError:
        return None


def agrees_with_the_library(path: Path) -> bool:
    """Whether our reader accepts the file; then the library must, too, and see the same tensors and bytes."""
    try:
        file = TensorFile.open(path)
    except BadTensorFileError as error:
        assert str(path) in error.message
        return False
    ours = {name: (info.dtype, list(info.shape), read_bytes(info)) for name, info in file.tensors.items()}
    assert library_reads(path.read_bytes()) == ours
    return True


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', "NaN"),
        (
            b'{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
            "Infinity",
        ),
        ({"w": {**F32, "shape": [1.0]}}, "not sizes"),
        ({"w": {**F32, "shape": {}}}, "lists of sizes"),
        ({"w": {**F32, "data_offsets": "04"}}, "lists of sizes"),
        ({"w": {**F32, "data_offsets": [0, 4, 8]}}, "lists of sizes"),
        ({"w": {**F32, "data_offsets": [4, 0]}}, "does not fit"),
        ({"w": {**F32, "data_offsets": [0, True]}}, "not sizes"),
        ({"w": {**F32, "data_offsets": [0, 2**64]}}, "not sizes"),
        ({"w": {**F32, "shape": [2**62, 2**62], "data_offsets": [0, 0]}}, "does not fit"),
        ({"w": {**F32, "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, "does not fit"),
        ({"w": {**F32, "shape": [1] * 33}}, "33 dimensions"),
        ({"w": {**F32, "dtype": "f32"}}, "not supported"),
        ({"w": {**F32, "dtype": "F64"}}, "does not fit"),  # a lie about the dtype
        ({"w": {**F32, "dtype": "BF16"}}, "does not fit"),
        ({"w": {**F32, "dtype": None}}, "not supported"),
        ({"w": {**F32, "scale": 2}}, "malformed"),  # a field that may mean something
        ({"w": F32, "__metadata__": []}, "map names to texts"),
        ({"w": F32, "__metadata__": {"format": 1}}, "map names to texts"),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "not usable JSON"),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"a":"\\udfff"}}', "none"),
        (b'{"w":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', "twice"),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0', "not usable JSON"),
        (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', "not usable JSON"),
        (b'{"w":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "not usable JSON"),
        (json.dumps({"w" * 5000: F32}).encode(), "5000 characters"),
    ],
)
def test_lies_are_refused_by_name(tmp_path: Path, header: object, says: str) -> None:
    path = write(tmp_path / "lie.safetensors", header)
    with pytest.raises(BadTensorFileError, match=says) as caught:
        TensorFile.open(path)
    assert str(path) in caught.value.message and len(str(caught.value)) < 1000


@pytest.mark.parametrize("order", [1, -1])
def test_empty_tensors_are_read_wherever_they_stand(tmp_path: Path, order: int) -> None:
    entries = {
        "first": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]},
        "w": F32,
        "huge but empty": {"dtype": "BF16", "shape": [0, 2**40], "data_offsets": [4, 4]},
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [4, 12]},
        "last": {"dtype": "U8", "shape": [3, 0], "data_offsets": [12, 12]},
    }
    path = write(tmp_path / "x.safetensors", dict(list(entries.items())[::order]), b"\1" * 12)
    assert agrees_with_the_library(path)


# --- mutations of valid files -------------------------------------------------------------------------------

VALID: list[tuple[str, str, tuple[int, ...]]] = [
    ("model.layers.0.q.weight", "F32", (2, 3)), ("model.layers.0.k.weight", "BF16", (4, 1)),
    ("empty", "F16", (0, 3)), ("scalar", "I64", ()), ("flags", "BOOL", (5,)),
]  # fmt: skip
WHOLE = encode_header(VALID, {"format": "pt"})
WHOLE += bytes(range(24)) + bytes(range(8)) + bytes(range(8)) + b"\1\0\1\0\1"
HEADER_END = len(encode_header(VALID, {"format": "pt"}))
TOKENS = [b"-", b"0", b"9", b"99999999999999999999", b"true", b"null", b"NaN", b'"', b"{", b"}", b"[", b"]", b",",
          b":", b"\\", b"\\ud800", b"\xff", b"\0", b"1e3", b".5", b'"w"', b"data_offsets", b"F64", b" "]  # fmt: skip

cuts = st.tuples(st.just("cut"), st.integers(0, len(WHOLE)))
flips = st.tuples(st.just("flip"), st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
inserts = st.tuples(st.just("insert"), st.integers(8, HEADER_END), st.sampled_from(TOKENS), st.booleans())
lengths = st.tuples(st.just("length"), st.integers(-9, 9) | st.integers(0, 2**64 - 1))


def mutate(content: bytes, change: tuple[Any, ...]) -> bytes:
    match change:
        case ("cut", at):
            return content[:at]
        case ("flip", at, bits) if at < len(content):
            return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]
        case ("insert", at, token, keep_length):
            longer = content[:at] + token + content[at:]
            length = int.from_bytes(longer[:8], "little") + (len(token) if keep_length else 0)
            return (length % 2**64).to_bytes(8, "little") + longer[8:]
        case ("length", by):
            length = (int.from_bytes(content[:8], "little") + by) % 2**64 if abs(by) < 10 else by
            return length.to_bytes(8, "little") + content[8:]
    return content


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(cuts | flips | inserts | lengths, min_size=1, max_size=3))
def test_mutated_files_are_refused_or_read_as_the_library_reads_them(
    tmp_path: Path, changes: list[tuple[Any, ...]]
) -> None:
    content = WHOLE
    for change in changes:
        content = mutate(content, change)
    (tmp_path / "m.safetensors").write_bytes(content)
    agrees_with_the_library(tmp_path / "m.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_entries_are_refused_or_read_as_the_library_reads_them(
    tmp_path: Path, data: st.DataObject
) -> None:
    """One value of a valid header is replaced, moved, or left out; the JSON stays JSON."""
    header = json.loads(WHOLE[8:HEADER_END])
    entry = header[data.draw(st.sampled_from(sorted(header)))]
    key = data.draw(st.sampled_from(sorted(entry)))
    sizes = st.lists(st.integers(-1, 9) | st.sampled_from([24, 32, 40, 2**31, 2**63, 2**64]), max_size=4)
    entry[key] = data.draw(sizes | st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4"]) | json_values)
    if data.draw(st.booleans()):
        entry.pop(data.draw(st.sampled_from(sorted(entry))))
    agrees_with_the_library(write(tmp_path / "m.safetensors", header, WHOLE[HEADER_END:]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=likely | json_values, data=st.binary(max_size=40))
def test_any_json_is_refused_or_read_as_the_library_reads_it(
    tmp_path: Path, header: object, data: bytes
) -> None:
    agrees_with_the_library(write(tmp_path / "m.safetensors", header, data))


def test_the_unchanged_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(WHOLE)
    assert agrees_with_the_library(tmp_path / "m.safetensors")


# --- memory and time ----------------------------------------------------------------------------------------

MEASURE = """
    import resource, sys, time
    from pathlib import Path
    from engine.errors import BadTensorFileError
    from engine.weights import TensorFile
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        TensorFile.open(Path(sys.argv[1]))
        sys.exit("accepted")
    except BadTensorFileError:
        pass
    print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "raw",
    [
        b'{"w":[' + b"[]," * 8_000_000 + b"0]}",
        b'{"w":[' + b"{}," * 8_000_000 + b"0]}",
        b'{"w":' + b"[" * 30_000_000 + b"}",
        b'{"' + b"\\u00e9" * 5_000_000 + b'":1}',
        b'{"w":{"dtype":"F32","shape":[' + b"9223372036854775807," * 1_000_000 + b'1],"data_offsets":[0,4]}}',
    ],
    ids=["lists", "objects", "depth", "name", "product"],
)
def test_huge_headers_cost_little(tmp_path: Path, raw: bytes) -> None:
    path = write(tmp_path / "huge.safetensors", raw)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 5 and kilobytes < 400_000, (seconds, kilobytes)


def test_a_header_longer_than_we_read_is_refused_by_its_length(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:  # 90 MB that take no room
        file.write((80 << 20).to_bytes(8, "little"))
        file.truncate(90 << 20)
    with pytest.raises(BadTensorFileError, match="at most 33554432 are read"):
        TensorFile.open(path)


# --- model folders ------------------------------------------------------------------------------------------


def within(seconds: float, call: Callable[[], object]) -> BaseException | None:
    """What `call` raises; fails when it does not come back (a daemon thread, so a hang cannot stop the tests)."""
    raised: list[BaseException | None] = []

    def work() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return raised[0]


@pytest.mark.parametrize(
    "name", ["model-00001-of-00006.safetensors", "config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop", "dangling"])
def test_special_files_are_refused_and_never_waited_for(
    tiny_llama_sharded: Path, tmp_path: Path, name: str, kind: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama_sharded, folder)
    path = folder / name
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
    error = within(20, lambda: Checkpoint.open(folder))
    assert isinstance(error, MedmergeError) and str(folder) in error.message
    if name.endswith(".safetensors"):
        error = within(20, lambda: TensorFile.open(path))
        assert isinstance(error, BadTensorFileError) and str(path) in error.message


def with_index(source: Path, folder: Path, weight_map: object, raw: str | None = None) -> Path:
    shutil.copytree(source, folder)
    (folder / "model.safetensors.index.json").write_text(raw or json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "a/../model-00001-of-00006.safetensors", "..", ".", "", "x" * 300,
     "x" * 300 + ".safetensors", "nul\0.safetensors", ".hidden.safetensors", "medmerge.json", "config.json",
     "\ud800.safetensors", 3, None, [], {}, True],
)  # fmt: skip
def test_shard_names_cannot_leave_the_folder_nor_take_other_names(
    tiny_llama_sharded: Path, tmp_path: Path, file: object
) -> None:
    (tmp_path / "outside.safetensors").write_bytes(WHOLE)
    folder = with_index(tiny_llama_sharded, tmp_path / "m", {"model.norm.weight": file})
    shutil.copyfile(folder / "model-00001-of-00006.safetensors", folder / ".hidden.safetensors")
    shutil.copyfile(folder / "model-00001-of-00006.safetensors", folder / "medmerge.json")
    with pytest.raises(BadModelError, match=r"index\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "raw",
    ['{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', '{"weight_map": []}', "[]", "{}", "",
     '{"weight_map": {}}', "[" * 100_000, '{"weight_map": ' + '{"a":' * 100_000, "\0", "NaN"],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(tiny_llama_sharded: Path, tmp_path: Path, raw: str) -> None:
    with pytest.raises(BadModelError, match=r"index\.json"):
        Checkpoint.open(with_index(tiny_llama_sharded, tmp_path / "m", None, raw))


def test_a_config_too_large_to_be_one_is_not_read_into_memory(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    with (tmp_path / "m" / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadModelError, match="too many"):
        Checkpoint.open(tmp_path / "m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.binary(max_size=30) | json_values.map(lambda value: json.dumps(value).encode()),
    index=st.none()
    | st.binary(max_size=30)
    | st.dictionaries(
        st.sampled_from(["w", "v"]),
        st.sampled_from(["a.safetensors", "b.safetensors", "c", "../a.safetensors"]),
    ).map(lambda names: json.dumps({"weight_map": names}).encode()),
    header=likely,
)
def test_any_folder_is_opened_or_refused_by_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, config: bytes, index: bytes | None, header: object
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_bytes(config)
    for name in ("a", "b", "model"):
        write(folder / f"{name}.safetensors", header if name == "a" else {"v": F32})
    if index is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)
    try:
        opened = Checkpoint.open(folder)
    except MedmergeError as error:
        assert str(folder) in error.message
    else:
        assert opened.tensors and opened.layers >= 0 and isinstance(opened.architecture, str)
        assert opened.dtype in ("F32", "BF16") and isinstance(opened.tied, bool) and opened.name
        assert opened.parameters == sum(np.prod(t.shape, dtype=int) for t in opened.tensors.values())
    shutil.rmtree(folder)
