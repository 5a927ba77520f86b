"""Is a finished GGUF the model it was made from? Token ids, next-token probabilities and greedy text.

`compare_tokens` runs after every conversion (0.1 s). `compare_with_checkpoint` runs the checkpoint in
transformers beside the GGUF in llama.cpp; it needs the memory for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BadModelError

# What separates pre-tokenizers: digits in words and after spaces and newlines, contractions in both cases,
# runs of spaces, tabs, newlines before text, accents, Chinese, emoji, code, punctuation. All NFC: llama.cpp
# does not normalise.
PROBES = (
    "The patient took 500 mg of paracetamol every 6 hours, 2024-01-31.",
    "Dose:\n\n1. 12.5mg\n 2) 1,250 IU\n\n\n   100000 units  3",
    "I'm sure they'LL say we've DON'T 'tis it's",
    "  leading and   inner    spaces\t\ttabs \n \n\t mixed\r\n",
    "β-blocker naïve façade ΔT≥2°C µg/mL Müller",
    "患者服用阿司匹林100毫克,每天3次。血压140/90。",
    "lésion ñandú день здоровья مرحبا नमस्ते 🙂👩‍⚕️ ✓",
    "def f(x):\n    return {'a': [x**2, 3.14e-5]}  # ok!?...",
    "user_name@example.com https://example.org/a?b=c&d=%20 C++/C#",
)
PROMPTS = (
    "What is aspirin used for?",
    "The most common symptom of asthma is",
    "List three side effects of metformin:\n1.",
    "Diabetes is a disease in which",
)


def compare_tokens(file: Path, folder: Path) -> None:
    """Compare token ids of the GGUF in llama.cpp with the checkpoint's tokenizer.json on PROBES.

    Raises BadModelError, with the text, when ids differ: the model would read other tokens than it was trained on.
    """
    import tokenizers

    from engine.chat.runtime import Model

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with Model(file, gpu_layers=0, vocab_only=True) as model:
        for text in PROBES:
            ours = model.tokenize(text)
            right = list(tokenizer.encode(text, add_special_tokens=False).ids)
            if ours != right:
                at = next(
                    (i for i, pair in enumerate(zip(ours, right, strict=False)) if pair[0] != pair[1]),
                    min(len(ours), len(right)),
                )
                raise BadModelError(
                    f"the GGUF's tokenizer ({model.metadata('tokenizer.ggml.pre') or 'no pre-tokenizer'}) does not "
                    f"read text as {folder / 'tokenizer.json'} does: {text!r} differs at token {at} "
                    f"({ours[at : at + 4]} instead of {right[at : at + 4]})",
                    "nothing was kept; name the right pre-tokenizer with --pre",
                )


@dataclass(frozen=True)
class Agreement:
    """How a GGUF compares with its checkpoint: greedy texts equal, and the largest difference of log p.

    `largest` is over the `likeliest` most probable tokens (by the checkpoint) after every prompt prefix;
    `mean` the mean absolute difference over the same. `texts` pairs (checkpoint, GGUF) by prompt.
    """

    equal: int
    prompts: int
    largest: float
    mean: float
    likeliest: int
    texts: tuple[tuple[str, str], ...]


def compare_with_checkpoint(
    file: Path, folder: Path, prompts: Sequence[str] = PROMPTS, new_tokens: int = 24, likeliest: int = 50
) -> Agreement:
    """Greedy text and next-token log-probabilities of a GGUF against its checkpoint in transformers (float32)."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine.chat.runtime import Model

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    texts, largest, total, count = [], 0.0, 0.0, 0
    with Model(file, gpu_layers=0) as model, model.context(size=1024) as context:
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = reference(torch.tensor([ids])).logits[0].double()
                generated = reference.generate(
                    torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
                )[0, len(ids) :].tolist()
            right = torch.log_softmax(logits, -1).numpy()
            ours = context.log_probabilities(ids)
            top = np.argsort(-right, axis=1)[:, :likeliest]
            difference = np.abs(np.take_along_axis(right - ours, top, axis=1))
            largest = max(largest, float(difference.max()))
            total, count = total + float(difference.sum()), count + difference.size
            answer: list[int] = []
            while len(answer) < new_tokens and not (answer and model.ends(answer[-1])):
                answer.append(int(context.logits().argmax()))
                context.feed(answer[-1:])
            texts.append((tokenizer.decode(generated), tokenizer.decode(answer)))
    return Agreement(
        sum(a == b for a, b in texts), len(texts), largest, total / max(count, 1), likeliest, tuple(texts)
    )
