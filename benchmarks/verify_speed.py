"""How long does verification take against the merge it checks: one run, one table.

    python benchmarks/verify_speed.py                       # 0.33 B parameters
    python benchmarks/verify_speed.py --parameters 1.3e9 --where /big/disk

Makes the random bf16 Llama and the two rank-16 adapters of merge_speed.py and times, each in its own process
with a warm page cache: our merge without verification (everything on disk at the end), the verification of that
merge, the same asked with swapped weights (every element is wrong, so the diagnosis runs), and without weights.
CPU seconds are those of the process and its threads: they do not depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from merge_speed import (
    OURS,
    RANK,
    ROOT,
    SHAPES,
    VOCABULARY,
    linear_shapes,
    make_adapter,
    make_base,
)

VERIFY = """
    import json, sys
    from pathlib import Path
    from engine.jobs import EventWriter
    from engine.merge.job import run_verify
    result = run_verify({"merged": sys.argv[4], "base": sys.argv[1], "weights": json.loads(sys.argv[5]),
                         "adapters": {"pt": sys.argv[2], "sft": sys.argv[3]}}, EventWriter())
    assert result["verdict"] == sys.argv[6], result["message"]
"""
USAGE = """
import os, resource
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float
    cpu: float
    peak_mb: float


def timed(name: str, code: str, arguments: list[str]) -> Row:
    """Run code in a new interpreter: wall seconds, its CPU seconds and peak resident memory."""
    os.sync()
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code) + USAGE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    cpu, peak = done.stdout.split()[-2:]
    return Row(name, seconds, float(cpu), int(peak) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=0.33e9, help="about how many (default 0.33e9)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--where", type=Path, help="folder on the disk to test (default: the temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.where, prefix="verify-speed-") as scratch:
        run(Path(scratch), args)


def run(scratch: Path, args: argparse.Namespace) -> None:
    def size(shape: tuple[int, int, int, int]) -> float:
        layers, hidden, middle, _ = shape
        return 2 * VOCABULARY * hidden + sum(r * c for r, c in linear_shapes(layers, hidden, middle).values())

    layers, hidden, middle, heads = min(SHAPES, key=lambda shape: abs(size(shape) - args.parameters))
    parameters = make_base(scratch / "base", layers, hidden, middle, heads)
    for seed, name in enumerate(("pt", "sft")):
        make_adapter(scratch / name, linear_shapes(layers, hidden, middle), seed)
    inputs = [str(scratch / name) for name in ("base", "pt", "sft")]
    cases = [
        ("medmerge merge --no-verify", OURS.replace("VERIFY", "False"), []),
        ("medmerge verify", VERIFY, ['{"pt": 0.3, "sft": 0.7}', "ok"]),
        ("verify, weights swapped", VERIFY, ['{"pt": 0.7, "sft": 0.3}', "swapped"]),
        ("verify without weights", VERIFY, ["null", "ok"]),
    ]
    rows: dict[str, list[Row]] = {}
    for turn in range(args.repeats):
        out = str(scratch / f"out-{turn}")
        for name, code, more in cases:
            rows.setdefault(name, []).append(timed(name, code, [*inputs, out, *more]))
    print(
        f"{parameters / 1e9:.2f} B parameters, {2 * parameters / 1e9:.2f} GB bf16, two rank-{RANK} adapters; "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    )
    print(f"{'':28} {'seconds':>8} {'x merge':>8} {'CPU s':>7} {'x merge':>8} {'peak MB':>8}")
    fastest = [min(found, key=lambda row: row.seconds) for found in rows.values()]
    first = fastest[0]
    for row in fastest:
        print(
            f"{row.name:28} {row.seconds:8.2f} {row.seconds / first.seconds:8.2f} {row.cpu:7.2f} "
            f"{row.cpu / first.cpu:8.2f} {row.peak_mb:8.0f}"
        )


if __name__ == "__main__":
    main()
