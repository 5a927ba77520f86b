"""verify_gguf: is a GGUF what was asked, and which weights are really in it. Knows nothing of the code that writes.

Called for `medmerge verify FILE.gguf`, and for every GGUF that is made, before it gets its name.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.errors import BadInputError, BadRecipeError
from engine.gguf.architecture import Architecture
from engine.gguf.blocks import SLOW, dequantisable
from engine.gguf.reader import GgufFile
from engine.gguf.verify.asked import Float64Array, Pair, Pairing, pair_tensors, read_all_deltas
from engine.gguf.verify.conclude import Evidence, GgufVerdict, conclude
from engine.gguf.verify.guess import guess_weights
from engine.gguf.verify.measure import TensorStats, measure
from engine.gguf.verify.metadata import check_metadata, quantised_with_imatrix
from engine.gguf.verify.sample import best_route, draw
from engine.jobs.events import EventWriter
from engine.merge.verify.verdict import Finding
from engine.weights import Checkpoint

PerTensor = Mapping[str, Mapping[str, float]]
REPLAY_ELEMENTS = 40_000_000  # quantised again in slow types, for what a right file would give


@dataclass(frozen=True)
class Question:
    """What was asked of the file: weights by label and, where they differ, by tensor."""

    labels: tuple[str, ...]
    weights: Mapping[str, float]
    per_tensor: PerTensor = field(default_factory=dict)

    def of(self, pair: Pair) -> Float64Array:
        """The asked weight of each delta of this tensor."""
        name = pair.source.name
        return np.array(
            [self.per_tensor.get(k, {}).get(name, self.weights.get(k, 0.0)) for k in pair.labels], np.float64
        )


def verify_gguf(
    path: Path,
    base: Path,
    adapters: Mapping[str, Path],
    weights: Mapping[str, float] | None,
    events: EventWriter,
    per_tensor_weights: PerTensor | None = None,
    threads: int | None = None,
    pre: str = "",
) -> GgufVerdict:
    """Say whether a GGUF holds base + sum_k weights[k] * delta_k in its types, and which weights are in it.

    Args:
        path: a GGUF of a whole model, made by any tool (Llama or Qwen3 architecture).
        base: the base's checkpoint folder. Without adapters: the checkpoint the file was made from.
        adapters: PEFT LoRA folders by label (plain low-rank changes), or none.
        weights: what was asked, by label; None to ask what is in there.
        events: progress in bytes of the GGUF.
        per_tensor_weights: weights that differ by tensor, {label: {base tensor name: weight}}; a tensor not
            named has the label's weight in `weights`.
        threads: tensors at once; by default the number of processors, 4 at most (each needs about 50 MB).
        pre: the pre-tokenizer the file should name, where it is not what is recognised.

    Raises:
        BadTensorFileError, BadModelError, BadAdapterError: an input that cannot be read or does not fit.
        BadInputError: a LoRA GGUF. BadRecipeError: weights for labels without an adapter, or the reverse.
        ChildFailedError: ggml's library is missing.
    """
    started = time.monotonic()
    if weights is not None and set(weights) != set(adapters):
        raise BadRecipeError(
            f"adapters and weights name different labels: {', '.join(sorted(set(weights) ^ set(adapters)))}",
            "give every adapter a weight (LABEL=PATH:WEIGHT), or none of them",
        )
    file = GgufFile.open(path)
    if file.metadata.get("general.type", "model") != "model":
        raise BadInputError(
            f"{path} is a GGUF of type {str(file.metadata['general.type'])!r:.40}, not a model",
            "verify the merged model, or chat with base and adapters live",
        )
    checkpoint = Checkpoint.open(base)
    architecture = Architecture.of(checkpoint)
    pairing = pair_tensors(file, checkpoint, architecture, read_all_deltas(checkpoint, adapters))
    findings, notes = check_metadata(file, checkpoint, architecture, pre)
    pairing.findings += findings
    pairing.warnings += notes
    _drop_unreadable(pairing)
    labels = tuple(adapters)
    touched = [pair for pair in pairing.pairs if pair.deltas]
    pieces = draw(touched or pairing.pairs)
    guessed, fits = None, True
    if weights is None and labels and touched:
        guessed, fits = guess_weights(pieces, labels)
    question = Question(labels, weights or guessed or dict.fromkeys(labels, 0.0), per_tensor_weights or {})
    route = best_route(pieces, [question.of(piece.pair) for piece in pieces])
    imatrix = quantised_with_imatrix(file)
    stats = _measure(pairing.pairs, question, route, imatrix, events, threads or min(4, os.cpu_count() or 1))
    evidence = Evidence(
        file, checkpoint, labels, stats, pairing, pieces, route, imatrix,
        asked=dict(weights) if weights is not None else None, guessed=guessed, guess_fits=fits,
        by_tensor=bool(per_tensor_weights),
    )  # fmt: skip
    return conclude(evidence, time.monotonic() - started)


def _drop_unreadable(pairing: Pairing) -> None:
    """Take tensors of types the gguf package cannot dequantise off the list, with a finding."""
    known = {kind: dequantisable(kind) for kind in {pair.stored.type for pair in pairing.pairs}}
    odd = [pair for pair in pairing.pairs if not known[pair.stored.type]]
    pairing.pairs = [pair for pair in pairing.pairs if known[pair.stored.type]]
    if odd:
        kinds = ", ".join(sorted({pair.stored.type for pair in odd}))
        pairing.findings.append(
            Finding(
                "not_checkable", kinds, f"{len(odd)} tensors are of types that cannot be read here: {kinds}"
            )
        )


def _measure(
    pairs: Sequence[Pair],
    question: Question,
    route: str,
    imatrix: bool,
    events: EventWriter,
    threads: int,
) -> list[TensorStats]:
    """Measure every tensor, large ones first, `threads` at once."""
    total = sum(pair.stored.nbytes for pair in pairs)
    slow = sum(pair.stored.elements for pair in pairs if _slow(pair))
    every = max(1, -(-slow // REPLAY_ELEMENTS))
    lock, done = threading.Lock(), 0

    def one(pair: Pair) -> TensorStats:
        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                events.progress(done, total, unit="B", message=pair.stored.name, phase="check")

        own = every if _slow(pair) else 1
        return measure(pair, question.of(pair), route if pair.deltas else "", own, imatrix, advance)

    order = sorted(range(len(pairs)), key=lambda i: -pairs[i].stored.elements)
    pool = ThreadPoolExecutor(threads)
    try:
        futures = {i: pool.submit(one, pairs[i]) for i in order}
        return [futures[i].result() for i in range(len(pairs))]
    finally:
        pool.shutdown(cancel_futures=True)


def _slow(pair: Pair) -> bool:
    return pair.stored.type in SLOW or pair.stored.type.startswith("IQ")
