"""Runs one cell: samples to exact prompts and tokens, tokens to batches, a batch to rows. Needs torch.

Batches are made from all samples of the cell, before those already done are left out, so that an interrupted
and resumed cell has the very batches, and rows, of one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from engine import templates
from engine.evaluate import choice
from engine.evaluate.cells import Cell
from engine.evaluate.config import Decoding
from engine.evaluate.data import Sample
from engine.evaluate.generate import find_stops, generate
from engine.evaluate.likelihood import continuation_logprobs, length_batches
from engine.evaluate.live import LiveModel
from engine.evaluate.think import ends_open, split_think

Row = dict[str, Any]


class CellWork:
    """One cell on one live model. `batches` holds indices into `samples`; `run(batch)` gives their rows."""

    def __init__(self, live: LiveModel, cell: Cell, samples: Sequence[Sample]) -> None:
        self.live, self.cell, self.samples = live, cell, samples
        self.prompts = [self._prompt(sample) for sample in samples]
        prepare = {
            "generation": self._prepare_generation,
            "probes": self._prepare_generation,
            "references": self._prepare_references,
            "multiple_choice": self._prepare_choice,
            "perplexity": self._prepare_text,
        }[cell.kind]
        lengths = prepare()
        self.batches = length_batches(lengths, cell.spec["batch_size"], **self._budget)

    def run(self, batch: Sequence[int]) -> list[Row]:
        """The rows of these samples, each with `id` and `prompt_sha256`."""
        measure = {
            "generation": self._generate,
            "probes": self._generate,
            "references": self._references,
            "multiple_choice": self._choose,
            "perplexity": self._text,
        }[self.cell.kind]
        rows = measure(batch)
        return [
            {"id": self.samples[i].id, "prompt_sha256": sha256(self.prompts[i]), **row}
            for i, row in zip(batch, rows, strict=True)
        ]

    def _prompt(self, sample: Sample) -> str:
        """The text exactly as the model gets it, before its tokens."""
        if self.cell.kind == "perplexity":
            return sample.prompt
        if self.cell.kind == "multiple_choice":
            return choice.choice_prompt(sample, self.cell.task.scoring)
        messages = [{"role": "user", "content": sample.prompt}]
        if self.cell.task.system:
            messages.insert(0, {"role": "system", "content": self.cell.task.system})
        return self._template.prompt(messages)

    @property
    def _template(self) -> templates.Template:
        if not hasattr(self, "_loaded"):
            self._loaded = templates.load(self.cell.template, self.live.base.folder)
        return self._loaded

    @property
    def _budget(self) -> dict[str, int]:
        """Generation makes logits for one position only: its batches are bounded by their count alone."""
        return {"tokens": 2**31} if self.cell.kind in ("generation", "probes") else {}

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
        answers = generate(
            self.live.model,
            self.live.tokenizer,
            [self._ids[i] for i in batch],
            [self.samples[i].id for i in batch],
            decoding,
            self.cell.seed or 0,
            self._stops,
        )
        rows = []
        for i, answer in zip(batch, answers, strict=True):
            thought = split_think(answer.raw, opened=ends_open(self.prompts[i]))
            sample = self.samples[i]
            row: Row = {
                "raw": answer.raw, "text": thought.answer, "think": thought.kind, "finish": answer.finish,
                "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens,
            }  # fmt: skip
            if self.cell.kind == "probes":
                row |= {"category": sample.category, "probe": sample.probe}
            else:
                row["reference"] = sample.reference
            rows.append(row)
        return rows

    # likelihood of reference answers, after the prompt of the generation task

    def _prepare_references(self) -> list[int]:
        self._pairs = [
            (self._encode(prompt), self._encode(sample.reference))
            for prompt, sample in zip(self.prompts, self.samples, strict=True)
        ]
        return [len(prompt) + len(answer) for prompt, answer in self._pairs]

    def _references(self, batch: Sequence[int]) -> list[Row]:
        scored = continuation_logprobs(self.live.model, [self._pairs[i] for i in batch])
        return [
            {"logprob": sum(logprobs), "tokens": len(logprobs), "reference": self.samples[i].reference}
            for i, logprobs in zip(batch, scored, strict=True)
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
        single = all(len(answer) == 1 for options in self._options for _, answer in options)
        return [
            max(len(context) + len(answer) for context, answer in options) * (1 if single else len(options))
            for options in self._options
        ]

    def _choose(self, batch: Sequence[int]) -> list[Row]:
        scores = choice.score_choices(self.live.model, [self._options[i] for i in batch])
        rows = []
        for i, logprobs in zip(batch, scores, strict=True):
            sample = self.samples[i]
            by_length = [x / max(1, len(o)) for x, o in zip(logprobs, sample.options, strict=True)]
            rows.append(
                {
                    "scoring": self.cell.task.scoring,
                    "options": list(sample.options),
                    "answer": sample.answer,
                    "logprobs": logprobs,
                    "chosen": choice.best(logprobs),
                    "chosen_norm": choice.best(by_length),
                }
            )
        return rows

    # perplexity of held-out text: each passage alone

    def _prepare_text(self) -> list[int]:
        most = self.cell.task.max_tokens
        whole = [list(self.live.tokenizer(text)["input_ids"]) for text in self.prompts]
        self._cut = [len(ids) > most for ids in whole]
        self._ids = [ids[:most] for ids in whole]
        return [len(ids) for ids in self._ids]

    def _text(self, batch: Sequence[int]) -> list[Row]:
        """The first token of a passage has nothing before it and is not scored."""
        pairs = [(self._ids[i][:1], self._ids[i][1:]) for i in batch]
        scored = continuation_logprobs(self.live.model, [pair for pair in pairs if pair[1]])
        left = iter(scored)
        rows = []
        for i, pair in zip(batch, pairs, strict=True):
            logprobs = next(left) if pair[1] else []
            rows.append({"logprob": sum(logprobs), "tokens": len(logprobs), "cut": self._cut[i]})
        return rows


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
