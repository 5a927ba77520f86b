"""Answers as models write them, each with the letter a person reads in it; and properties for any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.evaluate.letters import parse_letter

DRUGS = ("aspirin", "ibuprofen", "paracetamol", "a beta blocker")
GERMS = ("S. aureus", "E. coli", "C. difficile", "B. anthracis", "Hepatitis B virus")
YES_NO = ("yes", "no", "maybe")
ZH = ("阿司匹林", "布洛芬", "对乙酰氨基酚", "青霉素", "以上都是")
NUMBERS = ("4", "8", "12", "16")

ENGLISH = [
    # bare letters and decorations
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("**B**", "B"),
    ("**(B)**", "B"),
    ("`B`", "B"),
    ('"B"', "B"),
    ("B)", "B"),
    ("B:", "B"),
    ("  B\n", "B"),
    ("__B__", "B"),
    ("# B", "B"),
    ("A", "A"),
    ("a", "A"),
    ("B", "B"),
    ("（B）", "B"),
    ("Ｂ．", "B"),
    ("Option B", "B"),
    ("option b.", "B"),
    ("Choice: B", "B"),
    ("Letter B", "B"),
    # a letter with its option, or the option alone
    ("B) ibuprofen", "B"),
    ("B. Ibuprofen", "B"),
    ("B: ibuprofen", "B"),
    ("B - ibuprofen", "B"),
    ("(B) Ibuprofen.", "B"),
    ("B ibuprofen", "B"),
    ("Ibuprofen", "B"),
    ("ibuprofen.", "B"),
    ("**Ibuprofen**", "B"),
    ("A beta blocker", "D"),
    ("D. A beta blocker", "D"),
    ("B. Ibuprofen\n\nIbuprofen lowers fever because it blocks cyclooxygenase.", "B"),
    ("B. Ibuprofen\n\nExplanation:\nA. aspirin is wrong here.\nC. paracetamol is weaker.", "B"),
    ("B\n\nThe fever is due to inflammation.", "B"),
    ("B, because the fever is high.", "B"),
    ("B because the fever is high.", "B"),
    ("Option C, since the stomach must be spared.", "C"),
    # conclusions
    ("The answer is B", "B"),
    ("The answer is B.", "B"),
    ("The answer is (B).", "B"),
    ("The answer is **B**.", "B"),
    ("The answer is: B", "B"),
    ("The answer is option B.", "B"),
    ("The correct answer is B) ibuprofen.", "B"),
    ("The correct answer is B. Ibuprofen lowers fever.", "B"),
    ("the correct choice is (b)", "B"),
    ("the correct choice is b", "B"),
    ("The best answer would be C.", "C"),
    ("The most appropriate answer is therefore D.", "D"),
    ("Answer: B", "B"),
    ("Answer:B", "B"),
    ("ANSWER: (B)", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B. Ibuprofen**", "B"),
    ("Answer - B", "B"),
    ("Answer\nB", "B"),
    ("Final answer: B", "B"),
    ("Final Answer: $\\boxed{B}$", "B"),
    ("\\boxed{B}", "B"),
    ("\\boxed{\\text{B}}", "B"),
    ("<answer>B</answer>", "B"),
    ("The answer is A.", "A"),
    ("The answer is A because aspirin thins the blood.", "A"),
    ("The answer is ibuprofen.", "B"),
    ("The answer is a beta blocker.", "D"),
    ("The answer is A beta blocker.", "D"),
    ("My answer is C, not A.", "C"),
    ("The answer is not A but B.", "B"),
    ("I choose B.", "B"),
    ("I would choose option B.", "B"),
    ("I'd go with B.", "B"),
    ("I would select (C).", "C"),
    ("B is the answer.", "B"),
    ("B is the correct answer.", "B"),
    ("Option B is the best choice.", "B"),
    ("B is correct.", "B"),
    ("Option B is correct.", "B"),
    ("A is incorrect. B is correct.", "B"),
    # reasoning first
    ("A lowers pain, B lowers fever and pain, D lowers blood pressure; so the best answer is C", "C"),
    ("Aspirin would bleed. Ibuprofen hurts the stomach. Therefore the answer is (C).", "C"),
    ("The answer is A. Wait, the patient bleeds. So the answer is C.", "C"),
    ("First I thought the answer is A, but the correct answer is C.", "C"),
    ("Because the patient has an ulcer, option A is wrong and option B is wrong.\n\nAnswer: C", "C"),
    ("The patient has hepatitis B. The answer is C.", "C"),
    ("A patient with fever should get B.", "B"),  # the paper reads A
    ("A 27-year-old man has a fever. It must be C.", "C"),
    ("I think the answer is B.", "B"),
    ("I think it is B.", "B"),
    ("Therefore, C.", "C"),
    ("The child has a fever and an ulcer.\n\nC", "C"),
    ("C\n\nQuestion: Which drug is best?\nA. x\nB. y\nAnswer: B", "C"),  # a base model that goes on
    ("The answer for a patient with hepatitis B is C.", "C"),
    ("The correct answer among the options is: D", "D"),
    ("The answer is B and A is wrong.", "B"),
    ("I am not sure, but I would say B.", "B"),
    ("The answer isn't B, it's C.", "C"),
    ("I recommend option B for this patient.", "B"),
    ("B.\n\nA 45-year-old man has a fever.", "B"),
    ("B B B", "B"),
    ("1. B", "B"),
    ('{"answer": "B"}', "B"),
    ("Both A and B are wrong, so C is correct.", "C"),
    ("A. aspirin - no\nB. ibuprofen - no\nC. paracetamol - yes\nTherefore C.", "C"),
    # not to be read
    ("Options: A, B, C, D", None),
    ("A) aspirin B) ibuprofen C) paracetamol D) a beta blocker", None),
    ("The incorrect answer is A.", None),
    ("For adults A, for children C.", None),
    ("Blood group A is common.", None),
    ("Please choose A, B, C, or D.", None),
    ("Answer: A patient with fever", None),
    ("A, B, and C are all wrong.", None),
    ("Child-Pugh B", None),
    ("", None),
    ("   ", None),
    ("...", None),
    ("A patient with fever should rest.", None),
    ("A patient with fever should get ibuprofen or paracetamol.", None),
    ("I do not know.", None),
    ("I cannot answer this question.", None),
    ("A or B", None),
    ("A and C", None),
    ("A/B", None),
    ("A, C", None),
    ("A, B, C and D", None),
    ("A B C D", None),
    ("Both A and B", None),
    ("Either A or B.", None),
    ("The answer is A or B.", None),
    ("The answer is A and C.", None),
    ("The answer is (A) or (C).", None),
    ("The answer could be A or maybe B.", None),
    ("Answer: A/B/C/D", None),
    ("Output only the final answer letter (A/B/C/D).", None),
    ("A and B are correct.", None),
    ("not A", None),
    ("Not A.", None),
    ("The answer is not A.", None),
    ("The answer isn't A.", None),
    ("The answer cannot be A.", None),
    ("I would not choose A.", None),
    ("Neither A nor B is correct.", None),
    ("Option A is wrong.", None),
    ("The patient should not get A.", None),
    ("E", None),
    ("Answer: F", None),
    ("The answer is Z.", None),
    ("The answer is a common drug.", None),
    ("The answer is a matter of debate.", None),
    ("A. aspirin\nB. ibuprofen\nC. paracetamol\nD. a beta blocker", None),
    ("A. aspirin\n\nB. ibuprofen\n\nC. paracetamol", None),
    ("B) aspirin", None),  # letter and option contradict each other
    ("Vitamin B lowers the risk.", None),
    ("The patient has hepatitis B.", None),
    ("As a language model I give no medical advice.", None),
    ("Aspirin, ibuprofen and paracetamol lower fever.", None),
]

CHINESE = [
    ("B", "B"),
    ("Ｂ", "B"),
    ("（Ｂ）", "B"),
    ("【B】", "B"),
    ("B。", "B"),
    ("B、布洛芬", "B"),
    ("B．布洛芬", "B"),
    ("B布洛芬", "B"),
    ("B 布洛芬", "B"),
    ("布洛芬", "B"),
    ("布洛芬。", "B"),
    ("答案是B", "B"),
    ("答案是B。", "B"),
    ("答案：B", "B"),
    ("答案:B", "B"),
    ("答案为B", "B"),
    ("答案B", "B"),
    ("答案应为B。", "B"),
    ("答案是（B）", "B"),
    ("正确答案：B", "B"),
    ("正确答案是 B。", "B"),
    ("**正确答案：B**", "B"),
    ("正确选项是C。", "C"),
    ("最佳答案是 C 选项", "C"),
    ("选B", "B"),
    ("选 B。", "B"),
    ("故选B。", "B"),
    ("本题选C", "C"),
    ("应选择B。", "B"),
    ("我选择D。", "D"),
    ("选项B", "B"),
    ("选项B正确。", "B"),
    ("B项正确", "B"),
    ("B正确。", "B"),
    ("A错误，B正确。", "B"),
    ("排除A，选B。", "B"),
    ("患者有溃疡，不能用阿司匹林。因此答案是C。", "C"),
    ("先考虑A，但是患者出血，所以正确答案是C。", "C"),
    ("答案是A。不对，答案是C。", "C"),
    ("答案不是A，而是B。", "B"),
    ("因此，选E。", "E"),
    ("答案是布洛芬。", "B"),
    ("我认为是C。", "C"),
    ("正确的是C", "C"),
    ("A、B、D均错误，故答案选C。", "C"),
    ("不应选A，应选C", "C"),
    ("A和B都正确", None),
    ("维生素C缺乏", None),
    ("答案是A或B", None),
    ("选AB", None),
    ("A和C", None),
    ("A、C", None),
    ("A、B正确", None),
    ("答案是A、C", None),
    ("不选A", None),
    ("答案不是A。", None),
    ("不能选A。", None),
    ("A不正确。", None),
    ("选F", None),
    ("我不知道。", None),
    ("患者应补充维生素。", None),
    ("A. 阿司匹林\nB. 布洛芬\nC. 对乙酰氨基酚", None),
]

OTHERS = [
    ("yes", YES_NO, "A"),
    ("Yes.", YES_NO, "A"),
    ("Maybe", YES_NO, "C"),
    ("The answer is no.", YES_NO, "B"),
    ("Answer: maybe", YES_NO, "C"),
    ("B. no", YES_NO, "B"),
    ("E. coli", GERMS, "B"),
    ("The answer is E. coli.", GERMS, "B"),
    ("The answer is B. E. coli", GERMS, "B"),
    ("B. E. coli", GERMS, "B"),
    ("E. coli is a common germ of the gut.", GERMS, None),
    ("C. difficile", GERMS, "C"),
    ("Hepatitis B virus", GERMS, "E"),
    ("E", GERMS, "E"),
    ("12", NUMBERS, "C"),
    ("B. 8", NUMBERS, "B"),
    ("The answer is 16.", NUMBERS, "D"),
]


def letter(found: int | None) -> str | None:
    return None if found is None else "ABCDEFGHIJ"[found]


@pytest.mark.parametrize(("text", "expected"), ENGLISH)
def test_english_answers(text: str, expected: str | None) -> None:
    assert letter(parse_letter(text, DRUGS)) == expected


@pytest.mark.parametrize(("text", "expected"), CHINESE)
def test_chinese_answers(text: str, expected: str | None) -> None:
    assert letter(parse_letter(text, ZH, "zh")) == expected


@pytest.mark.parametrize(("text", "options", "expected"), OTHERS)
def test_options_that_look_like_letters_or_sentences(
    text: str, options: tuple[str, ...], expected: str | None
) -> None:
    assert letter(parse_letter(text, options)) == expected


def test_the_pronoun_is_an_answer_only_where_it_stands_alone() -> None:
    ten = tuple(f"drug {n}" for n in range(10))
    assert parse_letter("I", ten) == 8
    assert parse_letter("The answer is I.", ten) == 8
    assert parse_letter("I believe that fever is high.", ten) is None
    assert parse_letter("I", DRUGS) is None


def test_long_texts_are_read_quickly() -> None:
    """No pattern may run away on text without an end, which small models write."""
    for text in (
        "the answer " * 4000,
        "A, " * 8000,
        "answer: not " * 4000,
        "(" * 20000,
        "选" * 20000,
        "\n" * 20000 + "B",
    ):
        parse_letter(text, DRUGS)


PIECES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["A", "b", "(C)", "the answer is ", "Answer:", " not ", " or ", "答案是", "选", "\\boxed{", "}", "\n", ". ",
         "but", "而是"]
    ),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(PIECES, max_size=12).map("".join), st.lists(st.text(max_size=8), min_size=2, max_size=6),
    st.sampled_from(["en", "zh"]),
)  # fmt: skip
def test_any_text_gives_an_option_or_none(text: str, options: list[str], language: str) -> None:
    found = parse_letter(text, options, language)
    assert found is None or 0 <= found < len(options)


@given(
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(["{}", "({})", "**{}**", "{}.", "{})", "[{}]", '"{}"', "Answer: {}", "The answer is ({}).", 
                     "\\boxed{{{}}}",                     "答案：{}", "选{}", "Option {}", "\n{}\n", "  {}  "]),
)  # fmt: skip
def test_decoration_and_case_do_not_matter(choice: int, lower: bool, decoration: str) -> None:
    mark = "ABCD"[choice]
    assert parse_letter(decoration.format(mark.lower() if lower else mark), DRUGS) == choice


@given(st.permutations(DRUGS), st.sampled_from(["{}", "{}.", "The answer is {}.", "**{}**"]), st.booleans())
def test_an_options_text_follows_its_place(options: list[str], decoration: str, upper: bool) -> None:
    for place, option in enumerate(options):
        assert parse_letter(decoration.format(option.upper() if upper else option), options) == place
