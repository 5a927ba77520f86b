"""The app in a real terminal (tmux): start, pick, merge, quit, terminal restored; killed while a job runs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.jobs import JobSpec, JobStore, cancel, launch
from engine.workspace import Workspace
from tests.conftest import MakeAdapter

pytestmark = [
    pytest.mark.pty,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds for a condition; a loaded machine may be slow, a broken app never gets there


class Terminal:
    """A tmux session with a shell in it, on a server of its own."""

    def __init__(self, folder: Path, columns: int = 120, rows: int = 36) -> None:
        self.socket = str(folder / "tmux.sock")
        environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(ROOT)}
        environment.pop("TMUX", None)
        self._tmux("new-session", "-d", "-x", str(columns), "-y", str(rows), "sh", environment=environment)

    def _tmux(self, *words: str, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            ["tmux", "-S", self.socket, "-f", "/dev/null", *words],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        return done.stdout

    def type(self, line: str) -> None:
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def press(self, *keys: str) -> None:
        for key in keys:
            self._tmux("send-keys", key)

    @property
    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    @property
    def modes(self) -> str:
        """Whether the alternate screen, mouse and hidden cursor are on: "0 0 1" for a shell."""
        return self._tmux("display-message", "-p", "#{alternate_on} #{mouse_any_flag} #{cursor_flag}").strip()

    def until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"never: {what}\n{self.screen}")
            time.sleep(0.05)

    def shows(self, words: str) -> None:
        self.until(lambda: words in self.screen, f"{words!r} on the screen")

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    session = Terminal(tmp_path)
    yield session
    session.close()


@pytest.fixture
def workspace(tmp_path: Path, tiny_llama: Path, make_adapter: MakeAdapter) -> Workspace:
    """A workspace with a tiny base, a PT and an SFT adapter."""
    workspace = Workspace(tmp_path / "ws").create()
    shutil.copytree(tiny_llama, workspace.bases / tiny_llama.name)
    for name, seed in (("my-pt", 1), ("my-sft", 2)):
        shutil.copytree(make_adapter(tiny_llama, seed=seed), workspace.adapters / name)
    return workspace


def app_command(workspace: Workspace) -> str:
    code = "import sys; from tui.cli import main_app; sys.exit(main_app())"
    return shlex.join([sys.executable, "-c", code, "--workspace", str(workspace.root)])


def test_start_pick_merge_quit_and_the_terminal_is_restored(terminal: Terminal, workspace: Workspace) -> None:
    terminal.type(f"{app_command(workspace)}; echo left with $?")
    terminal.shows("Merge them")
    terminal.press("2")
    terminal.shows("every factor fits the chosen base")
    terminal.press("3")
    terminal.shows("writes")
    terminal.press("Right", "m")
    terminal.shows("✓ verified")
    assert (workspace.merges / "pt35-sft70" / "medmerge.json").is_file()
    terminal.press("q")
    terminal.shows("left with 0")
    terminal.until(lambda: terminal.modes == "0 0 1", "a terminal as a shell wants it")


def test_killed_while_a_job_runs_and_the_job_is_there_again(terminal: Terminal, workspace: Workspace) -> None:
    spec = JobSpec("train", "tests.pty.slow_job:run", {"seconds": 600}, "a long run")
    terminal.type(app_command(workspace))
    terminal.shows("Merge them")
    app = _app_pid(workspace)
    job = launch(spec, workspace.jobs)
    try:
        terminal.until(lambda: JobStore(workspace.jobs).get(job.id).state == "running", "the job runs")
        terminal.shows("a long run")
        os.kill(app, signal.SIGKILL)
        terminal.until(lambda: not _alive(app), "the app is gone")
        terminal.type(f"stty sane; clear; {app_command(workspace)}")
        terminal.press("7")
        terminal.shows("a long run")
        assert JobStore(workspace.jobs).get(job.id).state == "running"
        terminal.press("q")
    finally:
        cancel(JobStore(workspace.jobs).get(job.id), grace=5)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def _app_pid(workspace: Workspace) -> int:
    """The app's process: its command line ends with the workspace, and it is no shell."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[-2:] == ["--workspace", str(workspace.root)] and "main_app" in " ".join(words):
            return int(process.pid)
    raise AssertionError("the app is not running")
