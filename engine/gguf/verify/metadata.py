"""Metadata of a GGUF against what the base's own files say: hyperparameters, tokenizer, chat template.

Long values are compared by SHA-256. A key that a file does not carry is a note where llama.cpp has a default for
it, and a finding where the model would read text otherwise. Keys this program does not write are left alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from engine.errors import BadModelError
from engine.gguf.architecture import Architecture
from engine.gguf.reader import GgufFile
from engine.gguf.tokenizer import Tokenizer
from engine.merge.verify.files import shortened
from engine.merge.verify.verdict import Finding
from engine.weights import Checkpoint

TEMPLATE = "tokenizer.chat_template"
# Without these llama.cpp reads text otherwise, or not at all.
NEEDED = (
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges",
    "tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_id",
)  # fmt: skip
IMATRIX = "quantize.imatrix.file"


def expected_metadata(base: Checkpoint, architecture: Architecture, pre: str = "") -> dict[str, Any]:
    """Every key of architecture and tokenizer as the converter would write it; `pre` names the pre-tokenizer.

    Raises BadModelError: no tokenizer, or one of a kind that cannot be in a GGUF.
    """
    import gguf

    writer = gguf.GGUFWriter(None, architecture.name)
    architecture.write(writer)
    tokenizer = Tokenizer.of(base, architecture, pre)
    tokenizer.write(writer)
    return {key: value.value for part in writer.kv_data for key, value in part.items()}


def check_metadata(
    file: GgufFile, base: Checkpoint, architecture: Architecture, pre: str = ""
) -> tuple[list[Finding], list[str]]:
    """Findings with detail "config", "tokenizer" or "chat_template", and notes.

    A pre-tokenizer that is not recognised is taken from the file, with a note.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    if not (base.folder / "tokenizer.json").is_file():
        return [], [f"{base.folder.name} has no tokenizer.json: metadata and tokenizer were not compared"]
    try:
        expected = expected_metadata(base, architecture, pre)
    except BadModelError as error:
        own = str(file.metadata.get("tokenizer.ggml.pre", ""))
        try:
            expected = expected_metadata(base, architecture, own or "default")
        except BadModelError:
            return [
                Finding("not_checkable", "tokenizer", f"the tokenizer cannot be judged: {error.message}")
            ], []
        notes.append(
            f"the pre-tokenizer's name was not compared ({own}): the base's is none that is known here"
        )
    config: list[str] = []
    tokenizer: list[str] = []
    for key, right in expected.items():
        place = tokenizer if key.startswith("tokenizer.") else config
        if key == TEMPLATE:
            continue
        if key not in file.metadata:
            if key in NEEDED:
                place.append(f"{key} is missing")
            else:
                notes.append(f"{key} is not in the GGUF: llama.cpp takes its default")
        elif not _same(file.metadata[key], right):
            place.append(f"{key} is {_short(file.metadata[key])}, expected {_short(right)}")
    for detail, wrong in (("config", config), ("tokenizer", tokenizer)):
        if wrong:
            findings.append(Finding("unexpected_change", detail, shortened(wrong, 4)))
    ours, theirs = str(expected.get(TEMPLATE, "")), str(file.metadata.get(TEMPLATE, ""))
    if ours != theirs:
        words = (
            "has none"
            if not theirs
            else f"has another (SHA-256 {_hash(theirs)[:12]}, not {_hash(ours)[:12]})"
        )
        findings.append(
            Finding("unexpected_change", "chat_template", f"chat template: the GGUF {words}")
            if ours
            else Finding("unexpected_change", "chat_template", "the GGUF has a chat template, the base none")
        )
    return findings, notes


def source_of(file: GgufFile) -> dict[str, Any]:
    """What a GGUF made by this program says of its source; empty for others."""
    try:
        found = json.loads(str(file.metadata.get("medmerge.source", "")))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _same(found: Any, right: Any) -> bool:
    if isinstance(right, float) and isinstance(found, int | float):  # stored as float32
        return abs(found - right) <= 1e-6 * max(abs(right), 1e-12)
    if isinstance(right, list | tuple) and isinstance(found, list):
        if any(isinstance(item, float) for item in right):  # token scores, stored as float32
            return len(found) == len(right) and all(
                abs(a - b) <= 1e-6 * max(abs(b), 1.0) for a, b in zip(found, right, strict=True)
            )
        return _hash(found) == _hash(list(right))
    return bool(found == right)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} items with SHA-256 {_hash(list(value))[:12]}"
    return repr(value)[:80]


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def quantised_with_imatrix(file: GgufFile) -> bool:
    """Whether llama-quantize says it used an importance matrix."""
    return bool(file.metadata.get(IMATRIX))
