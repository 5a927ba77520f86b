"""Runs cells on a GGUF file with llama.cpp in this process: texts, multiple choice, likelihoods.

Called by bench.py. Prompts, tokens, drawing and rows are those of a checkpoint's cells (prompts.py, generate.py,
rows.py), so that what differs between a checkpoint and its GGUF is the file and llama.cpp's arithmetic alone.
Numbers of llama.cpp depend a little on what else is in a batch, so a batch always runs whole and in empty memory:
a resumed cell has the rows of one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from engine import templates
from engine.chat.runtime import Model, supports_gpu
from engine.errors import BadDataError, BadModelError, BadTensorFileError
from engine.evaluate import choice
from engine.evaluate.backends.scores import MOST_SEQUENCES, Scored, logprobs_of, parts_of, tokens_of
from engine.evaluate.backends.sequences import Piece, Sequences
from engine.evaluate.cells import TEXT_KINDS, Cell
from engine.evaluate.config import Decoding, GgufFile
from engine.evaluate.data import Sample
from engine.evaluate.generate import answer_text, ended, find_stops, pick, stream
from engine.evaluate.likelihood import length_batches
from engine.evaluate.prompts import prompt_of
from engine.evaluate.rows import Row, all_finite, answer_row, choice_row, finished, reference_row, text_row
from engine.gguf.convert import SOURCE_KEY

ROOM = 32768  # tokens of prompts and answers kept at a time: 3.5 GB for an 8B model (16-bit keys and values)


class GgufBackend:
    """One GGUF file in memory (mapped), on the GPU where llama.cpp was built for one and `device` is not `cpu`.

    threads: 0 takes as many as torch has here (all cores, or a Ray worker's share of them).
    Raises BadModelError when llama.cpp cannot load the file, or it holds no tokenizer.
    """

    def __init__(self, file: GgufFile, device: str = "auto", threads: int = 0) -> None:
        self.file, self.threads = file, threads or torch.get_num_threads()
        layers = -1 if device != "cpu" and supports_gpu() else 0
        try:
            self.model = Model(file.path, gpu_layers=layers)
        except BadTensorFileError as error:
            raise BadModelError(error.message, error.hint) from error
        kind = self.model.metadata("tokenizer.ggml.model")
        if self.model.vocabulary <= 0 or kind in ("", "none", "no_vocab"):
            self.model.close()
            raise BadModelError(
                f"{file.path} holds no tokenizer, so no text can be asked of it",
                "convert the model again together with its tokenizer: medmerge gguf CHECKPOINT --out FILE",
            )
        self.tokenizer = GgufTokenizer(self.model)
        self._room: Sequences | None = None

    def work(self, cell: Cell, samples: Sequence[Sample]) -> GgufWork:
        """The cell ready to run. Raises BadDataError naming a sample that is longer than the model's context."""
        return GgufWork(self, cell, samples)

    def room(self, count: int, size: int) -> Sequences:
        """Empty memory for `count` sequences of together `size` tokens."""
        if self._room is None or (self._room.count, self._room.size) != (count, size):
            self._free()
            self._room = Sequences(self.model, count, size, self.threads)
        self._room.clear()
        return self._room

    def close(self) -> None:
        """Give the memory back."""
        self._free()
        self.model.close()

    def _free(self) -> None:
        if self._room is not None:
            self._room.close()
            self._room = None

    def template(self, name: str) -> templates.Template:
        """The template of that name; `model` is the one in the file."""
        if name != "model":
            return templates.load(name)
        if not self.model.chat_template:
            raise BadModelError(
                f"{self.file.path} has no chat template",
                f"choose a built-in one: {', '.join(sorted(templates.BUILTIN))}",
            )
        return templates.from_jinja(self.model.chat_template, self.model.special_tokens())

    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer, whatever the template.

        A file of this program names those its checkpoint stops at; in others every token counts that llama.cpp
        takes as an end of generation.
        """
        if self.model.metadata(SOURCE_KEY):
            named = [self.model.metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
            return [int(text) for text in named if text.isdecimal()]
        return [token for token in range(self.model.vocabulary) if self.model.ends(token)]


class GgufTokenizer:
    """The file's tokenizer with the names transformers' has: what find_stops, encode_pair and answers need."""

    unk_token_id = None

    def __init__(self, model: Model) -> None:
        self._model = model
        # SentencePiece puts a space before the first word; it is no part of the text
        spaced = model.metadata("tokenizer.ggml.add_space_prefix") != "false"
        self._strips = model.metadata("tokenizer.ggml.model") == "llama" and spaced

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._model.tokenize(text, special=True, add_special=add_special_tokens)}

    @property
    def eos_token_id(self) -> int | None:
        text = self._model.metadata("tokenizer.ggml.eos_token_id")
        return int(text) if text.isdecimal() else None

    def convert_tokens_to_ids(self, mark: str) -> int | None:
        """The id of a mark that is one token, else None."""
        ids = self._model.tokenize(mark)
        if len(ids) == 1 and self._model.piece(ids[0], special=True) == mark.encode():
            return ids[0]
        return None

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """The text of tokens, special ones written out."""
        text = b"".join(self._model.piece(token, special=True) for token in tokens).decode("utf-8", "replace")
        return text[1:] if self._strips and text.startswith(" ") else text


class GgufWork:
    """One cell on one file. `batches` holds indices into the samples; `run(batch)` gives their rows."""

    def __init__(self, backend: GgufBackend, cell: Cell, samples: Sequence[Sample]) -> None:
        self.backend, self.cell, self.samples = backend, cell, samples
        self._scored: list[list[Scored]] = []
        self._template = backend.template(cell.template) if cell.template else None
        self.prompts = [prompt_of(cell, sample, self._template) for sample in samples]
        self._window = backend.model.trained_context or 2**31
        prepare = {
            "references": self._prepare_references,
            "multiple_choice": self._prepare_choice,
            "perplexity": self._prepare_text,
        }.get(cell.kind, self._prepare_answers)
        lengths = prepare()
        size = cell.spec["batch_size"]
        if cell.kind in TEXT_KINDS:
            self.batches = length_batches(lengths, min(size, MOST_SEQUENCES), ROOM)
        else:
            self.batches = length_batches(lengths, size)
            self._sizes = self._room_for_scores()

    def run(self, batch: Sequence[int]) -> list[Row]:
        """The rows of these samples, each with `id` and `prompt_sha256`."""
        rows = self._answers(batch) if self.cell.kind in TEXT_KINDS else self._scores(batch)
        return [finished(self.samples[i], self.prompts[i], row) for i, row in zip(batch, rows, strict=True)]

    def _encode(self, text: str) -> list[int]:
        """Tokens of a rendered conversation, which holds its special tokens already."""
        return self.backend.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _fits(self, index: int, tokens: int, least: int = 1) -> None:
        if not least <= tokens <= self._window:
            raise BadDataError(
                f"sample {self.samples[index].id}: it has {tokens} tokens, and the context of "
                f"{self.backend.file.path.name} is {self._window}",
                "lower the task's max_tokens"
                if self.cell.kind == "perplexity"
                else "shorten that sample, or leave it out",
            )

    # answers

    def _prepare_answers(self) -> list[int]:
        decoding = self.cell.decoding or Decoding("greedy")
        self._ids = [self._encode(prompt) for prompt in self.prompts]
        for index, ids in enumerate(self._ids):
            self._fits(index, len(ids) + 1, 2)
        settings = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=self.backend.ends()))
        self._stops = find_stops(
            self.backend.tokenizer, settings, self._template.stop if self._template else ()
        )
        self._most = [min(decoding.max_new_tokens, self._window - len(ids)) for ids in self._ids]
        return [len(ids) + most for ids, most in zip(self._ids, self._most, strict=True)]

    def _answers(self, batch: Sequence[int]) -> list[Row]:
        """generate.generate, with llama.cpp in place of the model's forward pass."""
        decoding, tokenizer = self.cell.decoding or Decoding("greedy"), self.backend.tokenizer
        needs = [sum(len(self._ids[i]) + self._most[i] for i in batch) for batch in self.batches]
        memory = self.backend.room(max(len(batch) for batch in self.batches), _padded(max(needs)))
        streams = [stream(self.cell.seed or 0, self.samples[i].id) for i in batch]
        new: list[list[int]] = [[] for _ in batch]
        finish = ["length"] * len(batch)
        alive = list(range(len(batch)))
        pieces = [
            Piece((n,), 0, self._ids[i], frozenset({len(self._ids[i]) - 1})) for n, i in enumerate(batch)
        ]
        while alive:
            logits = torch.empty(len(pieces), self.backend.model.vocabulary)
            for row, _, found in memory.read(pieces):
                logits[row] = torch.from_numpy(found)
            tokens = pick(logits, decoding, [streams[n] for n in alive])
            pieces, still = [], []
            for n, token in zip(alive, tokens, strict=True):
                index = batch[n]
                if token in self._stops.ids:
                    finish[n] = "stop"
                else:
                    new[n].append(token)
                    if self._stops.strings and ended(tokenizer, new[n], self._stops):
                        finish[n] = "stop"
                    elif len(new[n]) < self._most[index]:
                        place = len(self._ids[index]) + len(new[n]) - 1
                        pieces.append(Piece((n,), place, [token], frozenset({0})))
                        still.append(n)
                        continue
                memory.forget(n)
            alive = still
        return [
            answer_row(
                self.cell, self.samples[i], self.prompts[i], answer_text(tokenizer, new[n], self._stops), finish[n],
                len(self._ids[i]), len(new[n]),
            )
            for n, i in enumerate(batch)
        ]  # fmt: skip

    # likelihoods: what is scored of a sample is one or several (context, continuations)

    def _prepare_references(self) -> list[int]:
        self._scored = [
            [(self._encode(prompt), [self._encode(sample.reference)])]
            for prompt, sample in zip(self.prompts, self.samples, strict=True)
        ]
        return self._lengths()

    def _prepare_choice(self) -> list[int]:
        self._scored = []
        for prompt, sample in zip(self.prompts, self.samples, strict=True):
            groups: list[tuple[list[int], list[list[int]]]] = []
            for text in choice.continuations(sample, self.cell.task.scoring):
                context, answer = choice.encode_pair(self.backend.tokenizer, prompt, text)
                if not groups or groups[-1][0] != context:  # a tokenizer that merges over the border
                    groups.append((context, []))
                groups[-1][1].append(answer)
            self._scored.append(list(groups))
        return self._lengths()

    def _prepare_text(self) -> list[int]:
        """The first token of a passage has nothing before it and is not scored."""
        most = self.cell.task.max_tokens
        whole = [self.backend.tokenizer(text)["input_ids"] for text in self.prompts]
        self._cut = [len(ids) > most for ids in whole]
        ids = [ids[:most] for ids in whole]
        self._scored = [[(tokens[:1], [tokens[1:]])] if tokens[1:] else [] for tokens in ids]
        return self._lengths()

    def _lengths(self) -> list[int]:
        for index, groups in enumerate(self._scored):
            for context, answers in groups:
                self._fits(index, max(len(context) + len(answer) for answer in answers))
        return [sum(tokens_of(group) for group in groups) for groups in self._scored]

    def _scores(self, batch: Sequence[int]) -> list[Row]:
        groups = [(i, group) for i in batch for group in self._scored[i]]
        found: dict[int, list[list[float]]] = {i: [] for i in batch}
        for part in parts_of(groups):
            memory = self.backend.room(*self._sizes)
            for (i, _), logprobs in zip(part, logprobs_of(memory, [group for _, group in part]), strict=True):
                found[i] += logprobs
        return [self._score_row(i, found[i]) for i in batch]

    def _score_row(self, index: int, found: list[list[float]]) -> Row:
        sample = self.samples[index]
        for logprobs in found:
            all_finite(self.cell, sample, logprobs)
        if self.cell.kind == "multiple_choice":
            return choice_row(self.cell, sample, [sum(logprobs) for logprobs in found])
        if self.cell.kind == "references":
            return reference_row(sample, found[0])
        return text_row(found[0] if found else [], self._cut[index])

    def _room_for_scores(self) -> tuple[int, int]:
        """(sequences, tokens) that hold any part of any batch."""
        parts = [
            part
            for batch in self.batches
            for part in parts_of([(i, group) for i in batch for group in self._scored[i]])
        ]
        count = max((sum(len(group[1]) for _, group in part) for part in parts), default=1)
        return count, _padded(max((sum(tokens_of(group) for _, group in part) for part in parts), default=1))


def _padded(tokens: int) -> int:
    return -(-tokens // 256) * 256
