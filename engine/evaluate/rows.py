"""What was measured on one sample, as the row that is stored. Every backend makes its rows here.

A row keeps what the model gave and what is needed to score it again; labels and scores that tables show are
computed anew from it (`chosen`, `text` and `think` are there for reading by eye).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from engine.errors import NotFiniteError
from engine.evaluate import choice
from engine.evaluate.cells import Cell
from engine.evaluate.data import Sample
from engine.evaluate.letters import parse_letter
from engine.evaluate.think import ends_open, split_think

Row = dict[str, Any]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def finished(sample: Sample, prompt: str, row: Row) -> Row:
    """The row with the sample's id and the hash of the prompt as sent."""
    return {"id": sample.id, "prompt_sha256": sha256(prompt), **row}


def not_finite(cell: Cell, sample: str) -> NotFiniteError:
    """The error of a model whose logits are NaN or infinite: argmax would choose token 0, and look like an answer."""
    return NotFiniteError(
        f"{cell.spec['base']['name']}, {cell.title}, sample {sample}: the model gives values that are not numbers",
        "are its weights too large for float16, or damaged? try dtype: bfloat16 or float32, or smaller weights",
    )


def all_finite(cell: Cell, sample: Sample, logprobs: Sequence[float]) -> Sequence[float]:
    """The log-likelihoods as they are. Raises NotFiniteError naming model, mixture and sample."""
    if not all(math.isfinite(value) for value in logprobs):
        raise not_finite(cell, sample.id)
    return logprobs


def answer_row(
    cell: Cell, sample: Sample, prompt: str, raw: str, finish: str, prompt_tokens: int, new_tokens: int
) -> Row:
    """A generated answer. raw: without its stop mark; finish: `stop` or `length`; tokens: -1 where unknown."""
    opened = ends_open(prompt)
    thought = split_think(raw, opened=opened)
    row: Row = {
        "raw": raw, "text": thought.answer, "think": thought.kind, "opened": opened, "finish": finish,
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
    }  # fmt: skip
    if cell.kind == "probes":
        row |= {"category": sample.category, "probe": sample.probe}
    elif cell.kind == "instructions":
        row |= {"instructions": json.dumps(sample.instructions, ensure_ascii=False), "asked": sample.prompt}
    elif cell.kind == "generated_choice":
        chosen = parse_letter(thought.answer, sample.options, cell.task.language)
        row |= {"options": list(sample.options), "answer": sample.answer, "chosen": chosen}
    else:
        row["reference"] = sample.reference
    return row


def reference_row(sample: Sample, logprobs: Sequence[float]) -> Row:
    """The log-likelihood (nats) of the reference answer's tokens."""
    return {"logprob": sum(logprobs), "tokens": len(logprobs), "reference": sample.reference}


def text_row(logprobs: Sequence[float], cut: bool) -> Row:
    """The log-likelihood (nats) of held-out text; cut: it was longer than the task's max_tokens."""
    return {"logprob": sum(logprobs), "tokens": len(logprobs), "cut": cut}


def choice_row(cell: Cell, sample: Sample, logprobs: Sequence[float]) -> Row:
    """Summed log-likelihood (nats) of every option; `chosen_norm` is per character, as the harness' acc_norm."""
    by_length = [x / max(1, len(o)) for x, o in zip(logprobs, sample.options, strict=True)]
    return {
        "scoring": cell.task.scoring,
        "options": list(sample.options),
        "answer": sample.answer,
        "logprobs": list(logprobs),
        "chosen": choice.best(logprobs),
        "chosen_norm": choice.best(by_length),
    }
