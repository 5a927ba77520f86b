"""Overlap metrics against sacreBLEU, rouge-score, nltk, and jieba with rouge_chinese themselves; floors; ceilings."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from engine.evaluate.metrics import (
    OVERLAP,
    ceilings,
    derangements,
    floors,
    is_cjk,
    overlap,
    overlap_and_floors,
)
from engine.evaluate.overlap.grams import Subsequences
from engine.evaluate.resampling import resampled_sums
from engine.evaluate.think import split_think

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
ENGLISH = [
    *zip(OUTPUTS, REFERENCES, strict=True),
    ("Pain. Pain! Is it pain? Yes.", "Is it pain? It is: pain, and pain again."),
    ("line one\nline two\n\n\nline three", "line one\n\nline 2\nline three\n"),
    ("  \n ", "Nothing to say."),
    ("a", "a"),
    ("a b", "b a"),
    ("...", "?!"),
    ("BP 120/80 mmHg; HR 72.", "Blood pressure 120/80 mmHg, heart rate 72."),
    ("e.g. 5 mg q.i.d. p.o.", "5 mg four times a day by mouth (e.g. after meals)"),
    ("<think>\nWhat is asked?\n</think>\n\nAspirin.", "Aspirin."),
    ("the the the the the the", "the cat sat on the mat, the end"),
    ("naïve café über", "naive cafe uber"),
    ("\tTabs\tand  two  spaces ", "Tabs and two spaces"),
]
CHINESE = [
    ("糖尿病患者应该控制饮食。", "糖尿病病人应当控制饮食，并且适当运动。"),
    ("阿司匹林可以降低发热。", "阿司匹林可以退热。"),
    ("高血压是什么？高血压是血压过高。", "什么是高血压？高血压是指血压持续升高！"),
    ("“你好。”他说。再见……好的", "“你好！”她说。再见……好"),
    ("每天服用5毫克，qd。", "每日5 mg，一次。"),
    ("头痛\n发热\n\n咳嗽", "头痛、发热、咳嗽"),
    ("", "无"),
    ("无", "无"),
    ("哮喘引起喘息和咳嗽。患者应该就医。", "哮喘的症状包括喘息、咳嗽和气短。"),
    ("胰岛素 insulin 注射", "注射胰岛素（insulin）"),
    ("北京大学第一医院的医生建议住院治疗。", "医生建议在北京大学第一医院住院。"),
    ("请在两天内去看医生。", "患者应在两天之内看医生。"),
    ("。。。", "？"),
    ("他来到了网易杭研大厦", "他来到网易杭研大厦"),
]


def values(outputs, references):
    return {measured.name: measured.value for measured in overlap(outputs, references)}


def split(pairs):
    return [output for output, _ in pairs], [reference for _, reference in pairs]


@cache
def jieba_itself():
    import jieba

    jieba.setLogLevel(logging.CRITICAL)
    return jieba


def llama_factory(output, reference):
    """What its ComputeSimilarity does to a pair of texts (train/sft/metric.py)."""
    from rouge_chinese import Rouge

    jieba = jieba_itself()
    hypothesis, target = list(jieba.cut(output)), list(jieba.cut(reference))
    if len(" ".join(hypothesis).split()) == 0 or len(" ".join(target).split()) == 0:
        return {"lf_rouge1": 0.0, "lf_rouge2": 0.0, "lf_rougeL": 0.0}
    score = Rouge().get_scores(" ".join(hypothesis), " ".join(target))[0]
    return {f"lf_rouge{k.upper()}": 100 * score[f"rouge-{k}"]["f"] for k in ("1", "2", "l")}


@pytest.mark.parametrize("pairs, tokenizer", [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_corpus_bleu_and_chrf_are_sacrebleus(pairs, tokenizer):
    outputs, references = split(pairs)
    scorers = {"bleu": BLEU(tokenize=tokenizer), "chrf": CHRF()}
    found = {measured.name: measured for measured in overlap(outputs, references)}
    for name, scorer in scorers.items():
        assert found[name].value == pytest.approx(scorer.corpus_score(outputs, [references]).score)
        assert str(scorer.get_signature()) in found[name].detail
        # a resample is the corpus with items drawn again: the same number as scoring that corpus
        for row in resampled_sums(np.eye(len(pairs)), 5):
            drawn = [i for i, times in enumerate(row) for _ in range(int(times))]
            expected = scorer.corpus_score(
                [outputs[i] for i in drawn], [[references[i] for i in drawn]]
            ).score
            assert found[name].combine(row[None] @ found[name].stats)[0] == pytest.approx(expected)


TEXTS = st.lists(
    st.tuples(st.text("ab .,\n", max_size=25), st.text("ab .,\n", min_size=1, max_size=25)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_any_corpus_scores_as_sacrebleu_and_rouge_score_say(pairs):
    outputs, references = split(pairs)
    found = values(outputs, references)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, [references]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(outputs, [references]).score)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(reference, output) for output, reference in pairs]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(100 * np.mean([score[name].fmeasure for score in scores]))


def test_rouge_is_rouge_scores_mean():
    outputs, references = split(ENGLISH)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(r, o) for r, o in zip(references, outputs, strict=True)]
    found = values(outputs, references)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(100 * np.mean([score[name].fmeasure for score in expected]))


@pytest.mark.parametrize("output, reference", [*ENGLISH, *CHINESE])
def test_llama_factorys_rouge_is_jieba_and_rouge_chinese(output, reference):
    found = values([output], [reference])
    for name, expected in llama_factory(output, reference).items():
        assert found[name] == pytest.approx(expected, abs=1e-9), name


@settings(max_examples=60, deadline=None)
@given(st.text("糖尿病人 ab?？。\n”…", max_size=30), st.text("糖尿病人 ab?？。\n”…", min_size=1, max_size=30))
def test_any_text_is_cut_as_llama_factory_cuts_it(output, reference):
    found = values([output], [reference])
    for name, expected in llama_factory(output, reference).items():
        assert found[name] == pytest.approx(expected, abs=1e-9), name


@settings(deadline=None)
@given(st.text("abcde ,.é糖", min_size=0, max_size=40), st.text("abcde ,.é糖", min_size=1, max_size=40))
def test_character_bleu_is_nltks_method3(output, reference):
    expected = sentence_bleu([list(reference)], list(output), smoothing_function=SmoothingFunction().method3)
    assert values([output], [reference])["lf_char_bleu"] == pytest.approx(100 * float(expected), abs=1e-10)


@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcd"), max_size=90))
def test_the_longest_common_subsequence_is_the_tables(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert Subsequences([first], [second]).lengths(np.array([0]))[0] == table[-1, -1]


def test_statistics_add_up_to_the_value_of_the_whole():
    outputs, references = split(ENGLISH)
    halves = [overlap(outputs[part], references[part]) for part in (slice(0, 7), slice(7, None))]
    for whole, first, second in zip(overlap(outputs, references), *halves, strict=True):
        sums = first.stats.sum(0, keepdims=True) + second.stats.sum(0, keepdims=True)
        assert whole.combine(sums)[0] == pytest.approx(whole.value), whole.name
    assert tuple(measured.name for measured in overlap(outputs, references)) == OVERLAP


def test_a_think_block_and_an_unrelated_answer_still_score_in_character_bleu():
    """Why the floor stands beside it: English shares its letters (sacreBLEU is not fooled by that)."""
    unrelated = values([REFERENCES[1]], [REFERENCES[2]])
    assert unrelated["lf_char_bleu"] > 10 > unrelated["bleu"]
    gold = values(REFERENCES, REFERENCES)
    assert all(gold[name] == pytest.approx(100) for name in OVERLAP)


def test_answers_with_nothing_left_score_nothing():
    cut_off = split_think("<think>\nIt has been going on for a while and then").answer
    assert cut_off == ""
    for empty in ("", cut_off, " \n"):
        found = values([empty] * 4, REFERENCES)
        # a space is a character to LLaMA-Factory, and to nothing else
        assert {name for name, value in found.items() if value != 0} <= {"lf_char_bleu"}
        assert found["lf_char_bleu"] < 1e-3
    assert values([""], ["x"])["lf_char_bleu"] == 0


def test_floors_are_scores_against_other_references():
    found, floor = overlap_and_floors(REFERENCES, REFERENCES)
    assert [measured.value for measured in found] == [
        measured.value for measured in overlap(REFERENCES, REFERENCES)
    ]
    assert floor == floors(REFERENCES, REFERENCES) and set(floor) == set(OVERLAP)
    orders = derangements(4)
    for name in OVERLAP:
        shuffled = [values(REFERENCES, [REFERENCES[i] for i in order])[name] for order in orders]
        assert floor[name] == pytest.approx(np.mean(shuffled)), name
    expected = np.mean(
        [BLEU().corpus_score(REFERENCES, [[REFERENCES[i] for i in order]]).score for order in orders]
    )
    assert floor["bleu"] == pytest.approx(expected) and floor["bleu"] < 20
    assert floors(["a"], ["a"]) == {}


def test_ceilings_are_what_a_perfect_answer_gets():
    assert all(value == pytest.approx(100) for value in ceilings(REFERENCES).values())
    found = ceilings(["Yes.", "Acute asthma.", "No"])
    # one or two words and a full stop have no 4-gram, one word has no pair of words
    assert found["bleu"] == 0 and found["chrf"] == 100 and found["rouge1"] == 100
    assert found["rouge2"] == pytest.approx(100 / 3)
    assert (
        found["bleu"]
        == BLEU().corpus_score(["Yes.", "Acute asthma.", "No"], [["Yes.", "Acute asthma.", "No"]]).score
    )


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
    assert "tok:zh" in found["bleu"].detail and "jieba" in found["lf_rougeL"].detail
    assert found["bleu"].value == pytest.approx(BLEU(tokenize="zh").corpus_score(chinese, [chinese]).score)
    # rouge-score's own tokenizer finds no words there at all
    assert rouge_scorer.RougeScorer(["rougeL"]).score(chinese[0], chinese[0])["rougeL"].fmeasure == 0
    # character by character, as a Unicode-aware ROUGE must have it: 7 of 11 and 7 of 10 characters
    first = values(["糖尿病患者应该控制饮食"], ["糖尿病要控制饮食习惯"])
    assert first["rougeL"] == pytest.approx(100 * 2 * 7 / (11 + 10))


def test_mixed_lengths_are_an_error():
    with pytest.raises(ValueError, match="2 outputs and 1 references"):
        overlap(["a", "b"], ["a"])


def test_jieba_is_silent_and_leaves_nothing_behind(tmp_path):
    """Its own start prints to stderr and shares a cache file with every user of the temporary folder."""
    code = (
        "from engine.evaluate.metrics import overlap; print(overlap(['糖尿病'], ['糖尿病'])[-1].value > 99)"
    )
    (tmp_path / "jieba.cache").write_bytes(b"put there by somebody else")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True" and done.stderr == ""
    assert sorted(tmp_path.iterdir()) == before
