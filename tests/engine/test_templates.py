"""Rendered text against transformers' own templates, and against texts written out by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import templates
from engine.errors import BadInputError, BadModelError, BadRecipeError

USER = {"role": "user", "content": "What is {content} asthma? {{ 7 * 7 }} {% raw %}"}
ANSWER = {"role": "assistant", "content": "A disease."}
SYSTEM = {"role": "system", "content": "Be brief."}
SHARED = os.environ.get("MEDMERGE_SHARED_DATA", "")


def test_chatml_and_nothink_by_hand_and_text_is_never_interpreted() -> None:
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is {content} asthma? {{ 7 * 7 }} {% raw %}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    for name in ("chatml", "qwen3_nothink", "qwen3"):
        assert templates.render(name, [SYSTEM, USER]) == expected
    assert templates.render("qwen3_empty_think", [SYSTEM, USER]) == expected + "<think>\n\n</think>\n\n"
    assert (
        templates.render("chatml", [SYSTEM, USER, ANSWER], answer_open=False)
        == expected + "A disease.<|im_end|>\n"
    )


def test_llama3_by_hand() -> None:
    assert templates.render("llama3", [USER, ANSWER], answer_open=False) == (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{USER['content']}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA disease.<|eot_id|>"
    )
    assert templates.load("llama3").stop == ("<|eot_id|>",)


def test_old_think_blocks_are_stripped_where_the_model_does_so() -> None:
    thought = {"role": "assistant", "content": "<think>\npondering\n</think>\n\nA disease."}
    again = {"role": "user", "content": "Sure?"}
    assert "pondering" not in templates.render("qwen3", [USER, thought, again])
    assert "pondering" in templates.render("qwen3_nothink", [USER, thought, again])
    turns = [USER, thought, again, ANSWER]
    last = templates.load("qwen3").segments(turns, last_only=True)
    assert [piece.answer for piece in last] == [False, True, False, True, True]
    assert [piece.text for piece in last if piece.answer] == [
        "A disease.<|im_end|>\n",
        "<think>\n\n</think>\n\n",
        "A disease.<|im_end|>\n",
    ]
    each = templates.load("qwen3").segments(turns)
    assert next(piece.text for piece in each if piece.answer) == f"{thought['content']}<|im_end|>\n"
    prefilled = templates.load("qwen3_empty_think").segments(turns)
    assert [piece.answer for piece in prefilled] == [False, True, False, True]
    assert all(piece.text.endswith("<think>\n\n</think>\n\n") for piece in prefilled if not piece.answer)
    assert "pondering" not in "".join(piece.text for piece in prefilled)


def test_a_models_template_that_rewrites_history_trains_the_last_answer() -> None:
    rewriting = templates.from_jinja(
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
        "{{ turn.content if loop.last else turn.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        {"eos_token": "<|im_end|>"},
    )
    thought = {"role": "assistant", "content": "<think>ponder</think>A disease."}
    pieces = rewriting.segments([USER, thought, USER, ANSWER])
    assert [piece.answer for piece in pieces] == [False, True]
    assert "ponder" not in pieces[0].text and pieces[0].text.count("A disease.") == 1


def test_marks_are_what_the_template_writes() -> None:
    assert templates.load("chatml").marks() == ("<|im_start|>", "<|im_end|>")
    assert templates.load("llama3").marks()[0] == "<|begin_of_text|>"
    assert set(templates.load("qwen3").marks()) == {"<|im_start|>", "<|im_end|>", "<think>", "</think>"}
    no_system = templates.from_jinja(
        "{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}",
        {"eos_token": "</s>"},
    )
    assert no_system.marks() == ("</s>",)


def test_descriptions_tell_templates_apart() -> None:
    described = {name: templates.describe(template) for name, template in templates.BUILTIN.items()}
    assert all(found["name"] == name for name, found in described.items())
    assert described["qwen3"]["stop"] == ["<|im_end|>"]
    text = described["qwen3_empty_think"]["text"]
    assert "prefill = " in text and text.endswith("<think>\n\n</think>\n\n(answer 2)<|im_end|>\n")
    thinking = [
        described[name]["sha256"] for name in ("qwen3", "qwen3_empty_think", "qwen3_nothink", "llama3")
    ]
    assert len(set(thinking)) == 4
    assert described["chatml"]["sha256"] == described["qwen3_nothink"]["sha256"]  # they write the same
    own = templates.from_jinja("{{ messages[0].content }}", {"eos_token": "</s>"})
    off = templates.from_jinja("{{ messages[0].content }}", {"eos_token": "</s>"}, enable_thinking=False)
    assert templates.describe(own)["text"] == "{{ messages[0].content }}"
    assert "options" not in templates.describe(own)
    assert templates.describe(off)["options"] == {"enable_thinking": False}
    assert templates.describe(off)["sha256"] != templates.describe(own)["sha256"]


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3"])
def test_model_template_equals_transformers(family: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = templates.load("model", folder)
    for messages in ([USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER]):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.prompt(messages) == expected
    assert "<|im_end|>" in template.stop
    turns = [SYSTEM, USER, ANSWER, USER, ANSWER]
    pieces = template.segments(turns)
    assert "".join(p.text for p in pieces) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert [p.text for p in pieces if p.answer] == ["A disease.<|im_end|>\n"] * 2


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED, reason="set MEDMERGE_SHARED_DATA to the folder of reference data")
def test_qwen3_formats_equal_the_real_template() -> None:
    from transformers import AutoTokenizer

    folder = Path(SHARED) / "qwen3_tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for messages in ([USER], [SYSTEM, USER], [USER, ANSWER, USER]):
        for name, thinking in (("qwen3", True), ("qwen3_empty_think", False)):
            expected = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            assert templates.render(name, messages) == expected
            assert templates.from_folder(folder, enable_thinking=thinking).prompt(messages) == expected
    trained = tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)
    assert templates.render("qwen3", [USER, ANSWER], answer_open=False) == trained


def test_a_template_that_rewrites_its_prompt_cannot_be_trained_on() -> None:
    text = "{% if add_generation_prompt %}OPEN{% else %}CLOSED{% endif %}"
    with pytest.raises(BadInputError, match="cannot be trained on"):
        templates.from_jinja(text, {}).segments([USER, ANSWER])


def test_templates_run_in_a_sandbox() -> None:
    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(BadInputError):
            templates.from_jinja(attack, {}).prompt([USER])
    refusing = templates.from_jinja("{{ raise_exception('alternate, please') }}", {})
    with pytest.raises(BadInputError, match="alternate, please"):
        refusing.prompt([USER])
    with pytest.raises(BadModelError, match="does not compile"):
        templates.from_jinja("{% for %}", {})


def test_bad_names_folders_and_messages(tmp_path: Path) -> None:
    with pytest.raises(BadRecipeError, match="unknown template 'qwen'"):
        templates.load("qwen")
    with pytest.raises(BadRecipeError, match="needs a model folder"):
        templates.load("model")
    with pytest.raises(BadModelError, match="no chat template"):
        templates.load("model", tmp_path)
    with pytest.raises(BadInputError, match="message 2"):
        templates.render("chatml", [USER, {"role": "tool", "content": "x"}])
    with pytest.raises(BadInputError, match="end with an assistant"):
        templates.load("chatml").segments([USER])


def test_named_templates_use_the_default_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],'
        ' "eos_token": {"content": "</s>"}}'
    )
    template = templates.from_folder(tmp_path)
    assert template.prompt([USER]) == "D" and template.stop == ("</s>",)
