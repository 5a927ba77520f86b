"""The journal of a merge: what it says after any end of the process that wrote it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.atomic import JOURNAL, worth_resuming
from engine.merge.journal import FileHashes, Journal, fingerprint

PRINT = "f" * 64
DATA = bytes(range(256)) * 40  # 10,240 bytes


def write(folder: Path, name: str = "a.safetensors", size: int = len(DATA)) -> None:
    (folder / name).write_bytes(DATA[:size])


def filled(folder: Path) -> None:
    """A journal with one finished shard and one of which 8,000 bytes are noted (and more are written)."""
    folder.mkdir()
    with Journal.start(folder, PRINT, every=1000) as journal:
        write(folder, "a.safetensors")
        journal.finish(FileHashes("a.safetensors", "source", "target"))
        write(folder, "b.safetensors", 9000)
        for done in (4000, 8000):
            assert journal.note("b.safetensors", done, hashlib.sha256(DATA[:done]))


def test_what_was_noted_is_found_again(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text("made again in no time")
    (tmp_path / "p" / "folder").mkdir()
    with Journal.start(tmp_path / "p", PRINT) as journal:
        assert journal.finished("a.safetensors") == FileHashes("a.safetensors", "source", "target")
        assert journal.finished("b.safetensors") is None and journal.finished("c.safetensors") is None
        done, digest = journal.resume("b.safetensors")
        assert done == 8000 == journal.prefix("b.safetensors")
        digest.update(DATA[8000:9000])
        assert digest.digest() == hashlib.sha256(DATA[:9000]).digest()
        assert journal.prefix("c.safetensors") == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        JOURNAL, "a.safetensors", "b.safetensors",
    ]  # fmt: skip


def test_another_fingerprint_empties_the_folder(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    with Journal.start(tmp_path / "p", "0" * 64) as journal:
        assert journal.finished("a.safetensors") is None and journal.prefix("b.safetensors") == 0
    assert [path.name for path in (tmp_path / "p").iterdir()] == [JOURNAL]
    assert not worth_resuming(tmp_path / "p")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: os.utime(folder / "a.safetensors", ns=(1, 1)),
        lambda folder: os.truncate(folder / "a.safetensors", 100),
        lambda folder: (folder / "a.safetensors").unlink(),
    ],
)
def test_a_finished_shard_that_was_touched_is_written_again(tmp_path: Path, spoil: Any) -> None:
    filled(tmp_path / "p")
    spoil(tmp_path / "p")
    with Journal.start(tmp_path / "p", PRINT) as journal:
        assert journal.finished("a.safetensors") is None
        assert journal.prefix("a.safetensors") == 0 and not (tmp_path / "p" / "a.safetensors").exists()


@pytest.mark.parametrize("kept", [0, 7999, 9000])
def test_a_prefix_whose_bytes_are_not_there_is_not_believed(tmp_path: Path, kept: int) -> None:
    """Shorter than noted, or one bit of it another one: the shard is begun anew."""
    filled(tmp_path / "p")
    data = bytearray(DATA[:kept])
    if kept > 8000:
        data[7000] ^= 1
    (tmp_path / "p" / "b.safetensors").write_bytes(data)
    with Journal.start(tmp_path / "p", PRINT) as journal:
        assert journal.prefix("b.safetensors") == 0
    assert not (tmp_path / "p" / "b.safetensors").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000), junk=st.binary(max_size=20))
def test_any_torn_end_leaves_what_stands_before_it(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("torn") / "p"
    filled(folder)
    whole = (folder / JOURNAL).read_bytes()
    cut = min(cut, len(whole))
    (folder / JOURNAL).write_bytes(whole[:cut] + junk)
    lines = whole[:cut].count(b"\n")
    with Journal.start(folder, PRINT, every=1000) as journal:
        assert (journal.finished("a.safetensors") is not None) == (lines >= 2)
        assert journal.prefix("b.safetensors") == (0 if lines < 3 else 4000 if lines == 3 else 8000)
        write(folder, "b.safetensors", 9000)
        assert journal.note("b.safetensors", 9000, hashlib.sha256(DATA[:9000]))
    for line in (folder / JOURNAL).read_text().splitlines():  # the torn end is gone from the file, too
        assert isinstance(json.loads(line), dict)
    with Journal.start(folder, PRINT) as journal:
        assert journal.prefix("b.safetensors") == 9000
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "line", ["[]", "1", '{"shard": "../x", "done_bytes": 5, "sha256": ""}', '{"shard": 3}']
)
def test_lines_that_no_journal_writes_end_it(tmp_path: Path, line: str) -> None:
    filled(tmp_path / "p")
    path = tmp_path / "p" / JOURNAL
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with Journal.start(tmp_path / "p", PRINT) as journal:
        assert journal.finished("a.safetensors") is None


def test_notes_come_once_in_so_many_bytes_from_any_thread(tmp_path: Path) -> None:
    with Journal.start(tmp_path, PRINT, every=1000) as journal:
        write(tmp_path)
        threads = [
            threading.Thread(target=lambda: [journal.note("a.safetensors", n) for n in range(0, 10_240, 64)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    noted = [json.loads(line)["done_bytes"] for line in (tmp_path / JOURNAL).read_text().splitlines()[1:]]
    assert 1 <= len(noted) <= 10 and all(b - a >= 1000 for a, b in itertools.pairwise(noted))


def test_a_journal_without_room_ends_and_the_merge_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.start(tmp_path, PRINT, every=1000) as journal:
        write(tmp_path)
        assert journal.note("a.safetensors", 2000)
        real = os.pwrite
        monkeypatch.setattr(
            os, "pwrite", lambda fd, data, at: real(fd, data[:10], at)
        )  # a disk with 10 bytes left
        journal.note("a.safetensors", 4000)
        monkeypatch.undo()
        journal.note("a.safetensors", 8000)
        journal.finish(FileHashes("a.safetensors", "s", "t"))
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 2
    with Journal.start(tmp_path, PRINT) as journal:
        assert journal.prefix("a.safetensors") == 2000


def test_the_fingerprint_changes_with_everything_that_decides_the_bits(tmp_path: Path) -> None:
    shard = tmp_path / "a.safetensors"

    def shard_with(name: str, filler: bytes = b"\0" * 4) -> None:
        header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        shard.write_bytes(len(header).to_bytes(8, "little") + header + filler)
        os.utime(shard, ns=(5, 5))

    config = tmp_path / "config.json"
    config.write_text("{}")
    shard_with("w")
    first = fingerprint({"weight": 0.3}, [shard, config], {"kernel": "numpy"})
    assert first == fingerprint({"weight": 0.3}, [config, shard], {"kernel": "numpy"}) and len(first) == 64
    assert first != fingerprint({"weight": 0.4}, [shard, config], {"kernel": "numpy"})
    assert first != fingerprint({"weight": 0.3}, [shard, config], {"kernel": "c"})
    assert first != fingerprint({"weight": 0.3}, [shard], {"kernel": "numpy"})
    shard_with("v")  # same size, same time, another header
    assert first != fingerprint({"weight": 0.3}, [shard, config], {"kernel": "numpy"})
    shard_with("w")
    assert first == fingerprint({"weight": 0.3}, [shard, config], {"kernel": "numpy"})
    os.utime(shard, ns=(6, 6))
    assert first != fingerprint({"weight": 0.3}, [shard, config], {"kernel": "numpy"})
