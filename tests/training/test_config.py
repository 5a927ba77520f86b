"""Settings and data files: presets, YAML, and errors that name what is wrong and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadDataError, BadRecipeError
from training.config import PRESETS, from_mapping, read
from training.corpora import hold_out, read_samples

GOOD = {"kind": "sft", "base": "b", "data": ["d"], "output": "o"}


def test_paper_presets_are_the_published_recipe() -> None:
    for name, epochs in (("paper-pt", 4.0), ("paper-sft", 2.0)):
        config = from_mapping({"preset": name, "base": "b", "data": "d", "output": "o"})
        assert (config.rank, config.alpha, config.dropout, config.weight_decay) == (16, 16, 0.07, 0.03)
        assert (config.accumulation, config.cutoff, config.epochs) == (64, 2048, epochs)
        assert config.template == "qwen3_nothink" and not config.train_on_prompt
    assert PRESETS["paper-sft"]["mask_history"] is True


def test_yaml_overrides_presets_and_paths_become_absolute(tmp_path: Path) -> None:
    workspace, beside = tmp_path / "ws", tmp_path / "conf"
    (workspace / "bases" / "tiny").mkdir(parents=True)
    beside.mkdir()
    (beside / "rows.jsonl").write_text("{}")
    path = beside / "c.yaml"
    path.write_text(
        "preset: demo-pt\nbase: bases/tiny\ndata: rows.jsonl\noutput: adapters/x\nlearning_rate: 3e-4\n"
    )
    config = read(path, workspace, epochs=2, template=None)
    assert (config.kind, config.learning_rate, config.epochs, config.rank) == ("pt", 3e-4, 2.0, 8)
    assert config.base == str(workspace / "bases" / "tiny") and config.output == str(
        workspace / "adapters" / "x"
    )
    assert config.data == (str(beside / "rows.jsonl"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'"),
        ({"preset": "demo"}, "unknown preset 'demo'"),
        ({"rank": "8"}, "rank must be int"),
        ({"rank": True}, "rank must be int"),
        ({"rank": 0}, "rank is 0, expected between 1 and 1024"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"learning_rate": "fast"}, "learning_rate must be float"),
        ({"data": [1]}, "data must be a list of texts"),
        ({"base": ""}, "base is missing"),
        ({"kind": "dpo"}, "kind is 'dpo', expected one of pt, sft"),
        ({"packing": "yes"}, "packing must be bool"),
    ],
)
def test_bad_settings_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipeError, match=message):
        from_mapping({**GOOD, **change})


def test_unreadable_configs(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(BadRecipeError, match="cannot read"):
        read(path, tmp_path)
    for content, message in (("a: [1\n", "not valid YAML"), ("- 1\n", "keys and values")):
        path.write_text(content)
        with pytest.raises(BadRecipeError, match=message):
            read(path, tmp_path)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("pt", '{"text": ""}', r"rows\.jsonl, line 2: 'text' must be a text that is not empty"),
        ("pt", '{"txt": "a"}', "line 2: 'text' .* found missing"),
        ("sft", '{"instruction": "q", "output": null}', "line 2: 'output'"),
        ("sft", '{"messages": [{"role": "user", "content": "q"}]}', "line 2: 'messages'"),
        ("sft", '{"messages": [{"role": "bot", "content": "q"}]}', "line 2: 'messages'"),
        ("sft", '{"instruction": "q", "output"', "line 2: not valid JSON"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, kind: str, line: str, message: str) -> None:
    good = '{"text": "a"}' if kind == "pt" else '{"instruction": "q", "output": "a"}'
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(BadDataError, match=message):
        read_samples(tmp_path / "rows.jsonl", kind)


def test_alpaca_and_messages_become_conversations(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"instruction": "q", "input": "more", "output": "a", "system": "s"}, {"messages": turns}],
    )
    first, second = read_samples(path, "sft")
    assert [turn["content"] for turn in first.messages] == ["s", "q\nmore", "a"]
    assert list(second.messages) == turns and second.place.endswith("rows.jsonl, line 2")


def test_held_out_rows_are_stable_and_disjoint(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"text": f"text {n % 15}"} for n in range(20)]  # five texts twice
    samples = read_samples(write_jsonl(tmp_path / "rows.jsonl", rows), "pt")
    training, held = hold_out(samples, 6, seed=1)
    assert len(training) + len(held) == 20 and not {s.text for s in training} & {s.text for s in held}
    assert len({s.text for s in held}) == 6
    assert {s.text for s in hold_out(samples[::-1], 6, seed=1)[1]} == {s.text for s in held}
    assert len(hold_out(samples[:3], 6, seed=1)[1]) == 1
