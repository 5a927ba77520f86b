"""The variants' own fixture: on a tied base PEFT's forward pass is that of the merge of one side alone."""

from __future__ import annotations

import pytest

from tests.conftest import MakeVariant
from tests.engine.weights.variants import VARIANT_NAMES, VARIANTS


@pytest.mark.parametrize("name", [name for name in VARIANT_NAMES if name.startswith("tied")])
def test_tied_reference_is_pefts_forward(variant: MakeVariant, name: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    case = variant(name)
    live = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(case.base, dtype="float32"), case.adapter
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(case.base, dtype="float32")
    merged.config.tie_word_embeddings = False
    merged.lm_head.weight = torch.nn.Parameter(torch.zeros_like(merged.lm_head.weight))
    merged.load_state_dict({key: torch.from_numpy(value) for key, value in case.merged.items()})
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        theirs, ours = live(input_ids=tokens).logits, merged.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert case.untied and (case.merged["lm_head.weight"] != case.merged["model.embed_tokens.weight"]).any()
    assert VARIANTS[name].base == "qwen3"
