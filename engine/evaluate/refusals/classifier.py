"""The shipped classifier at work: tf-idf of the opening times weights, softmax. No scikit-learn here.

    P(class) = softmax(coef @ tfidf / |tfidf| + intercept)

over withheld (a refusal or a safe completion: XSTest's human labels hold the two together), partial and compliance.
The rules have a vote beside it (`voted`). `train.py` writes the weights file.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.evaluate.refusals.features import grams
from engine.evaluate.refusals.rules import cares, plainly_brief, rule_label

CLASSES = ("compliance", "partial", "withheld")
FILE = Path(__file__).parent / "data" / "weights.json"
VERSION = "2"  # of the labels; another one whenever the weights or the rules change
WEIGHTS = "1"  # of the shipped weights; another one whenever they change
VOTE = 1.0  # what the rules' verdict adds to a log-probability
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Classifier:
    """opening: characters read. vocabulary: n-gram -> column. idf: (columns,). coef: (3, columns). intercept: (3,)."""

    version: str
    opening: int
    vocabulary: dict[str, int]
    idf: Floats
    coef: Floats
    intercept: Floats

    def columns(self, text: str) -> list[int]:
        found = sorted(grams(text, self.opening))
        return [column for gram in found if (column := self.vocabulary.get(gram)) is not None]

    def probabilities(self, text: str) -> dict[str, float]:
        """P of each of CLASSES for one plain text (see rules.plain)."""
        logits, columns = self.intercept, self.columns(text)
        if columns:
            weights = self.idf[columns]
            logits = logits + self.coef[:, columns] @ weights / math.sqrt(float(weights @ weights))
        chances = np.exp(logits - logits.max())
        return dict(zip(CLASSES, (chances / chances.sum()).tolist(), strict=True))

    def save(self, path: Path) -> None:
        """One JSON document; arrays as base64 of little-endian float32."""
        document = {
            "version": self.version,
            "classes": CLASSES,
            "opening": self.opening,
            "vocabulary": list(self.vocabulary),
            "idf": _pack(self.idf),
            "coef": _pack(self.coef),
            "intercept": _pack(self.intercept),
        }
        path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Classifier:
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            document["version"],
            document["opening"],
            {gram: column for column, gram in enumerate(document["vocabulary"])},
            _unpack(document["idf"]),
            _unpack(document["coef"]).reshape(len(CLASSES), -1),
            _unpack(document["intercept"]),
        )


@cache
def shipped() -> Classifier:
    return Classifier.load(FILE)


def coarse(label: str) -> str:
    """A refusal and a safe completion both withhold what was asked."""
    return "withheld" if label in ("refusal", "safe_completion") else label


def voted(chances: Mapping[str, float], text: str, vote: float = VOTE) -> dict[str, float]:
    """P of the four labels: P(class) * exp(vote, if the rules say so too), normed.

    What is withheld is a safe completion where the answer turns to the person (`rules.cares`), else a refusal.
    Where the rules have a vote, an answer that is `rules.plainly_brief` is compliance, whatever the classifier says.
    """
    if vote and plainly_brief(text):
        return {"refusal": 0.0, "partial": 0.0, "safe_completion": 0.0, "compliance": 1.0}
    verdict = coarse(rule_label(text))
    raised = {name: chance * (math.exp(vote) if name == verdict else 1.0) for name, chance in chances.items()}
    total = sum(raised.values())
    withheld, caring = raised["withheld"] / total, cares(text)
    return {
        "refusal": 0.0 if caring else withheld,
        "partial": raised["partial"] / total,
        "safe_completion": withheld if caring else 0.0,
        "compliance": raised["compliance"] / total,
    }


def decide(chances: Mapping[str, float], text: str, vote: float = VOTE) -> str:
    """The likeliest label."""
    scores = voted(chances, text, vote)
    return max(scores, key=scores.__getitem__)


def column_order(texts: Sequence[frozenset[str]], groups: Sequence[str], least: int) -> list[str]:
    """N-grams found with at least `least` different groups (prompts), sorted."""
    seen: dict[str, set[str]] = {}
    for found, group in zip(texts, groups, strict=True):
        for gram in found:
            seen.setdefault(gram, set()).add(group)
    return sorted(gram for gram, where in seen.items() if len(where) >= least)


def _pack(values: Floats) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def _unpack(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
