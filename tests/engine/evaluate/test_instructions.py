"""IFEval's checks: every instruction with an answer that follows it and one that does not, and the harness itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadDataError
from engine.evaluate.instructions import check_answer, validate

P3 = "One.\n***\nTwo.\n***\nThree."
# instruction, kwargs, an answer that follows it, one that does not: written from IFEval's descriptions
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["fever", "rest"]}, "Rest, and watch the fever.", "Sleep well."),
    ("keywords:frequency", {"keyword": "water", "frequency": 2, "relation": "at least"}, "Water and water.", "Water."),
    ("keywords:frequency", {"keyword": "water", "frequency": 2, "relation": "less than"}, "Water.", "Water, water."),
    ("keywords:forbidden_words", {"forbidden_words": ["aspirin"]}, "Take rest.", "Take aspirin."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Zz.", "Z."),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "at least"}, "Go! Go!", "Go!"),
    ("language:response_language", {"language": "de"}, "Das Fieber ist heute hoch und er bleibt im Bett.",
     "The fever is high today and he stays in bed."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "See Dr. Lee. Rest.",
     "See Dr. Lee today."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, P3, "One.\n\nTwo.\n\nThree."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "First rest.\n\nThen eat.", "Then.\n\nFirst."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], come to [place].", "[name], come."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Rest.\nP.S. Drink.", "Rest. Drink."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one\n* two\n* three"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one* and two"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\na\nSection 2\nb", "Section 1\na"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<fever>>\nRest.", "Fever\nRest."),
    ("combination:two_responses", {}, "Rest.******Drink.", "Rest. Drink."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "What helps?"}, "What helps? Rest.", "Rest helps."),
    ("startend:end_checker", {"end_phrase": "Get well soon."}, "Rest. Get well soon.", "Get well soon. Rest."),
    ("startend:quotation", {}, '"Rest."', "Rest."),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "DRINK and REST.",
     "DRINK and rest."),
    ("change_case:english_capital", {}, "THE PATIENT SHOULD REST AND DRINK.", "The patient should rest."),
    ("change_case:english_lowercase", {}, "the patient should rest and drink.", "The patient should rest."),
    ("punctuation:no_comma", {}, "Rest and drink.", "Rest, and drink."),
]  # fmt: skip


def told(name: str, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": name, "kwargs": kwargs}]


@pytest.mark.parametrize(("name", "kwargs", "follows", "fails"), CASES)
def test_every_instruction(name, kwargs, follows, fails):
    instructions = told(name, kwargs)
    validate(instructions)
    assert check_answer(instructions, "q", follows).strict == (True,)
    assert check_answer(instructions, "q", fails).strict == (False,)


def test_all_instructions_are_covered_and_empty_answers_follow_none():
    from engine.evaluate.instructions.google.instructions_registry import INSTRUCTION_DICT

    assert {name for name, *_ in CASES} == set(INSTRUCTION_DICT)
    for name, kwargs, *_ in CASES:
        assert check_answer(told(name, kwargs), "q", " \n").strict == (False,)
        assert check_answer(told(name, kwargs), "q", "").loose == (False,)


def test_loose_forgives_an_introduction_and_markdown():
    no_comma, quoted = told("punctuation:no_comma", {}), told("startend:quotation", {})
    first = "Sure, here it is:\nRest and drink."
    assert check_answer(no_comma, "q", first).strict == (False,) and check_answer(
        no_comma, "q", first
    ).loose == (True,)
    assert check_answer(quoted, "q", '**"Rest."**').strict == (False,)
    assert check_answer(quoted, "q", '**"Rest."**').loose == (True,)
    assert check_answer(no_comma, "q", "Rest, drink.").loose == (False,)


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        ([], "no instruction"),
        (told("punctuation:no_coma", {}), "no instruction of IFEval"),
        (told("length_constraints:number_words", {"num_words": 3}), "needs relation"),
        (told("length_constraints:number_words", {"num_words": 3, "relation": "about"}), "does not take"),
        (told("punctuation:no_comma", {"number": 3}), "takes no kwargs, and has number"),
        (told("keywords:existence", {"keywords": None}), "needs keywords"),
        (told("keywords:existence", {"keywords": "fever"}), "must be a list of words"),
        (told("keywords:forbidden_words", {"forbidden_words": []}), "must be a list of words"),
        (told("keywords:existence", {"keywords": ["(fever"]}), "does not take.*unterminated"),
        (told("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}),
         "one letter"),
        (told("length_constraints:number_paragraphs", {"num_paragraphs": -1}), "whole number of at least 0"),
        (told("length_constraints:number_paragraphs", {"num_paragraphs": "three"}), "whole number"),
        (told("length_constraints:nth_paragraph_first_word",
              {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "so"}), r"from 1 to num_paragraphs \(2\)"),
        (told("language:response_language", {"language": "zh"}), "none of IFEval's languages"),
        (told("startend:end_checker", {"end_phrase": " "}), "must be text"),
    ],
)  # fmt: skip
def test_bad_instructions_are_named(instructions, words):
    with pytest.raises(BadDataError, match=words):
        validate(instructions)


def nltks_english_model(folder: Path) -> None:
    """The files of NLTK's punkt_tab, from the package that carries its tables (nothing is downloaded)."""
    punkt = pytest.importorskip("punkt")
    model, target = punkt.load_model("english"), folder / "tokenizers" / "punkt_tab" / "english"
    target.mkdir(parents=True)
    flags = [f"{word}\t{int(value)}" for word, value in model.ortho_context.items()]
    tables = {
        "abbrev_types.txt": sorted(model.abbrev_types),
        "sent_starters.txt": sorted(model.sent_starters),
        "collocations.tab": ["\t".join(pair) for pair in sorted(model.collocations)],
        "ortho_context.tab": flags,
    }
    for name, lines in tables.items():
        (target / name).write_text("\n".join(lines), encoding="utf-8")


def test_sentences_and_words_are_nltks_own(tmp_path, monkeypatch):
    """Its loader and its code, on its tables. The last text is one where the punkt package's code differs."""
    import nltk

    from engine.evaluate.instructions.google.instructions_util import count_sentences, word_tokenize

    nltks_english_model(tmp_path)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    texts = [
        "See Dr. Lee at 3 p.m. today. Rest.",
        "Take 2.5 mg, i.e. half. (See No. 5.) OK? Yes!",
        'He said: "Rest." She did... Then?\n\n* one\n* two',
        "The U.S. Food and Drug Administration approved it. COVID-19 isn't over.",
        "It is designed to be used globally.\n\n.",
    ]
    for text in texts:
        assert count_sentences(text) == len(nltk.sent_tokenize(text)), text
        assert word_tokenize(text) == nltk.word_tokenize(text), text


def test_a_verdict_does_not_change():
    """langdetect draws at random unless it is told not to; of this text it then says one of three languages."""
    rule = told("language:response_language", {"language": "pt"})
    assert len({check_answer(rule, "q", "No problem amigo").strict for _ in range(60)}) == 1


@pytest.mark.shared_data
def test_verdicts_are_the_harness_own(monkeypatch, tmp_path):
    """All prompts with their example responses, against the harness' functions as they are. Two prompts ask for "!"
    or "#" as a letter, where it draws another letter at random."""
    root = os.environ.get("MEDMERGE_SHARED_DATA")
    if not root or not (Path(root) / "ifeval").is_dir():
        pytest.skip("set MEDMERGE_SHARED_DATA to the folder of reference data")
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("lm_eval")
    nltks_english_model(tmp_path)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    from lm_eval.tasks.ifeval import instructions_util, utils

    instructions_util._get_sentence_tokenizer.cache_clear()
    folder = Path(root) / "ifeval"
    responses = [json.loads(line) for line in (folder / "example_en_responses.jsonl").open()]
    answers = {row["prompt"]: row["response"] for row in responses}
    rows = [json.loads(line) for line in (folder / "input_data.jsonl").open()]
    asked = [row for row in rows if row["prompt"] in answers]
    assert len(rows) == 541 and len(asked) == 540
    differing = []
    for row in asked:
        instructions = [
            {"id": name, "kwargs": {key: value for key, value in kwargs.items() if value is not None}}
            for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True)
        ]
        validate(instructions)
        got = check_answer(instructions, row["prompt"], answers[row["prompt"]])
        one = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
        strict = utils.test_instruction_following_strict(one, answers[row["prompt"]]).follow_instruction_list
        loose = utils.test_instruction_following_loose(one, answers[row["prompt"]]).follow_instruction_list
        if (list(got.strict), list(got.loose)) != (strict, loose):
            differing.append(row["key"])
    assert set(differing) <= {1122, 1129}
