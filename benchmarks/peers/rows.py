"""Each peer as code for a fresh interpreter: what its users run, no more, and everything on disk at the end.

mergekit runs in `.venv-mergekit` (`make mergekit`), the others in this environment. A run's time is from the
start of the interpreter to its end, so imports count, as they do for us; its memory is the process's own VmHWM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MERGEKIT_PYTHON = ROOT / ".venv-mergekit" / "bin" / "python"
_PEAK = "\nprint('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"

_PEFT = """
    import json, os, sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base, adapters, out, kind = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    (first, (path, _)), *rest = adapters.items()
    model = PeftModel.from_pretrained(model, path, adapter_name=first)
    for label, (path, _) in rest:
        model.load_adapter(path, adapter_name=label)
    weights = [weight for _, weight in adapters.values()]
    model.add_weighted_adapter(list(adapters), weights, "both", combination_type=kind)
    model.set_adapter("both")
    model.merge_and_unload().save_pretrained(out)
    os.sync()
"""
_MERGEKIT = """
    import json, os, sys
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    config, out = MergeConfiguration.model_validate(json.loads(sys.argv[1])), sys.argv[2]
    options = MergeOptions(lora_merge_cache=out + ".loras", copy_tokenizer=False, quiet=True, random_seed=0)
    run_merge(config, out, options)
    os.sync()
"""
_DELTALINT = """
    import json, sys
    from deltalint import check_merge
    report = check_merge(sys.argv[1], sys.argv[2], sys.argv[3])
    print("VERDICT", report.verdict.value)
"""


@dataclass(frozen=True)
class Peer:
    """A program to time. `missing` says why it cannot run here; empty when it can."""

    name: str
    python: Path
    code: str
    arguments: tuple[str, ...]
    missing: str = ""


@dataclass(frozen=True)
class Timed:
    """One run: wall seconds, the process's peak memory in MB (10^6 bytes), what it printed."""

    seconds: float
    peak_mb: float
    said: str


def peft(base: Path, adapters: Mapping[str, tuple[Path, float]], out: Path, kind: str = "cat") -> Peer:
    """Load in bf16, `add_weighted_adapter` (cat: exact sum of ranks), `merge_and_unload`, `save_pretrained`."""
    listed = json.dumps({label: [str(path), weight] for label, (path, weight) in adapters.items()})
    return Peer(f"PEFT {kind}", Path(sys.executable), _PEFT, (str(base), listed, str(out), kind))


def mergekit_adapters(base: Path, adapters: Mapping[str, tuple[Path, float]], out: Path) -> Peer:
    """task_arithmetic of `base+lora` pairs: it merges each adapter into a copy of the base first (OUT.loras)."""
    models = [
        {"model": f"{base}+{path}", "parameters": {"weight": weight}} for path, weight in adapters.values()
    ]
    return _mergekit("adapters", "task_arithmetic", models, {}, base, out)


def mergekit_models(
    method: str,
    models: Mapping[str, tuple[Path, float]],
    out: Path,
    base: Path | None = None,
    **parameters: Any,
) -> Peer:
    """Whole checkpoints by linear, slerp (t=), ties or dare_ties (density=), in bf16 as it does by default.

    slerp goes from the first model to the second; the others, but linear, need `base`.
    """
    entries = [{"model": str(path), "parameters": {"weight": weight}} for path, weight in models.values()]
    if method == "slerp":
        base = next(iter(models.values()))[0]
        entries = [{"model": str(path)} for path, _ in models.values()]
    return _mergekit(f"{len(models)} models", method, entries, parameters, base, out)


def deltalint(base: Path, adapter: Path, merged: Path) -> Peer:
    """Check a merge of one adapter at strength 1."""
    return Peer("deltalint", Path(sys.executable), _DELTALINT, (str(base), str(adapter), str(merged)))


def _mergekit(
    what: str,
    method: str,
    models: list[dict[str, Any]],
    parameters: Mapping[str, Any],
    base: Path | None,
    out: Path,
) -> Peer:
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    config |= {"base_model": str(base)} if base else {}
    config |= {"parameters": dict(parameters)} if parameters else {}
    return Peer(
        f"mergekit {method}, {what}",
        MERGEKIT_PYTHON,
        _MERGEKIT,
        (json.dumps(config), str(out)),
        "" if MERGEKIT_PYTHON.exists() else f"no {MERGEKIT_PYTHON.parents[1].name}: run `make mergekit`",
    )


def run(peer: Peer) -> Timed:
    """Run a peer once; what it writes stays, for the caller to verify and remove.

    Raises RuntimeError with its last words when it fails, or when it is missing.
    """
    if peer.missing:
        raise RuntimeError(f"{peer.name}: {peer.missing}")
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.sync()
    started = time.perf_counter()
    done = subprocess.run(
        [peer.python, "-c", textwrap.dedent(peer.code) + _PEAK, *peer.arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{peer.name} failed:\n{done.stderr[-2000:]}")
    said, _, peak = done.stdout.rpartition("PEAK ")
    return Timed(seconds, int(peak) * 1024 / 1e6, said.strip())
