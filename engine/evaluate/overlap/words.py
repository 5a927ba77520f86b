"""Texts as words, one function for each of the tokenizers that overlap metrics are defined on.

Called by scores.py. Each function returns exactly the words its tool counts: sacreBLEU's 13a and zh, rouge-score's,
and what LLaMA-Factory hands to rouge_chinese.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+")

Words = Sequence[str]


def is_cjk(texts: Sequence[str]) -> bool:
    """Whether over a fifth of the letters are Chinese, Japanese or Korean: words are then not space-separated."""
    joined = "".join(texts)
    letters = sum(char.isalpha() for char in joined)
    return letters > 0 and len(_CJK.findall(joined)) > 0.2 * letters


@cache
def sacrebleu_tokenizer(name: str) -> Callable[[str], str]:
    """sacreBLEU's own: 13a, or zh (each Chinese character a word, the rest as 13a). From a line to a line."""
    from sacrebleu.metrics.bleu import BLEU

    tokenizer: Callable[[str], str] = BLEU(tokenize=name).tokenizer
    return tokenizer


def bleu_words(text: str, tokenizer: str) -> Words:
    return sacrebleu_tokenizer(tokenizer)(text.rstrip()).split()


def rouge_words(text: str, cjk: bool) -> Words:
    """rouge-score's words, runs of a-z and 0-9. It drops every other script, so for Chinese, Japanese and Korean:
    lower-case words of any script, and each CJK character a word."""
    if cjk:
        return _WORD.findall(text.lower())
    from rouge_score import tokenize

    words: list[str] = tokenize.tokenize(text, None)
    return words


@lru_cache(
    maxsize=8192
)  # references are the same for every mixture, and jieba needs milliseconds for a long one
def lf_words(text: str) -> Words:
    """The words LLaMA-Factory's ROUGE counts: jieba's, joined by blanks, cut again by rouge_chinese.

    rouge_chinese cuts at line ends and at sentence ends before it cuts at blanks, which makes an empty word of a line
    without words; it is counted there, and so here. A text without any words has none.
    """
    joined = " ".join(_jieba().cut(text))
    if not joined.split():
        return ()
    sentences = [sentence for sentence in _cut_sentences()(joined) if sentence]
    return tuple(sys.intern(word) for sentence in sentences for word in " ".join(sentence.split()).split(" "))


@cache
def _jieba() -> Any:
    """jieba with its own dictionary, read from the package.

    jieba's own way to start reports on stderr, and reads and writes a cache in the shared temporary folder, where
    another user may have put something else under that name. Reading the dictionary takes half a second and neither.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # on some versions of setuptools it imports the deprecated pkg_resources
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


@cache
def _cut_sentences() -> Callable[[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in its patterns
        from rouge_chinese import Rouge
    cut: Callable[[str], list[str]] = Rouge().cut_sent
    return cut
