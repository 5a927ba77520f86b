"""LoRA on fused experts (PEFT's `target_parameters`): which parameter a pair belongs to, and how it lies there.

PEFT wraps a module that holds parameters once for each of them, and writes the factors without the parameter's
name: `experts.lora_A` is the outer wrapper, `experts.base_layer.lora_A` the next one in. So the parameter is found
by shape. For a tensor (experts, d1, d2), A (experts * r, in) and B (out, r * experts), PEFT from 0.19.1 on takes
out = d1 and in = d2, except in models whose experts are stored transposed; PEFT before that took in = d1 and
out = d2 for all. Square experts therefore need the version, which newer configs name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.errors import BadAdapterError
from engine.weights.adapter_config import LoraOptions
from engine.weights.adapter_keys import Pair
from engine.weights.changes import ExpertFactor, Experts, LoraFactor
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorInfo

# transformers' models whose experts module says is_transposed: stored (experts, in, out).
_TRANSPOSED_MODELS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
_SWAPPED_SINCE = (0, 19, 1)
# One expert's tensors, in the order transformers 5 stacks their rows into the fused parameter.
_APART = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}  # fmt: skip
_APART_MODULES = ((".mlp.experts", ".block_sparse_moe.experts"),)  # Mixtral's name on disk


@dataclass(frozen=True)
class Place:
    """A parameter a pair may belong to. `apart` holds, where experts lie apart, each one's tensors in row order."""

    name: str  # as PEFT calls it: "model.layers.0.mlp.experts.gate_up_proj"
    tensor: str  # its name in the base
    experts: int
    rows: int
    columns: int
    apart: tuple[tuple[TensorInfo, ...], ...] = ()
    matrix: bool = False  # a two-dimensional parameter: a plain low-rank change


def expert_changes(
    pairs: Sequence[Pair], options: LoraOptions, base: Checkpoint, hint: str
) -> Iterator[LoraFactor | Experts]:
    """The changes of the pairs that are no plain linear layer's.

    Raises BadAdapterError when a pair fits no targeted parameter, or more than one.
    """
    taken: dict[str, str] = {}
    for pair in pairs:
        a, b = pair.whole()
        if pair.bias is not None or pair.magnitude is not None:
            raise BadAdapterError(
                f"{a.file}: {pair.module} is fused experts with a bias or DoRA, which PEFT lacks"
            )
        places = list(_places(pair.module, options, base))
        fits = [(place, flip) for place in places for flip in _orientations(place, a, b, options, base)]
        if len(fits) != 1:
            seen = ", ".join(f"{p.tensor} {[p.experts, p.rows, p.columns]}" for p in places) or "none"
            raise BadAdapterError(
                f"{a.file}: key {a.name} {list(a.shape)} with B {list(b.shape)} fits "
                + (f"{len(fits)} ways into" if fits else "no")
                + f" targeted parameters of {pair.module} in {base.folder} (they are: {seen})",
                "the file does not say which; " + hint if fits else hint,
            )
        (place, flip) = fits[0]
        if place.tensor in taken:
            raise BadAdapterError(
                f"{a.file}: {a.name} and {taken[place.tensor]} both fit {place.tensor}", hint
            )
        taken[place.tensor] = a.name
        yield from _changes(pair.module, place, flip, a, b, options)


def _changes(
    module: str, place: Place, flip: bool, a: TensorInfo, b: TensorInfo, options: LoraOptions
) -> Iterator[LoraFactor | Experts]:
    rank = a.shape[0] // place.experts
    alpha = options.alpha_of(place.name)
    scale, grouped = options.scale(rank, alpha), options.grouped_experts
    if place.apart:
        for expert, tensors in enumerate(place.apart):
            first = 0
            for info in tensors:
                yield ExpertFactor(
                    module, a, b, rank, alpha, scale, False, info.name, expert, place.experts, first,
                    info.shape[0], grouped,
                )  # fmt: skip
                first += info.shape[0]
    elif place.matrix:
        yield LoraFactor(module, a, b, rank, alpha, scale, False, place.tensor)
    else:
        yield Experts(module, a, b, rank, alpha, scale, place.experts, flip, place.tensor, grouped)


def _places(module: str, options: LoraOptions, base: Checkpoint) -> Iterator[Place]:
    """The targeted parameters of a module that the base has."""
    names = {target.rpartition(".")[2] for target in options.target_parameters}
    prefixes = [f"{module}."] + [
        module.replace(ours, theirs) + "." for ours, theirs in _APART_MODULES if ours in module
    ]
    for leaf in sorted(names):
        full = f"{module}.{leaf}"
        if not any(_targets(target, full) for target in options.target_parameters):
            continue
        stored = base.tensors.get(full)
        if stored is not None and len(stored.shape) == 3:
            yield Place(full, full, *stored.shape)
        elif stored is not None and len(stored.shape) == 2:
            yield Place(full, full, 1, *stored.shape, matrix=True)
        elif stored is None:
            for prefix in prefixes:
                yield from _apart(full, prefix, leaf, base)


def _targets(target: str, full: str) -> bool:
    """PEFT's rule: the parameter's full name, its end, or a regular expression for it."""
    if full == target or full.endswith("." + target):
        return True
    try:
        return re.fullmatch(target, full) is not None
    except re.error:
        return False


def _apart(full: str, prefix: str, leaf: str, base: Checkpoint) -> Iterator[Place]:
    for scheme in _APART.get(leaf, ()):
        experts: list[tuple[TensorInfo, ...]] = []
        while all(f"{prefix}{len(experts)}.{part}.weight" in base.tensors for part in scheme):
            experts.append(tuple(base.tensors[f"{prefix}{len(experts)}.{part}.weight"] for part in scheme))
        shapes = {tuple(info.shape for info in tensors) for tensors in experts}
        if len(shapes) == 1 and {len(info.shape) for info in experts[0]} == {2}:
            rows, columns = sum(info.shape[0] for info in experts[0]), experts[0][0].columns
            yield Place(full, experts[0][0].name, len(experts), rows, columns, tuple(experts))


def _orientations(
    place: Place, a: TensorInfo, b: TensorInfo, options: LoraOptions, base: Checkpoint
) -> list[bool]:
    """Whether the pair lies (False) as (out, in) or (True) as (in, out) in the tensor; [] when it does not fit."""
    rank = options.rank_of(place.name, a.shape[0] // place.experts)
    if a.shape[0] != rank * place.experts:
        return []
    straight = (b.shape[0], a.shape[1]) == (place.rows, place.columns)
    flipped = (a.shape[1], b.shape[0]) == (place.rows, place.columns)
    if place.apart or place.experts == 1:
        return [False] if straight else []
    fits = [flip for flip, fine in ((False, straight), (True, flipped)) if fine]
    if base.config.get("model_type") in _TRANSPOSED_MODELS:
        wanted = True
    elif options.peft_version:
        wanted = options.peft_version < _SWAPPED_SINCE
    else:
        return fits
    return [wanted] if wanted in fits else fits
