"""The preview against the run's own encoder, and what the terminal gets of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadDataError
from engine.jobs.events import EventWriter
from tests.conftest import build_tokenizer
from training import preview
from training.masking import IGNORE
from tui.commands.train_preview import render_preview

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Make:
    """A preview of these rows: `make(kind, rows, samples=3, **settings)`."""

    def look(kind: str, rows: list[dict[str, Any]], samples: int = 3, **changes: Any) -> dict[str, Any]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {"kind": kind, "base": str(tiny_llama), "output": str(tmp_path / "out"), "data": [str(file)]}
        params = {"config": {**config, "cutoff": 64, **changes}, "samples": samples}
        return preview.run(params, EventWriter())

    return look


def row(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "output": answer}


def test_pieces_joined_are_what_the_model_sees(make: Make) -> None:
    result = make("sft", [row("What is asthma?", "A disease 🫁 哮喘.")], template="chatml", cutoff=128)
    assert result["template"]["name"] == "chatml" and "text" not in result["template"]
    sample = result["samples"][0]
    assert "".join(piece["text"] for piece in sample["pieces"]) == (
        "<|im_start|>user\nWhat is asthma?<|im_end|>\n<|im_start|>assistant\nA disease 🫁 哮喘.<|im_end|>\n"
    )
    trained = "".join(piece["text"] for piece in sample["pieces"] if piece["trained"])
    assert trained == "A disease 🫁 哮喘.<|im_end|>\n"
    assert {piece["text"] for piece in sample["pieces"] if piece["special"]} == {"<|im_start|>", "<|im_end|>"}
    assert sum(piece["tokens"] for piece in sample["pieces"]) == sample["length"]
    assert sum(piece["tokens"] for piece in sample["pieces"] if piece["trained"]) == sample["trained"]
    assert sample["place"].endswith("rows.jsonl, line 1") and sample["cut"] == 0 and sample["note"] == ""


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=40), seams=st.lists(st.booleans(), min_size=200, max_size=200))
def test_characters_split_over_tokens_stay_whole(text: str, seams: list[bool]) -> None:
    """Wherever trained and untrained tokens meet, also inside the bytes of one character."""
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    labels = [token if seam else IGNORE for token, seam in zip(ids, seams, strict=False)]
    found = preview.pieces(tokenizer, ids, labels)
    assert "".join(piece["text"] for piece in found) == text
    assert sum(piece["tokens"] for piece in found) == len(ids)


def test_counts_cuts_and_reasons(make: Make) -> None:
    rows = [
        row("What is asthma?", "A disease."),
        row("What? " * 400, "Six hours, for pain and fever, and the dose is 500 mg for an adult."),
        row("What?", "Wheezing. " * 60),
    ]
    result = make("sft", rows, template="chatml", cutoff=24)
    assert result["counted"] == {"rows": 3, "too_long": 2, "untrained": 1}
    _, none, cut = result["samples"]
    assert none["trained"] == 0 and "cutoff of 24" in none["note"]
    assert cut["cut"] > 0 and cut["length"] == 24 and not cut["note"]


def test_only_the_first_rows_are_read(make: Make) -> None:
    """Row 201 is broken, and nobody gets that far."""
    rows: list[dict[str, Any]] = [row(f"{n}?", "Yes.") for n in range(preview.ROWS)]
    result = make("sft", [*rows, {"instruction": 7}], samples=2, template="chatml")
    assert result["counted"]["rows"] == preview.ROWS and len(result["samples"]) == 2
    with pytest.raises(BadDataError, match="line 2"):
        make("sft", [rows[0], {"instruction": 7}], template="chatml")


def test_plain_text_shows_its_end_and_where_blocks_begin(make: Make) -> None:
    texts = ["Asthma is a disease of the airways. " * 3, "Short of breath. " * 4]
    result = make("pt", [{"text": text} for text in texts], cutoff=16)
    first, second = result["samples"]
    assert result["template"] is None
    assert "".join(piece["text"] for piece in first["pieces"]) == texts[0] + "<|im_end|>"
    stream = 0
    for sample in (first, second):
        starts, at = [], 0
        for piece in sample["pieces"]:
            starts += [at] if piece["border"] else []
            at += piece["tokens"]
        assert starts == [at for at in range(1, sample["length"]) if (stream + at) % 16 == 0]
        assert sample["trained"] == sample["length"] - 1 - len(starts)
        stream += sample["length"]
    assert first["length"] > 32
    assert "┃" in render_preview(result, color=False, width=80)


def test_several_turns_are_warned_of_where_thoughts_would_differ(make: Make) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "What?"), ("assistant", "A."), ("user", "Sure?"), ("assistant", "Yes."))
    ]
    warned = make("sft", [{"messages": turns}], template="qwen3")["warnings"]
    assert any("think block" in text for text in warned)
    masked = make("sft", [{"messages": turns}], template="qwen3", mask_history=True)["warnings"]
    assert not any("think block" in text and "inference" in text for text in masked)
    assert make("sft", [{"messages": turns}], template="chatml")["warnings"] == []


def test_it_is_what_a_run_trains_on(make: Make, tiny_llama: Path) -> None:
    from training.config import from_mapping
    from training.data.samples import Sample
    from training.prepare import Encoder, load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    shown = make("sft", [row("What is asthma?", "A disease.")], mask_history=True)["samples"][0]
    config = from_mapping(
        {"kind": "sft", "base": str(tiny_llama), "output": "o", "data": ["d"], "mask_history": True}
    )
    messages = (
        {"role": "user", "content": "What is asthma?"},
        {"role": "assistant", "content": "A disease."},
    )
    encoded = Encoder(config, tokenizer)(Sample(Path("d"), 1, messages=messages))
    assert shown["length"] == len(encoded.ids) and shown["trained"] == encoded.trained
    assert "".join(piece["text"] for piece in shown["pieces"]) == tokenizer.decode(encoded.ids)


@pytest.mark.parametrize("width", [30, 60, 100])
def test_the_terminal_gets_marked_lines_that_fit(make: Make, width: int) -> None:
    result = make("sft", [row("What is 哮喘?\nTell me.", "A disease.\n\n- wheezing " * 9)], cutoff=512)
    bare = render_preview(result, color=False, width=width)
    body = [line for line in bare.splitlines() if line.startswith("  ")]
    assert all(len(line) <= width for line in body)
    joined = "".join(line[2:] for line in body)
    assert "‹A disease.↵" in joined and joined.endswith("<|im_end|>↵›") and joined.count("‹") == 1
    coloured = render_preview(result, color=True, width=width)
    assert "\x1b[1;32m" in coloured and "‹" not in coloured
    assert "What is 哮喘?↵" in COLOUR.sub("", coloured).replace("\n  ", "")
    assert all(line.count("\x1b[") % 2 == 0 for line in coloured.splitlines())  # no colour runs over a line


def test_foreign_text_and_long_pieces_do_no_harm(make: Make) -> None:
    result = make("sft", [row("What is \x1b[31mred\x07?", "Wheezing and coughing. " * 200)], cutoff=4096)
    for color in (False, True):
        text = render_preview(result, color=color, width=80)
        assert "\x1b" not in COLOUR.sub("", text).replace("\x1b[", "") and "\x07" not in text
        assert "\x1b[31m" not in text and "�[31mred�" in text.replace("\n  ", " ").replace("  ", " ")
        assert re.search(r"about\s+[\d,]+\s+tokens", text)
