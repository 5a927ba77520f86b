"""One merge from recipe to finished folder: plan, stream, companions, manifest, verification, one rename.

Everything happens in `OUT.partial`; the name OUT appears only when the merge is whole and, unless it was asked
not to, verified. A merge that fails its verification is kept as `OUT.rejected` for study, never as OUT.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from engine.atomic import JOURNAL, need_space, new_folder, refuse_existing, sync_tree, write_json
from engine.jobs.events import EventWriter
from engine.merge import manifest as manifests
from engine.merge.plan import Plan, config_text, make_plan, refuse_broken_adapters
from engine.merge.recipe import Recipe
from engine.merge.selectors import DEFAULT
from engine.merge.stream import stream_merge
from engine.weights.checkpoint import INDEX

NOT_WEIGHTS = (JOURNAL, manifests.NAME)
_COMPANION_ROOM = 64_000_000  # bytes kept free for tokenizer, configs and the manifest


def merge(
    recipe: Recipe, events: EventWriter, verify: bool = True, threads: int | None = None
) -> dict[str, Any]:
    """Merge as the recipe says. Returns out, seconds, bytes_written, manifest, verdict and exit_code.

    `verdict` is the verification's JSON (None without one); exit_code 0 done, 1 the verification said no
    (then `out` is the `.rejected` folder), 4 it could not tell.

    Raises:
        TargetExistsError, NoSpaceError, BadInputError and kin: nothing is left behind.
    """
    started = time.monotonic()
    refuse_existing(recipe.output)
    plan = make_plan(recipe)
    refuse_broken_adapters(plan)
    need_space(recipe.output.parent, plan.bytes_written + _COMPANION_ROOM, "the merge")
    for warning in plan.warnings:
        events.warning(warning)
    out, verdict = recipe.output, None
    with new_folder(recipe.output) as partial:
        hashes = stream_merge(plan, partial, events, threads)
        copy_companions(plan, partial)
        record = manifests.make_manifest(plan, hashes, partial, time.monotonic() - started)
        write_json(partial / manifests.NAME, record)
        if verify:
            verdict = _verify(plan, partial, events)
        record["verification"] = summary(verdict)
        write_json(partial / manifests.NAME, record)
        if verdict is not None and verdict["exit_code"] == 1:
            out = reject(partial, recipe.output)
    return {
        "out": str(out),
        "seconds": round(time.monotonic() - started, 3),
        "bytes_written": plan.bytes_written,
        "manifest": record,
        "verdict": verdict,
        "exit_code": verdict["exit_code"] if verdict else 0,
    }


def _verify(plan: Plan, partial: Path, events: EventWriter) -> dict[str, Any]:
    from engine.merge.verify import verify_merge

    entries = plan.recipe.adapters
    mixed = any(entry.uniform is None for entry in entries)
    verdict = verify_merge(
        partial,
        plan.recipe.base,
        {entry.label: entry.path for entry in entries},
        {entry.label: entry.weights.get(DEFAULT, next(iter(entry.weights.values()))) for entry in entries},
        events,
        per_tensor_weights=plan.weights if mixed else None,
        allow_extra_files=NOT_WEIGHTS,
    )
    return {**verdict.to_json(), "exit_code": verdict.exit_code}


def summary(verdict: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest keeps of a verification."""
    if verdict is None:
        return {"done": False, "message": "not verified: made with --no-verify"}
    keys = (
        "ok", "verdict", "message", "asked", "expected_weights", "effective_weights", "rounding_loss",
        "residual", "rounding_floor", "differing_share", "unchanged_share", "tensors_checked",
    )  # fmt: skip
    return {"done": True, **{key: verdict[key] for key in keys if key in verdict}}


def reject(partial: Path, target: Path) -> Path:
    """Keep a merge that failed its verification beside the target, under a name that is free."""
    (partial / JOURNAL).unlink(missing_ok=True)
    sync_tree(partial)
    kept = target.with_name(target.name + ".rejected")
    number = 1
    while kept.exists():
        number += 1
        kept = target.with_name(f"{target.name}.rejected-{number}")
    partial.rename(kept)
    return kept


def copy_companions(plan: Plan, folder: Path) -> None:
    """Tokenizer, chat template, generation config and index beside the weights; config.json with its dtype."""
    base = plan.base
    for path in base.companions:
        target = folder / path.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    config = config_text(base, plan.recipe.dtype)
    if config is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")
    if base.index_path is not None:
        index = json.loads(base.index_path.read_text(encoding="utf-8"))
        total = sum(tensor.target.nbytes for tensor in plan.tensors)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
