"""From data files to packed blocks: tokenizer, template, held-out rows, encoding, packing. Called by `training.run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import templates
from engine.errors import BadDataError, BadModelError, BadRecipeError
from engine.jobs.events import EventWriter
from training import corpora, masking, packing
from training.config import TrainConfig
from training.corpora import Sample
from training.masking import Encoded
from training.packing import Block


@dataclass(frozen=True)
class Prepared:
    """Everything a run reads, as it will be trained on."""

    train: list[Block]
    held_out: list[Block]
    data: list[corpora.DataFile]
    documents: int
    tokens: int  # of one epoch, processed
    trained_tokens: int  # of one epoch, with loss


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local model folder. Raises BadModelError."""
    from transformers import AutoTokenizer

    if not (folder / "config.json").is_file():
        raise BadModelError(
            f"{folder} is not a model folder (no config.json)", "give the base model's folder"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadModelError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def end_token(config: TrainConfig, tokenizer: Any, template: templates.Template | None) -> int:
    """The id that ends a document: the template's stop token when the tokenizer has it, else its EOS."""
    if template is not None and template.stop:
        known = tokenizer.convert_tokens_to_ids(template.stop[0])
        if isinstance(known, int) and known != tokenizer.unk_token_id:
            return known
    if tokenizer.eos_token_id is None:
        raise BadModelError(f"the tokenizer of {config.base} has no EOS token", "choose a built-in template")
    return int(tokenizer.eos_token_id)


def choose_template(config: TrainConfig, tokenizer: Any) -> templates.Template | None:
    """The run's template; None for pt with the model's own, which needs none.

    Raises BadRecipeError when a mark of the template is no single token of this tokenizer.
    """
    if config.kind == "pt" and config.template == "model":
        return None
    template = templates.load(config.template, Path(config.base))
    for mark in template.stop[:1]:
        if len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
            raise BadRecipeError(
                f"template {config.template} ends turns with {mark}, which is not a token of {config.base}",
                "choose the template of this model family, or `model`",
            )
    return template


def encode(
    config: TrainConfig, samples: Sequence[Sample], tokenizer: Any, events: EventWriter
) -> list[Encoded]:
    template = choose_template(config, tokenizer)
    encoded = []
    for number, sample in enumerate(samples, 1):
        if config.kind == "pt":
            encoded.append(masking.encode_text(sample, tokenizer, end_token(config, tokenizer, template)))
        else:
            assert template is not None
            encoded.append(
                masking.encode_conversation(
                    sample,
                    tokenizer,
                    template,
                    config.cutoff,
                    train_on_prompt=config.train_on_prompt,
                    mask_history=config.mask_history,
                )
            )
        events.progress(number, len(samples), "rows", phase="encode")
    return [item for item in encoded if item.trained]


def pack(config: TrainConfig, documents: Sequence[Encoded]) -> list[Block]:
    if config.kind == "pt":
        return packing.cut_stream(documents, config.cutoff)
    return packing.pack_whole(documents, config.cutoff) if config.packing else packing.one_each(documents)


def prepare(config: TrainConfig, tokenizer: Any, events: EventWriter) -> Prepared:
    """Read and encode the data; the held-out rows are chosen before anything is packed."""
    samples: list[Sample] = []
    files = []
    for name in config.data:
        rows = corpora.read_samples(Path(name), config.kind)
        files.append(corpora.describe(Path(name), len(rows)))
        samples += rows
    training, held = corpora.hold_out(samples, config.held_out, config.seed)
    documents = encode(config, training, tokenizer, events)
    if not documents:
        raise BadDataError(f"no row of {', '.join(config.data)} leaves a token to train on", "raise cutoff")
    blocks = pack(config, documents)
    processed = sum(len(block.ids) for block in blocks)
    trained = sum(label != masking.IGNORE for block in blocks for label in block.labels)
    held_blocks = pack(config, encode(config, held, tokenizer, events)) if held else []
    return Prepared(blocks, held_blocks, files, len(documents), processed, trained)
