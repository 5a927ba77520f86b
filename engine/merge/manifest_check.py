"""`medmerge verify --manifest`: is every file of a merge, and of what it was made from, still what it was?

Reads and hashes; knows nothing of weights. The folder of the merge may have been moved, alone (then its inputs
are looked for where they were) or together with its inputs (then they are found by the way from one to the other).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadAdapterError, BadInputError
from engine.jobs.events import EventWriter
from engine.merge.manifest import NAME, manifest_path, read_manifest
from engine.weights.adapter import CONFIG, WEIGHTS
from engine.weights.checkpoint import read_json
from engine.weights.tensorfile import file_sha256


@dataclass(frozen=True)
class _Named:
    """A file a manifest names: where it should be, and what of. `part` is "output", "base", "adapter pt"."""

    part: str
    path: Path
    sha256: str


@dataclass
class _Found:
    """What became of the files, as paths."""

    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    inputs_changed: list[str] = field(default_factory=list)
    inputs_missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    parts: dict[str, list[str]] = field(
        default_factory=dict
    )  # "changed" and "gone" inputs by part, for the message
    right: set[Path] = field(default_factory=set)

    def note(self, named: _Named, state: str) -> None:
        """`state`: "changed", "missing" or "unreadable"."""
        if state == "unreadable":
            self.unreadable.append(str(named.path))
        elif named.part == "output":
            (self.changed if state == "changed" else self.missing).append(str(named.path))
        else:
            (self.inputs_changed if state == "changed" else self.inputs_missing).append(str(named.path))
            self.parts.setdefault(state, [])
            if named.part not in self.parts[state]:
                self.parts[state].append(named.part)


def check_manifest(merged: Path, events: EventWriter) -> dict[str, Any]:
    """Hash every file the manifest of a merged folder, or of a GGUF (`FILE.gguf.json`), names and compare.

    Returns:
        ok, message, exit_code, checked (files hashed), and lists of paths: `changed`, `missing` and `extra` files of
        the merge; `inputs_changed`, `inputs_missing`; `unreadable`; `moved` inputs ({part, path}), found where the
        merge was moved to; `links`, files of the merge that lie outside it; `inconsistent`, sentences on where the
        manifest contradicts itself. Exit code 1 when anything differs, 4 when all that is there agrees but
        something is gone or cannot be read, 0 when everything agrees.

    Raises:
        BadInputError: no manifest, or one that cannot be read.
    """
    manifest = read_manifest(merged)
    alone = merged.is_file()  # one file, whatever it is called now
    moved: list[dict[str, str]] = []
    files = manifest["output"]["files"]
    if alone and len(files) != 1:
        raise BadInputError(
            f"{manifest_path(merged)}: output.files names {len(files)} files, and {merged} is one"
        )
    wanted = [_Named("output", merged if alone else merged / n, sha) for n, sha in files.items()]
    places: dict[str, Path] = {}
    for part, described in _inputs(manifest):
        places[part] = place_of_input(merged, described)
        if str(places[part]) != described["path"] and places[part].is_dir():
            moved.append({"part": part, "path": str(places[part])})
        wanted += [_Named(part, places[part] / n, sha) for n, sha in described["files"].items()]
    found = _hash_all(wanted, events)
    known = {named.path for named in wanted} | {merged / NAME}
    extra = sorted(str(path) for path in _entries(merged) if path not in known)  # none beside a file
    inside = merged.parent if alone else merged
    links = sorted(str(n.path) for n in wanted if n.part == "output" and _leaves(inside, n.path))
    inconsistent = [*_contradictions(manifest), *_wrong_adapter_hashes(manifest, places, found)]
    differs = bool(found.changed or found.missing or extra or found.inputs_changed or inconsistent)
    unsure = bool(found.inputs_missing or found.unreadable)
    return {
        "ok": not differs and not unsure,
        "message": _message(len(found.right), found, extra, inconsistent, moved),
        "changed": found.changed,
        "missing": found.missing,
        "extra": extra,
        "inputs_changed": found.inputs_changed,
        "inputs_missing": found.inputs_missing,
        "unreadable": found.unreadable,
        "inconsistent": inconsistent,
        "moved": moved,
        "links": links,
        "checked": len(found.right) + len(found.changed) + len(found.inputs_changed),
        "exit_code": 1 if differs else 4 if unsure else 0,
    }


def _inputs(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("base", ...), ("adapter pt", ...), ("model a", ...)."""
    if manifest.get("base") is not None:
        yield "base", manifest["base"]
    for key in ("adapters", "models"):
        for label, described in manifest[key].items():
            yield f"{key.removesuffix('s')} {label}", described


def place_of_input(folder: Path, described: dict[str, Any]) -> Path:
    """Where an input lies: where it was, else as far from the merge as it was then."""
    there = Path(described["path"])
    if there.is_absolute() and _is(there, "folder"):
        return there
    if described.get("relative"):
        near = Path(os.path.normpath(folder.absolute().parent / described["relative"]))
        if _is(near, "folder"):
            return near
    return there


def _is(path: Path, kind: str) -> bool:
    """is_file or is_dir (links followed); False where the path itself is impossible."""
    try:
        return path.is_dir() if kind == "folder" else path.is_file()
    except OSError:
        return False


def _hash_all(wanted: list[_Named], events: EventWriter) -> _Found:
    found, done = _Found(), 0
    total = sum(named.path.stat().st_size for named in wanted if _is(named.path, "file"))
    hashed: dict[Path, str] = {}  # an input may be named twice: a base that is also a model
    for named in wanted:
        try:
            if not _is(named.path, "file"):
                found.note(named, "missing")
                continue
            if named.path not in hashed:
                hashed[named.path] = file_sha256(named.path)
            done += named.path.stat().st_size
        except OSError:
            found.note(named, "unreadable")
            continue
        if hashed[named.path] == named.sha256:
            found.right.add(named.path)
        else:
            found.note(named, "changed")
        events.progress(done, total, unit="B", message=named.path.name, phase="hash")
    return found


def _entries(folder: Path) -> Iterator[Path]:
    """Everything in a folder that is no plain folder: files, links (also to folders), sockets and the like."""
    for parent, folders, files in os.walk(folder):
        for name in [*files, *(name for name in folders if (Path(parent) / name).is_symlink())]:
            yield Path(parent) / name


def _leaves(folder: Path, path: Path) -> bool:
    """Whether a file of the folder is really somewhere else."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return False


def _contradictions(manifest: dict[str, Any]) -> Iterator[str]:
    """Where the recipe the manifest keeps is not what the manifest says went in."""
    recipe = manifest["recipe"]
    said = (recipe.get("method", "linear"), manifest.get("method"))
    if said[0] != said[1]:
        yield f"the recipe's method is {said[0]!r}, and method is {said[1]!r}"
    base = manifest.get("base")
    if "base" in recipe and recipe["base"] != (base["path"] if base is not None else None):
        yield "the recipe's base is another folder than base.path"
    for key in ("adapters", "models"):
        if key not in recipe:
            continue
        entries = recipe[key]
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            yield f"recipe.{key} is no mapping of entries"
            continue
        for label in sorted(entries.keys() ^ manifest[key].keys()):
            where = "the recipe" if label in entries else f"{key}"
            yield f"{label!r} is only in {where}"
        for label in entries.keys() & manifest[key].keys():
            if entries[label].get("path") != manifest[key][label]["path"]:
                yield f"the recipe's {key}.{label} is another folder than {key}.{label}.path"
            asked = manifest.get("asked")
            weight = asked.get(label) if isinstance(asked, dict) else None
            combined = manifest["output"].get("kind") == "adapter"  # there asked is what counted
            if not combined and entries[label].get("weight", 1.0) != weight:
                yield f"the recipe asks another weight of {label} than asked.{label}"


def _wrong_adapter_hashes(manifest: dict[str, Any], places: dict[str, Path], found: _Found) -> Iterator[str]:
    """adapters.LABEL.sha256 made again from weights and config, where both are as the manifest says."""
    for label, described in manifest["adapters"].items():
        folder = places[f"adapter {label}"]
        if described.get("sha256") is None or not {folder / CONFIG, folder / WEIGHTS} <= found.right:
            continue
        config = read_json(folder / CONFIG, BadAdapterError, "")
        digest = hashlib.sha256(described["files"][WEIGHTS].encode())
        digest.update(json.dumps(config, sort_keys=True).encode())
        if digest.hexdigest() != described["sha256"]:
            yield f"adapters.{label}.sha256 is not the hash of that adapter's weights and config"


def _message(
    right: int, found: _Found, extra: list[str], inconsistent: list[str], moved: list[dict[str, str]]
) -> str:
    what = [
        f"{len(names)} {word}"
        for names, word in (
            (found.changed, "changed"),
            (found.missing, "missing"),
            (extra, "not named by the manifest"),
            (found.inputs_changed, f"inputs changed ({', '.join(found.parts.get('changed', []))})"),
            (found.inputs_missing, f"inputs no longer there ({', '.join(found.parts.get('missing', []))})"),
            (found.unreadable, "cannot be read"),
        )
        if names
    ]
    what += inconsistent
    if not what:
        what = [f"all {right} files are as the manifest says"]
    if moved:
        what.append(f"{', '.join(entry['part'] for entry in moved)} found where the merge was moved to")
    return "; ".join(what)
