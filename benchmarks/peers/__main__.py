"""Run every peer once on a small random model (18 M parameters), and have our verifier say what it made.

    python -m benchmarks.peers [--where DIR]

A check that the peers run and merge what they are asked to, not a measurement: at this size most of their time
is spent importing. `python -m benchmarks.merge` has the large table.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models import linear_shapes, make_adapter, make_base
from benchmarks.peers import rows
from engine.jobs import EventWriter
from engine.merge.execute import merge
from engine.merge.recipe import parse
from engine.merge.verify import Verdict, verify_merge
from engine.merge.verify.asked import DEFAULT, Asked, AskedEntry

LAYERS, HIDDEN, MIDDLE, HEADS = 2, 256, 704, 4
ADAPTERS, MODELS = {"pt": 0.3, "sft": 0.7}, {"a": 0.5, "b": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--where", type=Path, help="folder to work in (default: the temporary folder)")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().where, prefix="peers-") as folder:
        scratch = Path(folder)
        make_inputs(scratch)
        print(f"{'':34} {'seconds':>8} {'peak MB':>8}  what our verifier says of it")
        for peer, asked in merges(scratch):
            print(line(peer, asked, scratch), flush=True)
        checked = rows.deltalint(scratch / "base", scratch / "pt", scratch / "a")
        timed = rows.run(checked)
        print(f"{checked.name:34} {timed.seconds:8.2f} {timed.peak_mb:8.0f}  says of base + pt: {timed.said}")


def make_inputs(scratch: Path) -> None:
    """A base, two adapters, and the two models base + pt and base + sft (merged by us)."""
    make_base(scratch / "base", LAYERS, HIDDEN, MIDDLE, HEADS)
    for seed, label in enumerate(ADAPTERS):
        make_adapter(scratch / label, linear_shapes(LAYERS, HIDDEN, MIDDLE), seed)
    for model, label in zip(MODELS, ADAPTERS, strict=True):
        recipe = {
            "base": str(scratch / "base"),
            "adapters": {label: {"path": str(scratch / label), "weight": 1.0}},
            "output": {"path": str(scratch / model)},
        }
        merge(parse(recipe, "recipe", []), EventWriter())


def merges(scratch: Path) -> Iterator[tuple[rows.Peer, Asked]]:
    """Each merging peer, and what it is asked for."""
    base, out = scratch / "base", scratch / "out"
    adapters = {label: (scratch / label, weight) for label, weight in ADAPTERS.items()}
    models = {label: (scratch / label, weight) for label, weight in MODELS.items()}
    mixture = Asked.mixture({label: path for label, (path, _) in adapters.items()}, ADAPTERS)
    yield rows.peft(base, adapters, out), mixture
    yield rows.mergekit_adapters(base, adapters, out), mixture
    yield rows.mergekit_models("linear", models, out), of_models("linear", scratch)
    yield rows.mergekit_models("slerp", models, out, t=0.5), of_models("slerp", scratch)
    for method in ("ties", "dare_ties"):
        yield rows.mergekit_models(method, models, out, base, density=0.5), of_models(method, scratch)


def of_models(method: str, scratch: Path) -> Asked:
    entries = tuple(
        AskedEntry(
            label, scratch / label, "model", {DEFAULT: 1.0 if method == "slerp" else w}, {DEFAULT: 0.5}
        )
        for label, w in MODELS.items()
    )
    return Asked(method, entries)


def line(peer: rows.Peer, asked: Asked, scratch: Path) -> str:
    """Run a peer and describe it in one line; its output is removed."""
    if peer.missing:
        return f"{peer.name:34} {peer.missing}"
    timed = rows.run(peer)
    out = scratch / "out"
    needs_base = asked.method not in ("linear", "slerp") or not asked.models
    verdict = verify_merge(
        out, scratch / "base" if needs_base else None, {}, None, EventWriter(), asked=asked
    )
    for folder in (out, Path(f"{out}.loras")):
        shutil.rmtree(folder, ignore_errors=True)
    return f"{peer.name:34} {timed.seconds:8.2f} {timed.peak_mb:8.0f}  {said(verdict)}"


def said(verdict: Verdict) -> str:
    found = verdict.effective_weights or {}
    weights = ", ".join(f"{label} {weight:.4f}" for label, weight in found.items() if weight is not None)
    return f"{verdict.verdict}, {verdict.differing_share:.1%} of elements" + (
        f"; {weights}" if weights else ""
    )


if __name__ == "__main__":
    main()
