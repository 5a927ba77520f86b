"""Overlap metrics against sacreBLEU, rouge-score and nltk themselves; floors; CJK."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU

from engine.evaluate.metrics import OVERLAP, char_bleu, derangements, floors, is_cjk, overlap
from engine.evaluate.statistics import resample_counts

REFERENCES = [
    "Aspirin is used to reduce pain, fever and inflammation.",
    "Asthma causes wheezing, coughing and shortness of breath in many people.",
    "Diabetes is a disease in which blood glucose is too high.",
    "The patient should see a doctor within two days.",
]
OUTPUTS = [
    "Aspirin reduces pain and fever.",
    "Asthma causes wheezing, coughing and shortness of breath.",
    "It is a disease in which the blood glucose is too high.",
    "",
]


def values(outputs, references):
    return {measured.name: measured.value for measured in overlap(outputs, references)}


def test_corpus_bleu_is_sacrebleus():
    scorer = BLEU()
    found = overlap(OUTPUTS, REFERENCES)[0]
    assert found.name == "bleu" and found.value == pytest.approx(
        scorer.corpus_score(OUTPUTS, [REFERENCES]).score
    )
    assert str(scorer.get_signature()) in found.detail
    # a resample is the corpus with items drawn again: the same number as scoring that corpus
    counts = resample_counts(4, 5)
    for row in counts:
        drawn = [i for i, times in enumerate(row) for _ in range(int(times))]
        expected = scorer.corpus_score([OUTPUTS[i] for i in drawn], [[REFERENCES[i] for i in drawn]]).score
        assert found.combine(row[None] @ found.stats)[0] == pytest.approx(expected)


def test_rouge_is_rouge_scores_mean():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(r, o) for r, o in zip(REFERENCES, OUTPUTS, strict=True)]
    found = values(OUTPUTS, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(100 * np.mean([score[name].fmeasure for score in expected]))


@given(st.text("abcde ,.é糖", min_size=0, max_size=40), st.text("abcde ,.é糖", min_size=1, max_size=40))
def test_character_bleu_is_nltks_method3(output, reference):
    expected = sentence_bleu([list(reference)], list(output), smoothing_function=SmoothingFunction().method3)
    assert char_bleu(reference, output) == pytest.approx(float(expected), abs=1e-12)


def test_a_think_block_and_an_unrelated_answer_still_score_in_character_bleu():
    """Why the floor stands beside it: English shares its letters (sacreBLEU is not fooled by that)."""
    unrelated = values([REFERENCES[1]], [REFERENCES[2]])
    assert unrelated["lf_char_bleu"] > 10 > unrelated["bleu"]
    gold = values(REFERENCES, REFERENCES)
    assert all(gold[name] == pytest.approx(100) for name in OVERLAP)


def test_floors_are_scores_against_other_references():
    found = floors(REFERENCES, REFERENCES)
    orders = derangements(4)
    expected = np.mean(
        [BLEU().corpus_score(REFERENCES, [[REFERENCES[i] for i in order]]).score for order in orders]
    )
    assert found["bleu"] == pytest.approx(expected) and found["bleu"] < 20
    assert floors(["a"], ["a"]) == {}


@given(st.integers(2, 60))
def test_derangements_leave_nothing_in_place_and_are_always_the_same(n):
    orders = derangements(n)
    assert orders == derangements(n)
    for order in orders:
        assert sorted(order) == list(range(n)) and all(i != place for place, i in enumerate(order))


def test_chinese_is_not_dropped():
    chinese = ["糖尿病患者应该控制饮食。", "阿司匹林可以降低发热。"]
    assert is_cjk(chinese) and not is_cjk(REFERENCES) and not is_cjk(["123 !"])
    found = {measured.name: measured for measured in overlap(chinese, chinese)}
    assert found["rougeL"].value == 100 and "CJK by character" in found["rougeL"].detail
    assert "tok:zh" in found["bleu"].detail
    assert found["bleu"].value == pytest.approx(BLEU(tokenize="zh").corpus_score(chinese, [chinese]).score)
    # rouge-score's own tokenizer finds no words there at all
    assert rouge_scorer.RougeScorer(["rougeL"]).score(chinese[0], chinese[0])["rougeL"].fmeasure == 0
