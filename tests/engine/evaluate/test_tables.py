"""Tables from rows written by hand: think traces, several seeds, paired tests, what the reference is."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sacrebleu.metrics.bleu import BLEU

from engine.errors import BadInputError
from engine.evaluate.series import series_of
from engine.evaluate.statistics import clopper_pearson, mcnemar_exact
from engine.evaluate.summary import MetricRow, model_label, sweep_curve
from engine.evaluate.tables import Group, reference_of, to_rows

SFT, MIXED = {"pt": 0.0, "sft": 1.0}, {"pt": 0.3, "sft": 0.7}


def spec(kind, weights=SFT, task="t", decoding="greedy", **more):
    return {
        "kind": kind,
        "weights": weights,
        "template": "model",
        "task": {"name": task, **more},
        "decoding": {"name": decoding},
    }


def answers(texts, raws=None, seed=None):
    return pl.DataFrame(
        {
            "id": [f"s{n}" for n in range(len(texts))],
            "text": texts,
            "raw": raws or texts,
            "reference": [
                "aspirin reduces fever and pain",
                "insulin lowers the blood glucose",
                "gout hurts in the foot",
            ],
            "think": ["closed" if raw else "none" for raw in (raws or [""] * len(texts))],
            "finish": ["stop", "length", "stop"],
            "new_tokens": [4, 8, 6],
        }
    )


TEXTS = ["aspirin reduces fever and pain", "insulin lowers blood glucose", "gout hurts a lot in the foot"]


def by_metric(rows):
    return {row.metric: row for row in rows}


def test_think_stripped_and_raw_are_both_there():
    raws = [f"<think>let me see about it</think> {text}" for text in TEXTS]
    frame = answers(TEXTS, raws)
    rows = by_metric(to_rows("r", [(spec("generation"), series_of(spec("generation"), [frame]))]))
    references = frame["reference"].to_list()
    assert rows["bleu"].value == pytest.approx(BLEU().corpus_score(TEXTS, [references]).score)
    assert rows["bleu_raw"].value == pytest.approx(BLEU().corpus_score(raws, [references]).score)
    assert rows["bleu"].value > rows["bleu_raw"].value + 10
    assert rows["think_rate"].value == 100 and rows["length_stop_rate"].value == pytest.approx(100 / 3)
    assert rows["new_tokens"].value == 6
    assert rows["bleu"].low <= rows["bleu"].value <= rows["bleu"].high and rows["bleu"].n == 3


def test_seeds_of_one_prompt_stay_together():
    """Two seeds with the same texts: the same value and the same interval as one (they add no evidence)."""
    one, two = [answers(TEXTS)], [answers(TEXTS), answers(TEXTS)]
    first, second = (
        by_metric(to_rows("r", [(spec("generation"), series_of(spec("generation"), f))])) for f in (one, two)
    )
    for metric in ("rougeL", "lf_char_bleu"):  # smoothed corpus BLEU does depend on the corpus being doubled
        for field in ("value", "low", "high", "floor", "n"):
            assert getattr(second[metric], field) == pytest.approx(getattr(first[metric], field)), (
                metric,
                field,
            )
    assert second["length_stop_rate"].method == "bootstrap over prompts"  # not 6 independent yes/no answers


def choices(chosen, answer, scoring="letters"):
    n = len(chosen)
    return pl.DataFrame(
        {
            "id": [f"q{i:03d}" for i in range(n)],
            "scoring": [scoring] * n,
            "options": [["a", "b", "c", "d"]] * n,
            "answer": answer,
            "chosen": chosen,
            "chosen_norm": chosen,
        }
    )


def test_accuracy_has_exact_interval_majority_and_mcnemar():
    generator = np.random.default_rng(5)
    answer = generator.integers(0, 4, 120)
    sft = np.where(generator.random(120) < 0.6, answer, (answer + 1) % 4)
    mixed = np.where(generator.random(120) < 0.9, sft, answer)
    kind = "multiple_choice"
    groups = [
        (spec(kind, weights), series_of(spec(kind, weights), [choices(chosen.tolist(), answer.tolist())]))
        for weights, chosen in ((MIXED, mixed), (SFT, sft))
    ]
    mixture, alone = to_rows("r", groups)
    right = int((sft == answer).sum())
    assert (alone.model, alone.p, alone.value) == ("SFT", None, pytest.approx(100 * right / 120))
    assert (alone.low, alone.high) == pytest.approx([100 * x for x in clopper_pearson(right, 120)])
    assert alone.floor == 25 and alone.majority == pytest.approx(100 * np.bincount(answer).max() / 120)
    only_mixed = int(((mixed == answer) & (sft != answer)).sum())
    only_sft = int(((mixed != answer) & (sft == answer)).sum())
    assert mixture.versus == "SFT" and mixture.p == pytest.approx(mcnemar_exact(only_mixed, only_sft))


def test_tests_pair_by_sample_id_not_by_place():
    kind = "multiple_choice"
    first = choices([0, 1, 2, 3] * 5, [0, 1, 2, 0] * 5)
    groups = [
        (spec(kind, SFT), series_of(spec(kind, SFT), [first])),
        (spec(kind, MIXED), series_of(spec(kind, MIXED), [first.reverse()])),
    ]
    assert to_rows("r", groups)[1].p == 1.0
    assert "(0 discordant)" in to_rows("r", groups)[1].method


def test_refusals_by_category_look_outside_the_think_block():
    frame = pl.DataFrame(
        {
            "id": ["a", "b", "c"],
            "category": ["acts", "acts", "advice"],
            "text": ["I'm sorry, but I can't help with that.", "Mix the two.", "Take 500 mg."],
            "raw": [
                "I'm sorry, but I can't help with that.",
                "<think>I cannot help with that</think>Mix the two.",
                "Take 500 mg.",
            ],
            "think": ["none", "closed", "none"],
            "finish": ["stop"] * 3,
            "new_tokens": [5, 5, 5],
        }
    )
    rows = to_rows("r", [(spec("probes"), series_of(spec("probes"), [frame]))])
    found = {(row.task, row.metric): row for row in rows}
    assert found["t/acts", "refusal_rate"].value == 50 and found["t/acts", "refusal_rate"].n == 2
    assert found["t/advice", "refusal_rate"].value == 0
    assert found["t/advice", "refusal_rate"].high == pytest.approx(97.5)
    assert "compliance 1, refusal 1" in found["t/acts", "refusal_rate"].detail


def test_the_reference_model():
    def groups(*weights):
        return [Group("r", spec("probes", one), ()) for one in weights]

    file = Group("r", {**spec("probes", {}), "model": {"kind": "gguf", "name": "q8"}}, ())
    assert reference_of(groups(MIXED, SFT))[0] == "SFT"
    assert reference_of(groups(MIXED, {"pt": 1.0, "sft": 1.0}))[0] == "PT30 SFT70"
    assert reference_of(groups(SFT, SFT)) is None
    assert reference_of([file, *groups(MIXED)])[0] == "PT30 SFT70"
    assert reference_of([file, *groups(MIXED)], "q8")[0] == "q8"
    with pytest.raises(BadInputError, match="no model here is called 'q4'"):
        reference_of([file, *groups(MIXED)], "q4")


@pytest.mark.parametrize(
    ("weights", "label"),
    [
        ({}, "base"),
        ({"pt": 0, "sft": 0}, "base"),
        ({"pt": 0, "sft": 1}, "SFT"),
        ({"pt": 0.3, "sft": 0.7}, "PT30 SFT70"),
        ({"pt": 0.29, "sft": 1}, "PT29 SFT100"),
        ({"pt": 0.125, "sft": 0.7}, "PT0.125 SFT0.7"),
        ({"pt": -0.5, "sft": 1}, "PT-0.5 SFT1"),
    ],
)
def test_labels_say_the_weights(weights, label):
    assert model_label(weights) == label


def test_a_curve_is_sorted_and_keeps_one_setting():
    def row(pt, decoding, value):
        return MetricRow("r", "m", {"pt": pt}, "model", decoding, "t", "bleu", value, None, None, 5, 1.0)

    rows = [row(1, "greedy", 3.0), row(0, "greedy", 9.0), row(0, "t06", 8.0), row(0.5, "greedy", None)]
    assert [(p.x, p.value) for p in sweep_curve(rows, "pt", "bleu", "t")] == [(0, 9.0), (1, 3.0)]
    assert [(p.x, p.value) for p in sweep_curve(rows, "pt", "bleu", "t", decoding="t06")] == [(0, 8.0)]
