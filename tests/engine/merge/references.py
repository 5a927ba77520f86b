"""What a merge should be, computed in float64 from the files, sharing no code with the engine.

`assert_is_merge` checks a whole linear merge of adapters; `linear`, `soup`, `slerp`, `ties`, `dare_linear` and
`dare_ties` say what one tensor should be under each method, and `Exact.assert_rounded` compares.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def load_model(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, whatever its shards."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def deltas(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """scale * B @ A and scale * |B| @ |A| in float64, by base tensor name (plain and rsLoRA, one rank)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    weights = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in weights.items():
        if ".lora_A." in key:
            b = weights[key.replace(".lora_A.", ".lora_B.")].double()
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            delta, size = scale * b @ a.double(), scale * b.abs() @ a.double().abs()
            found[name] = (delta.T, size.T) if config["fan_in_fan_out"] else (delta, size)
    return found


def assert_is_merge(
    merged: Path, base: Path, mixture: list[tuple[Path, Any]], dtype: torch.dtype | None = None
) -> None:
    """Every element is a right rounding of the float64 sum; untouched tensors keep their bytes.

    `mixture` pairs an adapter with its weight, or with a function of the tensor name. An element may be any
    value between round(v - e) and round(v + e), e bounding what float32 sums in any order may do:
    e = (terms + 4) * 2**-24 * (|W| + sum |w s| |B| |A|).
    """
    before, after = load_model(base), load_model(merged)
    assert before.keys() == after.keys()
    changes: dict[str, list[tuple[float, torch.Tensor, torch.Tensor, int]]] = {}
    for folder, weight in mixture:
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        for name, (delta, size) in deltas(folder).items():
            value = weight(name) if callable(weight) else weight
            changes.setdefault(name, []).append((value, delta, size, rank))
    for name, old in before.items():
        new = after[name]
        wanted = old.dtype if dtype is None else dtype
        assert new.dtype == wanted, name
        parts = [part for part in changes.get(name, []) if part[0] != 0]
        if not parts:
            assert _same_bytes(new, old if dtype is None or not old.is_floating_point() else old.to(dtype)), (
                name
            )
            continue
        exact = old.double() + sum(value * delta for value, delta, _, _ in parts)
        size = old.double().abs() + sum(abs(value) * size for value, _, size, _ in parts)
        error = (sum(rank for *_, rank in parts) + 4) * 2.0**-24 * size
        low, high = (exact - error).to(wanted).double(), (exact + error).to(wanted).double()
        wrong = (new.double() < low) | (new.double() > high)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are not right"


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


# The methods, one tensor at a time, in plain numpy float64 from the papers' formulas: the slow, obvious way.

Array = np.ndarray[Any, np.dtype[Any]]
HALF_ULP = 2.0**-24  # half a unit in the last place of a float32 in [1, 2), relative


@dataclass(frozen=True)
class Exact:
    """What one tensor should be, and how far float32 arithmetic in any order may be from it.

    value: the result in float64. slack: bound of the float32 error, per element. undecided: elements whose
    mask or sign hangs on a number within that bound, so that either decision is right.
    """

    value: Array
    slack: Array
    undecided: Array

    def assert_rounded(self, actual: torch.Tensor, name: str = "", undecided_share: float = 1e-3) -> None:
        """Every decided element of `actual` lies between round(value - slack) and round(value + slack)."""
        assert tuple(actual.shape) == self.value.shape, name
        low = torch.from_numpy(self.value - self.slack).to(actual.dtype).double().numpy()
        high = torch.from_numpy(self.value + self.slack).to(actual.dtype).double().numpy()
        found = actual.double().numpy()
        wrong = ((found < low) | (found > high)) & ~self.undecided
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.size} elements are not right"
        assert self.undecided.mean() <= undecided_share, f"{name}: {self.undecided.mean():.2%} undecided"


def as_float64(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def linear(base: Array, deltas: Sequence[Array], weights: Sequence[float], lambda_: float = 1.0,
           errors: Sequence[Array] | None = None) -> Exact:  # fmt: skip
    """W + lambda * sum w_k d_k. `errors` bound the float32 error of each delta (default: one rounding)."""
    value = base + lambda_ * sum(w * d for w, d in zip(weights, deltas, strict=True))
    return Exact(value, _slack(base, deltas, weights, lambda_, errors), np.zeros(base.shape, bool))


def soup(models: Sequence[Array], weights: Sequence[float], normalize: bool = True) -> Exact:
    """sum w_k X_k, divided by sum w_k when `normalize` (Wortsman 2022, arXiv 2203.05482)."""
    divisor = sum(weights) if normalize else 1.0
    shares = [weight / divisor for weight in weights]
    value = sum((share * model for share, model in zip(shares, models, strict=True)), np.zeros(1))
    size = sum((abs(share) * np.abs(model) for share, model in zip(shares, models, strict=True)), np.zeros(1))
    # the engine may sum shares of the models, or the first model and shares of the differences
    size = (
        size
        + np.abs(models[0])
        + sum(abs(s) * np.abs(m - models[0]) for s, m in zip(shares, models, strict=True))
    )
    return Exact(value, (len(models) + 4) * HALF_ULP * size, np.zeros(value.shape, bool))


def slerp(p: Array, q: Array, t: float, error: Array | float = 0.0) -> Exact:
    """Spherical interpolation of whole tensors, as mergekit does it: coefficients from the directions.

    cos = <p,q>/(|p||q|); theta = acos(cos); sin((1-t) theta)/sin(theta) p + sin(t theta)/sin(theta) q.
    Straight (1-t) p + t q where |cos| > 0.9995 or a norm is 0. `error` bounds p's and q's own float32 error.
    """
    norms = float(np.sqrt((p * p).sum())) * float(np.sqrt((q * q).sum()))
    cosine = float((p * q).sum()) / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        left, right = 1 - t, t
    else:
        theta = math.acos(cosine)
        left, right = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    size = abs(left) * np.abs(p) + abs(right) * np.abs(q)
    slack = 6 * HALF_ULP * size + (abs(left) + abs(right)) * np.asarray(error)
    return Exact(left * p + right * q, slack, np.zeros(p.shape, bool))


def trim(delta: Array, density: float) -> tuple[Array, float]:
    """Which elements TIES keeps, and the threshold: the max(1, int(density * n)) largest in size, ties all kept."""
    sizes = np.abs(delta.astype(np.float32))
    keep = max(1, int(density * delta.size)) if density > 0 else 0
    if density >= 1:
        return np.ones(delta.shape, bool), 0.0
    if keep == 0:
        return np.zeros(delta.shape, bool), math.inf
    threshold = np.sort(sizes, axis=None)[delta.size - keep]
    return sizes >= threshold, float(threshold)


def ties(base: Array, deltas: Sequence[Array], weights: Sequence[float], densities: Sequence[float],
         lambda_: float = 1.0, normalize: bool = True, errors: Sequence[Array] | None = None) -> Exact:  # fmt: skip
    """Trim, elect sign, merge what agrees (Yadav 2023, arXiv 2306.01708, section 4; weighted as in mergekit).

    Without `errors` the deltas are differences of two stored tensors, rounded once to float32: who passes the
    threshold is then certain. With them (products of factors) elements within the error of it may go either way.
    """
    bounds = _errors(deltas, errors)
    kept, open_ = [], np.zeros(base.shape, bool)
    for delta, density, bound in zip(deltas, densities, bounds, strict=True):
        mask, threshold = trim(delta, density)
        kept.append(np.where(mask, delta, 0.0))
        if errors is not None and 0 < threshold < math.inf:
            open_ |= np.abs(np.abs(delta) - threshold) <= bound + bound.max()
    return _elect(base, kept, deltas, weights, lambda_, normalize, bounds, open_)


def dare_draws(seed: int, label: str, tensor: str, count: int) -> Array:
    """draw(0..count-1), uint32: the low, then the high half of each word of numpy's Philox4x64-10."""
    text = f"medmerge.dare/1\n{seed}\n{label}\n{tensor}".encode()
    digest = hashlib.sha256(text).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    words = np.random.Philox(key=np.array(key, np.uint64), counter=0).random_raw((count + 1) // 2)
    draws = np.empty(2 * len(words), np.uint64)
    draws[0::2], draws[1::2] = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
    return draws[:count].astype(np.uint32)


def dare_drop(delta: Array, density: float, draws: Array, rescale: bool = True) -> Array:
    """Element i stays when draws[i] < floor(density * 2**32), divided by density when `rescale`, else is 0."""
    kept = draws.reshape(delta.shape).astype(np.float64) < math.floor(density * 2**32)
    return np.where(kept, delta / density if rescale else delta, 0.0)


def dare_linear(base: Array, deltas: Sequence[Array], weights: Sequence[float], densities: Sequence[float],
                draws: Sequence[Array], lambda_: float = 1.0, rescale: bool = True,
                errors: Sequence[Array] | None = None) -> Exact:  # fmt: skip
    """Drop at random, rescale, add (Yu 2023, arXiv 2311.03099, section 3)."""
    dropped = [dare_drop(*each, rescale) for each in zip(deltas, densities, draws, strict=True)]
    scales = [w / p if rescale else w for w, p in zip(weights, densities, strict=True)]
    slack = _slack(base, deltas, scales, lambda_, errors)
    value = linear(base, dropped, weights, lambda_).value
    return Exact(value, slack, np.zeros(base.shape, bool))


def dare_ties(base: Array, deltas: Sequence[Array], weights: Sequence[float], densities: Sequence[float],
              draws: Sequence[Array], lambda_: float = 1.0, normalize: bool = False, rescale: bool = True,
              errors: Sequence[Array] | None = None) -> Exact:  # fmt: skip
    """Drop at random, rescale, then elect the sign and merge what agrees, as in `ties`."""
    dropped = [dare_drop(*each, rescale) for each in zip(deltas, densities, draws, strict=True)]
    bounds = [
        bound / density if rescale else bound
        for bound, density in zip(_errors(deltas, errors), densities, strict=True)
    ]
    return _elect(base, dropped, dropped, weights, lambda_, normalize, bounds, np.zeros(base.shape, bool))


def _elect(base: Array, kept: Sequence[Array], deltas: Sequence[Array], weights: Sequence[float],
           lambda_: float, normalize: bool, bounds: Sequence[Array], open_: Array) -> Exact:  # fmt: skip
    """Majority sign (+ where the sum of kept w d is not negative), then the agreeing entries' (mean) sum."""
    weighted = [w * d for w, d in zip(weights, kept, strict=True)]
    total = sum(weighted, np.zeros(base.shape))
    sign = np.where(total >= 0, 1.0, -1.0)
    agree = [np.sign(value) == sign for value in weighted]
    mixed = sum((value * ok for value, ok in zip(weighted, agree, strict=True)), np.zeros(base.shape))
    divisor = np.ones(base.shape)
    if normalize:
        divisor = sum((w * ok for w, ok in zip(weights, agree, strict=True)), np.zeros(base.shape))
        divisor = np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    doubt = sum(
        (
            abs(w) * (bound + len(kept) * HALF_ULP * np.abs(d))
            for w, d, bound in zip(weights, kept, bounds, strict=True)
        ),
        np.zeros(base.shape),
    )
    # equal to 0 by a full cancellation is undecided; all entries 0 is not
    open_ = open_ | ((np.abs(total) <= doubt) & (doubt > 0) & np.logical_or.reduce([d != 0 for d in kept]))
    slack = _slack(base, deltas, [abs(w) / np.abs(divisor) for w in weights], lambda_, bounds)
    return Exact(base + lambda_ * mixed / divisor, slack, open_)


def _errors(deltas: Sequence[Array], errors: Sequence[Array] | None) -> Sequence[Array]:
    return errors if errors is not None else [HALF_ULP * np.abs(delta) for delta in deltas]


def _slack(base: Array, deltas: Sequence[Array], weights: Sequence[Any], lambda_: float,
           errors: Sequence[Array] | None) -> Array:  # fmt: skip
    """(terms + 4) half units in the last place of the sizes summed, and the deltas' own errors."""
    size, own = np.abs(base), np.zeros(base.shape)
    for delta, weight, bound in zip(deltas, weights, _errors(deltas, errors), strict=True):
        size = size + np.abs(lambda_ * weight * delta)
        own = own + np.abs(lambda_ * weight) * bound
    return (len(deltas) + 4) * HALF_ULP * size + own
