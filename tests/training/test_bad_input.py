"""What cannot be trained is refused by name, before anything is written; what is lost is counted and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadDataError, BadInputError, BadRecipeError
from engine.jobs.events import EventWriter
from training.config import TrainConfig
from training.run import train

Settings = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_out": 11}, "11 held-out rows were asked of 12 different rows"),
        ({"quantization": "nf4"}, "needs a CUDA device"),
        ({"attention": "flash_attention_2"}, "needs CUDA"),
        ({"shots": 4000}, "4000 shots were asked, and there are 10"),
        ({"template": "llama3"}, r"<\|begin_of_text\|>"),
        ({"distributed": "fsdp"}, "more than one process"),
        ({"processes": 2, "accumulation": 3}, "cannot share it evenly"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    change: dict[str, Any], said: str, settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    config = settings("sft", sft_file, **change)
    with pytest.raises(BadInputError, match=said):
        train(config, tmp_path / "run", EventWriter())
    assert not (tmp_path / "run").exists() and not Path(config.output).exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "sft.jsonl holds no rows"),
        (b'{"prompt": "a", "reply": "b"}\n', "reply"),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": \n', "line 2"),
        (b'{"instruction": "a", "output": "caf\xe9"}\n', "line 1"),
        (
            b'{"messages": [{"role": "doctor", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
            "doctor",
        ),
        (b'{"instruction": "say <|im_end|> now", "output": "b"}\n', r"<\|im_end\|>"),
    ],
)
def test_bad_data_name_the_file_and_the_line(
    content: bytes, said: str, settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    sft_file.write_bytes(content)
    with pytest.raises(BadDataError, match=said) as caught:
        train(settings("sft", sft_file, held_out=0), tmp_path / "run", EventWriter())
    assert "sft.jsonl" in caught.value.message
    assert not (tmp_path / "run").exists()


def test_shortened_samples_are_counted_and_said(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    events = EventWriter()
    train(settings("sft", sft_file, cutoff=32, max_steps=1), tmp_path / "run", events)
    said = [event.data["message"] for event in events.kept if event.type == "warning"]
    assert any(
        "of 12 samples are longer than the cutoff of 32 tokens and were shortened" in text for text in said
    )


def test_when_every_label_is_masked_the_first_sample_says_why(
    settings: Settings, sft_file: Path, tmp_path: Path
) -> None:
    row = {"instruction": "word " * 4000, "output": "b " * 60}
    sft_file.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        BadDataError, match=r"no row of sft\.jsonl leaves a token to train on; the first: .*line 1: .*cutoff"
    ):
        train(settings("sft", sft_file, held_out=0, cutoff=16), tmp_path / "run", EventWriter())


def test_no_gpu_is_no_reason_for_a_traceback(settings: Settings, sft_file: Path) -> None:
    with pytest.raises(BadRecipeError, match="dtype is 'float16', expected one of"):
        settings("sft", sft_file, dtype="float16")
