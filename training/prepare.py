"""From data files to packed blocks: tokenizer, template, encoding to disk, held-out rows, packing.

Called by `training.run` and `training.fewshot`. One pass over the files, in bounded memory: documents go to a
`TokenStore`, and what is trained on and what is held out is decided afterwards from their keys and lengths.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import templates
from engine.errors import BadDataError, BadModelError
from engine.jobs.events import EventWriter
from training import masking, packing
from training.config import TrainConfig
from training.data.samples import Sample
from training.data.sources import DataFile, Source, copies, describe, held_out_keys, read_source, sample_key
from training.masking import Encoded
from training.packing import Blocks
from training.tokens import TokenStore, TokenWriter, open_store

BATCH_ROWS, BATCH_CHARACTERS = 256, 4_000_000
Drop = Mapping[str, Mapping[int, str]]  # file -> row (from 0) -> why it is left out


@dataclass(frozen=True)
class Prepared:
    """Everything a run reads, as it will be trained on."""

    train: Blocks
    held_out: Blocks
    counts: dict[str, Any]  # for the manifest: rows, too_long, untrained, dropped, documents, tokens, ...


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


def choose_template(config: TrainConfig) -> templates.Template | None:
    """The run's template; None for pt with the model's own, which needs none."""
    if config.kind == "pt" and config.template == "model":
        return None
    return templates.load(config.template, Path(config.base))


class Encoder:
    """Encodes samples the way a run does (the preview uses it too)."""

    def __init__(self, config: TrainConfig, tokenizer: Any) -> None:
        """Raises BadRecipeError when a mark of the template is no single token of this tokenizer; what can be
        trained but rarely is meant is in `warnings`."""
        self.config, self.tokenizer = config, tokenizer
        self.template = choose_template(config)
        self.warnings = masking.check_marks(self.template, tokenizer, config.base) if self.template else ()
        self._end = end_token(config, tokenizer, self.template)

    def __call__(self, sample: Sample) -> Encoded:
        """Ids and labels of one sample. Raises BadDataError naming the sample."""
        config = self.config
        if config.kind == "pt":
            return masking.encode_text(sample, self.tokenizer, self._end)
        assert self.template is not None
        return masking.encode_conversation(
            sample,
            self.tokenizer,
            self.template,
            config.cutoff,
            train_on_prompt=config.train_on_prompt,
            mask_history=config.mask_history,
        )

    def many(self, samples: Sequence[Sample]) -> list[Encoded]:
        """The same of several samples; plain texts are tokenised together, on all cores."""
        if self.config.kind == "pt":
            return masking.encode_texts(samples, self.tokenizer, self._end)
        return [self(sample) for sample in samples]

    def why_untrained(self, sample: Sample) -> str:
        assert self.template is not None
        return masking.why_untrained(
            sample, self.tokenizer, self.template, self.config.cutoff, mask_history=self.config.mask_history
        )


def fingerprint(config: TrainConfig, encoder: Encoder, data: list[DataFile], drop: Drop) -> dict[str, Any]:
    """All that the encoded documents depend on; a store made from the same is used again."""
    tokenizer = Path(config.base) / "tokenizer.json"
    spelled = tokenizer.read_bytes() if tokenizer.is_file() else b""
    return {
        "format": "medmerge.tokens/2",
        "kind": config.kind,
        "template": templates.describe(encoder.template)["sha256"] if encoder.template else "",
        "cutoff": config.cutoff if config.kind == "sft" else 0,
        "masks": [config.train_on_prompt, config.mask_history],
        "seed": config.seed,  # of weights below 1
        "data": [[item.file, item.sha256, item.rows] for item in data],
        "sources": [
            {key: value for key, value in vars(source).items() if key != "path"}
            for source in (*config.data, *config.eval_data)
        ],
        "tokenizer": hashlib.sha256(spelled).hexdigest(),
        "dropped": [sorted(drop.get(path, {})) for path in _paths(config)],
    }


def _paths(config: TrainConfig) -> list[str]:
    """Every file or folder of the run, training first; each once."""
    return list(dict.fromkeys(source.path for source in (*config.data, *config.eval_data)))


def data_files(config: TrainConfig, events: EventWriter) -> list[DataFile]:
    """Name, SHA-256 and rows of every file of the run, training first; each file once."""
    paths = _paths(config)
    found = []
    for number, path in enumerate(paths):
        events.progress(number, len(paths), "files", f"reading {Path(path).name}", phase="data")
        source = next(item for item in (*config.data, *config.eval_data) if item.path == path)
        found.append(describe(source))
    events.progress(len(paths), len(paths), "files", phase="data")
    return found


def prepare(
    config: TrainConfig,
    tokenizer: Any,
    folder: Path,
    events: EventWriter,
    drop: Drop | None = None,
    data: list[DataFile] | None = None,
) -> Prepared:
    """Encode the data into `folder` (or use what is there, if it was made from the same), and pack it.

    Raises BadDataError for rows that cannot be read, a held-out part larger than the data, and data that leave no
    token to train on (with the first sample and why).
    """
    drop = drop or {}
    data = data if data is not None else data_files(config, events)
    encoder = Encoder(config, tokenizer)
    made_from = fingerprint(config, encoder, data, drop)
    store = open_store(folder, made_from)
    if store is None:
        store = _encode(config, encoder, folder, made_from, drop, data, events)
    return arrange(config, store)


def _encode(
    config: TrainConfig,
    encoder: Encoder,
    folder: Path,
    made_from: dict[str, Any],
    drop: Drop,
    data: list[DataFile],
    events: EventWriter,
) -> TokenStore:
    rows = dict(zip(_paths(config), (item.rows for item in data), strict=True))
    total = sum(rows[source.path] for source in (*config.data, *config.eval_data))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # jobs start with it off; nothing is forked here
    counts = {"rows": 0, "too_long": 0, "cut_tokens": 0, "untrained": 0, "dropped": 0, "eval_documents": 0}
    first_untrained = first_long = ""
    with TokenWriter(folder) as writer:
        for source, evaluation in _all_sources(config):
            for batch in _batches(read_source(source, config.kind)):
                counts["rows"] += len(batch)
                kept = batch if evaluation else [s for s in batch if s.index not in drop.get(source.path, {})]
                counts["dropped"] += len(batch) - len(kept)
                for sample, encoded in zip(kept, encoder.many(kept), strict=True):
                    if encoded.cut:
                        counts["too_long"] += 1
                        counts["cut_tokens"] += encoded.cut
                        first_long = first_long or sample.place
                    if not encoded.trained:
                        counts["untrained"] += 1
                        first_untrained = first_untrained or f"{sample.place}: {_why(encoder, sample)}"
                        continue
                    key = sample_key(sample)
                    counts["eval_documents"] += evaluation
                    writer.add(encoded, key, 0 if evaluation else copies(key, source.weight, config.seed))
                events.progress(counts["rows"], max(total, counts["rows"]), "rows", phase="encode")
        _say(counts, first_long, first_untrained, config, events)
        return writer.finish({**made_from, "counts": counts})


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples in lists of up to BATCH_ROWS rows or BATCH_CHARACTERS characters."""
    batch: list[Sample] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += len(sample.text)
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _why(encoder: Encoder, sample: Sample) -> str:
    if encoder.config.kind == "pt":
        return "the text is a single token"
    return encoder.why_untrained(sample)


def _all_sources(config: TrainConfig) -> Iterator[tuple[Source, bool]]:
    """Training sources, then evaluation sources (True)."""
    yield from ((source, False) for source in config.data)
    yield from ((replace(source, weight=1.0), True) for source in config.eval_data)


def _say(
    counts: dict[str, int], first_long: str, first_untrained: str, config: TrainConfig, events: EventWriter
) -> None:
    """Tell what was shortened or left out; raise when nothing is left."""
    if counts["too_long"]:
        events.warning(
            f"{counts['too_long']:,} of {counts['rows']:,} samples are longer than the cutoff of {config.cutoff} "
            f"tokens and were shortened ({counts['cut_tokens']:,} tokens lost; the first: {first_long})"
        )
    if counts["untrained"]:
        events.warning(
            f"{counts['untrained']:,} of {counts['rows']:,} samples leave no token to train on and are left out; "
            f"the first: {first_untrained}"
        )
    if counts["untrained"] + counts["dropped"] + counts["eval_documents"] >= counts["rows"]:
        why = f"the first: {first_untrained}" if first_untrained else "all of them were dropped"
        names = ", ".join(Path(source.path).name for source in config.data)
        raise BadDataError(
            f"no row of {names} leaves a token to train on; {why}", "raise cutoff, or look at --preview"
        )


def arrange(config: TrainConfig, store: TokenStore) -> Prepared:
    """Held-out rows by key, then shots, copies and blocks."""
    counts = dict(store.note["counts"])
    evaluation = np.zeros(len(store), dtype=bool)
    if counts["eval_documents"]:
        evaluation[-counts["eval_documents"] :] = True
    wanted = config.held_out_rows(int((~evaluation).sum()))
    held = evaluation.copy()
    if wanted:
        chosen = held_out_keys(store.keys[~evaluation], wanted, config.seed)
        held |= np.array([key.tobytes() in chosen for key in store.keys])
    training = np.flatnonzero(~held & (store.copies > 0))
    if counts["eval_documents"]:
        counts["eval_overlap"] = int(np.isin(store.keys[evaluation], store.keys[training]).sum())
    if config.shots:
        training = _shots(store, training, config)
    most = int(store.copies[training].max(initial=0))
    passes = [training[store.copies[training] > number] for number in range(most)]
    order = np.concatenate(passes) if passes else training
    if not len(order):
        raise BadDataError("nothing is left to train on once the held-out rows are taken", "lower held_out")
    blocks, held_blocks = pack(config, store, order), pack(config, store, np.flatnonzero(held))
    counts |= {
        "documents": len(order),
        "held_out_documents": int(held.sum()),
        "blocks": len(blocks),
        "tokens": int(store.lengths[order].sum()),
        "trained_tokens": int(store.loss[order].sum()) - _lost_at_borders(config, blocks, len(order)),
    }
    return Prepared(blocks, held_blocks, counts)


def _lost_at_borders(config: TrainConfig, blocks: Blocks, documents: int) -> int:
    """PT: pieces that go on in a block lose their first token's loss."""
    return blocks.pieces - documents if config.kind == "pt" else 0


def _shots(store: TokenStore, training: np.ndarray, config: TrainConfig) -> np.ndarray:
    """`shots` of the training documents: the first ones in the order of a hash of seed and content (so that 64 are
    among the 256 of the same seed), in the order of the files."""
    if config.shots > len(training):
        raise BadDataError(
            f"{config.shots} shots were asked, and there are {len(training)} training samples", "lower shots"
        )
    seed = str(config.shots_seed).encode()
    ranks = [hashlib.blake2b(seed + b":" + store.keys[index].tobytes()).digest() for index in training]
    chosen = sorted(range(len(training)), key=lambda place: ranks[place])[: config.shots]
    return training[np.sort(chosen)]


def pack(config: TrainConfig, store: TokenStore, order: np.ndarray) -> Blocks:
    """The blocks of these documents, in the way of the run's kind."""
    if config.kind == "pt":
        return packing.cut_stream(store, config.cutoff, order)
    if config.packing:
        return packing.pack_whole(store, config.cutoff, order)
    return packing.one_each(store, order)


def packing_words(config: TrainConfig) -> str:
    """How documents are laid out, for whoever reads a perplexity."""
    if config.kind == "pt":
        return f"one stream cut every {config.cutoff} tokens; documents do not see each other"
    if config.packing:
        return f"whole conversations packed to {config.cutoff} tokens; they do not see each other"
    return "one conversation a row"
