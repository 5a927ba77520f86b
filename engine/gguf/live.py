"""What "live" chat needs: the base as GGUF and each adapter as LoRA GGUF, made once and found again by hash.

Nothing is exported to change a weight: llama.cpp adds `weight * delta` to its (quantised) base as it computes.
That is a preview: the deltas are not rounded to the checkpoint's dtype, and the base may be quantised.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from engine.gguf.architecture import Architecture
from engine.gguf.convert import Conversion, convert
from engine.gguf.lora import convert_adapter
from engine.jobs.events import EventWriter
from engine.weights import Adapter, Checkpoint
from engine.weights.tensorfile import file_sha256

FORMAT = 1  # raise when the same inputs would give another file
FOLDER = "live"  # below the workspace's gguf/
SMALL_BYTES = 1_000_000_000
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class LiveFiles:
    """What `prepare` made or found. `made` are the files that were not there before."""

    base: Path
    adapters: dict[str, Path]
    made: tuple[Path, ...]


def prepare(base: Path, adapters: dict[str, Path], folder: Path, kind: str, events: EventWriter) -> LiveFiles:
    """Make the files that are not in `folder` yet. `kind` is a GGUF type, or "auto".

    Raises what converting raises: BadModelError, BadAdapterError (an adapter that one number per adapter
    cannot express is refused there by name), NoSpaceError, CancelledError.
    """
    model = Checkpoint.open(base)
    kind = default_type(model) if kind in ("", "auto") else kind.lower()
    made = []
    target = folder / f"{slug(model.name)}-{model_key(model)}-{kind}.gguf"
    if not target.exists():
        convert(Conversion.plan(base), target, kind, events)
        made.append(target)
    loras = {}
    for label, path in adapters.items():
        adapter = Adapter.open(path)
        loras[label] = folder / f"{slug(label)}-{slug(adapter.name)}-{adapter_key(adapter, model)}-lora.gguf"
        if not loras[label].exists():
            convert_adapter(path, base, loras[label], "f32", events)
            made.append(loras[label])
        else:
            adapter.match(model)
    return LiveFiles(target, loras, tuple(made))


def default_type(model: Checkpoint) -> str:
    """f16 where it costs little, q4_k_m for checkpoints above 1 GB."""
    return "f16" if model.nbytes < SMALL_BYTES else "q4_k_m"


def model_key(model: Checkpoint) -> str:
    """Twelve hex digits that change when the base does.

    Small files count by content, weight shards by place, size, time of change and header: hashing 28 GB at each
    start of a chat would be felt. The SHA-256 of the weights is in the GGUF itself.
    """
    parts: list[object] = [FORMAT, str(model.folder.resolve())]
    parts += [file_sha256(model.folder / name) for name in _TEXT_FILES if (model.folder / name).is_file()]
    for shard in model.shards:
        status = shard.path.stat()
        header = hashlib.sha256(shard.header).hexdigest()
        parts.append([shard.path.name, status.st_size, status.st_mtime_ns, status.st_ino, header])
    return _key(parts)


def adapter_key(adapter: Adapter, base: Checkpoint) -> str:
    """Twelve hex digits of the adapter's whole content and the head layout it is permuted for."""
    shape = Architecture.of(base)
    return _key([FORMAT, adapter.sha256, shape.name, shape.heads, shape.kv_heads, shape.head_dim, shape.tied])


def slug(name: str) -> str:
    """A name as a short, plain piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "model"


def _key(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
