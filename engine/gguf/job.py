"""What GGUF jobs run: `run` makes one file, `run_live` the files for mixing adapters while chatting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.gguf.convert import Conversion, convert
from engine.gguf.live import FOLDER, prepare
from engine.gguf.lora import convert_adapter
from engine.gguf.mixture import plan_mixture
from engine.jobs.events import EventWriter
from engine.weights.adapter import CONFIG
from engine.weights.tensorfile import file_sha256


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Make the GGUF file `out` from one of:

    - `source`, a checkpoint folder;
    - `source`, an adapter folder, with `base`: a LoRA GGUF (type f32 or f16);
    - `base` and `adapters` ({label: {"path", "weight"}}): the mixture, without a merged checkpoint.

    `type` is a llama.cpp type (default f16, f32 for an adapter); `pre` overrides the recognised pre-tokenizer.

    Returns: out, kind ("model", "adapter", "mixture"), type, bytes, seconds, sha256.
    """
    started = time.monotonic()
    out, pre = Path(params["out"]), str(params.get("pre") or "")
    source = Path(params["source"]) if params.get("source") else None
    base = Path(params["base"]) if params.get("base") else None
    if source is not None and (source / CONFIG).is_file():
        if base is None:
            raise BadRecipeError(f"{source} is an adapter", "name the base it was trained from with --base")
        kind, type_ = "adapter", str(params.get("type") or "f32").lower()
        convert_adapter(source, base, out, type_, events)
    else:
        type_ = str(params.get("type") or "f16").lower()
        if source is not None:
            kind, conversion = "model", Conversion.plan(source, pre)
        elif base is not None and params.get("adapters"):
            kind, conversion = "mixture", plan_mixture(base, params["adapters"], out, pre)
        else:
            raise BadRecipeError(
                "nothing to convert", "give a checkpoint or adapter folder, or a base and adapters"
            )
        convert(conversion, out, type_, events)
    return {
        "out": str(out),
        "kind": kind,
        "type": type_,
        "bytes": out.stat().st_size,
        "seconds": round(time.monotonic() - started, 3),
        "sha256": file_sha256(out),
    }


def run_live(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Make what is missing of the files a live mixture needs, in `out`/live.

    Args:
        params: base (checkpoint folder), adapters ({label: adapter folder}), type (default "auto"), out (the
            workspace's gguf folder).

    Returns: base (GGUF path), adapters ({label: LoRA GGUF path}), made (paths that are new), seconds.
    """
    started = time.monotonic()
    adapters = {str(label): Path(path) for label, path in dict(params["adapters"]).items()}
    folder = Path(params["out"]) / FOLDER
    files = prepare(Path(params["base"]), adapters, folder, str(params.get("type") or "auto"), events)
    return {
        "base": str(files.base),
        "adapters": {label: str(path) for label, path in files.adapters.items()},
        "made": [str(path) for path in files.made],
        "seconds": round(time.monotonic() - started, 3),
    }
