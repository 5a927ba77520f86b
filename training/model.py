"""The model of a run: base with fresh LoRA layers, and how it is held and computed. Used by `training.fit`.

Loaded here: torch, transformers, peft.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from engine.errors import BadModelError, BadRecipeError
from training.config import TrainConfig


@dataclass(frozen=True)
class How:
    """How a run computes, for its manifest."""

    device: str
    attention: str
    base_dtype: str
    quantization: str
    processes: int = 1
    distributed: str = ""


def base_dtype(config: TrainConfig, cuda: bool) -> Any:
    """The torch dtype of the frozen base: what is asked; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    import torch

    if config.dtype == "auto":
        return torch.bfloat16 if cuda else torch.float32
    return getattr(torch, config.dtype)


def choose_attention(config: TrainConfig, model_config: Any, cuda: bool) -> str:
    """The attention implementation: the one asked, if it can run here; "auto" takes the fastest that is exact.

    FlashAttention-2 where the package and CUDA are there and the base is not float32, else torch's scaled dot
    product attention: one call a document on a CPU (`training.attention`), masked by blocks on a GPU. Raises
    BadRecipeError for FlashAttention-2 where it cannot run.
    """
    import torch

    from training import attention

    flash = cuda and importlib.util.find_spec("flash_attn") is not None
    half = base_dtype(config, cuda) != torch.float32
    if config.attention == "flash_attention_2" and not (flash and half):
        missing = "CUDA" if not cuda else "the flash_attn package" if not flash else "a bfloat16 base"
        raise BadRecipeError(
            f"attention: flash_attention_2 needs {missing}", "attention: auto takes what is there"
        )
    if config.attention != "auto":
        return config.attention
    if flash and half:
        return "flash_attention_2"
    return attention.choose(model_config, "cuda" if cuda else "cpu", config.cutoff)


def _quantization(config: TrainConfig, cuda: bool) -> Any:
    """transformers' settings of a 4-bit base (nf4, double quantisation, bfloat16 products), None without."""
    if config.quantization == "none":
        return None
    missing = "a CUDA device" if not cuda else ""
    if importlib.util.find_spec("bitsandbytes") is None:
        missing = "bitsandbytes" if cuda else "a CUDA device and bitsandbytes"
    if missing:
        raise BadRecipeError(
            f"quantization: nf4 needs {missing}, which this machine does not have",
            "leave quantization out, or train where they are (pip install bitsandbytes)",
        )
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def lora_model(config: TrainConfig) -> tuple[Any, How]:
    """The base with fresh LoRA layers (float32, B = 0), and how it runs.

    Raises BadModelError for a folder transformers cannot load, BadRecipeError for settings that do not fit it or
    this machine.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM

    from training import fast_lora

    cuda = torch.cuda.is_available()
    dtype = base_dtype(config, cuda)
    quantization = _quantization(config, cuda)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        kind = choose_attention(config, AutoConfig.from_pretrained(config.base, **local), cuda)
        if quantization is not None:
            local |= {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}
        model = AutoModelForCausalLM.from_pretrained(
            config.base, dtype=dtype, use_safetensors=True, attn_implementation=kind, **local
        )
    except (OSError, ValueError) as error:
        raise BadModelError(f"{config.base} cannot be loaded: {str(error).splitlines()[0]}") from error
    model.config.use_cache = False
    if quantization is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=config.gradient_checkpointing
        )
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=config.targets[0] if config.targets == ("all-linear",) else list(config.targets),
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(model, adapter)
    except ValueError as error:
        raise BadRecipeError(f"targets {list(config.targets)} do not fit {config.base}: {error}") from error
    if not cuda:
        fast_lora.keep_memory()
        fast_lora.use(model)
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    return model, How(device, kind, str(dtype).removeprefix("torch."), config.quantization)
