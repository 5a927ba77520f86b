"""Ids and labels against LLaMA-Factory's rules, token by token: with the real Qwen3 tokenizer, and with a tiny one."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import templates
from tests.conftest import build_tokenizer
from tests.training import llamafactory_reference as reference
from training.data.samples import Sample
from training.masking import IGNORE, Encoded, encode_conversation, encode_text, split_budget, why_untrained

SHARED = os.environ.get("MEDMERGE_SHARED_DATA", "")
LLAMA3_MARKS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
THOUGHT = "<think>\nThe user asks about asthma.\n</think>\n\n"
SYSTEM = {"role": "system", "content": "You are careful. Answer in one sentence."}
LONG = "Wheezing, coughing, and shortness of breath. " * 12


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATIONS = {
    "single": [user("What is asthma?"), assistant("A disease.")],
    "system": [SYSTEM, user("What is asthma?"), assistant("A disease.")],
    "multi": [user("What is asthma?"), assistant("A disease."), user("Dose?"), assistant("500 mg.")],
    "three": [
        SYSTEM,
        user("哮喘是什么？"),
        assistant("一种慢性气道疾病。🫁"),
        user("Dose?"),
        assistant("500 mg."),
        user("Sure?"),
        assistant("Yes. "),
    ],
    "think": [user("What is asthma?"), assistant(THOUGHT + "A disease.")],
    "think_each": [
        user("What?"),
        assistant(THOUGHT + "A disease."),
        user("Dose?"),
        assistant(THOUGHT + "None."),
    ],
    "think_some": [SYSTEM, user("What?"), assistant(THOUGHT + "A."), user("Dose?"), assistant("None.")],
    "think_last": [user("What?"), assistant("A."), user("Dose?"), assistant(THOUGHT + "None.")],
    "think_open": [user("What?"), assistant("<think>\nnever closed")],
    "long_source": [user(LONG), assistant("Asthma.")],
    "long_target": [user("Symptoms?"), assistant(LONG)],
    "long_both": [SYSTEM, user(LONG), assistant(LONG)],
    "long_turns": [
        user(LONG),
        assistant(LONG),
        user("Dose?"),
        assistant("500 mg."),
        user(LONG),
        assistant(LONG),
    ],
    "long_history": [user("Short?"), assistant(LONG), user(LONG), assistant("Yes.")],
    "empty_answer": [user("Say nothing."), assistant("")],
    "break_first": [user("What?"), assistant("\n\nA disease.")],
    "line_breaks": [user("\n\nWhat?\n"), assistant(" indented\n\n  list\n")],
}


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The tiny tokenizer with Llama 3's marks, and with the think tags as plain added tokens, as Qwen3 has them."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": LLAMA3_MARKS})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer


@pytest.fixture(scope="module")
def qwen3() -> Any:
    """The real Qwen3 tokenizer; Llama 3's marks are added for its template's sake."""
    from transformers import AutoTokenizer

    if not SHARED:
        pytest.skip("set MEDMERGE_SHARED_DATA to the folder of reference data")
    tokenizer = AutoTokenizer.from_pretrained(Path(SHARED) / "qwen3_tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": LLAMA3_MARKS})
    tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer


@pytest.fixture(params=["tiny", pytest.param("qwen3", marks=pytest.mark.shared_data)])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def sample(messages: list[dict[str, str]], text: str = "") -> Sample:
    return Sample(Path("data.jsonl"), 7, text=text, messages=tuple(messages))


def same(ours: Encoded, theirs: tuple[list[int], list[int]]) -> None:
    """Equal ids, and equal labels but for the first token, which here never carries loss."""
    ids, labels = theirs
    assert ours.ids == ids
    assert ours.labels == [IGNORE, *labels[1:]][: len(ids)]


@pytest.mark.parametrize("name", sorted(reference.TEMPLATES))
@pytest.mark.parametrize("flags", ["", "train_on_prompt", "mask_history"])
def test_every_conversation_at_every_cutoff(name: str, flags: str, tokenizer: Any) -> None:
    chosen: dict[str, bool] = {flags: True} if flags else {}
    for case, messages in CONVERSATIONS.items():
        if (case, name) == ("think_open", "qwen3_empty_think"):
            continue  # test_where_we_do_otherwise
        whole = reference.encode_data_example(
            reference.TEMPLATES[name], tokenizer, messages, 1 << 20, **chosen
        )
        for cutoff in (16, 17, 24, 33, 64, 100, len(whole[0]) - 1, len(whole[0]), 2048):
            if cutoff < 1:
                continue
            theirs = reference.encode_data_example(
                reference.TEMPLATES[name], tokenizer, messages, cutoff, **chosen
            )
            ours = encode_conversation(sample(messages), tokenizer, templates.load(name), cutoff, **chosen)
            same(ours, theirs)
            assert ours.cut == len(whole[0]) - len(ours.ids)


words = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>|") | st.sampled_from(" \n"),
    max_size=30,
)
answers = st.builds(
    lambda thought, text: (f"<think>\n{thought}\n</think>\n\n" if thought else "") + text.lstrip("\n"),
    st.none() | words.filter(bool),
    words,
)
conversations = st.builds(
    lambda system, turns: [
        *([{"role": "system", "content": system}] if system else []),
        *(turn for question, answer in turns for turn in (user(question), assistant(answer))),
    ],
    st.none() | words,
    st.lists(st.tuples(words, answers), min_size=1, max_size=4),
)
quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@quick
@given(
    messages=conversations,
    name=st.sampled_from(sorted(reference.TEMPLATES)),
    flags=st.sampled_from(["", "train_on_prompt", "mask_history"]),
    cutoff=st.integers(1, 200),
)
def test_any_conversation(tokenizer: Any, messages: Any, name: str, flags: str, cutoff: int) -> None:
    chosen: dict[str, bool] = {flags: True} if flags else {}
    theirs = reference.encode_data_example(reference.TEMPLATES[name], tokenizer, messages, cutoff, **chosen)
    ours = encode_conversation(sample(messages), tokenizer, templates.load(name), cutoff, **chosen)
    same(ours, theirs)
    reason = why_untrained(
        sample(messages), tokenizer, templates.load(name), cutoff, mask_history=flags == "mask_history"
    )
    if flags != "train_on_prompt" and cutoff > 1:
        assert bool(reason) == (not ours.trained)


@quick
@given(messages=conversations)
def test_the_trained_tokens_are_the_answers(tokenizer: Any, messages: Any) -> None:
    given_answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]

    def trained(name: str, **flags: bool) -> str:
        encoded = encode_conversation(sample(messages), tokenizer, templates.load(name), 1 << 20, **flags)
        return str(tokenizer.decode([token for token in encoded.labels if token != IGNORE]))

    def spelled(*texts: str) -> str:
        # Qwen3's tokenizer writes every text in Unicode's composed form (NFC), piece by piece
        whole = "".join(text + "<|im_end|>\n" for text in texts)
        return unicodedata.normalize("NFC", whole) if tokenizer.backend_tokenizer.normalizer else whole

    assert trained("chatml") == spelled(*given_answers)
    assert trained("qwen3_nothink", mask_history=True) == spelled(given_answers[-1])
    thinking = [text if "</think>" in text else templates.EMPTY_THINK + text for text in given_answers]
    assert trained("qwen3") == spelled(*thinking)
    plain = [text.split("</think>\n\n")[-1].lstrip("\n") for text in given_answers]
    assert trained("qwen3_empty_think") == spelled(*plain)


@given(source=st.integers(0, 5000), target=st.integers(0, 5000), budget=st.integers(1, 4096))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_the_cutoff_is_shared_in_their_way(source: int, target: int, budget: int) -> None:
    assert split_budget(source, target, budget) == reference.infer_seqlen(source, target, budget)


@quick
@given(text=words)
def test_plain_text_ends_in_eos(tokenizer: Any, text: str) -> None:
    ids = reference.encode_pretrain(tokenizer, text)
    encoded = encode_text(sample([], text), tokenizer, tokenizer.eos_token_id)
    assert encoded.ids == ids and encoded.labels == [IGNORE, *ids[1:]]


@pytest.mark.shared_data
def test_rendered_text_equals_qwen3s_own_template(qwen3: Any) -> None:
    """What a model trained on `mask_history` sees is what the model's template shows at inference."""
    for case, messages in CONVERSATIONS.items():
        if case in ("think_open", "line_breaks", "break_first"):  # the template of the model repairs these
            continue
        own = qwen3.apply_chat_template(messages, tokenize=False)
        for name in ("qwen3", "qwen3_empty_think"):
            if name == "qwen3_empty_think" and "<think>" in messages[-1]["content"]:
                continue  # its thought is taken away
            pieces = templates.load(name).segments(messages, last_only=True)
            assert "".join(piece.text for piece in pieces) == own
            encoded = encode_conversation(
                sample(messages), qwen3, templates.load(name), 4096, mask_history=True
            )
            assert encoded.ids == qwen3.encode(own, add_special_tokens=False)
        opened = qwen3.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        prompt = qwen3.encode(opened, add_special_tokens=False)
        filled = encode_conversation(
            sample(messages), qwen3, templates.load("qwen3_empty_think"), 4096, mask_history=True
        )
        assert filled.ids[: len(prompt)] == prompt
        assert filled.labels[: len(prompt)] == [IGNORE] * len(prompt)
        assert filled.labels[len(prompt)] != IGNORE


@pytest.mark.shared_data
def test_the_ids_of_a_known_conversation(qwen3: Any) -> None:
    """Written out by hand from the published vocabulary: no code of either side makes these numbers."""
    start, end, think, no_think, line = 151644, 151645, 151667, 151668, 198
    encoded = encode_conversation(
        sample([user("Hi"), assistant("Hello")]), qwen3, templates.load("qwen3_empty_think"), 64
    )
    prompt = [start, 872, line, 13048, end, line, start, 77091, line, think, 271, no_think, 271]
    assert encoded.ids == [*prompt, 9707, end, line]
    assert encoded.labels == [IGNORE] * len(prompt) + [9707, end, line]
