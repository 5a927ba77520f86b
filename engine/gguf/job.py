"""What a GGUF job runs: a checkpoint or an adapter to a file, or a base and adapters for live mixing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.gguf.convert import Conversion, convert
from engine.jobs.events import EventWriter
from engine.weights.adapter import CONFIG
from engine.weights.tensorfile import file_sha256


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Convert `source` (a checkpoint folder, or an adapter folder with `base`) to the GGUF file `out`.

    Args:
        params: source, out (paths); type (default f16; an adapter: f32 or f16); base (the adapter's checkpoint);
            pre (override of the recognised pre-tokenizer).

    Returns: out, kind ("model" or "adapter"), type, bytes, seconds, sha256, warnings.
    """
    started = time.monotonic()
    source, out = Path(params["source"]), Path(params["out"])
    if (source / CONFIG).is_file():
        from engine.gguf.lora import convert_adapter

        if not params.get("base"):
            raise BadRecipeError(f"{source} is an adapter", "name the base it was trained from with --base")
        kind, type_ = "adapter", str(params.get("type") or "f32").lower()
        convert_adapter(source, Path(params["base"]), out, type_, events)
        warnings: list[str] = []
    else:
        kind, type_ = "model", str(params.get("type") or "f16").lower()
        conversion = Conversion.plan(source, pre=str(params.get("pre") or ""))
        warnings = convert(conversion, out, type_, events)
    for warning in warnings:
        events.warning(warning)
    return {
        "out": str(out),
        "kind": kind,
        "type": type_,
        "bytes": out.stat().st_size,
        "seconds": round(time.monotonic() - started, 3),
        "sha256": file_sha256(out),
        "warnings": warnings,
    }
