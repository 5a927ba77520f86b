"""Settings and data files: presets, YAML, and errors that name what is wrong and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadRecipeError
from training.config import PRESETS, from_mapping, read
from training.data.sources import Source

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
    assert config.data == (Source(str(beside / "rows.jsonl")),)


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
        ({"data": [1]}, "data must be a path or a mapping"),
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
