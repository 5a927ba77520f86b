"""Runs one cell: samples to exact prompts and tokens, tokens to batches, a batch to rows. Needs torch.

Batches are made from all samples of the cell, before those already done are left out, so that an interrupted
and resumed cell has the very batches, and rows, of one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine import templates
from engine.errors import BadDataError, NotFiniteError
from engine.evaluate import choice
from engine.evaluate.cells import TEXT_KINDS, TOGETHER, Cell
from engine.evaluate.config import Decoding
from engine.evaluate.data import Sample
from engine.evaluate.generate import find_stops, generate
from engine.evaluate.likelihood import continuation_logprobs, length_batches
from engine.evaluate.live import LiveModel
from engine.evaluate.prompts import prompt_of
from engine.evaluate.rows import (
    Row,
    all_finite,
    answer_row,
    choice_row,
    finished,
    not_finite,
    reference_row,
    text_row,
)


class CellWork:
    """One cell on one live model. `batches` holds indices into `samples`; `run(batch)` gives their rows."""

    def __init__(self, live: LiveModel, cell: Cell, samples: Sequence[Sample]) -> None:
        self.live, self.cell, self.samples = live, cell, samples
        self.prompts = [self._prompt(sample) for sample in samples]
        prepare = {
            "references": self._prepare_references,
            "multiple_choice": self._prepare_choice,
            "perplexity": self._prepare_text,
        }.get(cell.kind, self._prepare_generation)
        lengths = prepare()
        self.batches = length_batches(lengths, self._together, **self._budget)

    def run(self, batch: Sequence[int]) -> list[Row]:
        """The rows of these samples, each with `id` and `prompt_sha256`."""
        measure = {
            "references": self._references,
            "multiple_choice": self._choose,
            "perplexity": self._text,
        }.get(self.cell.kind, self._generate)
        rows = measure(batch)
        return [finished(self.samples[i], self.prompts[i], row) for i, row in zip(batch, rows, strict=True)]

    def _prompt(self, sample: Sample) -> str:
        return prompt_of(self.cell, sample, self._template if self.cell.template else None)

    @property
    def _template(self) -> templates.Template:
        if not hasattr(self, "_loaded"):
            self._loaded = templates.load(self.cell.template, self.live.base.folder)
        return self._loaded

    @property
    def _together(self) -> int:
        """Samples measured, and kept, as one: where text is generated several batches, so that places are refilled."""
        size = int(self.cell.spec["batch_size"])
        return size * TOGETHER if self.cell.kind in TEXT_KINDS else size

    @property
    def _budget(self) -> dict[str, int]:
        """Generation makes logits for one position only: its batches are bounded by their count alone."""
        return {"tokens": 2**31} if self.cell.kind in TEXT_KINDS else {}

    def _encode(self, text: str) -> list[int]:
        """Tokens of a rendered conversation, which holds its special tokens already."""
        return list(self.live.tokenizer(text, add_special_tokens=False)["input_ids"])

    # generation and probes

    def _prepare_generation(self) -> list[int]:
        self._ids = [self._encode(prompt) for prompt in self.prompts]
        self._stops = find_stops(self.live.tokenizer, self.live.model, self._template.stop)
        return [len(ids) for ids in self._ids]

    def _generate(self, batch: Sequence[int]) -> list[Row]:
        decoding = self.cell.decoding or Decoding("greedy")
        try:
            answers = generate(
                self.live.model,
                self.live.tokenizer,
                [self._ids[i] for i in batch],
                [self.samples[i].id for i in batch],
                decoding,
                self.cell.seed or 0,
                self._stops,
                slots=int(self.cell.spec["batch_size"]),
            )
        except NotFiniteError as error:
            raise not_finite(self.cell, error.message) from error
        return [
            answer_row(
                self.cell, self.samples[i], self.prompts[i], answer.raw, answer.finish, answer.prompt_tokens,
                answer.new_tokens,
            )
            for i, answer in zip(batch, answers, strict=True)
        ]  # fmt: skip

    # likelihood of reference answers, after the prompt of the generation task

    def _prepare_references(self) -> list[int]:
        self._pairs = [
            (self._encode(prompt), self._encode(sample.reference))
            for prompt, sample in zip(self.prompts, self.samples, strict=True)
        ]
        return self._fitting([len(prompt) + len(answer) for prompt, answer in self._pairs])

    def _references(self, batch: Sequence[int]) -> list[Row]:
        scored = continuation_logprobs(self.live.model, [self._pairs[i] for i in batch])
        return [
            reference_row(self.samples[i], all_finite(self.cell, self.samples[i], found))
            for i, found in zip(batch, scored, strict=True)
        ]

    # multiple choice

    def _prepare_choice(self) -> list[int]:
        scoring = self.cell.task.scoring
        self._options = [
            [
                choice.encode_pair(self.live.tokenizer, prompt, continuation)
                for continuation in choice.continuations(sample, scoring)
            ]
            for prompt, sample in zip(self.prompts, self.samples, strict=True)
        ]
        self._fitting(
            [max(len(context) + len(answer) for context, answer in options) for options in self._options]
        )
        single = all(len(answer) == 1 for options in self._options for _, answer in options)
        return [
            max(len(context) + len(answer) for context, answer in options) * (1 if single else len(options))
            for options in self._options
        ]

    def _choose(self, batch: Sequence[int]) -> list[Row]:
        scores = choice.score_choices(self.live.model, [self._options[i] for i in batch])
        return [
            choice_row(self.cell, self.samples[i], all_finite(self.cell, self.samples[i], found))
            for i, found in zip(batch, scores, strict=True)
        ]

    # perplexity of held-out text: each passage alone

    def _prepare_text(self) -> list[int]:
        most = self.cell.task.max_tokens
        whole = [list(self.live.tokenizer(text)["input_ids"]) for text in self.prompts]
        self._cut = [len(ids) > most for ids in whole]
        self._ids = [ids[:most] for ids in whole]
        return self._fitting([len(ids) for ids in self._ids])

    def _fitting(self, lengths: list[int]) -> list[int]:
        """The lengths, when the model's context holds them. Raises BadDataError naming the first sample it does not."""
        window = int(getattr(self.live.model.config, "max_position_embeddings", 0) or 2**31)
        for length, sample in zip(lengths, self.samples, strict=True):
            if length > window:
                raise BadDataError(
                    f"{self.cell.task.name}, sample {sample.id}: {length:,} tokens; the model's context is {window:,}",
                    "leave it out (where, limit), or for perplexity lower max_tokens",
                )
        return lengths

    def _text(self, batch: Sequence[int]) -> list[Row]:
        """The first token of a passage has nothing before it and is not scored."""
        pairs = [(self._ids[i][:1], self._ids[i][1:]) for i in batch]
        scored = continuation_logprobs(self.live.model, [pair for pair in pairs if pair[1]])
        left = iter(scored)
        return [
            text_row(all_finite(self.cell, self.samples[i], next(left) if pair[1] else []), self._cut[i])
            for i, pair in zip(batch, pairs, strict=True)
        ]
