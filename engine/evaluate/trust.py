"""Is a model that is evaluated what it claims to be? Reads what verification left in its manifest.

A merge that was not verified, failed, or changed since carries a warning in every table it appears in. A folder
without a manifest claims nothing and is not marked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from engine.merge.manifest import NAME, is_merge, manifest_path

WEIGHTS = (".safetensors", ".gguf")


def doubts(model: Path, sha256: Mapping[str, str]) -> list[str]:
    """Sentences on a checkpoint folder or GGUF file that is a merge; [] when it is none or was found right.

    sha256: the hash of each weight file as it is now, by name.
    """
    if model.is_dir() and not ((model / NAME).is_file() and is_merge(model)):
        return []
    manifest = model / NAME if model.is_dir() else manifest_path(model)
    if not manifest.is_file():
        return []
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        checked, files = said["verification"] or {}, said["output"]["files"]
        done, ok = bool(checked.get("done")), bool(checked.get("ok"))
        verdict, message = str(checked.get("verdict", "")), str(checked.get("message", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [
            f"{model.name}: its manifest cannot be read ({error}); whether it is what it claims is unknown"
        ]
    found = []
    if not done:
        found.append(
            f"{model.name} is a merge that was never verified (medmerge verify {model.name} --manifest)"
        )
    elif not ok:
        found.append(f"{model.name} did not pass verification: {verdict}, {message}")
    changed = sorted(name for name, value in sha256.items() if name in files and files[name] != value)
    if changed:
        found.append(f"{model.name}: {', '.join(changed)} changed since the manifest was written")
    added = sorted(name for name in sha256 if name not in files)
    if added:
        found.append(f"{model.name}: its manifest does not name {', '.join(added)}")
    gone = sorted(name for name in files if name.endswith(WEIGHTS) and name not in sha256)
    if gone:
        found.append(f"{model.name}: {', '.join(gone)} of its manifest is not there, or not used")
    return found
