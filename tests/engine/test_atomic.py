"""Results appear whole or not at all."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from engine import atomic
from engine.errors import BadInputError, CancelledError, MedmergeError, NoSpaceError, TargetExistsError


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


def with_journal(partial: Path, lines: int) -> None:
    (partial / atomic.JOURNAL).write_text('{"line": 1}\n' * lines)
    (partial / "done").write_text("kept")


@pytest.mark.parametrize(
    "error", [CancelledError("cancelled"), NoSpaceError("full", "free some"), OSError(errno.ENOSPC, "full")]
)
def test_finished_work_outlives_an_error_that_is_not_the_inputs_fault(
    tmp_path: Path, error: Exception
) -> None:
    target = tmp_path / "r"
    with pytest.raises(MedmergeError) as caught, atomic.new_folder(target, resume=True) as partial:
        with_journal(partial, 2)
        raise error
    said = str(caught.value)
    assert f"is kept in {partial}" in said and "goes on from there" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.partial"]
    with atomic.new_folder(target, resume=True) as partial:
        assert (partial / "done").read_text() == "kept"
    assert [path.name for path in target.iterdir()] == ["done"]  # no journal in a result


@pytest.mark.parametrize(
    ("error", "lines", "resume"),
    [
        (BadInputError("NaN in the base"), 2, True),  # running again would fail again
        (CancelledError("cancelled"), 1, True),  # a journal that says nothing is done
        (CancelledError("cancelled"), 2, False),
        (NoSpaceError("full", "free some"), 0, True),
    ],
)
def test_what_cannot_be_gone_on_with_is_removed(
    tmp_path: Path, error: MedmergeError, lines: int, resume: bool
) -> None:
    with pytest.raises(type(error)) as caught, atomic.new_folder(tmp_path / "r", resume=resume) as partial:
        with_journal(partial, lines)
        raise error
    assert "is kept" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_partial_is_removed_where_nobody_goes_on_with_it(tmp_path: Path) -> None:
    (tmp_path / "r.partial").mkdir()
    with_journal(tmp_path / "r.partial", 2)
    with atomic.new_folder(tmp_path / "r") as partial:
        assert list(partial.iterdir()) == []
    assert list((tmp_path / "r").iterdir()) == []


def test_a_partial_that_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    mine = tmp_path / "r.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with (
            pytest.raises(BadInputError, match="nothing says that this program left it"),
            atomic.new_folder(tmp_path / "r", resume=resume),
        ):
            pass
    (tmp_path / "s.partial").symlink_to(mine)
    with pytest.raises(BadInputError, match="no folder of ours"), atomic.new_folder(tmp_path / "s"):
        pass
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "t.partial").mkdir()  # empty: nothing can be lost
    with atomic.new_folder(tmp_path / "t"):
        pass


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
