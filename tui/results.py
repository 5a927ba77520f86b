"""Results of jobs (merge, verify, plan, interference, preview) as the screens show them. Pure; text is foreign."""

from __future__ import annotations

import math
import re
from typing import Any

from engine.errors import BadInputError
from tui.foreign import number, numbers
from tui.snapshots import (
    FindingView,
    ModuleView,
    OverlapView,
    Piece,
    PlanView,
    PreviewView,
    SampleView,
    VerdictView,
)


def verdict(said: dict[str, Any]) -> VerdictView:
    """A verdict as `medmerge verify --json` prints it (and the manifest keeps it)."""
    findings = tuple(
        FindingView(str(item.get("code", "")), str(item.get("message") or ""), str(item.get("detail") or ""))
        for item in _list(said.get("findings"))
        if isinstance(item, dict)
    )
    code = str(said.get("verdict") or (findings[0].code if findings else ""))
    ok: bool | None = bool(said.get("ok"))
    codes = {code, *(finding.code for finding in findings)}
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
        likely=numbers(said.get("guessed_weights")),
        loss=numbers(said.get("rounding_loss")),
        elements=int(number(said.get("elements_checked")) or 0),
        differing=int(number(said.get("elements_differing")) or 0),
        dtype=str(said.get("dtype") or ""),
        seconds=number(said.get("seconds")),
        warnings=tuple(str(line) for line in _list(said.get("warnings"))),
        worst=_modules(said.get("worst")),
        modules=_modules(said.get("per_module")),
    )


def _modules(said: Any) -> tuple[ModuleView, ...]:
    return tuple(
        ModuleView(
            name=str(item.get("name", "")),
            elements=int(number(item.get("elements")) or 0),
            differing=int(number(item.get("differing")) or 0),
            unchanged=int(number(item.get("unchanged")) or 0),
            error=number(item.get("error")),
            residual=number(item.get("residual")),
            found=numbers(item.get("found")),
        )
        for item in _list(said)
        if isinstance(item, dict)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def forecast_view(said: dict[str, Any]) -> PlanView:
    """The result of a plan job (engine.merge.job:run_plan): the plan with what was tried and sampled."""
    for key in ("bytes_read", "bytes_written", "free_bytes"):
        if number(said.get(key)) is None:
            raise BadInputError(f"the plan says no {key}", "medmerge plan shows what it says")
    asked = said["recipe"].get("adapters") or said["recipe"].get("models") or {}
    advice = [
        line for line in _list(said.get("advice")) if "round away" not in line
    ]  # shown with the weights
    return PlanView(
        read=int(said["bytes_read"]),
        written=int(said["bytes_written"]),
        memory=int(number(said.get("memory_bytes")) or 0),
        free=int(said["free_bytes"]),
        touched=int(number(said.get("tensors_changed")) or 0),
        copied=int(number(said.get("tensors_copied")) or 0),
        seconds=number(said.get("seconds")),
        expected=numbers(said.get("expected_weights")),
        lost={
            label: share
            for label, share in numbers(said.get("rounding_loss")).items()
            if number(asked.get(label, {}).get("weight"))  # a weight of 0 loses nothing
        },
        unchanged_share=number(said.get("unchanged_share")),
        dtype=str(said.get("dtype") or ""),
        warnings=tuple(str(line) for line in (*_list(said.get("warnings")), *advice)),
        measured=True,
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


def preview_view(result: dict[str, Any]) -> PreviewView:
    """The result of training.preview as a PreviewView; what is not of the expected kind counts as not there."""
    template = result.get("template")
    name = template.get("name") if isinstance(template, dict) else template
    counted = result.get("counted")
    counted = counted if isinstance(counted, dict) else {}
    samples = [_sample(entry) for entry in _list(result.get("samples")) if isinstance(entry, dict)]

    def count(key: str) -> int | None:
        value = number(counted.get(key))
        return None if value is None else int(value)

    return PreviewView(
        tuple(samples),
        template=name if isinstance(name, str) else "",
        cutoff=int(number(result.get("cutoff")) or 0),
        rows=count("rows"),
        too_long=count("too_long"),
        untrained=count("untrained"),
        warnings=tuple(str(words) for words in _list(result.get("warnings"))),
    )


def _sample(entry: dict[str, Any]) -> SampleView:
    pieces = [piece for piece in _list(entry.get("pieces")) if isinstance(piece, dict)]
    return SampleView(
        str(entry.get("place") or ""),
        int(number(entry.get("length")) or 0),
        int(number(entry.get("trained")) or 0),
        int(number(entry.get("cut")) or 0),
        tuple(
            Piece(str(piece.get("text", "")), bool(piece.get("trained")), bool(piece.get("special")))
            for piece in pieces
        ),
        str(entry.get("note") or ""),
    )
