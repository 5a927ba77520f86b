"""Several LoRA adapters into one: output kind `adapter` of a recipe. Called by engine/merge/execute.py.

Exact, by stacking ranks (module by module R = sum of ranks, the weights and scales in B, alpha = R so that the
adapter's own scale is 1), or cut to a given rank by an SVD whose error is known exactly (engine/merge/lowrank.py).
Only low-rank changes of linear layers (Conv1D, too) and embeddings can be summed like this; an adapter with DoRA,
biases, saved modules or fused experts is refused by name. The base is read by header only.

Everything is written into `OUT.partial`, read back and checked (engine/merge/combine_check.py), and only then
called OUT; what fails is kept as `OUT.rejected`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic import need_space, new_folder, refuse_existing, reject, write_json
from engine.errors import BadAdapterError, BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.combine_check import check_combined
from engine.merge.combine_config import adapter_config, copy_tokenizer, training_note
from engine.merge.lowrank import Spectrum, Term, stack, truncate
from engine.merge.manifest import (
    FORMAT,
    NAME,
    describe_adapter,
    describe_model,
    hash_files,
    linear_fields,
    now,
    variants,
    versions,
)
from engine.weights import Adapter, Checkpoint, LoraFactor
from engine.weights.adapter import CONFIG, MANIFEST, WEIGHTS
from engine.weights.identity import TrainedOn, base_warnings, compare_bases, noted_sha256
from engine.weights.tensorfile import encode_header, read_rows

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Part:
    """One adapter of the sum. `weights`: base tensor name -> weight, for every tensor the adapter changes."""

    label: str
    path: Path
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Module:
    """One module of the merged adapter: delta = sum over terms of weight * factor.scale * B @ A."""

    name: str
    terms: tuple[tuple[str, float, LoraFactor], ...]  # (label, weight, factor), weights not 0
    rank: int
    embedding: bool = False

    @property
    def keys(self) -> tuple[str, str]:
        """Names of A and B in the file, as PEFT writes them."""
        start, end = f"base_model.model.{self.name}.lora_", "" if self.embedding else ".weight"
        kind = "embedding_" if self.embedding else ""
        return f"{start}{kind}A{end}", f"{start}{kind}B{end}"

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        _, _, factor = self.terms[0]
        return (self.rank, factor.a.shape[1]), (factor.b.shape[0], self.rank)


def combine(
    base_folder: Path,
    parts: Sequence[Part],
    out: Path,
    events: EventWriter,
    rank: int | None = None,
    document: Mapping[str, Any] | None = None,
    verify: bool = True,
    strict_base: bool = False,
) -> dict[str, Any]:
    """Write one adapter whose delta is the weighted sum of the parts' deltas (rank None), or its best
    approximation of at most `rank` per module.

    A module that only some parts change is the sum of those; one whose weights are all 0 is left out. The file is
    float32. `document` is the recipe as it goes into the manifest. The base is read by header, so whether the parts
    were trained on it is known only where its own note says its hashes; `strict_base` reads and hashes it, and
    refuses another one.

    Returns:
        JSON: `out`, `seconds`, `bytes_written`, `manifest`, `verdict` (None without verification), `exit_code`
        (0, or 1 when the check said no and `out` is the `.rejected` folder), and `combined`: `rank` (largest),
        `modules`, `error` and `energy` over all modules, `per_module` [{name, rank, full_rank, norm, error,
        energy, rank_99}] (99% of the squared norm; without an SVD error is 0 and rank_99 null). `trained_on` and
        `warnings` as a merge has them.

    Raises:
        BadRecipeError: no parts, a rank under 1, all weights 0, an output that overlaps an input.
        BadAdapterError: an adapter that does not fit the base or is no plain LoRA (named), NaN or infinity.
        TargetExistsError, NoSpaceError: nothing is left behind.
    """
    started = time.monotonic()
    refuse_existing(out)
    _refuse_overlap(out, [("the base", base_folder)] + [(f"adapter {p.label}", p.path) for p in parts])
    if rank is not None and rank < 1:
        raise BadRecipeError(f"output.rank is {rank}, expected at least 1", "leave it out for the exact sum")
    base = Checkpoint.open(base_folder)
    adapters = {part.label: Adapter.open(part.path) for part in parts}
    modules = _modules(base, adapters, parts, rank)
    bases = compare_bases(adapters, base, base.sha256 if strict_base else noted_sha256(base))
    warnings = base_warnings(bases, strict_base)
    for warning in warnings:
        events.warning(warning)
    header, size = _layout(modules)
    need_space(out.parent, size + 64_000_000, "the merged adapter")
    verdict, kept = None, out
    with new_folder(out) as partial:
        spectra, sha256 = _write(partial / WEIGHTS, header, modules, rank is not None, events)
        config = adapter_config(base, list(adapters.values()), {m.name: m.rank for m in modules})
        write_json(partial / CONFIG, config)
        note = training_note(adapters)
        if note:
            write_json(partial / MANIFEST, note)
        copy_tokenizer(adapters, partial, events)
        summary = _summary(modules, spectra)
        record = _manifest(base, adapters, parts, partial, out, document, sha256, rank, summary, bases)
        write_json(partial / NAME, {**record, "seconds": round(time.monotonic() - started, 3)})
        if verify:
            dropped = {name: (s.dropped, s.norm) for name, s in spectra.items()}
            verdict = check_combined(partial, [(p.path, p.weights) for p in parts], dropped, events)
        record["verification"] = {"done": False, "message": "not verified: made with --no-verify"}
        if verdict is not None:
            record["verification"] = {"done": True, **{k: v for k, v in verdict.items() if k != "wrong"}}
        record["seconds"] = round(time.monotonic() - started, 3)
        write_json(partial / NAME, record)
        if verdict is not None and not verdict["ok"]:
            kept = reject(partial, out)
    return {
        "out": str(kept),
        "seconds": record["seconds"],
        "bytes_written": size,
        "manifest": record,
        "verdict": verdict,
        "combined": summary,
        "trained_on": {label: found.to_dict() for label, found in bases.items()},
        "warnings": warnings,
        "exit_code": verdict["exit_code"] if verdict else 0,
    }


def bytes_of(
    base: Checkpoint, adapters: Mapping[str, Adapter], parts: Sequence[Part], rank: int | None
) -> int:
    """Bytes of the merged adapter's weights. Raises as `combine` does for what cannot be summed."""
    return _layout(_modules(base, adapters, parts, rank))[1]


def _layout(modules: Sequence[Module]) -> tuple[bytes, int]:
    """The safetensors header of the merged adapter, and the bytes of the whole file."""
    tensors = [(key, shape) for m in modules for key, shape in zip(m.keys, m.shapes, strict=True)]
    header = encode_header([(key, "F32", shape) for key, shape in tensors], {"format": "pt"})
    return header, len(header) + sum(4 * math.prod(shape) for _, shape in tensors)


def _modules(
    base: Checkpoint, adapters: Mapping[str, Adapter], parts: Sequence[Part], rank: int | None
) -> list[Module]:
    """What is summed where, in the order of the first adapter that changes each module."""
    if not parts:
        raise BadRecipeError("there is no adapter to merge", "name at least one under `adapters:`")
    terms: dict[str, list[tuple[str, float, LoraFactor]]] = {}  # by base tensor: trainers' prefixes differ
    for part in parts:
        adapter = adapters[part.label]
        for name, factor in adapter.match(base).items():
            if factor.module not in adapter.factors:
                raise BadAdapterError(
                    f"{adapter.file.path}: {factor.module} is a low-rank change of a parameter (target_parameters), "
                    "and only those of linear layers and embeddings can be summed into an adapter",
                    "merge it into the base: leave output.kind out",
                )
            if name not in part.weights:
                raise BadRecipeError(f"adapter {part.label}: no weight for {name}")
            weight = float(part.weights[name])
            if weight != 0.0:
                terms.setdefault(name, []).append((part.label, weight, factor))
    if not terms:
        raise BadRecipeError("every weight is 0: the merged adapter would be empty", "give one a weight")
    modules = []
    for found in terms.values():
        full = sum(factor.rank for _, _, factor in found)
        module = max((factor.module for _, _, factor in found), key=len)  # the one with its whole path
        kinds = {".lora_embedding_" in factor.a.name for _, _, factor in found}
        if len(kinds) > 1:
            raise BadAdapterError(
                f"{module} is an embedding in one adapter and a linear layer in another",
                "these adapters belong to different bases",
            )
        rank_ = full if rank is None else min(rank, full)
        modules.append(Module(module, tuple(found), rank_, kinds.pop()))
    return modules


def _write(
    path: Path, header: bytes, modules: Sequence[Module], by_svd: bool, events: EventWriter
) -> tuple[dict[str, Spectrum], str]:
    """Write the safetensors file, module by module. Returns the spectra (empty when stacked) and the SHA-256."""
    spectra: dict[str, Spectrum] = {}
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for done, module in enumerate(modules, 1):
            b, a = stack([_term(label, weight, factor) for label, weight, factor in module.terms])
            if by_svd:
                b, a, spectra[module.name] = truncate(b, a, module.rank)
            for half, shape in zip((a, b), module.shapes, strict=True):
                if np.abs(half).max() > _FLOAT32_MAX:
                    raise BadRecipeError(
                        f"{module.name}: weight times scale times B is beyond float32", "use smaller weights"
                    )
                data = np.ascontiguousarray(half, dtype="<f4").reshape(shape).tobytes()
                digest.update(data)
                file.write(data)
            events.progress(done, len(modules), unit="modules", message=module.name, phase="combine")
    return spectra, digest.hexdigest()


def _term(label: str, weight: float, factor: LoraFactor) -> Term:
    a, b = read_rows(factor.a), read_rows(factor.b)
    for info, values in ((factor.a, a), (factor.b, b)):
        if not np.isfinite(values).all():
            raise BadAdapterError(
                f"{info.file}: {info.name} holds NaN or infinity",
                f"adapter {label} is broken: train it again, or use an earlier checkpoint of its run",
            )
    return Term(weight * factor.scale, b, a)


def _summary(modules: Sequence[Module], spectra: Mapping[str, Spectrum]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for module in modules:
        row: dict[str, Any] = {
            "name": module.name,
            "rank": module.rank,
            "full_rank": sum(factor.rank for _, _, factor in module.terms),
        }
        spectrum = spectra.get(module.name)
        if spectrum is None:
            row |= {"norm": None, "error": 0.0, "energy": 1.0, "rank_99": None}
        else:
            row |= {
                "norm": spectrum.norm, "error": spectrum.error, "energy": spectrum.energy,
                "rank_99": spectrum.rank_for(0.99),
            }  # fmt: skip
        rows.append(row)
    square = sum(spectrum.norm**2 for spectrum in spectra.values())
    dropped = sum(spectrum.dropped**2 for spectrum in spectra.values())
    share = dropped / square if square > 0 else 0.0
    return {
        "how": "svd" if spectra else "stacked",
        "rank": max(module.rank for module in modules),
        "modules": len(modules),
        "error": math.sqrt(share),
        "energy": 1.0 - share,
        "per_module": rows,
    }


def _manifest(
    base: Checkpoint,
    adapters: Mapping[str, Adapter],
    parts: Sequence[Part],
    folder: Path,
    out: Path,
    document: Mapping[str, Any] | None,
    sha256: str,
    rank: int | None,
    summary: Mapping[str, Any],
    bases: Mapping[str, TrainedOn],
) -> dict[str, Any]:
    """The manifest of a merged adapter; of the base only its small files are named, since only headers were read."""
    asked, near = {part.label: _asked(part) for part in parts}, out.parent
    return {
        "format": FORMAT,
        "name": out.name,
        "created": now(),
        "recipe": dict(document or {}),
        **linear_fields(document or {}),
        "asked": asked,
        "base": describe_model(base, {}, near),
        "adapters": {
            label: describe_adapter(adapter, near)
            | {
                "trained_on": bases[label].to_dict() if label in bases else None,
                "variants": variants(adapter.changes(base).values()),
            }
            for label, adapter in adapters.items()
        },
        "models": {},
        "output": {
            "kind": "adapter",
            "dtype": "float32",
            "rank": rank,
            "tensors_changed": summary["modules"],
            "combined": {key: summary[key] for key in ("how", "rank", "modules", "error", "energy")},
            "files": hash_files(folder, {WEIGHTS: sha256}),
        },
        "versions": versions(),
        "verification": None,
    }


def _asked(part: Part) -> float | dict[str, float]:
    """One number where all tensors have the same weight, else every tensor's."""
    weights = set(part.weights.values())
    return weights.pop() if len(weights) == 1 else dict(part.weights)


def _refuse_overlap(out: Path, inputs: Sequence[tuple[str, Path]]) -> None:
    target = out.resolve()
    for what, path in inputs:
        place = path.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise BadRecipeError(
                f"the output {out} is, contains or is inside {what} ({path})",
                "choose a folder outside the inputs",
            )
