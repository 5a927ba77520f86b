"""`medmerge.json` in a merge: what went in and what came out, with the SHA-256 of every file of both.

The hashes of the models' shards and of the output are those taken while the bytes were merged, so the manifest
speaks of the very bytes that were read and written. docs/manifest.md explains every field, and
manifest.schema.json beside this file is its JSON Schema; `engine.merge.manifest_check` compares a manifest with
what is on disk later.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__
from engine.errors import BadInputError, BadModelError, BadRecipeError
from engine.merge.kernel import kernel
from engine.merge.plan import Plan
from engine.merge.recipe import METHODS, TRIMS, Recipe
from engine.merge.selectors import spec_to_document
from engine.merge.stream import Streamed
from engine.template_check import of_adapter, of_manifest, records
from engine.weights import Adapter, Checkpoint
from engine.weights.changes import (
    Addition,
    Change,
    Dora,
    ExpertFactor,
    Experts,
    LoraFactor,
    Replacement,
    Sum,
    TokenRows,
)
from engine.weights.checkpoint import read_json
from engine.weights.identity import compare_bases
from engine.weights.tensorfile import file_sha256

NAME = "medmerge.json"
FORMAT = "medmerge.merge/2"
FIRST_FORMAT = "medmerge.merge/1"  # linear merges of adapters only; still read
SCHEMA = Path(__file__).with_name("manifest.schema.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VARIANTS: dict[type, str] = {
    LoraFactor: "lora", Experts: "experts", ExpertFactor: "experts", Dora: "dora", Replacement: "replaced",
    TokenRows: "token_rows", Addition: "added",
}  # fmt: skip


def make_manifest(plan: Plan, streamed: Streamed, folder: Path, seconds: float) -> dict[str, Any]:
    """The manifest of a finished folder, without a verification. Reads the small files once to hash them."""
    recipe, shards = plan.recipe, {entry.name: entry for entry in streamed.shards}
    read = {name: entry.source for name, entry in shards.items()}
    near = recipe.output.parent
    models = {
        label: describe_model(model, read if model is plan.base else _of(streamed.others, model), near)
        for label, model in plan.inputs.models.items()
    }
    files = hash_files(folder, {name: entry.target for name, entry in shards.items()})
    return _document(plan, recipe.output, seconds, read, plan.dtype, models, files)


def gguf_manifest(plan: Plan, target: Path, kind: str, sha256: str, seconds: float) -> dict[str, Any]:
    """The manifest of a GGUF made straight from base and adapters. Reads the base once to hash it, for all types."""
    return _document(plan, target, seconds, plan.base.sha256, kind, {}, {target.name: sha256})


def _document(
    plan: Plan,
    target: Path,
    seconds: float,
    base_hashes: Mapping[str, str],
    dtype: str,
    models: dict[str, Any],
    files: dict[str, str],
) -> dict[str, Any]:
    recipe, near = plan.recipe, target.parent
    bases = compare_bases(plan.adapters, plan.base, base_hashes)
    return {
        "format": FORMAT,
        "name": target.name,
        "created": now(),
        "seconds": round(seconds, 3),
        "recipe": recipe.to_dict(),
        **method_fields(recipe),
        "asked": plan.asked,
        "base": describe_model(plan.base, base_hashes, near) if recipe.base is not None else None,
        "adapters": {
            label: describe_adapter(adapter, near)
            | {
                "trained_on": bases[label].to_dict() if label in bases else None,
                "variants": variants(plan.inputs.changes[label].values()),
            }
            for label, adapter in plan.adapters.items()
        },
        "models": models,
        "output": {
            "kind": recipe.kind,
            "dtype": dtype,
            "tensors_changed": len(plan.changed),
            "files": files,
        },
        "versions": versions(),
        "verification": None,
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions() -> dict[str, str]:
    said = {"medmerge": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return {**said, "kernel": kernel().name}


def method_fields(recipe: Recipe) -> dict[str, Any]:
    """method, parameters, densities and vocabulary of a recipe, every default written out.

    `densities` gives what each entry keeps of its delta ({} where the method trims nothing).
    """
    names = METHODS[recipe.method]
    parameters = recipe.parameters.to_dict(names)
    if "normalize" in names:
        parameters["normalize"] = recipe.normalize
    kept = {entry.label: entry.density or recipe.parameters.density for entry in recipe.entries}
    densities = {label: spec_to_document(density) for label, density in kept.items()}
    return {
        "method": recipe.method,
        "parameters": parameters,
        "densities": densities if recipe.method in TRIMS else {},
        "vocabulary": recipe.vocabulary if recipe.models else None,
    }


def linear_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a recipe document for a merged adapter, which only linear methods make."""
    method = str(document.get("method", "linear"))
    default = {"normalize": False} if method == "linear" else {"lambda": 1.0}
    parameters = {**default, **(document.get("parameters") or {})}
    return {"method": method, "parameters": parameters, "densities": {}, "vocabulary": None}


def variants(changes: Iterable[Change]) -> dict[str, int]:
    """How many tensors an adapter changes in which way: {"lora": 210, "dora": 4}; several ways count each."""
    counted: dict[str, int] = {}
    for change in changes:
        for one in change.parts if isinstance(change, Sum) else (change,):
            name = _VARIANTS[type(one)]
            counted[name] = counted.get(name, 0) + 1
    return counted


def hash_files(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of every file of a result, hidden ones and the manifest apart; `known` are not read again."""
    return {
        name: known[name] if name in known else file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.name.startswith(".")
        and (name := str(path.relative_to(folder))) != NAME
    }


def _of(hashes: Mapping[Path, str], model: Checkpoint) -> dict[str, str]:
    return {shard.path.name: hashes[shard.path] for shard in model.shards}


def describe_model(model: Checkpoint, shard_hashes: Mapping[str, str], near: Path) -> dict[str, Any]:
    """What a manifest says of a checkpoint that went in. `near` is the folder the merge will lie in."""
    beside = [path for path in (model.index_path, *model.companions) if path is not None]
    described: dict[str, Any] = {
        "name": model.name,
        "path": str(model.folder),
        "relative": _relative(model.folder, near),
        "files": {
            **shard_hashes,
            **{str(path.relative_to(model.folder)): file_sha256(path) for path in beside},
        },
    }
    if (model.folder / NAME).is_file():
        parent = read_json(model.folder / NAME, BadModelError, "delete it if this is no merge")
        described["medmerge"] = {
            key: parent[key] for key in ("format", "name", "asked", "note") if key in parent
        } | {"sha256": file_sha256(model.folder / NAME)}
        if inside := records(of_manifest(parent)):
            described["medmerge"]["templates"] = inside
    return described


def describe_adapter(adapter: Adapter, near: Path | None = None) -> dict[str, Any]:
    """What a manifest says of an adapter that went in, with the SHA-256 of its files."""
    files = sorted(
        path
        for path in adapter.folder.iterdir()
        if path.suffix in (".json", ".safetensors") and path.is_file()
    )
    described = {
        "name": adapter.name,
        "path": str(adapter.folder),
        "kind": adapter.kind,
        "rank": adapter.rank,
        "scales": list(adapter.scales),
        **of_adapter("", adapter).to_dict(),
        "sha256": adapter.sha256,
        "files": {path.name: file_sha256(path) for path in files},
    }
    return described if near is None else described | {"relative": _relative(adapter.folder, near)}


def _relative(folder: Path, near: Path) -> str:
    """The way from the folder a merge lies in to an input: found again when both were moved together."""
    return os.path.relpath(folder.absolute(), near.absolute())


def manifest_path(merged: Path) -> Path:
    """Where the manifest of a merged folder, or of a GGUF file, lies."""
    return merged.with_name(f"{merged.name}.json") if merged.is_file() else merged / NAME


def is_merge(folder: Path) -> bool:
    """Whether a folder holds a manifest of a merge made by this program."""
    try:
        found = read_json(folder / NAME, BadInputError, "")["format"]
    except (BadInputError, KeyError):
        return False
    return str(found).startswith("medmerge.merge/")


def read_manifest(merged: Path) -> dict[str, Any]:
    """The manifest of an earlier merge (a folder, or a GGUF file), as format 2 whatever it was written in.

    Raises BadInputError when there is none, or one that does not say what a manifest says.
    """
    path = manifest_path(merged)
    manifest = read_json(path, BadInputError, "only merges made by medmerge carry a manifest", unique=True)
    found = manifest.get("format")
    if found == FIRST_FORMAT:
        manifest = _from_first(manifest, path)
    elif found != FORMAT:
        raise BadInputError(
            f"{path}: format is {found!r}, and this version reads {FIRST_FORMAT!r} and {FORMAT!r}",
            "a newer medmerge may have written it",
        )
    for key in ("recipe", "output", "adapters", "models"):
        if not isinstance(manifest.get(key), dict):
            raise BadInputError(f"{path}: {key} is missing or no mapping")
    parts: dict[str, Any] = {"output": manifest["output"]}
    if manifest.get("base") is not None:
        parts["base"] = manifest["base"]
    elif not manifest["models"]:
        raise BadInputError(f"{path}: base is missing, and no models are named")
    for key in ("adapters", "models"):
        parts |= {f"{key}.{label}": part for label, part in manifest[key].items()}
    for where, part in parts.items():
        _check_part(path, where, part)
    return manifest


def _check_part(path: Path, where: str, part: object) -> None:
    files = part.get("files") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(files, dict):
        raise BadInputError(f"{path}: {where}.files is not a mapping of file names to SHA-256")
    if not files:
        raise BadInputError(f"{path}: {where}.files names no file")
    for name, sha256 in files.items():
        if (
            not name
            or "\0" in name
            or Path(name).is_absolute()
            or not {"..", "."}.isdisjoint(name.split("/"))
        ):
            raise BadInputError(f"{path}: {where}.files names {name!r}, which is no file in that folder")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise BadInputError(f"{path}: {where}.files[{name!r}] is no SHA-256 (64 hex digits)")
    if where != "output" and not isinstance(part.get("path"), str):
        raise BadInputError(f"{path}: {where}.path is missing or no text")
    if not isinstance(part.get("relative", ""), str):
        raise BadInputError(f"{path}: {where}.relative is no text")


def _from_first(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """Format 1 knew linear merges of adapters onto a base, and no more."""
    recipe = manifest.get("recipe")
    method = recipe.get("method", "linear") if isinstance(recipe, dict) else None
    if method not in ("linear", "task_arithmetic"):
        raise BadRecipeError(f"{path}: recipe.method is {method!r}, which format 1 did not have")
    fields = {
        "method": method, "parameters": {}, "densities": {}, "vocabulary": None, "models": {},
    }  # fmt: skip
    output = manifest.get("output")
    if isinstance(output, dict):
        output = {"kind": "checkpoint", **output}
    return {**fields, **manifest, "format": FORMAT, "output": output}
