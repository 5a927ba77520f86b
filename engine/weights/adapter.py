"""A PEFT LoRA adapter folder, read by header only: which base tensors it changes, and how.

The delta of a linear layer is `scale * B @ A` (out x in), with A (r x in), B (out x r) and
scale = alpha / r, or alpha / sqrt(r) for rsLoRA; `rank_pattern` and `alpha_pattern` change r and alpha for
modules whose name ends in (or matches) a key, by PEFT's own rule. The other variants are in
engine/weights/changes.py. What cannot be merged exactly is refused by name, never skipped.

Who can use every variant asks `changes(base)`; who can only use plain low-rank pairs asks `match(base)`, which
refuses the rest. The files adapter_*.py beside this one are its own: config, keys, explain, match, experts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BadAdapterError
from engine.weights.adapter_config import CONFIG, LoraOptions, pattern_value, refuse_unsupported
from engine.weights.adapter_explain import check_complete, of_parameter, variants
from engine.weights.adapter_keys import Pair, Parts, sort_tensors
from engine.weights.adapter_match import OUTPUT, fit, tied_side
from engine.weights.changes import Change, ExpertFactor, LoraFactor
from engine.weights.checkpoint import Checkpoint, read_json
from engine.weights.tensorfile import TensorFile, TensorInfo, file_sha256, read_rows

__all__ = [
    "CONFIG",
    "PICKLE",
    "WEIGHTS",
    "Adapter",
    "Health",
    "LoraFactor",
    "pattern_value",
    "refuse_unsupported",
]

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MANIFEST = "training.json"
_PICKLES = (PICKLE, "adapter_model.pt", "adapter_0.pt", "adapter_0.bin", "adapter.pt")  # torchtune's, too
_BLOCK = 1 << 22  # elements read at once


@dataclass(frozen=True)
class Health:
    """What is wrong with the numbers of an adapter. Healthy when both lists are empty."""

    not_finite: tuple[str, ...]  # tensors holding NaN or infinity
    zero_b: tuple[str, ...]  # modules whose B (or A) is all zero: they change nothing (untrained)
    norm_by_layer: tuple[float, ...]  # Frobenius norm of the scaled low-rank deltas of each layer, in float64

    @property
    def ok(self) -> bool:
        return not self.not_finite and not self.zero_b


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder; nothing of the weights is in memory.

    `factors` holds the plain low-rank pairs of linear layers and embeddings by module name. Where `plain` is
    false it has other changes, too: only `changes(base)` gives all of them.
    """

    folder: Path
    config: dict[str, Any]
    file: TensorFile
    factors: dict[str, LoraFactor]
    options: LoraOptions
    parts: Parts
    training: dict[str, Any] = field(default_factory=dict)  # our manifest, when the folder has one

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Open a PEFT folder (adapter_config.json, adapter_model.safetensors).

        Raises:
            BadAdapterError: not an adapter, pickle weights, a kind that cannot be merged exactly (named), a key
                that the config does not explain, an A without its B, ranks that do not agree with the config.
            BadTensorFileError: the file is truncated or damaged.
        """
        if not folder.is_dir():
            raise BadAdapterError(f"{folder} is not a folder", f"an adapter is a folder with {CONFIG}")
        config = read_json(folder / CONFIG, BadAdapterError, f"an adapter folder has {CONFIG} and {WEIGHTS}")
        options = LoraOptions.read(folder, config)
        if not (folder / WEIGHTS).is_file():
            for name in _PICKLES:
                if (folder / name).is_file():
                    raise BadAdapterError(
                        f"{folder / name} is a pickle file, which is never loaded: it can run code",
                        "where you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(new, "
                        "safe_serialization=True)",
                    )
            raise BadAdapterError(f"{folder / WEIGHTS} is missing", "the adapter's weights are not here")
        file = TensorFile.open(folder / WEIGHTS)
        parts = sort_tensors(file)
        factors = {
            pair.module: _factor(options, pair, bool(config.get("fan_in_fan_out")))
            for pair in parts.pairs.values()
            if not of_parameter(options, pair)
        }
        check_complete(file, options, parts, factors)
        training: dict[str, Any] = {}
        if (folder / MANIFEST).is_file():
            training = read_json(
                folder / MANIFEST, BadAdapterError, "delete it to use the adapter without it"
            )
        return cls(folder, config, file, factors, options, parts, training)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        """ "pt" or "sft" as our training manifest says, else a guess from the folder name, else ""."""
        said = str(self.training.get("kind", ""))
        if said:
            return said
        words = re.split(r"[^a-z]+", self.folder.name.lower())
        return "sft" if "sft" in words else "pt" if "pt" in words or "cpt" in words else ""

    @property
    def rank(self) -> int:
        """The largest rank of its modules (of fused experts: as the config says); 0 when it has none."""
        return max((self._rank(pair) for pair in self.parts.pairs.values()), default=0)

    @property
    def scales(self) -> tuple[float, ...]:
        """The different scales of its modules, ascending."""
        return tuple(sorted({self._scale(pair) for pair in self.parts.pairs.values()}))

    @property
    def dtype(self) -> str:
        return next(iter(self.file.tensors.values())).dtype

    @property
    def nbytes(self) -> int:
        return self.file.size

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the module names it changes: ("down_proj", "q_proj", ...)."""
        return tuple(sorted({pair.module.rsplit(".", 1)[-1] for pair in self.parts.pairs.values()}))

    @property
    def base_name(self) -> str:
        """The base model the config names ("" when it names none)."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def template(self) -> str:
        """The chat template it was trained with, as our manifest says ("" for foreign adapters: unknown)."""
        return str(self.training.get("template") or "")

    @cached_property
    def sha256(self) -> str:
        """One hash of what decides the delta: config and weights."""
        digest = hashlib.sha256(file_sha256(self.file.path).encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def modules(self) -> int:
        """Number of layers it changes, low-rank or whole."""
        names = {pair.module for pair in self.parts.pairs.values()} | set(self.parts.token_rows)
        return len(names | {name.rpartition(".")[0] for name in self.parts.saved})

    @property
    def variants(self) -> tuple[str, ...]:
        """What it has besides plain low-rank pairs, in words: ("rsLoRA", "DoRA", "modules_to_save: lm_head")."""
        return tuple(variants(self.options, self.parts, self.factors))

    @property
    def plain(self) -> bool:
        """Whether low-rank pairs of linear layers and embeddings are all it has, as far as its file says."""
        whole = self.parts.saved or self.parts.token_rows
        pairs = self.parts.pairs.values()
        return not whole and all(
            pair.magnitude is None and pair.bias is None and pair.module in self.factors for pair in pairs
        )

    def changes(self, base: Checkpoint) -> dict[str, Change]:
        """Everything it does to the base, by base tensor name.

        On a base with tied embeddings the key `lm_head.weight` may be there though the base has no such tensor:
        then the output side changes apart from the input side (see `side`). A tensor saved with the adapter
        that is the base's own is left out.

        Raises BadAdapterError when a key matches no tensor of the base, or not its shape (names both), and when
        two changes of one tensor cannot be added.
        """
        return fit(self.parts, self.options, base, self.factors, self.base_name)

    def side(self, base: Checkpoint) -> str:
        """Which side of the base's tied embeddings it changes: "input", "output", "both", or ""."""
        return tied_side(base, set(self.changes(base)))

    def match(self, base: Checkpoint) -> dict[str, LoraFactor]:
        """Its factors by the name of the base tensor each one changes, for uses that know only those.

        Raises BadAdapterError as `changes` does, and when it changes anything by other means (names the
        variant) or the output side of tied embeddings alone.
        """
        matched: dict[str, LoraFactor] = {}
        for name, change in self.changes(base).items():
            if not isinstance(change, LoraFactor) or isinstance(change, ExpertFactor):
                raise BadAdapterError(
                    f"{self.file.path}: has {', '.join(self.variants) or type(change).__name__} ({name}), which "
                    "only a merge can apply",
                    "merge it into the base (medmerge merge), and use the result",
                )
            if name == OUTPUT and name not in base.tensors:
                raise BadAdapterError(
                    f"{self.file.path}: module {change.module} matches no tensor of {base.folder} (it ties its "
                    "embeddings, and the adapter changes the output side alone)",
                    "merge it into the base (medmerge merge), which unties them, and use the result",
                )
            matched[name] = change
        return matched

    def health(self) -> Health:
        """Read every tensor once and look for NaN, infinity and all-zero B; norms via r x r Gram matrices.

        The norms are those of the low-rank products, for DoRA without its magnitudes.
        """
        not_finite = [info.name for info in self.file.tensors.values() if info.is_float and not _finite(info)]
        broken, zero_b = set(not_finite), []
        layers: dict[int, float] = {}
        for pair in self.parts.pairs.values():
            infos = pair.whole()
            a, b = (read_rows(info).astype(np.float64) for info in infos)
            if not b.any() or not a.any():
                zero_b.append(pair.module)
            layer = re.search(r"\.(\d+)\.", pair.module)
            if layer and not broken & {info.name for info in infos}:
                square = max(sum(self._squares(pair, a, b)), 0.0)
                layers[int(layer[1])] = layers.get(int(layer[1]), 0.0) + square
        norms = tuple(math.sqrt(layers.get(i, 0.0)) for i in range(max(layers, default=-1) + 1))
        return Health(tuple(not_finite), tuple(zero_b), norms)

    def _squares(self, pair: Pair, a: Any, b: Any) -> Iterator[float]:
        """Squared Frobenius norms of scale * B A: of the layer, or of each expert."""
        rank, scale = self._rank(pair), self._scale(pair)
        experts = a.shape[0] // rank
        for expert in range(experts):
            rows = a[expert * rank : (expert + 1) * rank]
            columns = (
                b[:, expert * rank : (expert + 1) * rank]
                if self.options.grouped_experts or experts == 1
                else b[:, expert::experts]
            )
            yield scale**2 * float(np.sum((columns.T @ columns) * (rows @ rows.T)))

    def _rank(self, pair: Pair) -> int:
        if pair.module in self.factors and not pair.inner:
            return self.factors[pair.module].rank
        a, _ = pair.whole()
        rank = self.options.r or a.shape[0]
        return rank if a.shape[0] % rank == 0 else a.shape[0]

    def _scale(self, pair: Pair) -> float:
        if pair.module in self.factors and not pair.inner:
            return self.factors[pair.module].scale
        return self.options.scale(self._rank(pair), self.options.alpha_of(pair.module))


def _factor(options: LoraOptions, pair: Pair, fan_in_fan_out: bool) -> LoraFactor:
    """A layer's pair. Its orientation is the config's word until a base is seen (see adapter_match)."""
    a, b = pair.whole()
    rank, alpha = options.rank_of(pair.module, a.shape[0]), options.alpha_of(pair.module)
    if a.shape[0] != rank:
        raise BadAdapterError(
            f"{a.file}: {pair.module} has A {list(a.shape)} and B {list(b.shape)}; {options.path} says rank {rank}",
            "weights and config do not belong together",
        )
    return LoraFactor(
        pair.module, a, b, rank, alpha, options.scale(rank, alpha), bool(pair.embedding) or fan_in_fan_out
    )


def _finite(info: TensorInfo) -> bool:
    step = max(1, _BLOCK // max(1, info.columns))
    return all(
        np.isfinite(read_rows(info, first, min(step, info.rows - first))).all()
        for first in range(0, info.rows, step)
    )
