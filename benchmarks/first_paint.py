"""How long until the app's first paint, against a bare Textual app in the same run: `python benchmarks/first_paint.py`.

Both start in a pseudo terminal of 120 x 36, in turn, several times; time runs from fork to the moment a word of
theirs was drawn. Prints medians and their ratio; exits 1 when the ratio is 2 or more.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import signal
import statistics
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BARE = """
from textual.app import App
from textual.widgets import Static
class Bare(App):
    def compose(self):
        yield Static("Next")
Bare().run()
"""
OURS = "import sys; from tui.cli import main_app; sys.argv[1:] = ['--workspace', {workspace!r}]; main_app()"


def seconds_to_word(code: str, word: bytes, environment: dict[str, str]) -> float:
    """Start Python with `code` in a new terminal; seconds until `word` came out of it. Raises TimeoutError."""
    started = time.perf_counter()
    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 36, 120, 0, 0))
    seen = b""
    try:
        while time.perf_counter() - started < 60:
            if select.select([master], [], [], 0.5)[0]:
                seen += os.read(master, 65536)
                if word in seen:
                    return time.perf_counter() - started
    except OSError:
        pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(master)
    raise TimeoutError(f"{word!r} never came; the end was {seen[-2000:]!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": folder,
        }
        environment.pop("COLUMNS", None), environment.pop("LINES", None)
        ours = OURS.format(workspace=f"{folder}/ws")
        bare_times, our_times = [], []
        for _ in range(args.runs + 1):  # the first pair warms the caches and is left out
            bare_times.append(seconds_to_word(BARE, b"Next", environment))
            our_times.append(seconds_to_word(ours, b"Reading the workspace", environment))
    bare, app = statistics.median(bare_times[1:]), statistics.median(our_times[1:])
    print(f"{'first paint':<22}{'median':>10}{'min':>10}{'max':>10}")
    for name, times in (("bare Textual app", bare_times[1:]), ("medmerge-tui", our_times[1:])):
        row = (statistics.median(times), min(times), max(times))
        print(f"{name:<22}" + "".join(f"{value * 1000:>7.0f} ms" for value in row))
    print(f"ratio {app / bare:.2f} (must stay under 2)")
    return 0 if app / bare < 2 else 1


if __name__ == "__main__":
    sys.exit(main())
