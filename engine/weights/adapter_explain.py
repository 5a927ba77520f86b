"""Whether an adapter's config and file explain each other, and what it has in words. For engine/weights/adapter.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from engine.errors import BadAdapterError
from engine.weights.adapter_config import LoraOptions
from engine.weights.adapter_keys import Pair, Parts
from engine.weights.adapter_match import token_rows_of
from engine.weights.changes import LoraFactor
from engine.weights.tensorfile import TensorFile

# Tables that PEFT saves by itself where the vocabulary was resized.
_VOCABULARY = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_HEADS = ("classifier", "score")  # PEFT adds these to modules_to_save of classifiers by itself


def of_parameter(options: LoraOptions, pair: Pair) -> bool:
    """Whether the pair belongs to a parameter of the module (target_parameters), not to its `.weight`."""
    if pair.inner:
        return True
    a, _ = pair.whole()
    for target in options.target_parameters:
        parent = target.rpartition(".")[0]
        if parent and (pair.module == parent or pair.module.endswith("." + parent)):
            return True
    return bool(options.target_parameters) and options.rank_of(pair.module, a.shape[0]) != a.shape[0]


def check_complete(
    file: TensorFile, options: LoraOptions, parts: Parts, factors: Mapping[str, LoraFactor]
) -> None:
    """What the config promises must be in the file, and what is in the file must be explained by the config."""
    if not (parts.pairs or parts.saved or parts.token_rows):
        raise BadAdapterError(f"{file.path} holds no LoRA factors")
    for name, info in parts.saved.items():
        if not _explained(options, name):
            raise BadAdapterError(
                f"{file.path}: key {info.name} is no lora_A or lora_B, and {options.path} does not say why it is "
                "there (modules_to_save, bias)",
                "it may belong to another kind of adapter",
            )
    for module in options.modules_to_save:
        stored = any(_ends_in(name, module) for name in (*parts.saved, *parts.base_layers))
        if not stored and module not in _HEADS:
            raise BadAdapterError(
                f"{file.path}: {options.path} names {module} in modules_to_save, and the file has no such tensor",
                "the adapter was not saved whole; save it again",
            )
    if options.token_indices and not parts.token_rows:
        raise BadAdapterError(
            f"{file.path}: {options.path} has trainable_token_indices, and the file has no trained rows"
        )
    for module in parts.token_rows:
        if not token_rows_of(options, module):
            raise BadAdapterError(
                f"{file.path}: {parts.token_rows[module].name} has trained rows, and {options.path} does not say "
                "which (trainable_token_indices)"
            )
    for pair in parts.pairs.values():
        if options.use_dora and pair.magnitude is None and pair.module in factors:
            raise BadAdapterError(
                f"{file.path}: {options.path} says use_dora, and {pair.module} has no lora_magnitude_vector: a DoRA "
                "not saved whole",
                "without its magnitudes a DoRA cannot be merged; save it again",
            )
        if pair.magnitude is not None and not options.use_dora:
            raise BadAdapterError(
                f"{file.path}: {pair.module} has a lora_magnitude_vector, and {options.path} does not say use_dora",
                "PEFT would drop the magnitudes; if it was trained as DoRA, set use_dora to true there",
            )
        if options.lora_bias and pair.bias is None and not pair.embedding and pair.module in factors:
            raise BadAdapterError(
                f"{file.path}: {options.path} says lora_bias, and {pair.module} has no lora_B.bias"
            )


def _explained(options: LoraOptions, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" and options.bias != "none":
        return True
    if leaf == "weight" and module.rpartition(".")[2] in _VOCABULARY:
        return True
    return any(_ends_in(name, saved) for saved in options.modules_to_save)


def _ends_in(name: str, saved: str) -> bool:
    """PEFT's rule for modules_to_save: a module whose name ends in the text, and all below it."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(saved) for count in range(1, len(parts)))


def variants(options: LoraOptions, parts: Parts, factors: Mapping[str, LoraFactor]) -> Iterator[str]:
    pairs = parts.pairs.values()
    if options.use_rslora:
        yield "rsLoRA"
    if any(pair.magnitude is not None for pair in pairs):
        yield "DoRA"
    if names := _last(pair.module for pair in pairs if pair.embedding):
        yield f"embedding LoRA: {names}"
    if names := _last(pair.module for pair in pairs if pair.module not in factors or pair.inner):
        yield f"fused parameters: {names}"
    whole = [name for name in parts.saved if not name.endswith(".bias")]
    named = {saved for name in whole for saved in options.modules_to_save if _ends_in(name, saved)}
    rest = {name.split(".")[-2] for name in whole if not any(_ends_in(name, saved) for saved in named)}
    if named or rest:
        yield f"modules_to_save: {', '.join(sorted(named | rest))}"
    if any(name.endswith(".bias") for name in (*parts.saved, *parts.base_layers)):
        yield "trained biases"
    if any(pair.bias is not None for pair in pairs):
        yield "lora_bias"
    if names := _last(parts.token_rows):
        yield f"trained token rows: {names}"


def _last(modules: Iterable[str]) -> str:
    return ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
