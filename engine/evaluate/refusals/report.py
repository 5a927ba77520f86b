"""The tables of docs/refusals.md, measured anew: each model left out, each model and kind of prompt, crisis answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from engine.evaluate.refusals.classifier import CLASSES, VOTE, Classifier, coarse, decide
from engine.evaluate.refusals.rules import rule_label
from engine.evaluate.refusals.train import (
    MODELS,
    Row,
    Settings,
    accuracy,
    choose,
    fit,
    macro_f1,
    prefix_label,
)
from engine.evaluate.statistics import clopper_pearson

FINAL = "rules and classifier"
ALL = ("compliance", "partial", "refusal", "safe_completion")
Judge = Callable[[str], str]


def write_report(
    parts: Sequence[Sequence[Row]],
    crisis: Sequence[Row],
    held_out: Sequence[Row],
    shipped: Classifier,
    chosen: Settings,
) -> str:
    """Markdown. `chosen` are the settings of the shipped weights."""
    lines = ["### One model left out", "", _HEAD, _RULE]
    matrices = ["### Confusion, rules and classifier", ""]
    votes: dict[float, list[str]] = {vote: [] for vote in (0.0, VOTE, 2 * VOTE)}
    settings = []
    for number, (model, part) in enumerate(zip(MODELS, parts, strict=True)):
        others = [rows for other, rows in enumerate(parts) if other != number]
        best = choose(others, crisis)
        settings.append(best)
        classifier, _ = fit([*itertools.chain(*others), *crisis], best)
        lines += [_row(model, name, judge, part) for name, judge in judges(classifier).items()]
        matrices += [
            f"{model}:",
            "",
            *matrix_of(part, judges(classifier)[FINAL], CLASSES),
            "",
        ]
        for vote, cells in votes.items():
            cells.append(
                _share(
                    [coarse(decide(classifier.probabilities(row.text), row.text, vote)) for row in part], part
                )
            )
    lines += [
        "",
        "Settings chosen: " + "; ".join(f"{m} {s}" for m, s in zip(MODELS, settings, strict=True)) + ".",
    ]
    lines += ["", *matrices, "### The vote", "", "| vote | " + " | ".join(MODELS) + " |", "|---|---|---|---|"]
    lines += [f"| {vote:g} | {' | '.join(cells)} |" for vote, cells in votes.items()]
    lines += ["", "### One model and one kind of prompt left out", "", _HEAD, _RULE]
    for number, (model, part) in enumerate(zip(MODELS, parts, strict=True)):
        lines += _harder(
            model,
            part,
            [rows for other, rows in enumerate(parts) if other != number],
            crisis,
            settings[number],
        )
    lines += [
        "",
        "### Crisis answers, the held-out half",
        "",
        "| answers | method | accuracy | macro F1 |",
        "|---|---|---|---|",
    ]
    for name, rows in _crisis_parts(held_out):
        true = [row.label for row in rows]
        for method, judge in judges(shipped, fine=True).items():
            said = [judge(row.text) for row in rows]
            share = _interval(sum(a == b for a, b in zip(said, true, strict=True)), len(rows))
            lines.append(
                f"| {name} | {method} | {share} | {macro_f1(said, true, sorted({*said, *true})):.3f} |"
            )
    lines += [
        "",
        *matrix_of(held_out, lambda text: decide(shipped.probabilities(text), text), ALL, fine=True),
        "",
    ]
    return "\n".join([*lines, f"Shipped: {chosen}, {len(shipped.idf)} n-grams.", ""])


_HEAD = "| left out | method | refused or not | three labels | macro F1 |"
_RULE = "|---|---|---|---|---|"


def judges(classifier: Classifier, fine: bool = False) -> dict[str, Judge]:
    """The methods compared; labels of XSTest's three, or (fine) of four."""
    same: Callable[[str], str] = (lambda label: label) if fine else coarse
    return {
        "prefix list": lambda text: same(prefix_label(text)),
        "rules": lambda text: same(rule_label(text)),
        "classifier": lambda text: same(decide(classifier.probabilities(text), text, 0.0)),
        FINAL: lambda text: same(decide(classifier.probabilities(text), text)),
    }


def matrix_of(rows: Sequence[Row], judge: Judge, labels: Sequence[str], fine: bool = False) -> list[str]:
    """A confusion matrix in Markdown: true labels down, given ones across."""
    counts = Counter(((row.label if fine else coarse(row.label)), judge(row.text)) for row in rows)
    head = ["| human \\ given | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    return head + [
        f"| {true} | " + " | ".join(str(counts[true, said]) for said in labels) + " |" for true in labels
    ]


def _harder(
    model: str,
    part: Sequence[Row],
    others: Sequence[Sequence[Row]],
    crisis: Sequence[Row],
    settings: Settings,
) -> list[str]:
    """Neither the model nor the kind of prompt has been seen; the folds' answers are counted together."""
    said: dict[str, list[str]] = {}
    rows: list[Row] = []
    for kind in sorted({row.kind for row in part}):
        seen = [row for row in itertools.chain(*others) if row.kind != kind]
        classifier, _ = fit([*seen, *crisis], settings)
        unseen = [row for row in part if row.kind == kind]
        rows += unseen
        for name, judge in judges(classifier).items():
            said.setdefault(name, []).extend(judge(row.text) for row in unseen)
    return [_line(model, name, given, rows) for name, given in said.items() if "classifier" in name]


def _row(model: str, name: str, judge: Judge, rows: Sequence[Row]) -> str:
    return _line(model, name, [judge(row.text) for row in rows], rows)


def _line(model: str, name: str, said: Sequence[str], rows: Sequence[Row]) -> str:
    true = [coarse(row.label) for row in rows]
    right = sum((a == "compliance") == (b == "compliance") for a, b in zip(said, true, strict=True))
    exact = sum(a == b for a, b in zip(said, true, strict=True))
    n = len(rows)
    return f"| {model} | {name} | {_interval(right, n)} | {_interval(exact, n)} | {macro_f1(said, true, CLASSES):.3f} |"


def _share(said: Sequence[str], rows: Sequence[Row]) -> str:
    true = [coarse(row.label) for row in rows]
    right = sum((a == "compliance") == (b == "compliance") for a, b in zip(said, true, strict=True))
    return f"{right / len(rows):.3f} / {accuracy(said, true):.3f}"


def _interval(hits: int, n: int) -> str:
    low, high = clopper_pearson(hits, n)
    return f"{hits / n:.3f} [{low:.3f}, {high:.3f}]"


def _crisis_parts(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    kinds = ("written", "generated")
    return [("all", list(rows)), *((kind, [row for row in rows if row.kind == kind]) for kind in kinds)]
