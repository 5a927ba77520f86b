"""Results appear whole or not at all."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from engine import atomic
from engine.errors import BadInputError, NoSpaceError, TargetExistsError


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    with atomic.new_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert sorted(p.name for p in target.iterdir()) == ["a"]
    assert [p.name for p in target.parent.iterdir()] == ["result"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.new_folder(tmp_path / "r") as partial:
        (partial / "a").write_text("1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="filled up"), atomic.new_folder(tmp_path / "r"):
        Path("/dev/full").write_bytes(b"x" * 100) if Path("/dev/full").exists() else _no_space()
    assert list(tmp_path.iterdir()) == []


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_an_existing_target_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "r"
    if kind == "file":
        target.write_text("keep me")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExistsError), atomic.new_folder(target):
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "r"
    with pytest.raises(TargetExistsError), atomic.new_folder(target):
        target.write_text("someone else's")
    assert target.read_text() == "someone else's"


def test_the_partial_of_a_living_process_is_respected_and_a_dead_ones_replaced(tmp_path: Path) -> None:
    target = tmp_path / "r"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from pathlib import Path\nfrom engine import atomic\n"
        f"with atomic.new_folder(Path({str(target)!r})) as p:\n"
        "    (p / 'old').write_text('x'); print('ready', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == b"ready\n"
    with pytest.raises(BadInputError, match=str(other.pid)), atomic.new_folder(target):
        pass
    other.kill()
    other.communicate()
    with atomic.new_folder(target) as partial:
        (partial / "new").write_text("y")
    assert [p.name for p in target.iterdir()] == ["new"]


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": 1})
    atomic.write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 2\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_space_is_checked_before(tmp_path: Path) -> None:
    atomic.need_space(tmp_path / "not" / "there" / "yet", 1, "a byte")
    with pytest.raises(NoSpaceError, match=r"needs 1000000000000\.00 GB"):
        atomic.need_space(tmp_path, 10**21, "the impossible")
