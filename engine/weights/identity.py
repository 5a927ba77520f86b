"""Which base is this? One hash for a checkpoint's weights, and whether an adapter was trained on them.

Our training writes the identity of its base into the adapter's `training.json`; merges, GGUFs and evaluations
compare it with the base they use, with the hashes they take anyway. A base saved anew in other shards has other
hashes and the same weights, so a difference is a warning, not an error, unless the person asks for one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import BadModelError
from engine.weights.adapter import Adapter
from engine.weights.checkpoint import Checkpoint, read_json

NOTE = "medmerge.json"  # what the demo base and merges say about themselves, hashes included
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12  # hex digits of a hash that a message shows


def weights_sha256(shards: Mapping[str, str]) -> str:
    """One SHA-256 for a checkpoint's weights, from those of its files by name: of one file its own; of several that
    of their hex digests in the order of the names, joined by newlines."""
    hashes = [shards[name] for name in sorted(shards)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def base_identity(base: Checkpoint) -> dict[str, Any]:
    """What `training.json` says of a base: folder name, SHA-256 (`weights_sha256`), number of weight files.

    Reads all weights, once for a Checkpoint.
    """
    return {"name": base.folder.name, "sha256": weights_sha256(base.sha256), "shards": len(base.shards)}


def noted_sha256(base: Checkpoint) -> dict[str, str] | None:
    """SHA-256 of every shard by file name as the `medmerge.json` beside them says, without reading weights.

    None when there is none, when it does not name every shard, or when a size it gives is not the file's.
    """
    try:
        note = read_json(base.folder / NOTE, BadModelError, "")
    except BadModelError:
        return None
    output = note.get("output")
    files = output.get("files") if isinstance(output, dict) else note.get("files")
    if not isinstance(files, dict):
        return None
    found: dict[str, str] = {}
    for shard in base.shards:
        said = files.get(shard.path.name)
        if isinstance(said, dict):
            if said.get("bytes") != shard.size:
                return None
            said = said.get("sha256")
        if not isinstance(said, str) or not _SHA256.fullmatch(said):
            return None
        found[shard.path.name] = said
    return found


@dataclass(frozen=True)
class TrainedOn:
    """The base an adapter's `training.json` names, seen from the base it is used with.

    `same`: True, the hashes are equal; False, they are not; None, nobody can tell: the hash of the base in use is
    not known yet (`found` is ""), or its weights lie in another number of files than those it was trained on.
    """

    label: str
    name: str
    sha256: str
    base: str  # name of the base in use
    same_name: bool
    same: bool | None
    found: str  # hash of the base in use, "" while it is not known
    files: int  # weight files of the base in use
    trained_files: int  # those of the base it was trained on, 0 where nothing says

    def to_dict(self) -> dict[str, Any]:
        """As manifests and results have it."""
        return {"name": self.name, "sha256": self.sha256, "same": self.same}

    @property
    def warning(self) -> str:
        """What a person should know before using it, and what to do; "" when nothing speaks against it."""
        if self.same or not self.found:
            return ""
        trained = f"adapter {self.label} was trained on {self.name or 'a base without a name'}"
        hashes = f"(SHA-256 {self.sha256[:_SHOWN]}, here {self.found[:_SHOWN]})"
        called = "" if self.same_name else f", which is called {self.base},"
        if self.same is False:
            return (
                f"{trained}, and the weights of the base used here{called} have another hash {hashes}: a base saved "
                "anew has another hash and the same weights; if it is another model, use the one it was trained on"
            )
        where = f" in {_files(self.trained_files)}" if self.trained_files else ""
        return (
            f"{trained}{where}, and the base used here{called} lies in {_files(self.files)}: whether the weights are "
            f"the same cannot be told from their hashes {hashes}; use the files it was trained on to be sure"
        )


def trained_on(
    label: str, adapter: Adapter, base: Checkpoint, shards: Mapping[str, str] | None
) -> TrainedOn | None:
    """What an adapter's `training.json` says of its base, compared with `base`; None when it names no hash.

    `shards`: SHA-256 of the base's weight files by name, None while they are not known.
    """
    named = adapter.training.get("base")
    if not isinstance(named, dict):
        return None
    sha256, name, files = named.get("sha256"), str(named.get("name") or ""), named.get("shards")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        return None
    trained_files = files if type(files) is int and files > 0 else 0
    found = weights_sha256(shards) if shards else ""
    same: bool | None = None
    if found == sha256:
        same = True
    elif found and (trained_files or 1) == len(base.shards):
        same = False
    same_name = name.lower() in {base.name.lower(), base.folder.name.lower()}
    return TrainedOn(label, name, sha256, base.name, same_name, same, found, len(base.shards), trained_files)


def compare_bases(
    adapters: Mapping[str, Adapter], base: Checkpoint, shards: Mapping[str, str] | None
) -> dict[str, TrainedOn]:
    """`trained_on` of every adapter that names the hash of its base, by label."""
    made = {label: trained_on(label, adapter, base, shards) for label, adapter in adapters.items()}
    return {label: found for label, found in made.items() if found is not None}


def base_warnings(compared: Mapping[str, TrainedOn], strict: bool = False) -> list[str]:
    """The warnings of `compare_bases`. With `strict` the first becomes a BadModelError.

    An adapter that names no hash (a foreign one) is nobody's contradiction and passes `strict`.
    """
    warnings = [found.warning for found in compared.values() if found.warning]
    if strict and warnings:
        raise BadModelError(
            f"{warnings[0]} (--strict-base refuses that)", "leave --strict-base out to use it all the same"
        )
    return warnings


def _files(count: int) -> str:
    return "one file" if count == 1 else f"{count} files"
