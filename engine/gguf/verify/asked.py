"""What each tensor of a GGUF should hold: the checkpoint tensor it stands for, its deltas, its rows' order.

Written apart from the converter: names come from the gguf package's own table, and the order of q and k from
llama.cpp's rotation (neighbouring rows), not from the code that writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import BadAdapterError, BadModelError
from engine.gguf.architecture import Architecture
from engine.gguf.reader import GgufFile, GgufTensor
from engine.merge.verify import bits
from engine.merge.verify.deltas import read_deltas, reference
from engine.merge.verify.files import shortened
from engine.merge.verify.terms import Loaded, Part, Term
from engine.merge.verify.verdict import Finding
from engine.weights import Checkpoint, TensorInfo
from engine.weights.tensorfile import Float32Array, read_rows

EMBEDDING, HEAD, OUTPUT = "model.embed_tokens.weight", "lm_head.weight", "output.weight"
FREQUENCIES = "rope_freqs.weight"  # computed from config.json for Llama 3's scaling, not a weight
BUFFER = "rotary_emb.inv_freq"  # old checkpoints save it; llama.cpp computes it

UNIT = 2.0**-24  # relative error of one float32 rounding

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Some rows in the GGUF's order, flat: base (n,) and unit deltas (K, n), float32, n = rows * columns.

    `parts` compute single elements exactly; `places` are their positions in the checkpoint's order.
    """

    base: Float32Array
    deltas: Float32Array
    parts: tuple[Part, ...]
    roundings: tuple[int, ...]
    places: npt.NDArray[np.int64] | None  # None: the order is the checkpoint's

    def value(self, weights: Float64Array) -> Float32Array:
        """base + sum over k of weights[k] * delta_k, (n,)."""
        if not self.parts:
            return self.base
        result: Float32Array = weights.astype(np.float32) @ self.deltas
        result += self.base
        return result

    def exact(self, weights: Float64Array, at: npt.NDArray[np.int64]) -> tuple[Float64Array, Float64Array]:
        """The same of some elements in float64, and how far float32 sums in any order may be from it.

        slack = sum over k of (c_k + K + 1) 2^-24 |w_k| size_k, and (K + 1) 2^-24 |W| (c_k: roundings in delta_k).
        """
        base = self.base[at].astype(np.float64)
        value, slack = base.copy(), (len(self.parts) + 1) * UNIT * np.abs(base)
        where = at if self.places is None else self.places[at]
        for weight, part, roundings in zip(weights, self.parts, self.roundings, strict=True):
            delta, size = part.exact(where)
            value += weight * delta
            slack += (roundings + len(self.parts) + 1) * UNIT * abs(weight) * size
        return value, slack if self.parts else np.zeros_like(slack)


@dataclass(frozen=True)
class Pair:
    """A tensor of the GGUF and what it should hold. `heads` > 0: rows reordered inside that many heads."""

    stored: GgufTensor
    source: TensorInfo
    deltas: tuple[Term, ...] = ()
    heads: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(delta.label for delta in self.deltas)

    @property
    def unit(self) -> int:
        """Rows that belong together: a head, or one."""
        return self.stored.rows // self.heads if self.heads and len(self.stored.shape) > 1 else 1

    def load(self) -> list[Loaded]:
        """The deltas ready to compute: their factors in memory."""
        return [delta.load(self.source) for delta in self.deltas]

    def rows(self, first: int, count: int, loaded: list[Loaded]) -> Rows:
        """Rows `first : first + count` of the stored tensor (multiples of `unit`); `loaded` is `load()`."""
        base = read_rows(self.source, first, count)
        places = self._places(count, base.shape[1])
        parts = tuple(delta.block(first, bits.Rows.of(base)) for delta in loaded)
        deltas = np.empty((len(parts), base.size), np.float32)
        for k, part in enumerate(parts):
            flat = part.dense.reshape(-1)
            deltas[k] = flat if places is None else flat[places]
        flat = base.reshape(-1)
        roundings = tuple(delta.roundings for delta in loaded)
        return Rows(flat if places is None else flat[places], deltas, parts, roundings, places)

    def _places(self, count: int, columns: int) -> npt.NDArray[np.int64] | None:
        """Which element of the checkpoint's rows each stored element is; None for the same order.

        llama.cpp rotates rows (2i, 2i + 1) of a head, Llama checkpoints rows (i, i + d/2). The elements of a
        bias are the rows of one column.
        """
        if not self.heads:
            return None
        vector = len(self.source.shape) == 1
        height = columns // self.heads if vector else self.unit
        rows = columns if vector else count
        inside = np.arange(height)
        inside = inside // 2 + (inside % 2) * (height // 2)
        order = (np.arange(rows) // height) * height + np.tile(inside, rows // height)
        if vector:
            return np.asarray(order)
        return np.asarray((order[:, None] * columns + np.arange(columns)).reshape(-1))


@dataclass
class Pairing:
    """All tensors of a GGUF against a checkpoint's: what can be compared, and what is there too much or too little."""

    pairs: list[Pair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_all_deltas(base: Checkpoint, adapters: Mapping[str, Path]) -> dict[str, tuple[Term, ...]]:
    """The deltas of all adapters by base tensor, in the order of the labels.

    Raises BadAdapterError: not an adapter, of another base, or with new tokens (the vocabulary would grow).
    """
    found: dict[str, tuple[Term, ...]] = {}
    for label, folder in adapters.items():
        for name, term in read_deltas(label, folder, base).items():
            tensor = reference(base, name)
            if tensor is not None and term.shape != tensor.shape:
                raise BadAdapterError(
                    f"{term.where}: {name} would be {list(term.shape)}, and is {list(tensor.shape)} in the base",
                    "new tokens need a merged checkpoint: verify the GGUF against that (--base MERGE)",
                )
            found[name] = (*found.get(name, ()), term)
    return found


def pair_tensors(
    file: GgufFile, base: Checkpoint, architecture: Architecture, deltas: Mapping[str, tuple[Term, ...]]
) -> Pairing:
    """Find the checkpoint tensor of every GGUF tensor.

    Raises BadModelError for a checkpoint tensor that has no place in a GGUF of this architecture.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], architecture.layers)
    result, known = Pairing(), {FREQUENCIES} if architecture.rope.scaling == "llama3" else set()
    missing: list[str] = []
    reshaped: list[str] = []
    for name, tensor in base.tensors.items():
        if name.endswith(BUFFER) or (name == HEAD and architecture.tied):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise BadModelError(f"{tensor.file}: {name} has no name in llama.cpp's {architecture.name}")
        known.add(target)
        _add(
            result, file, target, tensor, deltas.get(name, ()), _heads(name, architecture), missing, reshaped
        )
    if architecture.tied and (OUTPUT in file.tensors or EMBEDDING in deltas or HEAD in deltas):
        known.add(OUTPUT)  # a head of its own: needed where an adapter changes one side, else a copy
        if EMBEDDING not in deltas and HEAD not in deltas:
            result.warnings.append("output.weight is written out as a copy of the embedding: the same model")
        own = deltas.get(HEAD, ())
        _add(result, file, OUTPUT, base.tensors[EMBEDDING], own, 0, missing, reshaped)
    if FREQUENCIES in known:
        missing += _frequencies(file, architecture)
    result.unexpected = [name for name in file.tensors if name not in known]
    for items, words in (
        (missing, "missing from the GGUF or not as computed"),
        (result.unexpected, "in the GGUF and not in the checkpoint"),
        (reshaped, "of another shape"),
    ):
        if items:
            plural = "tensor is" if len(items) == 1 else "tensors are"
            text = f"{len(items)} {plural} {words}: {shortened(items)}"
            result.findings.append(Finding("unexpected_change", shortened(items), text))
    return result


def _add(
    result: Pairing,
    file: GgufFile,
    target: str,
    source: TensorInfo,
    deltas: tuple[Term, ...],
    heads: int,
    missing: list[str],
    reshaped: list[str],
) -> None:
    stored = file.tensors.get(target)
    if stored is None:
        missing.append(target)
    elif stored.shape != source.shape:
        reshaped.append(f"{target} is {list(stored.shape)}, in the checkpoint {list(source.shape)}")
    else:
        result.pairs.append(Pair(stored, source, deltas, heads))


def _heads(name: str, architecture: Architecture) -> int:
    if architecture.name != "llama":  # only Llama's rotation differs between checkpoint and llama.cpp
        return 0
    part = name.rpartition("self_attn.")[2]
    return {"q_proj": architecture.heads, "k_proj": architecture.kv_heads}.get(part.partition(".")[0], 0)


def _frequencies(file: GgufFile, architecture: Architecture) -> list[str]:
    from engine.gguf.blocks import dequantise
    from engine.gguf.reader import read_raw

    stored = file.tensors.get(FREQUENCIES)
    right = architecture.rope.frequency_factors(architecture.head_dim)
    if stored is None or stored.type != "F32" or stored.elements != right.size:
        return [FREQUENCIES]
    values = dequantise(np.frombuffer(read_raw(stored, 0, stored.rows), np.uint8), "F32")
    return [] if np.allclose(values, right, rtol=1e-5, atol=0) else [FREQUENCIES]
