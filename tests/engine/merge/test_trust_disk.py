"""Disks that fill up, fail, cannot reserve space or cannot be written: clear errors, and nothing done is lost."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import atomic
from engine.errors import BadInputError, MedmergeError, NoSpaceError
from engine.jobs import EventWriter
from engine.merge import execute, schedule
from engine.merge.recipe import parse
from engine.weights.tensorfile import file_sha256
from tests.conftest import MakeAdapter


@pytest.fixture(scope="module")
def pt(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, seed=1, name="pt")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A real file system of so many kB, made or resized by calling it; skips where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(kilobytes: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={kilobytes}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small disk here: {done.stderr.decode().strip()}")
        mounted = True
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def merge(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Any]:
    document = {
        "base": str(base),
        "adapters": {"pt": {"path": str(adapter), "weight": 0.3}},
        "output": str(out),
    }
    return execute.merge(parse(document, "test", []), EventWriter(), verify=False, **options)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir() if path.name != "medmerge.json"}


@pytest.fixture(scope="module")
def whole(tiny_llama_sharded: Path, pt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same merge on a disk with room."""
    out = tmp_path_factory.mktemp("whole") / "m"
    merge(tiny_llama_sharded, pt, out)
    return out


@pytest.mark.parametrize("reserves", [True, False])
def test_a_merge_that_filled_the_disk_goes_on_when_there_is_room(
    tiny_llama_sharded: Path,
    pt: Path,
    whole: Path,
    disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    reserves: bool,
) -> None:
    place = disk(200)
    with pytest.raises(NoSpaceError, match="the merge needs") as caught:  # seen before
        merge(tiny_llama_sharded, pt, place / "m")
    assert caught.value.exit_code == 3 and not list(place.iterdir())
    monkeypatch.setattr(execute, "need_space", lambda *args: None)  # someone else fills it meanwhile
    if not reserves:
        monkeypatch.setattr(os, "posix_fallocate", no_fallocate(errno.EOPNOTSUPP))
    with pytest.raises(NoSpaceError, match=r"no room for .*\.safetensors") as caught:
        merge(tiny_llama_sharded, pt, place / "m")
    assert caught.value.exit_code == 3
    assert f"what is done is kept in {place / 'm.partial'}" in caught.value.hint
    assert [path.name for path in place.iterdir()] == ["m.partial"]
    disk(20_000)
    result = merge(tiny_llama_sharded, pt, place / "m")
    assert 0 < result["resumed_bytes"] < result["bytes_written"]
    assert contents(place / "m") == contents(whole)
    assert [path.name for path in place.iterdir()] == ["m"]


def test_a_disk_that_is_full_after_the_weights(
    tiny_llama_sharded: Path,
    pt: Path,
    whole: Path,
    disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All shards are written, the tokenizer finds no room: nothing is computed twice."""
    weights = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    place = disk(weights // 1024 + 40)
    monkeypatch.setattr(execute, "need_space", lambda *args: None)
    with pytest.raises(NoSpaceError, match="the disk filled up while writing") as caught:
        merge(tiny_llama_sharded, pt, place / "m")
    assert "is kept in" in str(caught.value) and not (place / "m").exists()
    disk(20_000)
    result = merge(tiny_llama_sharded, pt, place / "m")
    assert result["resumed_bytes"] == result["bytes_written"] == weights
    assert contents(place / "m") == contents(whole)


def no_fallocate(code: int) -> Callable[..., None]:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_that_cannot_reserve_space(
    tiny_llama_sharded: Path,
    pt: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_fallocate(code))
    merge(tiny_llama_sharded, pt, tmp_path / "m")
    assert contents(tmp_path / "m") == contents(whole)


def test_file_systems_without_locks_or_folder_sync(
    tiny_llama_sharded: Path, pt: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def files_only(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    monkeypatch.setattr(fcntl, "flock", no_fallocate(errno.ENOTSUP))
    merge(tiny_llama_sharded, pt, tmp_path / "m")
    assert contents(tmp_path / "m") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.EDQUOT, NoSpaceError), (errno.EIO, MedmergeError), (errno.ESTALE, MedmergeError)],
)
def test_a_write_that_fails_in_the_middle(
    tiny_llama_sharded: Path,
    pt: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[MedmergeError],
) -> None:
    real, written = os.pwrite, 0

    def failing(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 200_000:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, offset)

    monkeypatch.setattr(schedule, "BLOCK_ELEMENTS", 2048)
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(error, match=r"m(\.partial/model-.*)?\b") as caught:
        merge(tiny_llama_sharded, pt, tmp_path / "m", note_every=10_000)
    assert caught.value.exit_code == 3 and os.strerror(code) in caught.value.message
    assert f"{tmp_path / 'm.partial'}" in str(caught.value) and "goes on from there" in caught.value.hint
    monkeypatch.setattr(os, "pwrite", real)
    result = merge(tiny_llama_sharded, pt, tmp_path / "m", note_every=10_000)
    assert result["resumed_bytes"] > 100_000
    assert contents(tmp_path / "m") == contents(whole)


def test_an_output_folder_that_cannot_be_written(
    tiny_llama_sharded: Path, pt: Path, disk: Callable[[int], Path]
) -> None:
    place = disk(20_000)
    (place / "merges").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for out in (place / "m", place / "merges" / "m", place / "new" / "m"):
        with pytest.raises(BadInputError, match="Read-only file system") as caught:
            merge(tiny_llama_sharded, pt, out)
        assert str(out.parent) in caught.value.message and caught.value.hint


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path: Path) -> None:
    import json

    name = os.fsdecode(b"caf\xe9")
    atomic.write_json(tmp_path / "x.json", {"path": name})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"path": name}
