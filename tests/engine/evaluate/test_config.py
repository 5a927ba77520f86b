"""Configs and data files that are wrong in every way: the error names file and key (or line), and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadDataError, BadRecipeError
from engine.evaluate import EvalConfig, load_config, parse_config
from engine.evaluate.config import Decoding, GgufFile, Server
from engine.evaluate.data import read_samples
from engine.evaluate.tasks.task import HALVES, KINDS, SCORINGS, STYLES, Task


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
        (
            lambda r: changed(r, base="b" * 5000),
            r"base is b{60}, which cannot be looked up: File name too long",
        ),
        (
            lambda r: changed(r, base="~nobody-here/b"),
            r"base is ~nobody-here/b, which cannot be looked up: Co",
        ),
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


def mixtures(raw, weights):
    return [tuple(m.values()) for m in parse_config({**raw, "weights": weights}).weights]


@pytest.fixture
def resolved(raw, tmp_path):
    return load_config(write(tmp_path, raw)).to_dict()


def test_weights_as_words_grids_and_lines(resolved):
    assert mixtures(resolved, ["base", "pt", "sft"]) == [(0, 0), (1, 0), (0, 1)]
    assert mixtures(resolved, "sft") == [(0, 1)]
    grid = {"grid": {"pt": [0, 0.3], "sft": [0, 0.7, 1]}}
    assert mixtures(resolved, grid) == [(0, 0), (0, 0.7), (0, 1), (0.3, 0), (0.3, 0.7), (0.3, 1)]
    assert mixtures(resolved, {"line": {"pt": [0, 0.5], "sft": [1, 0.5]}}) == [(0, 1), (0.5, 0.5)]
    tenths = {"line": {"pt": {"from": 0, "to": 1, "step": 0.1}, "sft": "rest"}}
    assert mixtures(resolved, tenths) == [
        (n / 10, (10 - n) / 10) for n in range(11)
    ]  # no 0.30000000000000004
    down = {"grid": {"pt": {"from": 1, "to": 0, "points": 5}}}
    assert mixtures(resolved, down) == [(1, 0), (0.75, 0), (0.5, 0), (0.25, 0), (0, 0)]
    assert mixtures(resolved, ["pt", down, {"sft": 1}])[0] == (1, 0)  # what a grid repeats is left out
    assert len(mixtures(resolved, ["pt", down, {"sft": 1}])) == 6


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["bse"], r"weights\[0\] is 'bse', which is no adapter(?s:.)*did you mean base"),
        (["pt", {"pt": 1}], r"weights\[1\] is the same mixture as weights\[0\]"),
        ({"grid": {"ppt": [1]}}, r"weights\[0\].grid.ppt is not a known key(?s:.)*did you mean pt"),
        ({"grid": {}}, r"grid is empty"),
        ({"grid": {"pt": []}}, r"grid.pt should be a list with something"),
        ({"line": {"pt": [0, 1], "sft": [1]}}, r"differ in length: pt has 2, sft has 1"),
        ({"line": {"pt": "rest"}}, r"pt is rest, which one adapter of a line can be"),
        (
            {"line": {"pt": {"from": 0, "to": 1, "step": 0.3}}},
            r"does not lead from 0.0 to 1.0 in whole steps",
        ),
        ({"line": {"pt": {"from": 0, "to": 1}}}, r"should have either step or points"),
        ({"grid": {"pt": {"from": 0, "to": 1, "step": 1e-9}}}, r"makes 1,000,000,000 steps; at most 10,000"),
        ({"grid": {a: {"from": 0, "to": 1, "points": 200} for a in ("pt", "sft")}}, r"makes 40,000 mixtures"),
        ({"grid": {"pt": [0]}, "line": {}}, r"line is not a known key"),
    ],
)
def test_weights_that_make_no_sense(weights, message, resolved):
    with pytest.raises(BadRecipeError, match=message):
        parse_config({**resolved, "weights": weights})


def test_the_papers_decoding(raw, tmp_path):
    raw["decoding"] = [{"use": "paper", "max_new_tokens": 64}]
    drawn = load_config(write(tmp_path, raw)).decoding
    assert [(d.name, d.temperature, d.top_p) for d in drawn] == [
        ("T0.2 p0.7", 0.2, 0.7), ("T0.6 p0.8", 0.6, 0.8), ("T0.95 p0.7", 0.95, 0.7), ("greedy", 0, 1),
    ]  # fmt: skip
    assert {d.max_new_tokens for d in drawn} == {64}


def test_files_and_servers_need_no_base(raw, tmp_path):
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    server = {"name": "there", "url": "https://host:8443/v1/", "api": "chat", "key_env": "MY_KEY"}
    config = load_config(write(tmp_path, {"gguf": ["q4.gguf"], "servers": [server], "tasks": raw["tasks"]}))
    assert config.base is None and config.weights == () and config.gguf[0].name == "q4"
    assert config.servers[0].url == "https://host:8443/v1" and config.servers[0].retries == 5
    assert parse_config(config.to_dict()) == config
    with pytest.raises(BadRecipeError, match="it names 2 models"):
        parse_config(config.to_dict(), mode="eval")
    completions = {**server, "api": "completions"}
    with pytest.raises(BadRecipeError, match=r"templates is model(?s:.)*qwen3_nothink"):
        load_config(write(tmp_path, {"servers": [completions], "tasks": raw["tasks"]}))
    named = {"servers": [completions], "tasks": raw["tasks"], "templates": ["chatml"]}
    assert load_config(write(tmp_path, named), mode="eval").templates == ("chatml",)
    with pytest.raises(BadRecipeError, match="two entries named 'q4'"):
        load_config(write(tmp_path, {"gguf": ["q4.gguf", "q4.gguf"], "tasks": raw["tasks"]}))


@pytest.mark.parametrize(
    "change",
    [
        {"api_key": "sk-123"},
        {"key_env": "sk-123"},
        {"url": "http://u:sk-123@h/v1"},
        {"url": "http://h/?k=sk-123"},
    ],
)
def test_a_key_in_a_config_is_refused_and_not_repeated(change, raw, tmp_path):
    server = {"name": "s", "url": "http://h/v1", "api": "chat", **change}
    with pytest.raises(BadRecipeError, match="key_env: MY_SERVER_KEY") as error:
        load_config(write(tmp_path, {"servers": [server], "tasks": raw["tasks"]}))
    assert "sk-123" not in str(error.value)


words = st.text(st.characters(codec="utf-8", exclude_characters="{}"), max_size=8)
names = words.filter(str.strip)
_unseen = {"exclude_categories": ("Cc", "Cs", "Zl", "Zp"), "exclude_characters": "{}\u200e\u200f\u061c"}
labels = (
    st.text(  # what is printed as a name: one line; direction marks (2066 to 2069, 202A to 202E) are out too
        st.characters(**_unseen).filter(
            lambda c: not ("\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069")
        ),
        max_size=8,
    ).filter(str.strip)
)
numbers = st.floats(-2, 2, allow_nan=False)


@st.composite
def configs(draw, folder: Path) -> EvalConfig:
    """Any config that the dataclasses can hold and the parser takes."""
    kind = draw(st.sampled_from(KINDS))
    only = {}
    if kind == "multiple_choice":
        scoring = draw(st.sampled_from(SCORINGS))
        only = {
            "scoring": scoring,
            "shuffle": draw(st.none() | st.integers(0, 9)),
            "style": draw(st.sampled_from(STYLES)),
            "mixed_options": draw(st.booleans()),
            "instruction": draw(names) if scoring == "generated" else "",
            "columns": {"options": draw(st.lists(names, min_size=2, max_size=4))},
        }
    elif kind == "generation":
        only = {
            "references": draw(st.booleans()),
            "columns": draw(st.dictionaries(st.just("reference"), names)),
        }
    task = Task(
        draw(labels), kind, folder / "qa.jsonl", draw(st.none() | st.integers(1, 9)),
        half=draw(st.sampled_from(HALVES)), system=draw(st.just("") | names), prompt=draw(st.just("") | names),
        where=draw(st.dictionaries(names, st.none() | st.booleans() | words | st.lists(words, min_size=1), max_size=2)),
        replace=draw(st.dictionaries(names, st.dictionaries(words, names, min_size=1, max_size=2), max_size=2)),
        language=draw(st.sampled_from(["en", "zh"])), header=draw(st.booleans()), **only,
    )  # fmt: skip
    with_base = draw(st.booleans())
    mixture = st.fixed_dictionaries({"pt": numbers, "sft": numbers})
    drawing = st.builds(
        Decoding, labels, st.floats(0, 100), st.floats(0.01, 1), st.integers(0, 99), st.integers(1, 99)
    )
    server = st.builds(
        Server, labels, st.sampled_from(["http://h/v1", "https://[::1]:80"]), words.map(str.strip), st.just("chat"),
        st.just("") | st.just("K_1"), st.integers(1, 9), st.floats(0.1, 99), st.integers(0, 9),
    )  # fmt: skip
    mixtures = st.lists(mixture, min_size=1, max_size=3, unique_by=lambda m: (m["pt"], m["sft"]))
    files = (GgufFile("the file", folder / "qa.jsonl"),)
    return EvalConfig(
        base=folder / "base" if with_base else None,
        adapters={"pt": folder / "pt", "sft": folder / "sft"} if with_base else {},
        weights=tuple(draw(mixtures)) if with_base else (),
        tasks=(task,),
        templates=tuple(draw(st.lists(st.sampled_from(["model", "chatml", "qwen3"]), min_size=1, unique=True))),
        decoding=tuple(draw(st.lists(drawing, min_size=1, max_size=2, unique_by=lambda d: d.name))),
        seeds=tuple(draw(st.lists(st.integers(0, 9), min_size=1, unique=True))),
        gguf=files if not with_base or draw(st.booleans()) else (),
        servers=tuple(draw(st.lists(server, max_size=2, unique_by=lambda s: s.name))),
    )  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_config_goes_round_through_json_and_yaml(data, raw, tmp_path):
    config = data.draw(configs(tmp_path))
    raw = json.loads(json.dumps(config.to_dict()))
    assert parse_config(raw) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(raw))) == config
    assert config.limited(1).tasks[0].limit == 1


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
