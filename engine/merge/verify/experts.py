"""LoRA of fused experts, PEFT's `target_parameters`: one A and one B for all experts of a module's parameter.

A is (experts * r, in), B (out, r * experts). Several parameters of one module are wrapped one inside the other,
in the order the module defines them (gate_up_proj, down_proj): the innermost is the first. Checkpoints hold the
parameter fused, (experts, out, in) or (experts, in, out), or each expert's matrices apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import BadAdapterError
from engine.merge.verify.lora_config import LoraConfig
from engine.merge.verify.terms import Delta, ExpertDelta, Term
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensorfile import TensorInfo

ORDER = ("gate_up_proj", "down_proj")
# Each expert's own tensors, and which share of the fused rows each is.
_APART = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # in block_sparse_moe.experts
Pair = tuple[int, TensorInfo, TensorInfo]  # depth, A, B


def expert_terms(
    label: str, config: LoraConfig, base: Checkpoint, path: Path, module: str, pairs: Sequence[Pair]
) -> Iterator[Term]:
    """The changes of one module's experts.

    Raises BadAdapterError when it is not clear which parameter a pair belongs to.
    """
    said = {name.rpartition(".")[2] for name in config.target_parameters if _means(name, module)}
    names = [name for name in ORDER if name in said]
    if len(names) != len(pairs) or said - set(ORDER):
        raise BadAdapterError(
            f"{path}: {module} has {len(pairs)} pairs of A and B and is not a linear layer of {base.folder}; "
            f"target_parameters names {', '.join(sorted(said)) or 'none of it'}",
            "this adapter belongs to another base, or changes something that is not known",
        )
    inner_first = sorted(pairs, key=lambda pair: -pair[0])
    turned: bool | None = None
    for name, (_, a, b) in zip(names, inner_first, strict=True):
        tensor = base.tensors.get(f"{module}.{name}")
        if tensor is None:
            yield from _apart(label, config, base, path, module, name, a, b)
            continue
        experts = tensor.shape[0]
        if len(tensor.shape) != 3 or a.shape[0] % experts or a.shape[0] != b.shape[1]:
            raise BadAdapterError(
                f"{path}: A {list(a.shape)} and B {list(b.shape)} do not fit {tensor.name} {list(tensor.shape)}"
            )
        if b.shape[0] != a.shape[1]:
            turned = tensor.shape[1:] == (a.shape[1], b.shape[0])
        elif turned is None:
            turned = base.config.get("model_type") in ("gpt_oss", "llama4", "llama4_text")
        scale = config.scale(f"{module}.{name}", a.shape[0] // experts)
        yield ExpertDelta(label, tensor.name, a, b, scale, experts, turned, config.grouped_experts)


def _means(target: str, module: str) -> bool:
    owner = target.rpartition(".")[0]
    return module == owner or module.endswith(f".{owner}")


def _apart(
    label: str,
    config: LoraConfig,
    base: Checkpoint,
    path: Path,
    module: str,
    name: str,
    a: TensorInfo,
    b: TensorInfo,
) -> Iterator[Term]:
    owner, kinds, experts = module, _APART[name], 0
    mixtral = module.replace(".mlp.", ".block_sparse_moe.")
    if f"{mixtral}.0.w1.weight" in base.tensors:
        owner, kinds = mixtral, _MIXTRAL[name]
    while f"{owner}.{experts}.{kinds[0]}.weight" in base.tensors:
        experts += 1
    if not experts or a.shape[0] % experts or b.shape[0] % len(kinds):
        raise BadAdapterError(
            f"{path}: {module}.{name} is not a tensor of {base.folder}",
            "this adapter belongs to another base",
        )
    rank, rows = a.shape[0] // experts, b.shape[0] // len(kinds)
    scale = config.scale(f"{module}.{name}", rank)
    for expert in range(experts):
        for i, kind in enumerate(kinds):
            yield Delta(
                label, f"{owner}.{expert}.{kind}.weight", a, b, scale, False,
                expert=expert, experts=experts, rows=(i * rows, (i + 1) * rows), grouped=config.grouped_experts,
            )  # fmt: skip
