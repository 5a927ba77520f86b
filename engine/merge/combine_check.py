"""Reads a merged adapter back and compares its delta with the weighted sum of its sources. Plain code of its own.

It shares with engine/merge/combine.py only the reading of tensor bytes: configs, ranks, scales, key names and
sums are worked out again here. Two checks of every module, D = sum_k w_k s_k B_k A_k in float64:

    elements    sampled rows of s' B' A' lie within 3 * 2^-24 sum_k |w_k s_k B_k| |A_k| of D: one rounding of
                each element of B', and of float64 sources (only when stacked)
    distance    ||D - s' B' A'||_F, from Gram matrices of the stacked factors, equals what was said to be dropped
                (0 when stacked) within 1e-6 ||D||
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.jobs.events import EventWriter
from engine.weights.tensorfile import TensorFile, TensorInfo, read_rows

Matrix = npt.NDArray[np.float64]
ROWS = 8  # sampled rows of B of each module
ELEMENT_BOUND = 3 * 2.0**-24
DISTANCE_BOUND = 1e-6  # of ||D||: the factors are float32, rounded at 6e-8
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
_MODULE = re.compile(
    r"^(?:module\.)*(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?$"
)


class _Source:
    """One adapter folder as this check reads it: factors and scale of each module."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self.halves: dict[str, dict[str, TensorInfo]] = {}
        for name, info in TensorFile.open(folder / "adapter_model.safetensors").tensors.items():
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found = _MODULE.match(name)
            if found:
                self.halves.setdefault(found[1], {})[found[2]] = info

    def scale(self, module: str, rank: int) -> float:
        alpha = float(self.config["lora_alpha"])
        for key, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def factors(self, module: str) -> tuple[Matrix, Matrix]:
        """B (out, r) with the scale in it, A (r, in), float64; out and in as the adapter has them."""
        pair = self.halves[module]
        a, b = read_rows(pair["A"]).astype(np.float64), read_rows(pair["B"]).astype(np.float64)
        return self.scale(module, a.shape[0]) * b, a


class _Summand:
    """A source with the weight of each of its modules, by the module's name in the merged adapter."""

    def __init__(self, folder: Path, weights: Mapping[str, float], written: Sequence[str]) -> None:
        self.source = _Source(folder)
        self.modules: dict[str, tuple[str, float]] = {}  # name in the merged adapter -> (own name, weight)
        ends = {ending: name for name in written for ending in _endings(name)}
        by_tensor = {
            ending: w for name, w in weights.items() for ending in _endings(name.removesuffix(".weight"))
        }
        for own in self.source.halves:
            weight = next((by_tensor[e] for e in _endings(own) if e in by_tensor), 0.0)
            if weight != 0.0:
                self.modules[next((ends[e] for e in _endings(own) if e in ends), own)] = (own, weight)


def _endings(name: str) -> list[str]:
    """The name and the name without the first one or two parts ("model.", "base_model.model."), longest first.

    Trainers and checkpoints differ in those. A layer's number is never cut off, so what is left still tells it
    from all others.
    """
    parts = name.split(".")
    cuts = range(min(3, len(parts)))
    return [".".join(parts[cut:]) for cut in cuts if not any(part.isdigit() for part in parts[: cut + 1])]


def check_combined(
    folder: Path,
    sources: Sequence[tuple[Path, Mapping[str, float]]],
    dropped: Mapping[str, tuple[float, float]],
    events: EventWriter,
) -> dict[str, Any]:
    """Compare the adapter in `folder` with its sources.

    Args:
        sources: (folder, {base tensor name: weight}) of every summand.
        dropped: {module: (||D - D_r||_F, ||D||_F)} as the SVD said, empty when the ranks were stacked.

    Returns:
        JSON: ok, verdict ("ok", "unknown_delta", "missing", "unexpected_change"), message, findings, modules_checked,
        elements_checked, elements_differing, error (||D - D'||_F / ||D||_F over all modules), worst (module with
        the largest distance from what was said), wrong ([module names]), exit_code 0 or 1.
    """
    written = _Source(folder)
    summands = [_Summand(path, weights, list(written.halves)) for path, weights in sources]
    wanted = {module for summand in summands for module in summand.modules}
    missing, strays = sorted(wanted - written.halves.keys()), sorted(written.halves.keys() - wanted)
    wrong: list[str] = []
    elements = differing = 0
    square = distance = 0.0
    worst, worst_by = "", -1.0
    names = sorted(wanted & written.halves.keys())
    for done, module in enumerate(names, 1):
        terms = []
        for summand in summands:
            if module in summand.modules:
                own, weight = summand.modules[module]
                terms.append((weight, *summand.source.factors(own)))
        b, a = written.factors(module)
        count, bad = _elements(module, terms, b, a) if module not in dropped else (0, 0)
        norm, found = _distance(terms, b, a)
        said = dropped.get(module, (0.0, norm))
        off = max(abs(found - said[0]), abs(norm - said[1])) / norm if norm > 0 else found
        if bad or not off <= DISTANCE_BOUND:
            wrong.append(module)
        if off > worst_by:
            worst, worst_by = module, off
        elements, differing = elements + count, differing + bad
        square, distance = square + norm**2, distance + found**2
        events.progress(done, len(names), unit="modules", message=module, phase="verify")
    findings = []
    for code, modules, what in (
        ("missing", missing, "modules are not in the file"),
        ("unexpected_change", strays, "modules should not be in the file"),
        ("unknown_delta", wrong, "modules are not the weighted sum of their sources"),
    ):
        if modules:
            text = f"{len(modules)} {what}, the first is {modules[0]}"
            findings.append({"code": code, "detail": ", ".join(modules[:8]), "message": text})
    error = math.sqrt(distance / square) if square > 0 else 0.0
    kind = f"its best approximation, {error:.2%} away" if dropped else "exact in float32"
    good = f"every module is the weighted sum of its sources ({kind}); {len(names)} modules checked"
    return {
        "ok": not findings,
        "verdict": findings[0]["code"] if findings else "ok",
        "message": findings[0]["message"] if findings else good,
        "findings": findings or [{"code": "ok", "detail": "", "message": good}],
        "modules_checked": len(names),
        "elements_checked": elements,
        "elements_differing": differing,
        "error": error,
        "worst": {"name": worst, "off": max(worst_by, 0.0)},
        "wrong": missing + strays + wrong,
        "exit_code": 1 if findings else 0,
    }


def _elements(
    module: str, terms: Sequence[tuple[float, Matrix, Matrix]], b: Matrix, a: Matrix
) -> tuple[int, int]:
    """Elements of sampled rows that were compared, and those beyond the bound."""
    rows = np.unique(np.linspace(0, b.shape[0] - 1, ROWS).astype(np.int64))
    want = sum(w * (b_k[rows] @ a_k) for w, b_k, a_k in terms)
    size = sum(abs(w) * (np.abs(b_k[rows]) @ np.abs(a_k)) for w, b_k, a_k in terms)
    # The smallest float32 is 2^-149: below the normal numbers B rounds to multiples of it.
    floor = 2.0**-149 * np.abs(a).sum(axis=0)
    got = b[rows] @ a
    beyond = ~(np.abs(got - want) <= ELEMENT_BOUND * size + floor)  # NaN is beyond, too
    return int(got.size), int(np.count_nonzero(beyond))


def _distance(terms: Sequence[tuple[float, Matrix, Matrix]], b: Matrix, a: Matrix) -> tuple[float, float]:
    """||D||_F and ||D - B A||_F, the latter as one stack of factors [w_k B_k, -B] [A_k; A].

    ||L R||_F^2 = sum((L^T L) * (R R^T)) in float64: cancellation leaves about 1e-8 ||D||.
    """
    left = np.concatenate([*(w * b_k for w, b_k, _ in terms), -b], axis=1)
    right = np.concatenate([*(a_k for _, _, a_k in terms), a], axis=0)
    products = (left.T @ left) * (right @ right.T)
    own = products.shape[0] - a.shape[0]
    return math.sqrt(max(0.0, float(products[:own, :own].sum()))), math.sqrt(max(0.0, float(products.sum())))
