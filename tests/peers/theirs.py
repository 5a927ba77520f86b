"""mergekit's arithmetic again, step by step in torch, so that each difference from the exact result is explained.

Where a config's dtype is bfloat16, mergekit's task methods round every intermediate: the deltas, the weights,
the products, the sum, the total (`generalized_task_arithmetic.merge_group`). These functions do the same and no
more; a golden that equals them bit for bit differs from the exact result for these reasons alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def task_arithmetic(
    base: Tensor, models: Sequence[Tensor], weights: Sequence[float], lambda_: float = 1
) -> Tensor:
    """W + lambda * sum w_k (X_k - W), every step rounded to the tensors' own dtype."""
    deltas = torch.stack([model - base for model in models])
    deltas *= _column(weights, deltas)
    mixed = deltas.sum(dim=0)
    return base + (mixed * lambda_ if lambda_ != 1 else mixed)


def ties(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    lambda_: float = 1,
    normalize: bool = True,
) -> Tensor:
    """Exactly int(density * n) kept of each rounded delta, by an argsort that breaks ties as it likes."""
    deltas = torch.stack([_trim(m - base, d) for m, d in zip(models, densities, strict=True)])
    column = _column(weights, deltas)
    deltas *= column
    majority = (deltas.sum(dim=0) >= 0).to(base.dtype) * 2 - 1
    mask = deltas.sign() == majority
    mixed = (deltas * mask).sum(dim=0)
    if normalize:
        divisor = (column * mask).sum(dim=0)
        divisor[divisor == 0] = 1
        mixed /= divisor
    return base + (mixed * lambda_ if lambda_ != 1 else mixed)


def lora_merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """One float32 adapter merged by PEFT (`weight += delta`): float32 product and sum, rounded to the base's dtype."""
    return (base.float() + (b @ a) * scale).to(base.dtype)


def _trim(delta: Tensor, density: float) -> Tensor:
    if density >= 1:
        return delta
    kept = torch.argsort(delta.abs().reshape(-1).float(), descending=True)[
        : max(1, int(density * delta.numel()))
    ]
    mask = torch.zeros(delta.numel(), dtype=delta.dtype)
    mask[kept] = 1
    return delta * mask.reshape_as(delta)


def _column(weights: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 1))
