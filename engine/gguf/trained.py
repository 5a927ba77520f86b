"""What is inside a model a person talks to, and which text its own template is: for warnings about templates.

`medmerge chat`, the chat screen and evaluation ask here; engine/template_check.py judges. Reads headers and small
JSON files only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import templates
from engine.errors import BadInputError, MedmergeError
from engine.gguf.reader import GgufFile
from engine.merge.manifest import NAME, is_merge, manifest_path, read_manifest
from engine.template_check import Chosen, Trained, choose, from_record, of_adapter, of_manifest
from engine.weights import Adapter

SOURCE_KEY = "medmerge.source"
_SPECIAL = ("bos", "eos", "padding")


def trained_in(model: Path) -> list[Trained]:
    """The adapters merged into a checkpoint folder or GGUF; empty for a base, and for files that say nothing.

    A folder says it in its manifest, a GGUF in the manifest beside it or in its own metadata. A manifest that is
    there and cannot be read is one unknown adapter.
    """
    if not model.is_file():
        if not (model / NAME).is_file() or not is_merge(model):
            return []
        return _of_manifest(model, model.name)
    if manifest_path(model).is_file():
        return _of_manifest(model, model.name)
    source = _source(_open(model))
    return [
        *(from_record(label, entry, model.name) for label, entry in _entries(source.get("adapters"))),
        *(from_record(label, entry, model.name) for label, entry in _entries(source.get("templates"))),
    ]


def trained_adapter(label: str, path: Path) -> Trained:
    """What an adapter folder, or a LoRA GGUF made from one, was trained with.

    Raises BadAdapterError for a folder that is none.
    """
    if path.is_dir():
        return of_adapter(label, Adapter.open(path))
    return from_record(label, {"template_known": False, **_source(_open(path))})


def choose_for(name: str, model: Path) -> Chosen:
    """The template `name` for a checkpoint folder or a GGUF ("model" is then the one in the file).

    Raises BadRecipeError for a name that does not exist.
    """
    if name != "model" or model.is_dir():
        return choose(name, model)
    file = _open(model)
    text = file.metadata.get("tokenizer.chat_template") if file else None
    if file is None or not isinstance(text, str) or not text:
        return Chosen(name)
    try:
        return Chosen(name, templates.describe(templates.from_jinja(text, _special_tokens(file)))["sha256"])
    except MedmergeError:  # it does not compile: whoever renders with it says so
        return Chosen(name)


def hashes_in(gguf: Path) -> dict[str, str] | None:
    """SHA-256 of the weight files a GGUF was made from, by name, as this program wrote them into it; else None."""
    found = _source(_open(gguf)).get("sha256")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else None


def _of_manifest(model: Path, name: str) -> list[Trained]:
    try:
        return of_manifest(read_manifest(model), name)
    except BadInputError:
        return [Trained("", within=name)]


def _open(path: Path) -> GgufFile | None:
    try:
        return GgufFile.open(path)
    except MedmergeError:
        return None  # what loads it says what is wrong with it


def _source(file: GgufFile | None) -> dict[str, Any]:
    """What this program wrote about the file's source; empty for files of other tools."""
    try:
        found = json.loads(str(file.metadata.get(SOURCE_KEY, ""))) if file else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _special_tokens(file: GgufFile) -> dict[str, str]:
    """The texts of BOS, EOS and PAD by their names in chat templates, as the chat child has them."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    found: dict[str, str] = {}
    for name in _SPECIAL:
        number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens):
            found[f"{'pad' if name == 'padding' else name}_token"] = str(tokens[number])
    return found


def _entries(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, Mapping):
        return []
    return [(str(label), entry) for label, entry in value.items() if isinstance(entry, Mapping)]
