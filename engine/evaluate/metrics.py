"""Overlap of generated text with references: sacreBLEU, ROUGE, LLaMA-Factory's character BLEU, and floors.

Each metric is a matrix of per-sample statistics and a function of their sums, so that values, bootstrap
intervals and paired tests all come from the same numbers. The floor of a metric is its value when every
answer is scored against another sample's reference: what an answer unrelated to its question gets.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from engine.evaluate.statistics import Combine, FloatArray, ratio

OVERLAP = ("bleu", "rouge1", "rouge2", "rougeL", "lf_char_bleu")
SHUFFLES = 5
SHUFFLE_SEED = 7
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+")


@dataclass(frozen=True)
class Measured:
    """A metric on n samples. stats (n, k) float64; combine maps summed stats to the value (0 to 100)."""

    name: str
    stats: FloatArray
    combine: Combine
    detail: str  # signature, tokenizer: what one must know to compare it elsewhere

    @property
    def value(self) -> float:
        return float(self.combine(self.stats.sum(0, keepdims=True))[0])


def overlap(outputs: Sequence[str], references: Sequence[str]) -> list[Measured]:
    """All overlap metrics of outputs (n texts) against one reference each, in the order of OVERLAP."""
    return [*_sacrebleu(outputs, references), *_rouge(outputs, references), *_lf(outputs, references)]


def floors(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of each metric over SHUFFLES fixed derangements of the references ({} with one sample)."""
    if len(references) < 2:
        return {}
    sums: dict[str, float] = {}
    for order in derangements(len(references)):
        for measured in overlap(outputs, [references[i] for i in order]):
            sums[measured.name] = sums.get(measured.name, 0.0) + measured.value
    return {name: value / SHUFFLES for name, value in sums.items()}


def derangements(n: int, count: int = SHUFFLES, seed: int = SHUFFLE_SEED) -> list[list[int]]:
    """`count` permutations of range(n) without a fixed point, the same ones every time (n >= 2).

    A random cyclic order, each item mapped to the next (Sattolo's permutations: one cycle, so no fixed point).
    """
    found = []
    for number in range(count):
        cycle = np.random.default_rng([seed, n, number]).permutation(n)
        order = np.empty(n, dtype=int)
        order[cycle] = np.roll(cycle, -1)
        found.append([int(i) for i in order])
    return found


def is_cjk(texts: Sequence[str]) -> bool:
    """Whether over a fifth of the letters are Chinese, Japanese or Korean: words are then not space-separated."""
    joined = "".join(texts)
    letters = sum(char.isalpha() for char in joined)
    return letters > 0 and len(_CJK.findall(joined)) > 0.2 * letters


@cache
def _bleu(tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # effective_order only silences the warning of sentence_score; the counts it returns do not depend on it.
    return BLEU(tokenize=tokenizer, effective_order=True)


def _sacrebleu(outputs: Sequence[str], references: Sequence[str]) -> list[Measured]:
    """Corpus BLEU-4 from per-sample n-gram counts: correct 1-4, total 1-4, output and reference length."""
    from sacrebleu.metrics.bleu import BLEU

    tokenizer = "zh" if is_cjk(references) else "13a"
    scorer = _bleu(tokenizer)
    rows = []
    for output, reference in zip(outputs, references, strict=True):
        score = scorer.sentence_score(output, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])

    def combine(sums: FloatArray) -> FloatArray:
        scores = [
            BLEU.compute_bleu(
                correct=[int(x) for x in row[:4]],
                total=[int(x) for x in row[4:8]],
                sys_len=int(row[8]),
                ref_len=int(row[9]),
                smooth_method="exp",
                effective_order=False,
            ).score
            for row in sums
        ]
        return np.array(scores, dtype=np.float64)

    import sacrebleu

    signature = (
        f"sacreBLEU nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:{sacrebleu.__version__}"
    )
    return [Measured("bleu", np.array(rows, dtype=np.float64).reshape(-1, 10), combine, signature)]


class UnicodeTokenizer:
    """For rouge-score, whose own tokenizer drops everything but a-z and 0-9: lower-case words of any script,
    and each Chinese, Japanese or Korean character as a word."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _rouge(outputs: Sequence[str], references: Sequence[str]) -> list[Measured]:
    """Mean F-measure of ROUGE-1, -2, -L, times 100 (rouge-score, no stemming)."""
    cjk = is_cjk(references)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = _rouge_scorer(cjk)
    scores = [scorer.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
    detail = f"rouge-score, {'Unicode words, CJK by character' if cjk else 'a-z0-9 words'}, no stemming"
    return [_mean(name, [100 * score[name].fmeasure for score in scores], detail) for name in names]


@cache
def _rouge_scorer(cjk: bool) -> Any:
    from rouge_score import rouge_scorer

    tokenizer = UnicodeTokenizer() if cjk else None
    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False, tokenizer=tokenizer)


def _lf(outputs: Sequence[str], references: Sequence[str]) -> list[Measured]:
    values = [
        100 * char_bleu(reference, output) for output, reference in zip(outputs, references, strict=True)
    ]
    return [
        _mean("lf_char_bleu", values, "LLaMA-Factory's BLEU-4: characters, nltk method3, mean of sentences")
    ]


def _mean(name: str, values: Sequence[float], detail: str) -> Measured:
    stats = np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return Measured(name, stats, ratio, detail)


def char_bleu(reference: str, output: str) -> float:
    """BLEU-4 over characters as LLaMA-Factory reports it, 0 to 1.

    nltk's sentence_bleu([list(reference)], list(output), smoothing_function=method3): precisions p1..p4 with
    denominators of at least 1; 0 when no character matches; the k-th precision that is 0 becomes
    1 / (2^k * denominator); times the brevity penalty exp(1 - |reference| / |output|) for shorter outputs.
    An unrelated English answer gets about 0.2 here, because English shares its letters.
    """
    precisions, zeros = [], 0
    for order in range(1, 5):
        hypothesis, known = _grams(output, order), _grams(reference, order)
        matched = sum(min(count, known[gram]) for gram, count in hypothesis.items())
        total = max(1, sum(hypothesis.values()))
        if order == 1 and matched == 0:
            return 0.0
        if matched == 0:
            zeros += 1
            precisions.append(1 / (2**zeros * total))
        else:
            precisions.append(matched / total)
    penalty = 1.0 if len(output) > len(reference) else math.exp(1 - len(reference) / len(output))
    return penalty * math.exp(math.fsum(0.25 * math.log(p) for p in precisions))


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
