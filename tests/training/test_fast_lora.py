"""The faster ways give what PEFT and torch give: values and gradients in float64, on real PEFT models."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from training import fast_lora
from training.masking import IGNORE, Encoded
from training.packing import Block, collate

DOCUMENTS = [
    Encoded(list(range(5, 17)), [IGNORE, *range(6, 17)]),
    Encoded([8, 8, 120], [IGNORE, IGNORE, 120]),
    Encoded([300, 2, 301, 2], [IGNORE, 2, IGNORE, 2]),
]


def lora_model(base: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A PEFT model whose B is not zero, so that A has gradients too."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=dtype == torch.bfloat16)
    if dtype == torch.float64:
        model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def batch(rows: int = 2) -> tuple[dict[str, Any], torch.Tensor]:
    made = collate([Block.of(DOCUMENTS), Block.of(DOCUMENTS[::-1][:2])][:rows], pad=0)
    target = made["labels"][:, 1:]
    keep = (target != IGNORE).any(dim=0).nonzero().squeeze(1)
    inputs = {key: made[key] for key in ("input_ids", "position_ids")}
    return {**inputs, "use_cache": False, "logits_to_keep": keep}, target[:, keep]


def usual_loss(model: Any, inputs: dict[str, Any], target: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3"])
@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_equal_pefts(
    family: str, changes: dict[str, Any], checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    model = lora_model(request.getfixturevalue(family), **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs, target = batch()
    torch.manual_seed(11)
    expected = usual_loss(model, inputs, target)
    wanted = gradients(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    assert fast_lora.use(model) == 14
    torch.manual_seed(11)
    found = usual_loss(model, inputs, target)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    got = gradients(model, found)
    assert got.keys() == wanted.keys() and len(got) == 28
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    x, w, bias, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, 6), (7, 6), (7,), (2, 6), (7, 2)))
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: fast_lora.LoraLinear.apply(x, x, w, bias, a, b, 1.7), (x, a, b)
    )
    dropped = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, d, a, b: fast_lora.LoraLinear.apply(x, d, w, None, a, b, 0.3), (x, dropped, a, b)
    )


def test_bfloat16_base_stays_within_its_rounding(tiny_qwen3: Path) -> None:
    """Against the same weights in float64, the faster way is no worse than PEFT's by more than half."""
    model = lora_model(tiny_qwen3, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = copy.deepcopy(model).double()
    inputs, target = batch()
    true = gradients(exact, usual_loss(exact, inputs, target))
    ways = []
    for fast in (False, True):
        if fast:
            fast_lora.use(model)
        loss = usual_loss(model, inputs, target)
        got = gradients(model, loss)
        assert all(value.dtype == torch.float32 for value in got.values())
        error = sum(float((got[name] - true[name]).square().sum()) for name in true)
        ways.append((error / sum(float(value.square().sum()) for value in true.values())) ** 0.5)
    assert ways[1] < 0.05 and ways[1] < 1.5 * ways[0]


def test_what_does_not_fit_goes_the_usual_way(tiny_llama: Path) -> None:
    assert fast_lora.use(lora_model(tiny_llama, lora_bias=True)) == 0
    model = lora_model(tiny_llama, use_dora=True)
    inputs, target = batch(rows=1)
    wanted = gradients(model, usual_loss(model, inputs, target))
    fast_lora.use(model)
    got = gradients(model, usual_loss(model, inputs, target))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    plain = lora_model(tiny_llama)
    fast_lora.use(plain)
    with torch.no_grad():
        adapted = plain(**inputs).logits
        with plain.disable_adapter():
            bare = plain(**inputs).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
        torch.testing.assert_close(bare, base(**inputs).logits)
        assert not torch.allclose(adapted, bare)
        torch.testing.assert_close(plain.merge_and_unload()(**inputs).logits, adapted)


def test_saved_adapters_are_unchanged(tiny_llama: Path) -> None:
    model = lora_model(tiny_llama)
    before = get_peft_model_state_dict(model)
    fast_lora.use(model)
    after = get_peft_model_state_dict(model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


_FAULTS = """
import resource, sys
import torch
from training import fast_lora
torch.set_num_threads(1)
if sys.argv[1] == "kept" and not fast_lora.keep_memory():
    sys.exit("no glibc")
def step(first):
    for size in range(first, first - 5, -1):  # a page less each time: the odd bytes malloc keeps for alignment
        parts = [torch.ones((12 << 20) + size * 1024) for _ in range(2)]  # never make a freed block too small
        del parts
step(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_is_not_fetched_again() -> None:
    """Page faults of a second step that allocates what the first one freed: 100 MB are 24,576 pages."""
    kept, plain = (
        subprocess.run([sys.executable, "-c", _FAULTS, word], capture_output=True, text=True)
        for word in ("kept", "plain")
    )
    if "no glibc" in kept.stderr:
        pytest.skip("malloc cannot be told here (no glibc)")
    assert int(kept.stdout) < 1000 < int(plain.stdout)
