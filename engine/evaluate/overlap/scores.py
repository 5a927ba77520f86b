"""The overlap metrics: sacreBLEU and chrF, ROUGE, and what LLaMA-Factory prints. Called by engine/evaluate/metrics.py.

A family of metrics is made once for n outputs and n references, and then measures the outputs against the
references in any order. Values are those of the tools themselves (the tests compare); only the counting is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from engine.evaluate.overlap.grams import Grams, IntArray, Subsequences, Tokens
from engine.evaluate.overlap.words import bleu_words, is_cjk, lf_words, rouge_words
from engine.evaluate.statistics import Combine, FloatArray, ratio

CHRF_ORDERS = 6
CHRF_BETA = 2


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


class Bleu:
    """Corpus BLEU-4 as sacreBLEU computes it (Papineni et al., ACL 2002; Post, WMT 2018)."""

    def __init__(self, outputs: Sequence[str], references: Sequence[str]) -> None:
        self._tokenizer = "zh" if is_cjk(references) else "13a"
        tokens = Tokens.of_words([bleu_words(text, self._tokenizer) for text in [*outputs, *references]])
        self._lengths = tokens.lengths.reshape(2, -1).astype(np.float64)
        self._grams = Grams(tokens, 4)

    def measure(self, order: IntArray) -> list[Measured]:
        """stats: matched 1- to 4-grams, n-grams of the output, words of the output, words of the reference."""
        of_output, of_reference = self._lengths
        lengths = np.stack([of_output, of_reference[order]], axis=1)
        stats = np.concatenate([self._grams.matched(order), self._grams.outputs, lengths], axis=1)
        signature = (
            f"nrefs:1|case:mixed|eff:no|tok:{self._tokenizer}|smooth:exp|version:{version('sacrebleu')}"
        )
        return [Measured("bleu", stats, corpus_bleu, f"sacreBLEU {signature}")]


def corpus_bleu(sums: FloatArray) -> FloatArray:
    """BP * exp(mean of ln p_n), times 100; the k-th p_n without a match becomes 1 / (2^k * n-grams)."""
    matched, total, outputs, references = sums[:, :4], sums[:, 4:8], sums[:, 8], sums[:, 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        halves = 0.5 ** np.cumsum(matched == 0, axis=1)
        logs = np.log(np.where(matched == 0, halves, matched) / total)
        penalty = np.where(outputs < references, np.exp(1 - references / outputs), 1.0)
        values = 100 * penalty * np.exp(logs.mean(axis=1))
    return np.where((matched > 0).any(axis=1) & (total > 0).all(axis=1), values, 0.0)


class Chrf:
    """Corpus chrF2 as sacreBLEU computes it: F of character 1- to 6-grams, recall weighing four times as much
    as precision (Popović, WMT 2015)."""

    def __init__(self, outputs: Sequence[str], references: Sequence[str]) -> None:
        texts = ["".join(text.split()) for text in [*outputs, *references]]
        self._grams = Grams(Tokens.of_characters(texts), CHRF_ORDERS)

    def measure(self, order: IntArray) -> list[Measured]:
        """stats: n-grams of the output (of the orders its reference has), of the reference, and matched."""
        references = self._grams.references[order]
        outputs = np.where(references > 0, self._grams.outputs, 0.0)
        stats = np.concatenate([outputs, references, self._grams.matched(order)], axis=1)
        signature = f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version('sacrebleu')}"
        return [Measured("chrf", stats, corpus_chrf, f"sacreBLEU chrF2 {signature}")]


def corpus_chrf(sums: FloatArray) -> FloatArray:
    """F_2 of mean precision and mean recall over the orders that both sides have, times 100."""
    outputs, references, matched = np.split(sums, 3, axis=1)
    both = (outputs > 0) & (references > 0)
    orders = np.maximum(both.sum(axis=1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(both, matched / outputs, 0.0).sum(axis=1) / orders
        recall = np.where(both, matched / references, 0.0).sum(axis=1) / orders
        weight = CHRF_BETA**2
        values = 100 * (1 + weight) * precision * recall / (weight * precision + recall)
    return np.where(precision + recall > 0, values, 0.0)


class Rouge:
    """Mean F of ROUGE-1, -2 and -L as rouge-score computes them, without stemming (Lin, 2004)."""

    def __init__(self, outputs: Sequence[str], references: Sequence[str]) -> None:
        cjk = is_cjk(references)
        self._detail = (
            f"rouge-score, {'Unicode words, CJK by character' if cjk else 'a-z0-9 words'}, no stemming"
        )
        self._pairs = _WordPairs(
            [rouge_words(text, cjk) for text in outputs], [rouge_words(text, cjk) for text in references]
        )

    def measure(self, order: IntArray) -> list[Measured]:
        scores = self._pairs.f_measures(order, guard=0.0)
        return [_mean(name, 100 * f, self._detail) for name, f in zip(_ROUGE, scores, strict=True)]


_ROUGE = ("rouge1", "rouge2", "rougeL")


class LlamaFactory:
    """The four numbers LLaMA-Factory prints after predicting (its train/sft/metric.py), for comparison with tables
    made that way. (It rounds each row to 4 decimals before the mean.)"""

    def __init__(self, outputs: Sequence[str], references: Sequence[str]) -> None:
        tokens = Tokens.of_characters([*outputs, *references])
        self._lengths = tokens.lengths.reshape(2, -1).astype(np.float64)
        self._characters = Grams(tokens, 4)
        self._pairs = _WordPairs(
            [lf_words(text) for text in outputs], [lf_words(text) for text in references], once=True
        )

    def measure(self, order: IntArray) -> list[Measured]:
        outputs, references = self._lengths
        bleu = character_bleu(self._characters.matched(order), outputs, references[order])
        detail = "LLaMA-Factory's BLEU-4: characters, nltk method3, mean of sentences"
        found = [_mean("lf_char_bleu", 100 * bleu, detail)]
        scores = self._pairs.f_measures(order, guard=1e-8)  # rouge_chinese divides by p + r + 1e-8
        detail = f"LLaMA-Factory's ROUGE: jieba {version('jieba')} words, rouge_chinese, each n-gram once"
        return found + [_mean(f"lf_{name}", 100 * f, detail) for name, f in zip(_ROUGE, scores, strict=True)]


def character_bleu(matched: FloatArray, outputs: FloatArray, references: FloatArray) -> FloatArray:
    """Sentence BLEU-4 over characters, 0 to 1; matched (n, 4), outputs and references (n,) lengths.

    nltk's sentence_bleu([list(reference)], list(output), smoothing_function=method3): precisions p1..p4 with
    denominators of at least 1; 0 when no character matches; the k-th precision that is 0 becomes
    1 / (2^k * denominator); times the brevity penalty exp(1 - |reference| / |output|) for shorter outputs.
    An unrelated English answer gets about 0.2 here, because English shares its letters.
    """
    total = np.maximum(outputs[:, None] - np.arange(4), 1.0)
    halves = 0.5 ** np.cumsum(matched == 0, axis=1)
    precision = np.where(matched == 0, halves, matched) / total
    with np.errstate(divide="ignore", over="ignore"):
        penalty = np.where(outputs > references, 1.0, np.exp(1 - references / outputs))
    return np.where(matched[:, 0] > 0, penalty * np.exp(np.log(precision).mean(axis=1)), 0.0)


class _WordPairs:
    """1-grams, 2-grams and subsequences of outputs and references, as ROUGE needs them."""

    def __init__(
        self, outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]], once: bool = False
    ) -> None:
        tokens = Tokens.of_words([*outputs, *references])
        self._lengths = tokens.lengths.reshape(2, -1).astype(np.float64)
        self._grams = Grams(tokens, 2, once)
        self._subsequences = Subsequences(outputs, references)

    def f_measures(self, order: IntArray, guard: float) -> list[FloatArray]:
        """Three times (n,): F of 1-grams, of 2-grams and of the longest common subsequence."""
        outputs, references = self._lengths
        matched, of_output = self._grams.matched(order), self._grams.outputs
        of_reference = self._grams.references[order]
        longest = self._subsequences.lengths(order)
        return [
            *(_f_measure(matched[:, k], of_output[:, k], of_reference[:, k], guard) for k in range(2)),
            _f_measure(longest, outputs, references[order], guard),
        ]


def _f_measure(matched: FloatArray, outputs: FloatArray, references: FloatArray, guard: float) -> FloatArray:
    """2 p r / (p + r + guard), p = matched / outputs, r = matched / references; 0 where nothing matches."""
    precision, recall = matched / np.maximum(outputs, 1), matched / np.maximum(references, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(matched > 0, 2 * precision * recall / (precision + recall + guard), 0.0)


def _mean(name: str, values: FloatArray, detail: str) -> Measured:
    return Measured(name, np.stack([values, np.ones(len(values))], axis=1), ratio, detail)
