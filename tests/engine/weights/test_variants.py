"""Every variant's changes, summed in float64, against PEFT's own merge in float32; and the fixture itself."""

from __future__ import annotations

import numpy as np
import pytest

from engine.weights import Adapter, Checkpoint
from tests.conftest import MakeVariant
from tests.engine.weights import dense
from tests.engine.weights.variants import VARIANT_NAMES, VARIANTS


@pytest.mark.parametrize("name", [name for name in VARIANT_NAMES if VARIANTS[name].base == "qwen3"])
def test_tied_reference_is_pefts_forward(variant: MakeVariant, name: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    case = variant(name)
    tied = AutoModelForCausalLM.from_pretrained(case.base, dtype="float32")
    if case.rows:
        tied.resize_token_embeddings(case.rows)
    live = PeftModel.from_pretrained(tied, case.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(case.base, dtype="float32")
    merged.config.tie_word_embeddings = False
    if case.rows:
        merged.resize_token_embeddings(case.rows)
    merged.lm_head.weight = torch.nn.Parameter(torch.zeros_like(merged.lm_head.weight))
    merged.load_state_dict({key: torch.from_numpy(value) for key, value in case.merged.items()})
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        theirs, ours = live(input_ids=tokens).logits, merged.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    same = np.array_equal(case.merged["lm_head.weight"], case.merged["model.embed_tokens.weight"])
    assert case.untied and same == name.startswith("both")
    side = {"head": "output", "embedding": "input"}.get(name.rpartition("_")[2], "both")
    assert Adapter.open(case.adapter).side(Checkpoint.open(case.base)) == side


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_changes_are_pefts_merge(variant: MakeVariant, name: str) -> None:
    case = variant(name)
    ours = dense.merged(case.adapter, case.base)
    assert ours.keys() == case.merged.keys()
    base = {key: dense.stored(info) for key, info in Checkpoint.open(case.base).tensors.items()}
    changed = 0
    for key, theirs in case.merged.items():
        assert ours[key].shape == theirs.shape, key
        assert np.linalg.norm(ours[key] - theirs) <= 1e-6 * np.linalg.norm(theirs), key
        if key in base and base[key].shape == theirs.shape:
            assert np.abs(ours[key] - theirs).max() <= 2e-6 * np.abs(theirs).max(), key
            changed += not np.array_equal(base[key], ours[key])
    assert changed, "the adapter changed nothing"
