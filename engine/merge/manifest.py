"""`medmerge.json` in a merge: what went in and what came out, with the SHA-256 of every file of both.

The hashes of the base's shards and of the output are those taken while the bytes were merged, so the manifest
speaks of the very bytes that were read and written. `check_manifest` reads everything again and compares.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__
from engine.errors import BadInputError, BadModelError
from engine.jobs.events import EventWriter
from engine.merge.plan import Plan
from engine.merge.stream import FileHashes
from engine.weights import Adapter, Checkpoint
from engine.weights.checkpoint import read_json
from engine.weights.tensorfile import file_sha256

NAME = "medmerge.json"
FORMAT = "medmerge.merge/1"


def make_manifest(plan: Plan, hashes: list[FileHashes], folder: Path, seconds: float) -> dict[str, Any]:
    """The manifest of a finished folder, without a verification. Reads the small files once to hash them."""
    shards = {entry.name: entry for entry in hashes}
    return {
        "format": FORMAT,
        "name": plan.recipe.output.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "recipe": plan.recipe.to_dict(),
        "asked": plan.asked,
        "base": _base(plan.base, {name: entry.source for name, entry in shards.items()}),
        "adapters": {label: describe_adapter(adapter) for label, adapter in plan.adapters.items()},
        "output": {
            "dtype": plan.dtype,
            "tensors_changed": len(plan.changed),
            "files": {
                path.name: shards[path.name].target if path.name in shards else file_sha256(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and not path.name.startswith(".") and path.name != NAME
            },
        },
        "versions": {
            "medmerge": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "verification": None,
    }


def _base(base: Checkpoint, shard_hashes: dict[str, str]) -> dict[str, Any]:
    beside = [path for path in (base.index_path, *base.companions) if path is not None]
    described: dict[str, Any] = {
        "name": base.name,
        "path": str(base.folder),
        "files": shard_hashes | {path.name: file_sha256(path) for path in beside},
    }
    if (base.folder / NAME).is_file():
        parent = read_json(base.folder / NAME, BadModelError, "delete it if this is no merge")
        described["medmerge"] = {
            key: parent[key] for key in ("format", "name", "asked", "note") if key in parent
        } | {"sha256": file_sha256(base.folder / NAME)}
    return described


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """What a manifest says of an adapter that went in, with the SHA-256 of its files."""
    files = sorted(
        path
        for path in adapter.folder.iterdir()
        if path.suffix in (".json", ".safetensors") and path.is_file()
    )
    return {
        "name": adapter.name,
        "path": str(adapter.folder),
        "kind": adapter.kind,
        "rank": adapter.rank,
        "scales": list(adapter.scales),
        "template": adapter.template or None,
        "sha256": adapter.sha256,
        "files": {path.name: file_sha256(path) for path in files},
    }


def is_merge(folder: Path) -> bool:
    """Whether a folder holds a manifest of a merge made by this program."""
    try:
        return str(json.loads((folder / NAME).read_text(encoding="utf-8"))["format"]).startswith(
            "medmerge.merge/"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an earlier merge. Raises BadInputError when there is none, or one we cannot read."""
    manifest = read_json(folder / NAME, BadInputError, "only merges made by medmerge carry a manifest")
    if manifest.get("format") != FORMAT:
        raise BadInputError(f"{folder / NAME}: format is {manifest.get('format')!r}, expected {FORMAT!r}")
    output, base, adapters = manifest.get("output"), manifest.get("base"), manifest.get("adapters")
    if not (isinstance(output, dict) and isinstance(base, dict) and isinstance(adapters, dict)):
        raise BadInputError(f"{folder / NAME}: output, base or adapters are missing or no mappings")
    for where, part in {"output": output, "base": base, **adapters}.items():
        files = part.get("files") if isinstance(part, dict) else None
        if not isinstance(files, dict) or not all(
            isinstance(value, str) and _plain_name(str(key)) for key, value in files.items()
        ):
            raise BadInputError(f"{folder / NAME}: {where}.files is not a mapping of file names to SHA-256")
    return manifest


def _plain_name(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def check_manifest(folder: Path, events: EventWriter) -> dict[str, Any]:
    """Hash every file the manifest names and compare; inputs that moved away are reported, not failed.

    Returns `{"ok", "message", "changed", "missing", "extra", "inputs_missing", "checked", "exit_code"}`:
    exit code 1 when a file of the merge or an input differs, 4 when all that is there agrees but inputs are
    gone, 0 when everything agrees. `extra` are files of the folder the manifest does not know.
    """
    manifest = read_manifest(folder)
    wanted: list[tuple[Path, str, bool]] = []
    wanted += [(folder / name, sha, False) for name, sha in manifest["output"]["files"].items()]
    for part in (manifest["base"], *manifest["adapters"].values()):
        wanted += [(Path(str(part.get("path"))) / name, sha, True) for name, sha in part["files"].items()]
    total = sum(path.stat().st_size for path, _, _ in wanted if path.is_file())
    changed: list[str] = []
    missing: list[str] = []
    gone: list[str] = []
    done = 0
    for path, sha, is_input in wanted:
        if not path.is_file():
            (gone if is_input else missing).append(str(path))
            continue
        if file_sha256(path) != sha:
            changed.append(str(path))
        done += path.stat().st_size
        events.progress(done, total, unit="B", message=path.name, phase="hash")
    known = {folder / name for name in manifest["output"]["files"]} | {folder / NAME}
    extra = sorted(str(path) for path in folder.rglob("*") if path.is_file() and path not in known)
    bad = bool(changed or missing or extra)
    what = [
        f"{len(names)} {word}"
        for names, word in (
            (changed, "changed"),
            (missing, "missing"),
            (extra, "not named by the manifest"),
            (gone, "inputs no longer there"),
        )
        if names
    ]
    return {
        "ok": not bad and not gone,
        "message": "; ".join(what) or f"all {len(wanted)} files are as the manifest says",
        "changed": changed,
        "missing": missing,
        "extra": extra,
        "inputs_missing": gone,
        "checked": len(wanted) - len(missing) - len(gone),
        "exit_code": 1 if bad else 4 if gone else 0,
    }
