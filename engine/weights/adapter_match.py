"""An adapter's tensors against a base: which change of which tensor, checked by name and shape.

Called by `Adapter.changes`. What the adapter's file cannot say by itself is decided here, from the base:

- whether a layer is stored (in, out): transformers' Conv1D layers are, whatever fan_in_fan_out says, because
  PEFT sets it per layer when it loads;
- which parameter of a module a fused-expert factor belongs to, by its shape (PEFT writes no name), and in which
  orientation; experts that lie apart in the base get their slice of the fused change;
- whether an embedding saved beside its LoRA is the base's own, or a resized or trained one (then it is a change);
- which side of tied embeddings changes. PEFT's forward pass changes the layer that was wrapped and not the other,
  so a change of `model.embed_tokens.weight` alone leaves the output side as it was, and the base's absent
  `lm_head.weight` can be changed alone. Where both change alike (ensure_weight_tying, trained token rows, a
  resized vocabulary) both names are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import BadAdapterError
from engine.weights.adapter_config import LoraOptions
from engine.weights.adapter_experts import expert_changes
from engine.weights.adapter_keys import Pair, Parts
from engine.weights.changes import Addition, Change, Dora, LoraFactor, Replacement, Sum, TokenRows
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import Float32Array, TensorInfo, read_rows

# Where transformers stores linear layers (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
# The same layer under another head or wrapper class; tried in this order when the name itself is not there.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.", "model.model.", "language_model.",
             "model.", "transformer.", "")  # fmt: skip
_INPUTS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight",
           "tokens_embed.weight")  # fmt: skip
OUTPUT = "lm_head.weight"
_BLOCK = 1 << 21  # elements compared at once


@dataclass(frozen=True)
class Fit:
    """What `fit` needs at every step: the adapter's side and the base."""

    parts: Parts
    options: LoraOptions
    base: Checkpoint
    hint: str


def fit(parts: Parts, options: LoraOptions, base: Checkpoint, factors: dict[str, LoraFactor], base_name: str
        ) -> dict[str, Change]:  # fmt: skip
    """Every change by the name of the base tensor it changes; tensors that are the base's own are left out.

    Raises BadAdapterError for a key that matches nothing, a shape that does not fit, a layout that cannot be
    told, two changes of one tensor that cannot be added.
    """
    hint = "this adapter belongs to another base" + (f" ({base_name})" if base_name else "")
    made: dict[str, list[Change]] = {}
    here = Fit(parts, options, base, hint)
    for change in (
        *_low_rank(here, factors),
        *expert_changes(_expert_pairs(parts, factors), options, base, hint),
        *_biases(here),
        *_saved(here),
        *_token_rows(here),
    ):
        made.setdefault(change.tensor_name, []).append(change)
    changes = {name: _joined(found) for name, found in made.items()}
    if base.tied and OUTPUT not in base.tensors:
        _tie(here, changes)
    _check_vocabulary(here, changes)
    return changes


def _low_rank(here: Fit, factors: dict[str, LoraFactor]) -> Iterator[LoraFactor | Dora]:
    for (module, inner), pair in here.parts.pairs.items():
        factor = factors.get(module)
        if factor is None or inner:
            continue
        name = locate(here, factor.tensor_name, factor.a)
        change = replace(factor, tensor="" if name == f"{module}.weight" else name)
        if not pair.embedding:
            change = replace(change, transposed=is_conv1d(here.base, module))
        _check_shape(here, change.module, change.a, change.shape, name)
        yield change if pair.magnitude is None else Dora(change, pair.magnitude)


def _expert_pairs(parts: Parts, factors: dict[str, LoraFactor]) -> list[Pair]:
    return [pair for (module, inner), pair in parts.pairs.items() if inner or module not in factors]


def _biases(here: Fit) -> Iterator[Addition]:
    for pair in here.parts.pairs.values():
        if pair.bias is None:
            continue
        a, _ = pair.whole()
        rank = here.options.rank_of(pair.module, a.shape[0])
        wanted = f"{pair.module}.bias"
        name = _find(here.base, wanted)
        if name is None:
            raise BadAdapterError(
                f"{pair.bias.file}: {pair.bias.name} (lora_bias) changes {wanted}, and the layer has no bias in "
                f"{here.base.folder}",
                "such an adapter cannot be merged (PEFT refuses it, too): its layers need biases",
            )
        _check_shape(here, pair.module, pair.bias, pair.bias.shape, name)
        scale = here.options.scale(rank, here.options.alpha_of(pair.module))
        yield Addition(pair.module, pair.bias, scale, name)


def _saved(here: Fit) -> Iterator[Replacement]:
    for name, info in here.parts.saved.items():
        yield _replacement(here, name, info)
    for name, info in here.parts.base_layers.items():
        if name in here.parts.saved:
            continue
        change = _replacement(here, name, info)
        if name.endswith(".bias") or not _same_values(info, _stored(here, change.tensor_name)):
            yield change


def _replacement(here: Fit, name: str, info: TensorInfo) -> Replacement:
    """A tensor saved whole. Only the tables of the vocabulary may have more rows than the base's."""
    if not info.is_float or 0 in info.shape:
        raise BadAdapterError(
            f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}, expected floats",
            "an empty one was saved from DeepSpeed ZeRO-3 or FSDP without gathering: save it again"
            if 0 in info.shape
            else "",
        )
    found = locate(here, name, info)
    shape = _stored(here, found).shape
    if is_vocabulary(here.base, found) and len(info.shape) == 2 and info.shape[1:] == shape[1:]:
        if info.shape[0] < shape[0]:
            raise BadAdapterError(
                f"{info.file}: {info.name} has {info.shape[0]} rows, fewer than the {shape[0]} of {found} in "
                f"{here.base.folder}",
                "a vocabulary cannot shrink in a merge; " + here.hint,
            )
    else:
        _check_shape(here, name, info, info.shape, found)
    return Replacement(name.rpartition(".")[0], info, found)


def _token_rows(here: Fit) -> Iterator[TokenRows]:
    for module, info in here.parts.token_rows.items():
        rows = token_rows_of(here.options, module)
        name = locate(here, f"{module}.weight", info)
        shape = _stored(here, name).shape
        fits = len(info.shape) == 2 and info.shape == (len(rows), *shape[1:]) and info.is_float
        if not fits or len(set(rows)) != len(rows) or any(row >= shape[0] for row in rows):
            raise BadAdapterError(
                f"{info.file}: {info.name} is {list(info.shape)}, and {here.options.path} names {len(rows)} token "
                f"rows of {name} {list(shape)}",
                "weights, config and base do not belong together",
            )
        yield TokenRows(module, info, rows, name, shape)


def token_rows_of(options: LoraOptions, module: str) -> tuple[int, ...]:
    """trainable_token_indices of a module: the longest key that ends its name, else the plain list."""
    keys = [key for key in options.token_indices if key and (module == key or module.endswith("." + key))]
    return options.token_indices.get(max(keys, key=len) if keys else "", ())


def _joined(found: list[Change]) -> Change:
    if len(found) == 1:
        return found[0]
    kinds = [type(change).__name__ for change in found]
    addable = [change for change in found if not isinstance(change, Dora | Sum)]
    if len(addable) < len(found) or len(set(kinds)) < len(kinds) or len({c.shape for c in found}) > 1:
        hint = ""
        if "Dora" in kinds and "Replacement" in kinds:
            hint = "DoRA on a layer that is also saved whole (a resized embedding) is not merged here"
        raise BadAdapterError(
            f"the adapter changes {found[0].tensor_name} twice, in ways that do not add up: {', '.join(kinds)}",
            hint,
        )
    return Sum(tuple(addable))


# ---- tied embeddings and the vocabulary ---------------------------------------------------------------------------


def _tie(here: Fit, changes: dict[str, Change]) -> None:
    """Give both sides of a tied base the same change where the adapter means both."""
    source = input_name(here.base)
    if source is None:
        return
    for one, other in ((source, OUTPUT), (OUTPUT, source)):
        change = changes.get(one)
        if change is None or other in changes:
            continue
        resized = change.shape[0] != here.base.tensors[source].shape[0]
        if here.options.ensure_weight_tying or resized or _only_rows(change):
            changes[other] = _renamed(change, other)


def _only_rows(change: Change) -> bool:
    return isinstance(change, TokenRows)


def _renamed(change: Change, name: str) -> Change:
    if isinstance(change, Sum):
        return Sum(tuple(replace(part, tensor=name) for part in change.parts))
    if isinstance(change, Dora):
        return replace(change, low_rank=replace(change.low_rank, tensor=name))
    return replace(change, tensor=name)


def _check_vocabulary(here: Fit, changes: dict[str, Change]) -> None:
    """Both embedding tables must end with the same number of rows."""
    source = input_name(here.base)
    sides = [name for name in (source, OUTPUT) if name and (name in changes or name in here.base.tensors)]
    rows = {name: (changes[name] if name in changes else _stored(here, name)).shape[0] for name in sides}
    before = {_stored(here, name).shape[0] for name in sides}
    if len(set(rows.values())) > 1 and len(before) == 1:
        grown = max(rows, key=lambda name: rows[name])
        raise BadAdapterError(
            f"the adapter resizes {grown} to {rows[grown]} rows, and the other embedding table keeps "
            f"{min(rows.values())}",
            "save both: PEFT's save_pretrained(..., save_embedding_layers=True)",
        )


def tied_side(base: Checkpoint, names: frozenset[str] | set[str]) -> str:
    """Which side of tied embeddings the changed tensors are: "input", "output", "both", "" (none, or not tied)."""
    if not base.tied or OUTPUT in base.tensors:
        return ""
    source, output = input_name(base) in names, OUTPUT in names
    return "both" if source and output else "input" if source else "output" if output else ""


def is_vocabulary(base: Checkpoint, name: str) -> bool:
    """Whether a tensor is one of the two tables with a row for each token."""
    return name == OUTPUT or name == input_name(base)


def input_name(base: Checkpoint) -> str | None:
    """The name of the input embedding table, None where no tensor has a known name."""
    return next(
        (prefix + name for name in _INPUTS for prefix in _PREFIXES if prefix + name in base.tensors), None
    )


# ---- names and shapes ---------------------------------------------------------------------------------------------


def locate(here: Fit, name: str, key: TensorInfo) -> str:
    """The base's name for an adapter's tensor name. Raises BadAdapterError when there is none."""
    found = _find(here.base, name)
    if found is not None:
        return found
    near = next((other for other in here.base.tensors if other.endswith(".weight")), "nothing")
    raise BadAdapterError(
        f"{key.file}: key {key.name} (module {name.rpartition('.')[0]}) matches no tensor of {here.base.folder} "
        f"(looked for {name}; the base has tensors like {near})",
        here.hint,
    )


def _find(base: Checkpoint, name: str) -> str | None:
    if name in base.tensors:
        return name
    tails = [name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)]
    for tail in tails:
        near = [prefix + tail for prefix in _PREFIXES if prefix + tail in base.tensors]
        if near:
            return near[0] if len(near) == 1 else None
    if base.tied and OUTPUT in tails and input_name(base) is not None:
        return OUTPUT
    return None


def _stored(here: Fit, name: str) -> TensorInfo:
    """The base tensor of that name; for the absent output side of tied embeddings the input's."""
    if name in here.base.tensors:
        return here.base.tensors[name]
    return here.base.tensors[input_name(here.base) or name]


def _check_shape(here: Fit, module: str, key: TensorInfo, shape: tuple[int, ...], name: str) -> None:
    stored = _stored(here, name)
    grown = _grown_rows(here, name)
    if shape not in (stored.shape, (grown, *stored.shape[1:])):
        raise BadAdapterError(
            f"{key.file}: {module} changes a {list(shape)} weight, and {name} of {here.base.folder} is "
            f"{list(stored.shape)}",
            here.hint,
        )


def _grown_rows(here: Fit, name: str) -> int | None:
    """Rows of a resized table that is saved beside its LoRA, which then has as many."""
    if not is_vocabulary(here.base, name):
        return None
    info = next(
        (info for saved, info in here.parts.base_layers.items() if _find(here.base, saved) == name), None
    )
    return info.shape[0] if info and info.shape else None


def is_conv1d(base: Checkpoint, module: str) -> bool:
    """Whether transformers keeps this layer (in, out), as its Conv1D does."""
    return base.config.get("model_type") in _CONV1D_MODELS and re.split(r"\.", module)[-1] in _CONV1D_LAYERS


def _same_values(info: TensorInfo, stored: TensorInfo) -> bool:
    """Whether a saved tensor is the base's own, rounded to the saved dtype where that is coarser."""
    if info.shape != stored.shape:
        return False
    step = max(1, _BLOCK // max(1, info.columns))
    for first in range(0, info.rows, step):
        count = min(step, info.rows - first)
        base_rows = narrowed(read_rows(stored, first, count), info.dtype)
        if not np.array_equal(read_rows(info, first, count), base_rows):
            return False
    return True


def narrowed(values: Float32Array, dtype: str) -> Float32Array:
    """float32 values rounded to nearest even in F16 or BF16, as float32; others unchanged."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(values), rounded.view(np.float32), values)
    return values
