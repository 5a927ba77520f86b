"""Merging and verifying against a durable copy of the same bytes and against the peers: one run, one table.

    python -m benchmarks.merge                                  # 0.33 B parameters, without peers
    python -m benchmarks.merge --parameters 1.3e9 --peers --where /big/disk

Makes random bf16 Llamas and two rank-16 adapters on all linear layers. Every row is a process of its own, with
a warm page cache and everything on disk at the end (`sync`); rounds of all rows follow each other, and the table
gives medians. The floor is `cp -r` and `sync` of the model: a merge reads and writes the same bytes. CPU seconds
and peak memory are those of the row's own process. Peers run once; mergekit needs `make mergekit`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import RANK, linear_shapes, make_adapter, make_base, shape_of
from benchmarks.peers import rows as peers
from engine.merge.kernel import kernel

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"pt": 0.3, "sft": 0.7}
_MERGE = """
    import json, sys
    from engine.jobs import EventWriter
    from engine.merge.job import run_merge
    result = run_merge(json.loads(sys.argv[1]), EventWriter())
    assert result["exit_code"] == 0, result["verdict"]["message"]
"""
_NO_HASH = """
    from engine.merge import stream
    def pass_on(self, index, data, copy=False):
        return self.digest.copy() if copy else None
    stream._InOrder.update = pass_on
    stream.file_sha256 = lambda path: ""
"""
_VERIFY = """
    import json, sys
    from engine.jobs import EventWriter
    from engine.merge.job import run_verify
    result = run_verify(json.loads(sys.argv[1]), EventWriter())
    assert result["exit_code"] == 0, result["message"]
"""
_COPY = """
    import os, subprocess, sys
    subprocess.run(["cp", "-r", sys.argv[1], sys.argv[2]], check=True)
    os.sync()
"""
_USAGE = """
import resource
_used = resource.getrusage(resource.RUSAGE_SELF)
_peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print("USAGE", _used.ru_utime + _used.ru_stime, _peak)
"""


@dataclass
class Row:
    """One thing to time. `run` does it once and gives (wall seconds, CPU seconds, peak MB)."""

    name: str
    run: Callable[[], tuple[float, float, float]]
    once: bool = False
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    peak: float = 0.0

    def measure(self) -> None:
        wall, cpu, peak = self.run()
        self.walls.append(wall)
        self.cpus.append(cpu)
        self.peak = max(self.peak, peak)


def process(code: str, arguments: list[str], out: Path | None) -> tuple[float, float, float]:
    """Run code in a fresh interpreter; what it wrote to `out` is removed afterwards."""
    os.sync()
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code) + _USAGE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"a row failed:\n{done.stderr}")
    cpu, peak = done.stdout.rpartition("USAGE ")[2].split()
    if out is not None:
        shutil.rmtree(out)
    return wall, float(cpu), int(peak) * 1024 / 1e6


def merge_row(name: str, out: Path, recipe: dict[str, Any], verify: bool = False, before: str = "") -> Row:
    task = json.dumps({"recipe": {**recipe, "output": {"path": str(out)}}, "verify": verify})
    code = textwrap.dedent(before) + textwrap.dedent(_MERGE)
    return Row(name, lambda: process(code, [task], out))


def verify_row(method: str, made: Path, recipe: dict[str, Any]) -> Row:
    """Checking a merge of two models, which is made once before and says itself what was asked."""
    task = {"recipe": {**recipe, "output": {"path": str(made)}}, "verify": False}
    process(_MERGE, [json.dumps(task)], None)
    return Row(f"verify that {method}", lambda: process(_VERIFY, [json.dumps({"merged": str(made)})], None))


def peer_row(peer: peers.Peer, out: Path | None) -> Row | None:
    if peer.missing:
        print(f"{peer.name}: left out, {peer.missing}", file=sys.stderr)
        return None

    def run() -> tuple[float, float, float]:
        timed = peers.run(peer)
        for path in (out, out and out.with_name(out.name + ".loras")):
            if path is not None and path.exists():
                shutil.rmtree(path)
        return timed.seconds, float("nan"), timed.peak_mb

    return Row(peer.name, run, once=True)


def adapters_group(scratch: Path, with_peers: bool) -> list[Row]:
    """Two adapters onto the base, and checking such merges."""
    base, out = scratch / "base", scratch / "out"
    paths = {label: scratch / label for label in WEIGHTS}
    recipe = {
        "base": str(base),
        "adapters": {label: {"path": str(path), "weight": WEIGHTS[label]} for label, path in paths.items()},
    }
    merged = {**recipe, "output": {"path": str(scratch / "merged")}}
    alone = {"base": str(base), "adapters": {"pt": {"path": str(paths["pt"]), "weight": 1.0}}}
    for made, name in ((merged, "merged"), ({**alone, "output": {"path": str(scratch / "alone")}}, "alone")):
        process(_MERGE, [json.dumps({"recipe": made, "verify": False})], None)
        assert (scratch / name).is_dir()
    check = {
        "merged": str(scratch / "merged"), "base": str(base), "weights": WEIGHTS,
        "adapters": {label: str(path) for label, path in paths.items()},
    }  # fmt: skip
    single = {
        "merged": str(scratch / "alone"), "base": str(base), "weights": {"pt": 1.0},
        "adapters": {"pt": str(paths["pt"])},
    }  # fmt: skip
    found = [
        merge_row("linear", out, recipe),
        merge_row("linear, without hashing", out, recipe, before=_NO_HASH),
        merge_row("linear, and verified", out, recipe, verify=True),
        Row("verify that merge", lambda: process(_VERIFY, [json.dumps(check)], None)),
        Row("verify one adapter at 1", lambda: process(_VERIFY, [json.dumps(single)], None)),
    ]
    for method, parameters in (
        ("slerp", {"t": 0.5}),
        ("ties", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
    ):
        found.append(
            merge_row(f"{method}, two adapters", out, {**recipe, "method": method, "parameters": parameters})
        )
    if with_peers:
        pairs = {label: (path, WEIGHTS[label]) for label, path in paths.items()}
        found += [
            row
            for row in (
                peer_row(peers.deltalint(base, paths["pt"], scratch / "alone"), None),
                peer_row(peers.peft(base, pairs, out), out),
                peer_row(peers.mergekit_adapters(base, pairs, out), out),
            )
            if row
        ]
    return found


def models_group(scratch: Path, with_peers: bool) -> list[Row]:
    """Two full checkpoints of a base."""
    base, out = scratch / "base", scratch / "out"
    paths = {label: scratch / label for label in ("a", "b")}
    listed = {label: {"path": str(path), "weight": 0.5} for label, path in paths.items()}
    tried: list[tuple[str, Path | None, dict[str, Any]]] = [
        ("linear", None, {}),
        ("slerp", None, {"t": 0.5}),
        ("ties", base, {"density": 0.5}),
        ("dare_linear", base, {"density": 0.5}),
        ("dare_ties", base, {"density": 0.5}),
    ]
    found = []
    for method, on, parameters in tried:
        recipe = {"method": method, "models": listed, **({"base": str(on)} if on else {})}
        recipe |= {"parameters": parameters} if parameters else {}
        found.append(merge_row(f"{method}, two models", out, recipe))
        if method != "dare_linear":
            found.append(verify_row(method, scratch / f"checked-{method}", recipe))
    if with_peers:
        pairs = {label: (path, 0.5) for label, path in paths.items()}
        rows = [
            peer_row(peers.mergekit_models(method, pairs, out, on, **parameters), out)
            for method, on, parameters in tried
            if method != "dare_linear"
        ]
        found += [row for row in rows if row]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parameters", type=float, default=0.33e9, help="about how many (default 0.33e9)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument(
        "--peers", action="store_true", help="PEFT, mergekit and deltalint as well, once each"
    )
    parser.add_argument("--only", choices=("adapters", "models"), help="one group of rows")
    parser.add_argument(
        "--where", type=Path, help="folder on the disk to test (default: the temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.where, prefix="merge-") as scratch:
        measure(Path(scratch), args)


def measure(scratch: Path, args: argparse.Namespace) -> None:
    layers, hidden, middle, heads = shape_of(args.parameters)
    parameters = make_base(scratch / "base", layers, hidden, middle, heads)
    rows = [
        Row(
            "cp -r, sync",
            lambda: process(_COPY, [str(scratch / "base"), str(scratch / "out")], scratch / "out"),
        )
    ]
    if args.only != "models":
        for seed, label in enumerate(WEIGHTS):
            make_adapter(scratch / label, linear_shapes(layers, hidden, middle), seed)
        rows += adapters_group(scratch, args.peers)
    if args.only != "adapters":
        for seed, label in enumerate(("a", "b"), 1):
            make_base(scratch / label, layers, hidden, middle, heads, seed)
        rows += models_group(scratch, args.peers)
    for turn in range(args.repeats):
        for row in rows:
            if turn == 0 or not row.once:
                row.measure()
                print(f"round {turn + 1}: {row.name} {row.walls[-1]:.2f} s", file=sys.stderr, flush=True)
    print(
        f"{parameters / 1e9:.2f} B parameters, {2 * parameters / 1e9:.2f} GB bf16, two rank-{RANK} adapters; "
        f"{os.cpu_count()} cores, {platform.machine()}, kernel: {kernel().name}, numpy {np.__version__}; "
        f"medians of {args.repeats}, peers once"
    )
    print(f"{'':34} {'seconds':>8} {'x cp':>6} {'CPU s':>7} {'peak MB':>8}")
    floor = statistics.median(rows[0].walls)
    for row in rows:
        wall, cpu = statistics.median(row.walls), statistics.median(row.cpus)
        used = "-" if cpu != cpu else f"{cpu:.2f}"
        print(f"{row.name:34} {wall:8.2f} {wall / floor:6.2f} {used:>7} {row.peak:8.0f}")


if __name__ == "__main__":
    main()
