"""Configs and data files that are wrong in every way: the error names file and key (or line), and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import BadDataError, BadRecipeError
from engine.evaluate import EvalConfig, load_config, parse_config
from engine.evaluate.data import read_samples


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    for name in ("base", "pt", "sft"):
        (tmp_path / name).mkdir()
    (tmp_path / "qa.jsonl").write_text("")
    return {
        "base": "base",
        "adapters": {"pt": "pt", "sft": "sft"},
        "weights": [{"pt": 0, "sft": 1}, {"pt": 0.3, "sft": 0.7}],
        "decoding": [
            {"name": "greedy", "temperature": 0, "max_new_tokens": 64},
            {"name": "t", "temperature": 0.6},
        ],
        "seeds": [42, 43],
        "tasks": [{"name": "qa", "kind": "generation", "data": "qa.jsonl", "limit": 3}],
    }


def write(tmp_path: Path, raw: Any) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return path


def test_a_good_config_goes_round(raw, tmp_path):
    config = load_config(write(tmp_path, raw))
    assert config.base == tmp_path / "base" and config.tasks[0].data == tmp_path / "qa.jsonl"
    assert config.weights[1] == {"pt": 0.3, "sft": 0.7}
    assert (
        config.decoding[0].max_new_tokens == 64
        and config.decoding[0].greedy
        and not config.decoding[1].greedy
    )
    again = parse_config(config.to_dict())
    assert isinstance(again, EvalConfig) and again == config
    assert config.limited(2).tasks[0].limit == 2 and config.limited(9).tasks[0].limit == 3


def test_the_workspace_comes_before_the_configs_folder(raw, tmp_path):
    workspace = tmp_path / "ws"
    (workspace / "base").mkdir(parents=True)
    config = load_config(write(tmp_path, raw), workspace)
    assert config.base == workspace / "base" and config.adapters["pt"] == tmp_path / "pt"


def changed(raw, **changes):
    return {**raw, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: changed(r, wieghts=[]), r"wieghts is not a known key(?s:.)*did you mean weights"),
        (
            lambda r: changed(r, tasks=[{**r["tasks"][0], "limt": 3}]),
            r"tasks\[0\].limt (?s:.)*did you mean limit",
        ),
        (lambda r: changed(r, base="nowhere"), r"base is nowhere, which does not exist"),
        (lambda r: changed(r, base=None), r"base is missing"),
        (
            lambda r: changed(r, weights=[{"pt": 0.3, "sfft": 1}]),
            r"weights\[0\].sfft (?s:.)*did you mean sft",
        ),
        (lambda r: changed(r, weights=[{"pt": "a"}]), r"weights\[0\].pt should be a number, and is 'a'"),
        (lambda r: changed(r, weights=[{"pt": float("nan")}]), r"weights\[0\].pt should be a number"),
        (lambda r: changed(r, weights=[{"pt": 1}, {"pt": 1, "sft": 0}]), r"weights\[1\] is the same mixture"),
        (lambda r: changed(r, weights=None), r"weights is missing"),
        (lambda r: changed(r, weights=[]), r"weights should be a list"),
        (lambda r: changed(r, seeds=[-1]), r"seeds should be a whole number"),
        (
            lambda r: changed(r, templates=["qwen3_nothnk"]),
            r"templates is 'qwen3_nothnk'(?s:.)*qwen3_nothink",
        ),
        (lambda r: changed(r, decoding=[{"name": "a", "top_p": 0}]), r"decoding\[0\].top_p is 0"),
        (lambda r: changed(r, decoding=[{"name": "a"}, {"name": "a"}]), r"two entries named 'a'"),
        (lambda r: changed(r, dtype="int4"), r"dtype is 'int4', and should be one of bfloat16"),
        (lambda r: changed(r, tasks=[]), r"tasks should be a list with something in it"),
        (lambda r: changed(r, tasks=[{**r["tasks"][0], "scoring": "options"}]), r"scoring has no meaning"),
        (lambda r: changed(r, tasks=[{**r["tasks"][0], "limit": True}]), r"limit should be a whole number"),
        (lambda r: "base: [", r"sweep.yaml is not valid YAML"),
        (lambda r: "base: a\nbase: b\n", r"key 'base' stands twice \(again in line 2\)"),
        (lambda r: "- 1", r"should be a mapping"),
    ],
)
def test_mistakes_are_named(change, message, raw, tmp_path):
    path = write(tmp_path, change(raw))
    with pytest.raises(BadRecipeError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(str(path)) and error.value.exit_code == 2


def test_an_evaluation_is_of_one_mixture(raw, tmp_path):
    with pytest.raises(BadRecipeError, match="holds 2 mixtures"):
        load_config(write(tmp_path, raw), mode="eval")
    raw["weights"] = {"sft": 1}
    assert load_config(write(tmp_path, raw), mode="eval").weights == ({"pt": 0.0, "sft": 1.0},)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("generation", "{", "line 2 is not JSON"),
        ("generation", "[1]", "line 2 should be a JSON object"),
        ("generation", '{"id": "b", "prompt": "x"}', "line 2: 'reference' is missing"),
        ("generation", '{"id": "a", "prompt": "x", "reference": "y"}', "line 2: id 'a' was used in line 1"),
        ("generation", '{"id": "b", "prompt": 3, "reference": "y"}', "line 2: prompt should be text"),
        ("generation", '{"id": "b", "prompt": " ", "reference": "y"}', "line 2: prompt is empty"),
        (
            "multiple_choice",
            '{"id": "b", "question": "x", "options": ["y"], "answer": 0}',
            "options should be a list",
        ),
        (
            "multiple_choice",
            '{"id": "b", "question": "x", "options": ["y", "z"], "answer": 2}',
            r"\(0 to 1\)",
        ),
        ("multiple_choice", '{"id": "b", "question": "x", "options": ["y", "z"], "answer": true}', "index"),
        ("probes", '{"id": "b", "category": "x", "prompt": "y", "kind": "bad"}', "harmful, safe, advice"),
        ("perplexity", b'{"id": "b", "text": "\xff"}', "line 2 is not UTF-8"),
    ],
)
def test_broken_lines_name_file_and_line(kind, line, message, tmp_path):
    good = {
        "generation": '{"id": "a", "prompt": "x", "reference": "y"}',
        "multiple_choice": '{"id": "a", "question": "x", "options": ["y", "z"], "answer": 0}',
        "probes": '{"id": "a", "category": "x", "prompt": "y", "kind": "safe"}',
        "perplexity": '{"id": 1, "text": "x"}',
    }[kind]
    path = tmp_path / "data.jsonl"
    path.write_bytes(good.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(BadDataError, match=message) as error:
        read_samples(path, kind)
    assert str(path) in str(error.value)


def test_no_samples_and_no_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(BadDataError, match="no samples"):
        read_samples(tmp_path / "empty.jsonl", "probes")
    with pytest.raises(BadDataError, match="cannot read"):
        read_samples(tmp_path / "none.jsonl", "probes")


def test_a_limit_spreads_over_the_file(tmp_path):
    """Files are often sorted by category: the first rows would all be of one."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"id": {n}, "text": "t"}}\n' for n in range(10)))
    assert [sample.id for sample in read_samples(path, "perplexity", 4)] == ["0", "2", "5", "7"]
    assert [sample.id for sample in read_samples(path, "perplexity", 99)] == [str(n) for n in range(10)]
