"""The leakage audit's speed and memory on a synthetic corpus.

    python -m benchmarks.audit [--megabytes 1000] [--workers 2] [--folder DIR]

The corpus: JSON lines of text in a Zipf vocabulary, rows of 60 to 400 words, 1% copies and 1% near copies; 1,000 of
2,000 test rows are planted in it. Peers in the same run, on a sample: reading the JSON alone (the floor), and MinHash
of each document in turn with datasketch where it is installed, else with rensa's object a document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from engine.jobs.events import EventWriter

TESTS = 2000
SAMPLE = 16 << 20  # bytes the peers read


def vocabulary(size: int = 60_000) -> tuple[list[str], np.ndarray]:
    """Words of 2 to 12 letters, and their cumulative Zipf probabilities."""
    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    weights = np.arange(len(letters), 0, -1) / sum(range(len(letters) + 1))
    words = ["".join(rng.choice(letters, rng.integers(2, 13), p=weights)) for _ in range(size)]
    zipf = 1 / np.arange(2, size + 2)
    return words, np.cumsum(zipf / zipf.sum())


def documents(
    rng: np.random.Generator, words: list[str], cumulative: np.ndarray, count: int
) -> list[list[str]]:
    lengths = rng.integers(60, 400, count)
    drawn = np.searchsorted(cumulative, rng.random(int(lengths.sum())))
    flat = [words[i] for i in np.minimum(drawn, len(words) - 1).tolist()]
    ends = np.cumsum(lengths).tolist()
    return [flat[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def write_corpus(folder: Path, size: int) -> tuple[Path, Path]:
    """(train.jsonl of about `size` bytes, test.jsonl)."""
    words, cumulative = vocabulary()
    rng = np.random.default_rng(2)
    tests = [document[:120] for document in documents(rng, words, cumulative, TESTS)]
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    test.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in tests), encoding="utf-8")
    planted, written, kept = 0, 0, [["none"]]
    with train.open("w", encoding="utf-8") as file:
        while written < size:
            for row in documents(rng, words, cumulative, 5000):
                chance = rng.random()
                if chance < 0.01:
                    row = kept[int(rng.integers(len(kept)))]
                elif chance < 0.02:
                    row = list(kept[int(rng.integers(len(kept)))])
                    row[len(row) // 2] = "changed"
                elif planted < TESTS // 2 and chance > 0.99:
                    row = row[:50] + tests[planted] + row[50:]
                    planted += 1
                elif len(kept) < 20_000:
                    kept.append(row)
                written += file.write(json.dumps({"text": " ".join(row)}) + "\n")
    return train, test


class Peak:
    """Largest sum of USS of this process and its children, sampled ten times a second."""

    def __enter__(self) -> Peak:
        self.bytes, self._go = 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        me = psutil.Process()
        while self._go:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._go = False
        self._thread.join()


def sample(train: Path) -> tuple[list[bytes], int]:
    with train.open("rb") as file:
        lines = file.readlines(SAMPLE)
    return lines, sum(map(len, lines))


def words_of(lines: list[bytes]) -> Iterator[list[str]]:
    for line in lines:
        yield json.loads(line)["text"].lower().split()


def parse_only(lines: list[bytes]) -> str:
    for line in lines:
        json.loads(line)
    return "json.loads of every line, one process (the floor)"


def naive(lines: list[bytes]) -> str:
    """One MinHash a document, of its set of 5-word shingles; no index, no comparison."""
    try:
        from datasketch import MinHash
    except ImportError:
        from rensa import RMinHash

        for row in words_of(lines):
            RMinHash(128, 42).update(list({" ".join(row[i : i + 5]) for i in range(len(row) - 4)}))
        return "rensa, one object a document, signatures only, one process"
    for row in words_of(lines):
        MinHash(num_perm=128).update_batch([" ".join(row[i : i + 5]).encode() for i in range(len(row) - 4)])
    return "datasketch, one object a document, signatures only, one process"


def cpu_seconds() -> float:
    """User and system time of this process and its ended children: what other programs on the machine do not change."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(call: Any, lines: list[bytes], size: int) -> tuple[str, float]:
    start = time.perf_counter()
    name = call(lines)
    return name, size / 1e6 / (time.perf_counter() - start)


def main() -> None:
    from training.audit.report import audit_files

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the corpus and the scratch files go (then removed)"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="audit-benchmark-", dir=options.folder))
    try:
        train, test = write_corpus(folder, options.megabytes * 1_000_000)
        size = train.stat().st_size
        lines, sampled = sample(train)
        peers = [timed(call, lines[: len(lines) // (1 if call is parse_only else 8)],
                       sampled // (1 if call is parse_only else 8)) for call in (parse_only, naive)]  # fmt: skip
        with Peak() as peak:
            start, cpu = time.perf_counter(), cpu_seconds()
            result = audit_files([train], [test], EventWriter(), scratch=folder, workers=options.workers)
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rate = size / 1e6 / seconds
    counts = result["counts"]
    machine = f"{platform.machine()}, {multiprocessing.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{size / 1e6:,.0f} MB, {counts['rows'][str(train)]:,} rows")
    print(f"{counts['leaked_test_rows']} of {TESTS // 2} planted test rows found")
    print(f"repeats found: {counts['duplicates']}\n")
    print(
        f"{'audit, all detectors and repeats, workers: ' + str(options.workers):68} {rate:7.1f} MB/s  {seconds:6.1f} s"
    )
    print(f"{'':68} {peak.bytes / 1e6:7.0f} MB peak, all processes")
    print(f"{'':68} {size / 1e6 / cpu:7.1f} MB for each second of processor time")
    for name, peer in peers:
        print(f"{name:68} {peer:7.1f} MB/s  the audit is {rate / peer:.2f} x")
    print(f"2 GB at this rate: {2000 / rate:.0f} s")


if __name__ == "__main__":
    main()
