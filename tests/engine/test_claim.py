"""One writer per target: real processes race, die and take over, with flock and on file systems without it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from engine.atomic import new_folder
from engine.claim import Owner, claim, lock_path, start_time
from engine.errors import BadInputError, NoSpaceError

ROOT = Path(__file__).resolve().parents[2]

PREAMBLE = """
    import errno, fcntl, json, os, random, signal, sys
    from multiprocessing import get_context
    from pathlib import Path
    from engine import atomic, claim
    from engine.errors import BadInputError

    root, locks = Path(sys.argv[1]), sys.argv[2]
    if locks == "exclusive":
        def refuse(*args):
            raise OSError(errno.ENOTSUP, "no locks on this file system")
        fcntl.flock = refuse
    fork = get_context("fork")

    def run(work, *args):
        process = fork.Process(target=work, args=args)
        process.start()
        return process

    dead = run(int)
    dead_start = claim.start_time(dead.pid)
    dead.join()
    DEAD = claim.Owner(dead.pid, dead_start or 1.0, claim.platform.node(), 0.0)
"""

# Every second round starts with what a killed process left: its lock and a half-made folder.
RACE = """
    ROUNDS, RACERS = 60, 4

    def racer(number, barrier, results):
        for turn in range(ROUNDS):
            target = root / f"r{turn}"
            barrier.wait()
            try:
                with atomic.new_folder(target) as partial:
                    os.close(os.open(partial / "inside", os.O_CREAT | os.O_EXCL))
                    (partial / str(number)).write_text("mine")
                    found = sorted(path.name for path in partial.iterdir())
                results.put((turn, number, found))
            except BadInputError as error:
                results.put((turn, number, error.message))
            except BaseException as error:
                results.put((turn, number, f"broken: {error!r}"))

    for turn in range(0, ROUNDS, 2):
        partial = root / f"r{turn}.partial"
        claim.lock_path(partial).write_bytes(DEAD.encode())
        partial.mkdir()
        (partial / "old").write_text("half")
    barrier, results = fork.Barrier(RACERS), fork.Queue()
    racers = [run(racer, number, barrier, results) for number in range(RACERS)]
    print(json.dumps([results.get(timeout=60) for _ in range(ROUNDS * RACERS)]))
    for process in racers:
        process.join()
"""


def script(code: str, folder: Path, locks: str) -> Any:
    """Run PREAMBLE and `code` in a new process; the JSON it prints."""
    text = textwrap.dedent(PREAMBLE) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", text, str(folder), locks],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("locks", ["flock", "exclusive"])
def test_of_many_racers_exactly_one_wins_every_round(tmp_path: Path, locks: str) -> None:
    outcomes = script(RACE, tmp_path, locks)
    rounds: dict[int, list[tuple[int, Any]]] = {}
    for turn, number, outcome in outcomes:
        rounds.setdefault(turn, []).append((number, outcome))
    assert len(rounds) == 60 and all(len(found) == 4 for found in rounds.values())
    for turn, found in rounds.items():
        winners = [(number, files) for number, files in found if isinstance(files, list)]
        assert len(winners) == 1, found
        number, files = winners[0]
        assert files == sorted(["inside", str(number)])
        assert sorted(path.name for path in (tmp_path / f"r{turn}").iterdir()) == files
        for _, outcome in found:
            if isinstance(outcome, str):
                assert "is being written by" in outcome or "is already there" in outcome, outcome
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"r{turn}" for turn in rounds)


# The same name taken and given back all the time: a lock file that goes away must not be held by two.
TURNS = """
    def taker(results):
        held = broken = 0
        while held < 150:
            try:
                with claim.claim(root / "x"):
                    held += 1
                    try:
                        os.close(os.open(root / "inside", os.O_CREAT | os.O_EXCL))
                        os.unlink(root / "inside")
                    except OSError:
                        broken += 1
            except BadInputError:
                pass
        results.put([held, broken])

    results = fork.Queue()
    takers = [run(taker, results) for _ in range(4)]
    print(json.dumps([results.get(timeout=60) for _ in takers] + [os.listdir(root)]))
    for process in takers:
        process.join()
"""


@pytest.mark.parametrize("locks", ["flock", "exclusive"])
def test_a_claim_given_back_is_never_held_by_two(tmp_path: Path, locks: str) -> None:
    assert script(TURNS, tmp_path, locks) == [[150, 0]] * 4 + [[]]


# Children are killed at random moments in the middle of making the folder; the next one takes over each time.
KILLS = """
    def child(ready):
        with atomic.new_folder(root / "r") as partial:
            for number in range(200):
                (partial / str(number)).write_text(str(os.getpid()))
                if number == 0:
                    ready.send(1)
            if "kill" in (root / "mode").read_text():
                signal.pause()

    random.seed(int(sys.argv[2] == "flock"))
    (root / "mode").write_text("kill")
    for turn in range(25):
        receiver, sender = fork.Pipe(duplex=False)
        process = run(child, sender)
        if turn % 2 or locks == "exclusive":  # there a lock without a name (microseconds) stays for a person
            receiver.recv()
        signal.sigtimedwait([signal.SIGUSR1], random.random() * 0.02)
        process.kill()
        process.join()
        assert not (root / "r").exists()
    (root / "mode").write_text("finish")
    receiver, sender = fork.Pipe(duplex=False)
    last = run(child, sender)
    last.join()
    owners = {path.read_text() for path in (root / "r").iterdir()}
    print(json.dumps([last.exitcode, sorted(owners) == [str(last.pid)], sorted(os.listdir(root))]))
"""


@pytest.mark.parametrize("locks", ["flock", "exclusive"])
def test_killed_holders_are_replaced_and_nothing_of_theirs_stays(tmp_path: Path, locks: str) -> None:
    assert script(KILLS, tmp_path, locks) == [0, True, ["mode", "r"]]


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("flock", [True, False])
def test_the_refused_one_is_told_who_and_since_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    if not flock:
        without_flock(monkeypatch)
    with claim(tmp_path / "x") as left_over:
        assert not left_over
        with (
            pytest.raises(BadInputError, match=rf"written by process {os.getpid()} since \d{{4}}-\d\d-\d\d "),
            claim(tmp_path / "x"),
        ):
            pass
        assert lock_path(tmp_path / "x").is_file()
    assert not list(tmp_path.iterdir())
    with claim(tmp_path / "x"):  # free again
        pass


def test_a_holder_on_another_machine_is_believed_alive_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    lock = lock_path(tmp_path / "x")
    lock.write_bytes(Owner(1, 1.0, "another-host", 0.0).encode())
    with pytest.raises(BadInputError, match="process 1 on another-host") as caught, claim(tmp_path / "x"):
        pass
    assert str(lock) in caught.value.hint and lock.is_file()


def test_a_lock_that_never_got_its_owner_is_not_taken_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    lock_path(tmp_path / "x").write_bytes(b"")
    with pytest.raises(BadInputError, match="another process"), claim(tmp_path / "x"):
        pass


@pytest.mark.parametrize("locks", ["flock", "exclusive"])
def test_a_dead_lock_beside_a_finished_result_goes_with_the_next_look(tmp_path: Path, locks: str) -> None:
    """A kill between the rename and the end of the claim. A living holder's lock, or one beside a leftover, stays."""
    look = """
        def seen():
            try:
                with atomic.new_folder(root / "r"):
                    return "made"
            except atomic.TargetExistsError:
                return sorted(os.listdir(root))

        (root / "r").mkdir()
        lock = claim.lock_path(root / "r.partial")
        lock.write_bytes(DEAD.encode())
        found = [seen()]
        lock.write_bytes(DEAD.encode())
        (root / "r.partial").mkdir()
        found.append(seen())
        (root / "r.partial").rmdir()
        with claim.claim(root / "r.partial"):
            found.append(seen())
        print(json.dumps(found))
    """
    lock = ".r.partial.lock"
    assert script(look, tmp_path, locks) == [["r"], [lock, "r", "r.partial"], [lock, "r"]]


def test_a_reused_pid_is_not_the_owner() -> None:
    me = Owner.me()
    assert me.alive and abs(me.start - start_time(os.getpid())) < 0.01
    assert not Owner(me.pid, me.start - 100, me.host, 0).alive
    assert Owner.parse(me.encode()) == me
    assert Owner.parse(b"") is None and Owner.parse(b'{"pid": 3}') is None and Owner.parse(b"[[[") is None


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    lock_path(tmp_path / "x").symlink_to(victim)
    with pytest.raises(BadInputError, match="cannot write in"), claim(tmp_path / "x"):
        pass
    assert victim.read_text() == "keep me"


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadInputError, match="cannot make the folder"), new_folder(tmp_path / "file" / "r"):
        pass
    real = os.pwrite

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpaceError), new_folder(tmp_path / "r"):
        pass
    monkeypatch.setattr(os, "pwrite", real)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=100k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a read-only disk here")
    try:
        with pytest.raises(BadInputError, match="Read-only file system") as caught, new_folder(disk / "r"):
            pass
        assert str(disk) in caught.value.message
    finally:
        subprocess.run(["umount", str(disk)], check=True)
