"""A merge killed at any moment and run again is bit for bit the merge that was never killed.

The merges run in real processes that kill themselves (SIGKILL) at their n-th call to the system: a write of half
a block, an fsync, a truncate, an open, a rename. Blocks are tiny, so that a merge of a small model has hundreds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from engine.atomic import partial_path
from engine.claim import lock_path
from engine.weights.tensorfile import file_sha256
from tests.conftest import MakeAdapter

ROOT = Path(__file__).resolve().parents[3]

# Forks a child per merge: the imports are paid for once. argv: a JSON document (see `rehearse`).
REHEARSAL = """
    import json, os, random, signal, sys, threading, time
    from multiprocessing import get_context
    from pathlib import Path
    from engine.merge.job import load_numpy_single_threaded
    load_numpy_single_threaded()
    from engine.jobs import EventWriter
    from engine.merge import execute, schedule, stream
    from engine.merge.recipe import parse
    import engine.merge.verify

    schedule.BLOCK_ELEMENTS, schedule.COPY_BYTES = 512, 700
    fork = get_context("fork")
    lock = threading.Lock()
    PATCHED = ("pwrite", "fsync", "fdatasync", "ftruncate")
    AUDITED = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")

    def counting(limit, counted):
        # Calls so far in counted[0]; the process kills itself at number `limit`. counted[1]: bytes of tensor data.
        def count():
            with lock:
                counted[0] += 1
                return counted[0] == limit
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        for name in PATCHED:
            def patched(descriptor, *args, real=getattr(os, name), name=name):
                last = count()
                if last and name == "pwrite":
                    real(descriptor, memoryview(args[0])[: len(args[0]) // 2], args[1])  # half of it arrives
                if last:
                    die()
                done = real(descriptor, *args)
                if name == "pwrite" and os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
                    with lock:
                        counted[1] += done
                return done
            setattr(os, name, patched)
        def hook(event, args):
            if event in AUDITED and count():
                die()
        sys.addaudithook(hook)

    def child(task, out, limit, sender):
        counted = [0, 0]
        recipe = parse({**task["recipe"], "output": {"path": out, **task["output"]}}, "test", [])
        counting(limit, counted)
        result = execute.merge(
            recipe, EventWriter(), verify=task["verify"], threads=task["threads"], note_every=task["every"]
        )
        sender.send([counted, result["resumed_bytes"], result["bytes_written"], result["manifest"]["output"]["files"]])

    def merge(task, out, limit=0):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=child, args=(task, out, limit, sender))
        process.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            answer = None
        process.join()
        return process.exitcode, answer

    task = json.loads(sys.argv[1])
    random.seed(task["seed"])
    report = {"whole": merge(task, task["whole"]), "chains": []}
    calls = report["whole"][1][0][0]
    for number, kills in enumerate(task["chains"]):
        out = f'{task["whole"]}-{number}'
        deaths = []
        for _ in range(kills):
            limit = random.randrange(1, calls)
            code, answer = merge(task, out, limit)
            deaths.append([limit, code])
            if answer is not None or Path(out).exists():  # it got through, or died after the rename
                break
        else:
            code, answer = merge(task, out)
        report["chains"].append({"out": out, "deaths": deaths, "code": code, "answer": answer})
    print(json.dumps({"calls": calls, **report}))
"""


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    return make_adapter(tiny_llama, seed=1, name="pt"), make_adapter(tiny_llama, seed=2, rank=4, name="sft")


def recipe_of(base: Path, pair: tuple[Path, Path], method: str) -> dict[str, Any]:
    parameters = {"ties": {"density": 0.4}, "dare_ties": {"density": 0.6, "seed": 7}, "slerp": {"t": 0.3}}
    return {
        "base": str(base),
        "method": method,
        "adapters": {
            label: {"path": str(path), "weight": weight}
            for (label, weight), path in zip((("pt", 0.3), ("sft", 0.7)), pair, strict=True)
        },
        "parameters": parameters.get(method, {}),
    }


def rehearse(folder: Path, recipe: dict[str, Any], chains: list[int], **options: Any) -> dict[str, Any]:
    """Merge once undisturbed into `folder`/whole, then for each of `chains` kill so many times, then let it end."""
    task = {"recipe": recipe, "whole": str(folder / "whole"), "chains": chains, "seed": 0, "every": 3000,
            "verify": False, "threads": 3, "output": {}, **options}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REHEARSAL), json.dumps(task)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by name of every file, hidden ones too, but not of those that tell times."""
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("medmerge.json", "verification.json")
    }


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check(folder: Path, report: dict[str, Any]) -> list[int]:
    """Every chain ended like the undisturbed merge; returns the bytes each did not compute again."""
    whole = folder / "whole"
    code, (counted, resumed, written, files) = report["whole"]
    assert code == 0 and resumed == 0 and counted[1] == written == shard_bytes(whole)
    kept = []
    for chain in report["chains"]:
        out = Path(chain["out"])
        assert all(code in (-9, 0) for _, code in chain["deaths"]), chain
        assert contents(out) == contents(whole), chain
        if chain["answer"] is None:  # killed when all was done: only its lock is left
            lock_path(partial_path(out)).unlink(missing_ok=True)
            continue
        assert chain["code"] == 0, chain
        counted, resumed, written, found = chain["answer"]
        hashes = {name: sha for name, sha in files.items() if name != "verification.json"}
        assert {name: sha for name, sha in found.items() if name != "verification.json"} == hashes
        manifest = json.loads((out / "medmerge.json").read_text())
        assert manifest["output"]["files"] == found
        assert manifest["base"]["files"] == json.loads((whole / "medmerge.json").read_text())["base"]["files"]
        assert counted[1] == written - resumed, chain  # what was resumed was really not written again
        kept.append(resumed)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["whole", *(Path(chain["out"]).name for chain in report["chains"])]
    )
    return kept


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties"])
def test_killed_anywhere_and_run_again_it_is_the_same_merge(
    tiny_llama: Path, pair: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    report = rehearse(tmp_path, recipe_of(tiny_llama, pair, method), [1] * 5 + [4])
    assert report["calls"] > 200
    kept = check(tmp_path, report)
    assert sum(count > 0 for count in kept) >= 3 and max(kept) > shard_bytes(tmp_path / "whole") // 2


def test_several_shards_another_dtype_and_verification(
    tiny_llama_sharded: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Finished shards are not touched again; a kill during the verification loses nothing."""
    report = rehearse(
        tmp_path, recipe_of(tiny_llama_sharded, pair, "linear"), [1] * 4 + [3],
        verify=True, output={"dtype": "float32"}, seed=3,
    )  # fmt: skip
    kept = check(tmp_path, report)
    assert any(count == shard_bytes(tmp_path / "whole") for count in kept) or max(kept) > 100_000


def test_without_notes_only_finished_shards_are_kept(
    tiny_llama_sharded: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    report = rehearse(
        tmp_path, recipe_of(tiny_llama_sharded, pair, "linear"), [1] * 5, every=1 << 30, threads=1, seed=5
    )
    sizes = {path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors")}
    sums = {0}
    for size in sorted(sizes):
        sums |= {total + size for total in sums}
    kept = check(tmp_path, report)
    assert set(kept) <= sums and any(kept)


def test_changed_inputs_begin_anew(tiny_llama: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The journal's fingerprint: another weight, or an input that was written again, uses nothing of the old."""
    from engine.jobs import EventWriter
    from engine.merge import execute
    from engine.merge.journal import FileHashes, Journal, fingerprint
    from engine.merge.kernel import kernel
    from engine.merge.plan import make_plan
    from engine.merge.recipe import parse

    def started(document: dict[str, Any]) -> None:
        recipe = parse(document, "test", [])
        partial = tmp_path / "m.partial"
        partial.mkdir()
        mark = fingerprint(recipe.to_dict(), make_plan(recipe).input_files, {"kernel": kernel().name})
        with Journal.start(partial, mark) as journal:
            size = (tiny_llama / "model.safetensors").stat().st_size
            (partial / "model.safetensors").write_bytes(
                b"\0" * size
            )  # would be believed, were it the same merge
            journal.finish(FileHashes("model.safetensors", "0" * 64, "0" * 64))

    document = recipe_of(tiny_llama, pair, "linear") | {"output": str(tmp_path / "m")}
    started(document)
    other = json.loads(json.dumps(document))
    other["adapters"]["pt"]["weight"] = 0.31
    result = execute.merge(parse(other, "test", []), EventWriter(), verify=True)
    assert result["resumed_bytes"] == 0 and result["exit_code"] == 0
    (tmp_path / "m").rename(tmp_path / "first")
    started(document)
    weights = pair[0] / "adapter_model.safetensors"
    found = weights.stat()
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    result = execute.merge(parse(document, "test", []), EventWriter(), verify=True)
    assert result["resumed_bytes"] == 0 and result["exit_code"] == 0
