"""Tiny random models with a real (small) tokenizer, and PEFT adapters that look trained. Shared by all tests.

`tiny_llama` (untied) and `tiny_qwen3` (tied embeddings) are bf16 checkpoints of under a megabyte;
`tiny_llama_sharded` is the same Llama in several shards. They are made once a session and must not be changed
by a test: copy them first. `make_adapter(base, ...)` makes a new adapter folder each time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from engine.workspace import Workspace

if TYPE_CHECKING:
    from tests.engine.weights.variants import VariantCase

# Tiny models gain nothing from threads, and spinning OpenMP threads are very slow beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER_TEXT = [
    "Aspirin is used to reduce pain, fever and inflammation. What is the dose for an adult?",
    "The patient was given 500 mg of paracetamol every 6 hours, and the fever went down.",
    "Diabetes is a disease in which the level of glucose in the blood is too high.",
    "What are the symptoms of asthma? Wheezing, coughing, and shortness of breath.",
    "user assistant system You are a careful medical assistant. Answer in one sentence.",
]
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class MakeAdapter(Protocol):
    def __call__(
        self, base: Path, rank: int = 8, b_std: float = 0.02, seed: int = 0, **peft_config: Any
    ) -> Path: ...


class MakeVariant(Protocol):
    def __call__(self, name: str) -> VariantCase: ...


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 384 tokens (GPT-2's pre-tokenizer), with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    architecture: str, folder: Path, seed: int = 0, dtype: str = "bfloat16", **config: Any
) -> Path:
    """Save a random "llama" or "qwen3" model of 2 layers and width 64, with the tokenizer, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shard_size = config.pop("max_shard_size", "5GB")
    tokenizer = build_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": architecture == "qwen3",
        **config,
    }
    assert len(tokenizer) <= settings["vocab_size"]
    torch.manual_seed(seed)
    model_class, config_class = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    }[architecture]
    model = model_class(config_class(**settings)).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 Llama in one file, embeddings not tied. Do not change it: copy it."""
    return build_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_llama_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as `tiny_llama`, in several shards with an index."""
    return build_model(
        "llama", tmp_path_factory.mktemp("models") / "tiny-llama-sharded", max_shard_size="60KB"
    )


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 Qwen3 in one file, embeddings tied (no lm_head on disk). Do not change it: copy it."""
    return build_model("qwen3", tmp_path_factory.mktemp("models") / "tiny-qwen3", seed=1)


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """Makes PEFT LoRA folders with a non-zero B: `make_adapter(base, rank, b_std, seed, **LoraConfig fields)`.

    A keeps PEFT's own start (Kaiming uniform), B is normal with standard deviation `b_std`, alpha is 2 * rank,
    targets are all linear layers, unless given. `name=` names the folder, `dtype=` the dtype on disk (float32).
    """

    def make(base: Path, rank: int = 8, b_std: float = 0.02, seed: int = 0, **peft_config: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        name = peft_config.pop("name", f"adapter-{seed}")
        dtype = getattr(torch, peft_config.pop("dtype", "float32"))
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            **{
                "lora_alpha": 2 * rank,
                "target_modules": LINEAR_LAYERS,
                "task_type": "CAUSAL_LM",
                **peft_config,
            },
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(seed + 1000)
        for key, value in model.named_parameters():
            if "lora_B" in key or "lora_embedding_B" in key:
                value.data.copy_(torch.randn(value.shape, generator=generator) * b_std)
            if "lora_" in key:
                value.data = value.data.to(dtype)
        folder = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> MakeVariant:
    """A LoRA variant by name, with PEFT's own merge beside it (tests/engine/weights/variants.py lists them)."""
    from tests.engine.weights import variants

    folder = tmp_path_factory.mktemp("variants")
    return lambda name: variants.variant(name, folder)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A new, empty workspace with its folders made."""
    return Workspace(tmp_path / "workspace").create()
