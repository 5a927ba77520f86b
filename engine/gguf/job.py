"""What GGUF jobs run: `run` makes one file, `run_verify` judges one, `run_live` prepares mixing while chatting.

numpy is loaded with one BLAS thread first: the workers of a verification are our own threads.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge.job import load_numpy_single_threaded


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Make the GGUF file `out` from one of:

    - `source`, a checkpoint folder;
    - `source`, an adapter folder, with `base`: a LoRA GGUF (type f32 or f16);
    - `base` and `adapters` ({label: {"path", "weight"}}): the mixture, without a merged checkpoint. A weight is a
      number, or a mapping of base tensor names to numbers.

    `type` is a llama.cpp type (default f16, f32 for an adapter); `pre` overrides the recognised pre-tokenizer;
    `verify` (default True): read models and mixtures back before they get their name. `strict_base` (default
    False): refuse a base that is not the one an adapter was trained on, before anything is written.

    Returns: out, kind ("model", "adapter", "mixture"), type, bytes, seconds, sha256, verdict (None for an
    adapter), trained_on ({label: {name, sha256, same}} of adapters that name the hash of their base), warnings,
    exit_code (1: `out` is the `.rejected` file; 4: the verification could not tell).
    """
    started = time.monotonic()
    load_numpy_single_threaded()
    from engine.gguf.lora import convert_adapter
    from engine.gguf.mixture import Mixture
    from engine.gguf.outputs import write_ggufs
    from engine.weights.adapter import CONFIG
    from engine.weights.tensorfile import file_sha256

    out, pre = Path(params["out"]), str(params.get("pre") or "")
    strict = bool(params.get("strict_base", False))
    source = Path(params["source"]) if params.get("source") else None
    base = Path(params["base"]) if params.get("base") else None
    if source is not None and (source / CONFIG).is_file():
        if base is None:
            raise BadRecipeError(f"{source} is an adapter", "name the base it was trained from with --base")
        type_ = str(params.get("type") or "f32").lower()
        own = _Bases({source.name: source}, base, strict)
        convert_adapter(source, base, out, type_, events)
        made = {"out": str(out), "bytes": out.stat().st_size, "sha256": file_sha256(out)}
        return {
            "kind": "adapter", "type": type_, **made, "verdict": None, "exit_code": 0, **own.told(None, events),
            "seconds": round(time.monotonic() - started, 3),
        }  # fmt: skip
    what: Path | Mixture
    bases: _Bases | None = None
    if source is not None:
        kind, what = "model", source
    elif base is not None and params.get("adapters"):
        entries = dict(params["adapters"])
        paths = {label: Path(entry["path"]) for label, entry in entries.items()}
        bases = _Bases(paths, base, strict)
        kind, what = "mixture", Mixture(base, paths, {k: entry["weight"] for k, entry in entries.items()})
    else:
        raise BadRecipeError(
            "nothing to convert", "give a checkpoint or adapter folder, or a base and adapters"
        )
    type_ = str(params.get("type") or "f16").lower()
    made = write_ggufs(what, {type_: out}, events, pre, bool(params.get("verify", True)))[0].to_json()
    told = bases.told(Path(str(made["out"])), events) if bases else {"trained_on": {}, "warnings": []}
    return {"kind": kind, **made, **told, "seconds": round(time.monotonic() - started, 3)}


class _Bases:
    """The bases that adapters were trained on, against the one they are converted with.

    With `strict` its weights are hashed at once, and another one is a BadModelError. Without, a file that was made of
    them says their hashes: they are not read for it once more.
    """

    def __init__(self, adapters: dict[str, Path], base: Path, strict: bool) -> None:
        from engine.weights import Adapter, Checkpoint

        self._adapters = {label: Adapter.open(path) for label, path in adapters.items()}
        self._base = Checkpoint.open(base)
        if strict:
            self._compare(self._base.sha256, strict)

    def told(self, file: Path | None, events: EventWriter) -> dict[str, Any]:
        """`trained_on` and `warnings` of a result; the warnings are told, too. `file`: the finished GGUF, which holds
        the hashes (None: as far as the base's own note says them)."""
        from engine.gguf.trained import hashes_in
        from engine.weights.identity import noted_sha256

        known = self._base.__dict__.get("sha256")  # hashed above, in the strict case
        hashes = known or (hashes_in(file) if file else None) or noted_sha256(self._base)
        trained_on, warnings = self._compare(hashes, strict=False)
        for warning in warnings:
            events.warning(warning)
        return {"trained_on": trained_on, "warnings": warnings}

    def _compare(self, hashes: dict[str, str] | None, strict: bool) -> tuple[dict[str, Any], list[str]]:
        from engine.weights.identity import base_warnings, compare_bases

        compared = compare_bases(self._adapters, self._base, hashes)
        return {k: found.to_dict() for k, found in compared.items()}, base_warnings(compared, strict)


def run_verify(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """params: file (a GGUF), base, adapters {label: path} (may be empty), weights {label: number} or None.

    Returns the verdict as JSON, with its exit_code.
    """
    load_numpy_single_threaded()
    from engine.gguf.verify import verify_gguf

    verdict = verify_gguf(
        Path(params["file"]),
        Path(params["base"]),
        {label: Path(path) for label, path in params["adapters"].items()},
        params.get("weights"),
        events,
    )
    return verdict.to_json()


def run_live(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Make what is missing of the files a live mixture needs, in `out`/live.

    Args:
        params: base (checkpoint folder), adapters ({label: adapter folder}), type (default "auto"), out (the
            workspace's gguf folder).

    Returns: base (GGUF path), adapters ({label: LoRA GGUF path}), made (paths that are new), seconds.
    """
    started = time.monotonic()
    load_numpy_single_threaded()
    from engine.gguf.live import FOLDER, prepare

    adapters = {str(label): Path(path) for label, path in dict(params["adapters"]).items()}
    folder = Path(params["out"]) / FOLDER
    files = prepare(Path(params["base"]), adapters, folder, str(params.get("type") or "auto"), events)
    return {
        "base": str(files.base),
        "adapters": {label: str(path) for label, path in files.adapters.items()},
        "made": [str(path) for path in files.made],
        "seconds": round(time.monotonic() - started, 3),
    }
