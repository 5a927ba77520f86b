"""One merge from recipe to finished folder: plan, stream, companions, manifest, verification, one rename.

Everything happens in `OUT.partial`; the name OUT appears only when the merge is whole and, unless it was asked
not to, verified. A merge that fails its verification is kept as `OUT.rejected` for study, never as OUT.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.atomic import JOURNAL, need_space, new_folder, refuse_existing, reject, write_json
from engine.errors import BadRecipeError
from engine.jobs.events import EventWriter
from engine.merge import manifest as manifests
from engine.merge.companions import copy_companions
from engine.merge.journal import Journal, fingerprint
from engine.merge.kernel import kernel
from engine.merge.plan import Plan, make_plan, refuse_broken_adapters
from engine.merge.recipe import LINEAR, Recipe
from engine.merge.stream import stream_merge
from engine.weights.identity import base_warnings, compare_bases

REPORT = "verification.json"
NOT_WEIGHTS = (JOURNAL, manifests.NAME, REPORT)
_COMPANION_ROOM = 64_000_000  # bytes kept free for tokenizer, configs and the manifest


def merge(
    recipe: Recipe,
    events: EventWriter,
    verify: bool = True,
    threads: int | None = None,
    note_every: int | None = None,
    strict_base: bool = False,
) -> dict[str, Any]:
    """Merge as the recipe says. Returns out, seconds, bytes_written, resumed_bytes, manifest, verdict, trained_on,
    warnings, exit_code.

    `verdict` is the verification's JSON (None without one), also in verification.json beside the merge; exit_code
    0 done, 1 the verification said no (then `out` is the `.rejected` folder), 4 it could not tell. A merge that a
    kill, a cancel or a full disk ended goes on where it stopped when it is run again. `note_every`: bytes of a
    shard between two notes of the journal. `trained_on` ({label: {name, sha256, same}}) compares the base that each
    adapter's training.json names with the bytes that were merged; another one is a warning, and with `strict_base`
    an error.

    Raises:
        TargetExistsError, NoSpaceError, BadInputError and kin: nothing is left behind under the name.
    """
    if recipe.kind == "adapter":
        return _merge_adapters(recipe, events, verify, strict_base)
    if recipe.kind == "gguf":
        return _only_ggufs(recipe, events, verify, threads, strict_base)
    ggufs = gguf_files(recipe)
    started = time.monotonic()
    refuse_existing(recipe.output)
    plan = _planned(recipe, events)
    out, verdict = recipe.output, None
    with new_folder(recipe.output, resume=True) as partial:
        mark = fingerprint(recipe.to_dict(), plan.input_files, {"kernel": kernel().name})
        with Journal.start(partial, mark, note_every) as journal:
            there = sum(path.stat().st_blocks * 512 for path in partial.iterdir() if path.is_file())
            need_space(partial, plan.bytes_written + _COMPANION_ROOM - there, "the merge")
            streamed = stream_merge(plan, partial, events, threads, journal)
        bases, warnings = _compare_bases(
            plan, {shard.name: shard.source for shard in streamed.shards}, events, strict_base
        )
        copy_companions(plan, partial)
        record = manifests.make_manifest(plan, streamed, partial, time.monotonic() - started)
        write_json(partial / manifests.NAME, record)
        if verify:
            verdict = _verify(plan, partial, events)
            write_json(partial / REPORT, verdict)
            record["output"]["files"][REPORT] = manifests.file_sha256(partial / REPORT)
        record["verification"] = summary(verdict)
        write_json(partial / manifests.NAME, record)
        if verdict is not None and verdict["exit_code"] == 1:
            out = reject(partial, recipe.output)
    exit_code = verdict["exit_code"] if verdict else 0
    written: list[dict[str, Any]] = []
    if ggufs and exit_code != 1:
        written = _write_ggufs(out, ggufs, events, verify, threads)
        exit_code = worst([exit_code, *(file["exit_code"] for file in written)])
    return {
        "out": str(out),
        "ggufs": written,
        "seconds": round(time.monotonic() - started, 3),
        "bytes_written": plan.bytes_written,
        "resumed_bytes": streamed.resumed_bytes,
        "manifest": record,
        "verdict": verdict,
        "trained_on": bases,
        "warnings": warnings,
        "exit_code": exit_code,
    }


def _compare_bases(
    plan: Plan, shards: Mapping[str, str], events: EventWriter, strict: bool
) -> tuple[dict[str, Any], list[str]]:
    """The bases the adapters were trained on against the one merged: ({label: trained_on}, all warnings so far).

    Raises BadModelError where `strict` and one is another, or cannot be told.
    """
    compared = compare_bases(plan.adapters, plan.base, shards)
    warnings = base_warnings(compared, strict)
    for warning in warnings:
        events.warning(warning)
    return {label: found.to_dict() for label, found in compared.items()}, [*plan.warnings, *warnings]


def _planned(recipe: Recipe, events: EventWriter) -> Plan:
    """The plan of a recipe whose adapters were read and are whole; its warnings are told."""
    plan = make_plan(recipe)
    refuse_broken_adapters(plan)
    for warning in plan.warnings:
        events.warning(warning)
    return plan


def worst(codes: list[int]) -> int:
    """One exit code for several checks: a no (1) outweighs a doubt (4), which outweighs a yes (0)."""
    return 1 if 1 in codes else 4 if 4 in codes else 0


def gguf_files(recipe: Recipe) -> dict[str, Path]:
    """Where the recipe's GGUFs go, by type. Raises before anything is done when one is there or means nothing."""
    if not recipe.gguf:
        return {}
    from engine.gguf.outputs import gguf_paths

    files = gguf_paths(recipe.output, recipe.gguf, alone=recipe.kind == "gguf")
    for path in files.values():
        refuse_existing(path)
        if recipe.kind == "gguf":
            refuse_existing(path.with_name(f"{path.name}.json"))
    return files


def _write_ggufs(
    source: Any, files: dict[str, Path], events: EventWriter, verify: bool, threads: int | None
) -> list[dict[str, Any]]:
    from engine.gguf.outputs import write_ggufs

    made = write_ggufs(source, files, events, verify=verify, threads=threads)
    return [file.to_json() for file in made]


def _only_ggufs(
    recipe: Recipe, events: EventWriter, verify: bool, threads: int | None, strict_base: bool
) -> dict[str, Any]:
    """GGUF straight from base and adapters, without a checkpoint on the way (output.kind gguf).

    Each file gets a manifest beside it, FILE.gguf.json.
    """
    started = time.monotonic()
    files = gguf_files(recipe)
    plan = _planned(recipe, events)
    mixture = _mixture(plan)
    bases, warnings = _compare_bases(plan, plan.base.sha256, events, strict_base)
    written = _write_ggufs(mixture, files, events, verify, threads)
    records = []
    for file in written:
        out, seconds = Path(file["out"]), time.monotonic() - started
        record = manifests.gguf_manifest(plan, out, file["type"], file["sha256"], seconds)
        record["verification"] = summary(file["verdict"])
        write_json(manifests.manifest_path(out), record)
        records.append(record)
    return {
        "out": written[0]["out"],
        "ggufs": written,
        "seconds": round(time.monotonic() - started, 3),
        "bytes_written": sum(file["bytes"] for file in written),
        "resumed_bytes": 0,
        "manifest": records[0],
        "verdict": written[0]["verdict"],
        "trained_on": bases,
        "warnings": warnings,
        "exit_code": worst([file["exit_code"] for file in written]),
    }


def _mixture(plan: Plan) -> Any:
    """The linear merge of a plan as the GGUF writer takes it. Raises BadRecipeError for other merges."""
    from engine.gguf.mixture import Mixture

    recipe = plan.recipe
    if recipe.models or recipe.method not in LINEAR or recipe.base is None:
        raise BadRecipeError(
            f"output.kind gguf goes straight from a base and adapters, which {recipe.method} of "
            f"{'models' if recipe.models else 'adapters'} does not allow",
            "leave output.kind out: the checkpoint is merged and verified, and its GGUFs are made from it",
        )
    paths = {entry.label: entry.path for entry in recipe.entries}
    return Mixture(recipe.base, paths, _plain(plan.counted), plan.asked)


def _plain(weights: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A number for labels whose tensors all have the same weight."""
    return {
        label: next(iter(own.values())) if len(set(own.values())) == 1 else own
        for label, own in weights.items()
    }


def outputs(plan: Plan) -> dict[str, int]:
    """Bytes of what is written beside or instead of a checkpoint, by kind; refuses what the merge would refuse.

    A GGUF's bytes are those of its tensors; of a type that llama.cpp quantises, at most (as q8_0).

    Raises BadRecipeError, BadAdapterError as the merge does before it begins.
    """
    recipe = plan.recipe
    if recipe.kind == "adapter":
        from engine.merge.combine import bytes_of

        return {"adapter": bytes_of(plan.base, plan.adapters, _shares(plan), recipe.rank)}
    if not recipe.gguf:
        return {}
    from engine.gguf.convert import Conversion
    from engine.gguf.mixture import plan_mixture
    from engine.gguf.quantize import DIRECT
    from engine.gguf.writer import tensor_bytes

    gguf_files(recipe)
    alone = recipe.kind == "gguf"
    conversion = plan_mixture(_mixture(plan)) if alone else Conversion.plan(plan.base.folder, "")
    return {
        kind: tensor_bytes(conversion.tensors, kind if kind in DIRECT else "q8_0") for kind in recipe.gguf
    }


def _shares(plan: Plan) -> list[Any]:
    from engine.merge.combine import Part

    return [Part(entry.label, entry.path, plan.counted[entry.label]) for entry in plan.recipe.entries]


def question(plan: Plan) -> tuple[Path | None, Any]:
    """What the verifier is asked: the base (None: the first model), and the plan's numbers by tensor, before
    normalize and lambda. A base that is one of the models of a sum is asked as the first of them.
    """
    from engine.merge.verify.asked import Asked, AskedEntry

    recipe = plan.recipe
    own = [entry for entry in recipe.models if plan.inputs.models[entry.label] is plan.base]
    listed, base = recipe.entries, recipe.base
    if own and recipe.method in LINEAR:
        listed, base = (*own, *(entry for entry in recipe.entries if entry not in own)), None
    entries = tuple(
        AskedEntry(
            entry.label,
            entry.path,
            entry.kind,
            plan.weights[entry.label],
            plan.densities.get(entry.label, {"default": 1.0}),
        )
        for entry in listed
    )
    t = {tensor.target.name: tensor.t for tensor in plan.changed} if recipe.method == "slerp" else {}
    return base, Asked(
        method=recipe.method,
        entries=entries,
        t={"default": 0.5, **t},
        lam=recipe.parameters.lam,
        normalize=recipe.parameters.normalize,
        rescale=recipe.parameters.rescale,
        seed=recipe.parameters.seed,
        vocabulary=recipe.vocabulary,
    )


def _verify(plan: Plan, partial: Path, events: EventWriter) -> dict[str, Any]:
    from engine.merge.verify import verify_merge

    base, asked = question(plan)
    verdict = verify_merge(partial, base, {}, None, events, allow_extra_files=NOT_WEIGHTS, asked=asked)
    return {**verdict.to_json(), "exit_code": verdict.exit_code}


def _merge_adapters(recipe: Recipe, events: EventWriter, verify: bool, strict_base: bool) -> dict[str, Any]:
    """Several adapters into one (output.kind adapter)."""
    from engine.merge.combine import combine

    refuse_existing(recipe.output)
    plan = _planned(recipe, events)
    assert recipe.base is not None
    made = combine(
        recipe.base, _shares(plan), recipe.output, events, recipe.rank, recipe.to_dict(), verify, strict_base
    )
    return {**made, "warnings": [*plan.warnings, *made["warnings"]]}


def summary(verdict: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest keeps of a verification."""
    if verdict is None:
        return {"done": False, "message": "not verified: made with --no-verify"}
    keys = (
        "ok", "verdict", "message", "asked", "expected_weights", "effective_weights", "rounding_loss",
        "residual", "rounding_floor", "differing_share", "unchanged_share", "tensors_checked",
    )  # fmt: skip
    return {"done": True, **{key: verdict[key] for key in keys if key in verdict}}
