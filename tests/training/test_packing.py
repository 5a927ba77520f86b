"""Packed documents must not see each other, and the loss must be the plain loss of the documents alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from training import attention
from training.masking import IGNORE, Encoded
from training.packing import Block, collate, cut_stream, one_each, pack_whole
from training.trainer import held_out_loss, token_loss

DOCUMENTS = [
    Encoded([5, 17, 200, 9, 31, 2], [IGNORE, 17, 200, 9, 31, 2]),
    Encoded([8, 8, 120], [IGNORE, IGNORE, 120]),
    Encoded([300, 44, 7, 90, 2], [IGNORE, IGNORE, 7, 90, 2]),
]


def load(base: Path, implementation: str) -> torch.nn.Module:
    if implementation == attention.NAME:
        assert attention.choose(AutoConfig.from_pretrained(base), "cpu", 64) == attention.NAME
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=implementation
    ).eval()


def loss_alone(model: torch.nn.Module, document: Encoded) -> tuple[float, int]:
    """Sum of -log p in float64, from a plain forward of one document with an ordinary mask."""
    ids = torch.tensor([document.ids])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
    pairs = [(t, label) for t, label in enumerate(document.labels) if label != IGNORE]
    return -sum(float(torch.log_softmax(logits[t - 1], -1)[label]) for t, label in pairs), len(pairs)


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3"])
def test_packed_logits_equal_the_documents_alone(
    family: str, implementation: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    model = load(base, implementation)
    reference = load(base, "eager")
    batch = collate([Block.of(DOCUMENTS), Block.of(DOCUMENTS[::-1][:2])], pad=0)
    assert "attention_mask" not in batch
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    for row, documents in enumerate([DOCUMENTS, DOCUMENTS[::-1][:2]]):
        start = 0
        for document in documents:
            end = start + len(document.ids)
            with torch.no_grad():
                alone = reference(input_ids=torch.tensor([document.ids])).logits[0]
            torch.testing.assert_close(packed[row, start:end], alone, atol=2e-5, rtol=1e-4)
            start = end


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
def test_token_loss_is_the_sum_over_trained_tokens(tiny_llama: Path, implementation: str) -> None:
    model = load(tiny_llama, implementation)
    expected = [
        loss_alone(model if implementation == "sdpa" else load(tiny_llama, "sdpa"), d) for d in DOCUMENTS
    ]
    batch = collate([Block.of(DOCUMENTS[:2]), Block.of(DOCUMENTS[2:])], pad=0)
    loss, count = token_loss(model, batch)
    assert count == sum(n for _, n in expected) == 9
    assert float(loss.detach()) == pytest.approx(sum(value for value, _ in expected), rel=1e-5)
    mean, tokens = held_out_loss(model, [Block.of(DOCUMENTS), Block.of(DOCUMENTS[:1])], pad=0, batch_size=2)
    weighted = sum(value for value, _ in expected) + expected[0][0]
    assert (tokens, mean) == (14, pytest.approx(weighted / 14, rel=1e-5))


def test_per_document_gradients_equal_the_masked_ones(tiny_qwen3: Path) -> None:
    gradients = []
    for implementation in ("sdpa", attention.NAME):
        model = load(tiny_qwen3, implementation)
        loss, _ = token_loss(model, collate([Block.of(DOCUMENTS)], pad=0))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


def test_per_document_attention_of_bfloat16_is_as_near_to_exact_as_torchs() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 29, 16).bfloat16() for heads in (4, 2, 2))
    positions = torch.tensor([[*range(12), *range(17)]])
    outcomes = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        found, _ = attention.per_document_attention(
            torch.nn.Module(), *inputs, None, scaling=0.25, position_ids=positions
        )
        assert found.dtype == dtype
        outcomes.append([found, *torch.autograd.grad(found.sum(), inputs)])
    for exact, rounded in zip(
        *outcomes, strict=True
    ):  # rounded once, at the end: half a unit of 2^-8 and the sums
        torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=2**-8)


def test_sliding_windows_and_gpus_keep_the_stock_attention(tiny_qwen3: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_qwen3)
    assert attention.choose(config, "cuda", 64) == "sdpa"
    config.sliding_window = 32
    assert attention.choose(config, "cpu", 64) == "sdpa"
    config.model_type, config.sliding_window = "gemma3_text", None
    assert attention.choose(config, "cpu", 64) == "sdpa"


documents_strategy = st.lists(st.integers(2, 40), min_size=1, max_size=12).map(
    lambda lengths: [
        Encoded(ids, [IGNORE, *ids[1:]])
        for number, length in enumerate(lengths)
        for ids in [[100 * number + k for k in range(length)]]
    ]
)


@given(documents_strategy, st.integers(16, 48))
def test_cut_stream_keeps_every_token_in_order(documents: list[Encoded], size: int) -> None:
    blocks = cut_stream(documents, size)
    assert [i for block in blocks for i in block.ids] == [i for document in documents for i in document.ids]
    assert all(len(block.ids) == size for block in blocks[:-1]) and len(blocks[-1].ids) <= size
    for block in blocks:
        for index, (token, label, position) in enumerate(
            zip(block.ids, block.labels, block.positions, strict=True)
        ):
            begins = index == 0 or block.ids[index - 1] // 100 != token // 100
            assert (position == 0) == begins
            assert label == (IGNORE if begins else token)


@given(documents_strategy)
def test_pack_whole_keeps_documents_whole_and_once(documents: list[Encoded]) -> None:
    blocks = pack_whole(documents, 48)
    assert all(len(block.ids) <= 48 for block in blocks)
    found = sorted(
        tuple(block.ids[start:end])
        for block in blocks
        for starts in [[n for n, position in enumerate(block.positions) if position == 0]]
        for start, end in zip(starts, [*starts[1:], len(block.ids)], strict=True)
    )
    assert found == sorted(tuple(document.ids) for document in documents)
    assert len(blocks) <= len(one_each(documents))


def test_pack_whole_fills_blocks_and_refuses_what_cannot_fit() -> None:
    documents = [Encoded([n] * length, [n] * length) for n, length in enumerate([30, 10, 20, 40])]
    assert sorted(len(block.ids) for block in pack_whole(documents, 50)) == [50, 50]
    with pytest.raises(ValueError, match="40 tokens"):
        pack_whole(documents, 39)


def test_collate_pads_as_a_document_of_its_own() -> None:
    batch = collate([Block.of(DOCUMENTS[:1]), Block.of(DOCUMENTS[1:2])], pad=3)
    assert batch["input_ids"][1].tolist() == [8, 8, 120, 3, 3, 3]
    assert batch["labels"][1].tolist() == [IGNORE, IGNORE, 120, IGNORE, IGNORE, IGNORE]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 2]
