"""Turns what the engine finds on disk into the rows that screens show. Runs in threads; imports numpy.

Only headers and small JSON files are read here, except `adapter_detail`, which reads one adapter's weights.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import MedmergeError
from engine.weights.adapter import Adapter
from engine.weights.checkpoint import Checkpoint
from engine.weights.discover import FoundAdapter, find_adapters, find_models
from engine.workspace import Workspace
from tui.snapshots import (
    AdapterDetail,
    AdapterRow,
    DataFile,
    GgufRow,
    MergeRow,
    ModelRow,
    OverlapView,
    Overview,
    PlanView,
    RunRow,
    SampleRow,
    VerdictView,
)

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow

MANIFEST = "medmerge.json"
MAX_CURVE = 2000


def read_workspace(workspace: Workspace, base: str) -> Overview:
    """Everything in the workspace, adapters judged against the `base` folder (or alone when it is "")."""
    models = [
        _model(found.path, found.model, found.error) for found in find_models(workspace.places("bases"))
    ]
    chosen = _open_base(base or (models[0].path if len(models) == 1 else ""))
    adapters = [_adapter(found, chosen) for found in find_adapters(workspace.places("adapters"))]
    merges = [
        _merge(found.path, found.model, found.error) for found in find_models(workspace.places("merges"))
    ]
    probe = workspace.root if workspace.root.exists() else Path.home()
    return Overview(
        root=str(workspace.root),
        models=tuple(models),
        adapters=tuple(adapters),
        merges=tuple(sorted(merges, key=lambda row: row.created, reverse=True)),
        ggufs=tuple(_ggufs(workspace.places("gguf"))),
        runs=tuple(_runs(workspace.places("runs"))),
        data=tuple(_data(workspace.places("data"))),
        free=shutil.disk_usage(probe).free,
    )


def _model(path: Path, model: Checkpoint | None, error: MedmergeError | None) -> ModelRow:
    if model is None:
        return ModelRow(str(path), path.name, error=error.message if error else "cannot be read")
    return ModelRow(
        str(path), model.name, model.architecture, model.dtype, model.parameters, model.layers, model.nbytes
    )


def _open_base(path: str) -> Checkpoint | None:
    if not path:
        return None
    try:
        return Checkpoint.open(Path(path))
    except MedmergeError:
        return None  # the base's own row says what is wrong with it


def _adapter(found: FoundAdapter, base: Checkpoint | None) -> AdapterRow:
    adapter = found.adapter
    if adapter is None:
        error = found.error
        return AdapterRow(
            str(found.path),
            found.path.name,
            error=error.message if error else "cannot be read",
            hint=error.hint if error else "",
        )
    misfit = warning = ""
    if base is not None:
        try:
            adapter.changes(base)
        except MedmergeError as error:
            misfit = error.message
        if (
            not misfit
            and adapter.base_name
            and Path(adapter.base_name).name not in (base.folder.name, base.name)
        ):
            warning = f"its config names another base: {adapter.base_name}"
    return AdapterRow(
        str(found.path),
        adapter.name,
        kind=adapter.kind,
        rank=adapter.rank,
        scales=adapter.scales,
        modules=adapter.modules,
        targets=adapter.targets,
        variants=adapter.variants,
        dtype=adapter.dtype,
        nbytes=adapter.nbytes,
        base_name=adapter.base_name,
        template=adapter.template,
        misfit=misfit,
        warning=warning,
    )


def adapter_detail(path: Path) -> AdapterDetail:
    """Health, norm by layer and training story of one adapter; reads its weights once."""
    try:
        adapter = Adapter.open(path)
        health = adapter.health()
    except MedmergeError as error:
        return AdapterDetail(str(path), error=error.message)
    return AdapterDetail(
        str(path),
        norms=health.norm_by_layer,
        not_finite=health.not_finite,
        zero_b=health.zero_b,
        facts=_training_facts(adapter.training),
        curve=curve_points(adapter.training.get("curve"), "loss"),
    )


def _training_facts(training: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The manifest's story in a few lines; anything missing or of another shape is left out."""
    facts = []
    settings = training.get("settings")
    if isinstance(settings, dict):
        shown = [
            f"{name} {settings[key]}"
            for key, name in (("epochs", "epochs"), ("learning_rate", "lr"), ("cutoff", "cutoff"))
            if key in settings
        ]
        facts.append(("settings", ", ".join(shown)))
    tokens = training.get("tokens")
    if isinstance(tokens, dict):
        named = [
            f"{tokens[key]:,} {key}" for key in ("processed", "trained") if isinstance(tokens.get(key), int)
        ]
        facts.append(("tokens", ", ".join(named)))
    elif isinstance(tokens, int):
        facts.append(("tokens", f"{tokens:,}"))
    data = training.get("data")
    if isinstance(data, list):
        named = [
            f"{Path(str(entry.get('file', '?'))).name} ({entry.get('rows', '?')} rows)"
            for entry in data
            if isinstance(entry, dict)
        ]
        facts.append(("data", ", ".join(named)))
    audit = training.get("audit")
    if isinstance(audit, dict) and audit:
        facts.append(("audit", audit_words(audit)))
    return tuple((what, value) for what, value in facts if value)


def audit_words(audit: dict[str, Any]) -> str:
    """The leakage audit in words, from its counts."""
    counts = audit.get("counts") if isinstance(audit.get("counts"), dict) else audit
    leaks = counts.get("leaks", counts.get("leaked")) if isinstance(counts, dict) else None
    leaks = len(leaks) if isinstance(leaks, list) else leaks
    if not isinstance(leaks, int):
        return ""
    return "clean, 0 leaks" if leaks == 0 else f"{leaks} leaks"


def curve_points(curve: Any, key: str) -> tuple[tuple[float, float], ...]:
    """(step, value) of the entries of a stored curve that hold a finite `key`."""
    if not isinstance(curve, list):
        return ()
    points = []
    for entry in curve[:MAX_CURVE]:
        if not isinstance(entry, dict):
            continue
        step, value = entry.get("step"), entry.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value):
            points.append((float(step), float(value)))
    return tuple(points)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is none to read: notes beside results are optional."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _merge(path: Path, model: Checkpoint | None, error: MedmergeError | None) -> MergeRow:
    note = read_json_object(path / MANIFEST)
    recipe = note.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    adapters = recipe.get("adapters")
    said = note.get("verification")
    return MergeRow(
        str(path),
        path.name,
        weights=_weights(adapters),
        method=str(recipe.get("method") or ""),
        dtype=model.dtype if model else "",
        nbytes=model.nbytes if model else 0,
        created=path.stat().st_mtime,
        verdict=verdict(said) if isinstance(said, dict) and said.get("done") else None,
        base=str(recipe.get("base") or ""),
        adapters=tuple(
            (str(label), str(entry.get("path")))
            for label, entry in (adapters.items() if isinstance(adapters, dict) else ())
            if isinstance(entry, dict)
        ),
        by_tensor=isinstance(adapters, dict)
        and any(isinstance(e, dict) and isinstance(e.get("weight"), dict) for e in adapters.values()),
        error=error.message if error else "",
    )


def _weights(adapters: Any) -> tuple[tuple[str, float], ...]:
    """(label, weight) of a recipe's adapters; the default where selectors give several."""
    found = []
    for label, entry in adapters.items() if isinstance(adapters, dict) else ():
        value = entry.get("weight") if isinstance(entry, dict) else None
        if isinstance(value, dict):
            value = value.get("default")
        weight = number(value)
        if weight is not None:
            found.append((str(label), weight))
    return tuple(found)


def verdict(said: dict[str, Any]) -> VerdictView:
    """A verdict as `medmerge verify --json` prints it (and the manifest keeps it)."""
    findings = tuple(
        (str(item.get("code", "")), str(item.get("message") or item.get("detail") or ""))
        for item in said.get("findings") or []
        if isinstance(item, dict)
    )
    code = str(said.get("verdict") or (findings[0][0] if findings else ""))
    ok: bool | None = bool(said.get("ok"))
    codes = {code, *(code for code, _ in findings)}
    if not ok and (said.get("exit_code") == 4 or codes <= {"not_identifiable", "not_checkable"}):
        ok = None
    return VerdictView(
        ok=ok,
        code=code,
        message=str(said.get("message") or ""),
        asked=numbers(said.get("asked")),
        expected=numbers(said.get("expected_weights")),
        found=numbers(said.get("effective_weights")),
        residual=number(said.get("residual")),
        floor=number(said.get("rounding_floor")),
        unchanged_share=number(said.get("unchanged_share")),
        differing_share=number(said.get("differing_share")),
        tensors=int(number(said.get("tensors_checked")) or 0),
        findings=findings,
    )


def number(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers."""
    if not isinstance(values, dict):
        return {}
    return {str(key): float(value) for key, value in values.items() if number(value) is not None}


def plan_view(recipe: dict[str, Any]) -> PlanView:
    """A merge's plan from headers only: bytes, tensors, warnings. Raises what `medmerge plan` would say."""
    from engine.merge.plan import make_plan
    from engine.merge.recipe import parse

    plan = make_plan(parse(recipe, "the merge", []))
    probe = plan.recipe.output.parent
    while not probe.exists():
        probe = probe.parent
    return PlanView(
        read=plan.bytes_read,
        written=plan.bytes_written,
        memory=0,
        free=shutil.disk_usage(probe).free,
        touched=len(plan.changed),
        copied=sum(1 for tensor in plan.tensors if tensor.copied),
        warnings=plan.warnings,
    )


def overlap(said: dict[str, Any]) -> OverlapView:
    """The result of an interference job: `modules` and `overall` as `medmerge interference --json` gives them."""
    overall = said.get("overall")
    overall = overall if isinstance(overall, dict) else {}
    kinds: dict[str, dict[int, float]] = {}
    for module in said.get("modules") or []:
        if not isinstance(module, dict):
            continue
        name, value = str(module.get("name", "")), number(module.get("cosine"))
        layer = re.search(r"\.(\d+)\.", name)
        if layer and value is not None:
            kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
            kinds.setdefault(kind, {})[int(layer[1])] = value
    depth = max((layer for values in kinds.values() for layer in values), default=-1) + 1
    return OverlapView(
        cosine=number(overall.get("cosine")),
        sign_conflict=number(overall.get("sign_conflict")),
        subspace=number(overall.get("subspace_overlap")),
        norms=numbers(overall.get("norm")),
        by_kind=tuple(
            (kind, tuple(values.get(layer, math.nan) for layer in range(depth)))
            for kind, values in kinds.items()
        ),
    )


def _ggufs(places: list[Path]) -> list[GgufRow]:
    files = [path for place in places if place.is_dir() for path in sorted(place.rglob("*.gguf"))]
    return [
        GgufRow(
            str(path), path.name, path.stat().st_size, "adapter" if "lora" in path.name.lower() else "model"
        )
        for path in files
        if path.is_file()
    ]


def _runs(places: list[Path]) -> list[RunRow]:
    rows = []
    for folder in (
        entry for place in places if place.is_dir() for entry in place.iterdir() if entry.is_dir()
    ):
        created = folder.stat().st_mtime
        if (folder / "train.json").is_file():
            rows.append(RunRow(str(folder), folder.name, "train", created))
        elif (folder / "cells.json").is_file():
            note = read_json_object(folder / "cells.json")
            cells = note.get("cells")
            cells = [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
            done = sum(1 for cell in cells if (folder / "cells" / f"{cell.get('hash')}.parquet").is_file())
            kind = "sweep" if note.get("mode") == "sweep" else "eval"
            rows.append(RunRow(str(folder), folder.name, kind, created, len(cells), done))
    return sorted(rows, key=lambda row: row.created, reverse=True)


def samples_of(run: Path, row: MetricRow, limit: int = 200) -> tuple[SampleRow, ...]:
    """The stored samples behind one number: those of its mixture, task, template and decoding."""
    from engine.evaluate.store import RunStore

    store = RunStore(run)
    prompts = store.prompts()
    found: list[SampleRow] = []
    task, _, category = row.task.partition("/")
    for entry in store.cells()["cells"]:
        spec = entry["spec"]
        decoding = (spec.get("decoding") or {}).get("name", "")
        same = spec["weights"] == row.weights and spec["task"]["name"] == task
        if not (same and spec.get("template", "") == row.template and decoding == row.decoding):
            continue
        if (spec["kind"] == "references") != row.metric.startswith("reference_") or not store.is_done(
            entry["hash"]
        ):
            continue
        for sample in store.frame(entry["hash"]).head(limit).to_dicts():
            if category and sample.get("category") != category:
                continue
            found.append(_sample(sample, prompts))
    return tuple(found)


def _sample(sample: dict[str, Any], prompts: dict[str, str]) -> SampleRow:
    text = str(sample.get("raw") or "")
    facts = [
        (key, str(sample[key]))
        for key in ("finish", "new_tokens", "think", "category", "logprob", "tokens", "seed", "template")
        if sample.get(key) not in (None, "")
    ]
    if "chosen" in sample:
        options = sample.get("options") or []
        lines = [
            f"{'→' if index == sample['chosen'] else ' '} {chr(65 + index)} {option}"
            + ("   (right)" if index == sample.get("answer") else "")
            for index, option in enumerate(options)
        ]
        text = "\n".join(lines)
    prompt = prompts.get(str(sample.get("prompt_sha256")), "(prompt not stored)")
    return SampleRow(str(sample.get("id")), prompt, str(sample.get("reference") or ""), text, tuple(facts))


def _data(places: list[Path]) -> list[DataFile]:
    kinds = (".jsonl", ".yaml", ".yml")
    files = [path for place in places if place.is_dir() for path in sorted(place.iterdir())]
    return [DataFile(str(path), path.name, path.stat().st_size) for path in files if path.suffix in kinds]
