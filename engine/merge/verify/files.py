"""Everything in a merged folder that is not arithmetic: names, shapes, dtypes, shards, config, tokenizer, template.

Rules, and why:
- every base tensor is there with its shape, in the base's dtype or in the one dtype the merge was converted to;
- no other tensor (a tied lm_head written out as an equal copy is the same model), no weight file that no
  index names (a stale shard is what a loader may pick up tomorrow);
- config.json means the same; the fields tools rewrite (versions, dtype) may differ;
- tokenizer and chat template are the base's. A missing one is a warning: the weights can still be right.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.merge.verify.bits import same_bytes
from engine.merge.verify.deltas import is_embedding
from engine.merge.verify.terms import Term
from engine.merge.verify.verdict import Finding
from engine.weights.checkpoint import INDEX, Checkpoint
from engine.weights.tensorfile import TensorInfo, file_sha256, read_regular

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
# The tokenizer and template files whose change changes what the model says.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# What tools rewrite in config.json without changing the model.
CONFIG_FREE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache")
TOKENIZER_CONFIG_KEYS = (
    "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token", "chat_template",
)  # fmt: skip
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass
class Structure:
    """Which tensors can be compared, and what is wrong with the others."""

    pairs: dict[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    untied: str | None = None  # the head that a change of one side made a tensor of its own
    rows: int | None = None  # of the tables, where tokens were added


def compare_tensors(
    base: Checkpoint, merged: Checkpoint, touched: Mapping[str, Sequence[Term]], of_models: bool = False
) -> Structure:
    """Pair the tensors of both models; findings for missing, unexpected, reshaped and converted ones.

    `touched` gives what changes each tensor: it may name lm_head.weight of a tied base, and terms with more rows
    than the base has (new tokens). An adapter that changes one side of a tied pair unties it.
    """
    result = Structure()
    held = dict(base.tensors)
    head = next((name for name in touched if name.endswith("lm_head.weight") and name not in held), None)
    embedding = next((name for name in base.tensors if is_embedding(name)), None)
    if head is None and base.tied and embedding in touched and not of_models:
        head = "lm_head.weight" if "lm_head.weight" not in held else None
    if head is not None and embedding is not None:
        held[head] = base.tensors[embedding]
        result.untied = head
    missing = [name for name in held if name not in merged.tensors]
    extra = [name for name in merged.tensors if name not in held]
    _allow_tied(base, merged, touched, missing, extra, result.warnings)
    reshaped, converted = [], []
    main = merged.dtype
    for name, ours in held.items():
        theirs = merged.tensors.get(name)
        if theirs is None:
            continue
        shape = max([ours.shape, *(term.shape for term in touched.get(name, ()))])
        if theirs.shape != shape:
            reshaped.append(f"{name} is {list(theirs.shape)}, expected {list(shape)}")
        elif theirs.dtype != ours.dtype and (theirs.dtype != main or not ours.is_float):
            converted.append(f"{name} is {theirs.dtype}, in the base {ours.dtype}")
        else:
            result.pairs[name] = (ours, theirs)
            if shape != ours.shape:
                result.rows = shape[0]
    result.unexpected = extra
    for items, words in (
        (missing, "missing from the merge"),
        (extra, "in the merge and not in the base"),
        (reshaped, "of another shape"),
        (converted, "of another dtype than both the base and the rest of the merge"),
    ):
        if items:
            plural = "tensor is" if len(items) == 1 else "tensors are"
            result.findings.append(
                Finding(
                    "unexpected_change",
                    shortened(items),
                    f"{len(items)} {plural} {words}: {shortened(items)}",
                )
            )
    return result


def _allow_tied(
    base: Checkpoint,
    merged: Checkpoint,
    touched: Mapping[str, Sequence[Term]],
    missing: list[str],
    extra: list[str],
    warnings: list[str],
) -> None:
    """A tied lm_head written out, or an equal one left out, is the same model: take it off the lists."""
    for model, names, words in (
        (merged, extra, "is written out as a copy of the embedding"),
        (base, missing, "equals the embedding and was left out"),
    ):
        for name in [n for n in names if n.endswith("lm_head.weight") and n in model.tensors]:
            embedding = next((t for n, t in model.tensors.items() if is_embedding(n)), None)
            head = model.tensors[name]
            if embedding is None or (embedding.shape, embedding.dtype) != (head.shape, head.dtype):
                continue
            left_out = model is base
            if left_out and (not merged.tied or name in touched or embedding.name in touched):
                continue
            if same_bytes(embedding, head) == 0:
                names.remove(name)
                warnings.append(f"{name} {words}: the same model")


def check_folder(
    base: Checkpoint, merged: Checkpoint, allow_extra: Sequence[str], structure: Structure
) -> tuple[list[Finding], list[str]]:
    """Findings and warnings about the files beside the weights."""
    findings: list[Finding] = []
    warnings: list[str] = []
    known = {shard.path.name for shard in merged.shards} | {INDEX}
    stale = [
        path.name
        for path in sorted(merged.folder.iterdir())
        if path.is_file() and path.name not in known and _is_weights(path.name)
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_extra)
    ]  # fmt: skip
    if stale:
        findings.append(
            Finding(
                "stale_files",
                shortened(stale),
                f"weight files in the folder that no index names: {shortened(stale)}",
            )
        )
    _compare_config(base, merged, structure, findings, warnings)
    for name in TOKENIZER_FILES:
        _compare_file(base.folder / name, merged.folder / name, findings, warnings)
    _compare_tokenizer_config(base.folder, merged.folder, findings, warnings)
    return findings, warnings


def _is_weights(name: str) -> bool:
    if name == "training_args.bin":  # the Trainer's settings, no weights
        return False
    return any(fnmatch.fnmatch(name, pattern) for pattern in (*WEIGHT_FILES, *ADAPTER_FILES))


def _compare_config(
    base: Checkpoint,
    merged: Checkpoint,
    structure: Structure,
    findings: list[Finding],
    warnings: list[str],
) -> None:
    ours, theirs = base.config, merged.config
    changed = [
        key
        for key in ours
        if key in theirs and key not in CONFIG_FREE and ours[key] != theirs[key]
        and not (key == "tie_word_embeddings" and "lm_head.weight" in merged.tensors)
        and not (key == "vocab_size" and structure.rows is not None and theirs[key] == structure.rows)
    ]  # fmt: skip
    if changed:
        words = "; ".join(f"{key} is {theirs[key]!r}, in the base {ours[key]!r}" for key in changed[:3])
        findings.append(Finding("unexpected_change", "config.json", f"config.json was changed: {words}"))
    if structure.untied in merged.tensors and theirs.get("tie_word_embeddings") is True:
        findings.append(
            Finding(
                "unexpected_change",
                "config.json",
                f"{structure.untied} is its own tensor now, and config.json still says tie_word_embeddings: a "
                "loader would not read it",
            )
        )
    said = theirs.get("dtype") or theirs.get("torch_dtype")
    real = DTYPE_NAMES.get(merged.dtype)
    if said and real and str(said).removeprefix("torch.") != real:
        warnings.append(
            f"config.json says dtype {said} and the weights are {real}: a loader that follows it rounds again"
        )


def _compare_file(ours: Path, theirs: Path, findings: list[Finding], warnings: list[str]) -> None:
    if not ours.is_file():
        if theirs.is_file() and ours.name.startswith("chat_template"):
            if _template(ours.parent) == _template(theirs.parent):
                return
            findings.append(
                Finding("unexpected_change", ours.name, f"{ours.name} is new: the base has no such template")
            )
        return
    if not theirs.is_file():
        if ours.name.startswith("chat_template") and _template(ours.parent) == _template(theirs.parent):
            return
        warnings.append(f"{ours.name} of the base is missing from the merge")
        return
    if file_sha256(ours) != file_sha256(theirs) and not _same_json(ours, theirs):
        findings.append(Finding("unexpected_change", ours.name, f"{ours.name} is not the base's"))


def _compare_tokenizer_config(base: Path, merged: Path, findings: list[Finding], warnings: list[str]) -> None:
    name = "tokenizer_config.json"
    if not (base / name).is_file() or not (merged / name).is_file():
        if (base / name).is_file():
            warnings.append(f"{name} of the base is missing from the merge")
        return
    if file_sha256(base / name) == file_sha256(merged / name):
        return
    ours, theirs = _json(base / name), _json(merged / name)
    if ours is None or theirs is None:
        findings.append(Finding("unexpected_change", name, f"{name} is not the base's"))
        return
    changed = [
        key
        for key in TOKENIZER_CONFIG_KEYS
        if ours.get(key) != theirs.get(key)
        and not (key == "chat_template" and _template(base) == _template(merged))
    ]
    if changed:
        findings.append(
            Finding("unexpected_change", name, f"{name} differs from the base's in {', '.join(changed)}")
        )


def _template(folder: Path) -> str | None:
    """The chat template in force: chat_template.jinja, else chat_template in tokenizer_config.json."""
    try:
        return read_regular(folder / "chat_template.jinja").decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        config = _json(folder / "tokenizer_config.json") or {}
        value = config.get("chat_template")
        return value if isinstance(value, str) else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _same_json(ours: Path, theirs: Path) -> bool:
    """The same JSON written in another way (spaces, escapes); order of keys does not matter."""
    if ours.suffix != ".json":
        return False
    a, b = _json(ours), _json(theirs)
    return a is not None and a == b


def shortened(items: Sequence[str], most: int = 8) -> str:
    """The first items, and how many more there are."""
    text = ", ".join(items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
