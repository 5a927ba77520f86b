"""LoRA layers in fewer passes, and memory that is kept, for training on a CPU. `training.model` calls both.

The mathematics is PEFT's; modules, parameters and state dict stay as they are, random numbers are drawn by PEFT's own
dropout layers, and whatever does not fit (a GPU, quantised or trained base weights, several adapters, DoRA, autocast)
goes the usual way. Measured by `python -m benchmarks.train`.
"""

from __future__ import annotations

import ctypes
import types
from typing import Any

import torch
import torch.nn.functional as F

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next step; whether it took the advice.

    Activations of megabytes are allocated and freed thousands of times a step. By default each goes back to the
    system, which hands it out again page by page, zeroed: a sixth of the time of a step. Peak memory is what it was,
    but the process holds it until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in wanted)


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (d A^T) B^T, with d = dropout(x), or x itself.

    x, d: (rows, in); W: (out, in); A: (rank, in); B: (out, rank). A and B are rounded to x's dtype for the products,
    as autocast does; their gradients come back in their own. W and bias are frozen. Adding into the product and
    keeping d A^T (rows x rank) saves PEFT's four passes over (rows, out) and the casts of x, y and their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, d: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float
    ) -> torch.Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        inner = d @ low_a.T
        y = F.linear(x, weight, bias)
        y.addmm_(inner, low_b.T, alpha=scale)
        ctx.save_for_backward(d, inner, weight, a, b)
        ctx.scale, ctx.same = scale, d is x
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad,) = grads
        d, inner, weight, a, b = ctx.saved_tensors
        through = (grad @ b.to(grad.dtype)).mul_(ctx.scale)  # (rows, rank)
        grad_a = (through.T @ d).to(a.dtype) if ctx.needs_input_grad[4] else None
        grad_b = (grad.T @ inner).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[5] else None
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_d = None
        if ctx.same:
            if grad_x is not None:
                grad_x.addmm_(through, a.to(grad.dtype))
        elif ctx.needs_input_grad[1]:
            grad_d = through @ a.to(grad.dtype)
        return grad_x, grad_d, None, None, grad_a, grad_b, None


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What takes the place of the forward of one PEFT layer; its class's own for what does not fit."""
    active = self.active_adapters
    weight = self.base_layer.weight
    usual = (
        args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A
        or active[0] in self.lora_variant or x.device.type != "cpu" or x.dtype != weight.dtype
        or torch.is_autocast_enabled("cpu")
    )  # fmt: skip
    if usual:
        return type(self).forward(self, x, *args, **kwargs)
    name = active[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    dropout = self.lora_dropout[name]
    rows = x.reshape(-1, x.shape[-1])
    dropping = self.training and getattr(dropout, "p", 0.0) > 0
    dropped = dropout(rows.to(a.dtype)).to(x.dtype) if dropping else rows
    y = LoraLinear.apply(rows, dropped, weight, self.base_layer.bias, a, b, self.scaling[name])
    return y.view(*x.shape[:-1], y.shape[-1])


def use(model: Any) -> int:
    """Give every plain LoRA layer of a PEFT model on the CPU the forward above; how many it fits."""
    from peft.tuners.lora.layer import Linear

    count = 0
    for module in model.modules():
        if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
            continue
        base = module.base_layer
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        plain = not any(layer.bias is not None for layer in module.lora_B.values())
        if frozen and plain and base.weight.device.type == "cpu" and base.weight.is_floating_point():
            module.forward = types.MethodType(_forward, module)
            count += 1
    return count
