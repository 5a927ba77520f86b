"""The JSON Schemas: as committed, and of one mind with the parser on good and bad configs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from engine.errors import BadRecipeError
from engine.evaluate.config import Decoding, EvalConfig, GgufFile, Server, parse_config
from engine.evaluate.schema import PROMPT, SCHEMAS, field_docs, schema, text, with_tables
from engine.evaluate.tasks import PRESETS, Task, preset_path
from engine.evaluate.tasks.prompt import split_prompt

ROOT = Path(__file__).parents[3]
GEN = {"name": "g", "kind": "generation", "data": "d.jsonl"}
MC = {"name": "m", "kind": "multiple_choice", "data": "d.jsonl"}
MIX = {"base": "base", "adapters": {"pt": "pt", "sft": "sft"}}
SERVER = {"name": "s", "url": "http://localhost:8000/v1", "api": "chat"}


def config(**changes: Any) -> dict[str, Any]:
    return {"base": "base", "tasks": [GEN], **changes}


def task(**changes: Any) -> dict[str, Any]:
    return config(tasks=[{**GEN, **changes}])


def choice(**changes: Any) -> dict[str, Any]:
    return config(tasks=[{**MC, **changes}])


GOOD: dict[str, Any] = {
    "least": config(),
    "mixture": config(**MIX, weights={"pt": 0.3, "sft": 0.7}),
    "mixtures": config(**MIX, weights=[{"pt": 0.3}, "base", "sft"]),
    "grid": config(**MIX, weights={"grid": {"pt": [0, 0.3, 1], "sft": {"from": 0, "to": 1, "points": 3}}}),
    "line": config(
        **MIX, weights=["base", {"line": {"pt": {"from": 0, "to": 1, "step": 0.1}, "sft": "rest"}}]
    ),
    "paper": config(
        decoding=["paper"], templates=["qwen3", "qwen3_empty_think", "qwen3_nothink"], seeds=[1, 2]
    ),
    "paper short": config(decoding=[{"use": "paper", "max_new_tokens": 64}, {"name": "x", "top_p": 0.5}]),
    "word": config(decoding="paper"),
    "gguf": {"gguf": ["a.gguf", {"name": "q8", "path": "b.gguf"}], "tasks": [GEN]},
    "server": {"servers": [SERVER], "tasks": [GEN]},
    "key": {"servers": [{**SERVER, "key_env": "MY_KEY", "timeout": 5, "retries": 0}], "tasks": [GEN]},
    "preset": config(tasks=["xstest", {"use": "medqa", "data": "d.jsonl", "limit": 3}, "t.yaml"]),
    "prompt": task(prompt="{a} {{b}}", columns={"reference": "r", "id": "n"}, where={"a": [1, None, True]}),
    "choice": choice(scoring="generated", instruction="x {letters}", shuffle=1, language="zh"),
    "options": choice(columns={"options": ["a", "b"], "answer": "c"}, answers="index1", mixed_options=True),
    "constant": choice(columns={"options": {"value": ["yes", "no"]}}, style="pubmedqa", half="dev"),
    "replace": task(replace={"a": {"X": "y"}}, empty="skip", max_new_tokens=None, limit=None),
    "settings": config(dtype="float32", compute="model", device="cpu", batch_size=1),
}
BAD: dict[str, Any] = {
    "unknown key": config(tmplates=["model"]),
    "unknown task key": task(limt=3),
    "no tasks": {"base": "base"},
    "tasks empty": config(tasks=[]),
    "tasks a mapping": config(tasks={"name": "x"}),
    "no base": {"tasks": [GEN]},
    "weights without base": {"gguf": ["a.gguf"], "weights": [{"pt": 1}], "tasks": [GEN]},
    "adapters without base": {"gguf": ["a.gguf"], "adapters": {"pt": "pt"}, "tasks": [GEN]},
    "adapters without weights": config(**MIX),
    "weight as text": config(**MIX, weights=[{"pt": "a"}]),
    "weights empty": config(**MIX, weights=[]),
    "grid of a word": config(**MIX, weights={"grid": {"pt": "x"}}),
    "grid with rest": config(**MIX, weights={"grid": {"pt": [0, 1], "sft": "rest"}}),
    "steps and points": config(**MIX, weights={"line": {"pt": {"from": 0, "to": 1, "step": 1, "points": 2}}}),
    "step 0": config(**MIX, weights={"grid": {"pt": {"from": 0, "to": 1, "step": 0}}}),
    "template": config(templates=["qwen4"]),
    "templates twice": config(templates=["model", "model"]),
    "seed": config(seeds=[-1]),
    "seeds none": config(seeds=[]),
    "decoding word": config(decoding=["papers"]),
    "decoding key": config(decoding=[{"name": "x", "temprature": 1}]),
    "decoding use": config(decoding=[{"use": "paper", "top_p": 0.1}]),
    "top_p 0": config(decoding=[{"name": "x", "top_p": 0}]),
    "temperature": config(decoding=[{"name": "x", "temperature": -1}]),
    "no decoding name": config(decoding=[{"top_p": 0.5}]),
    "dtype": config(dtype="int4"),
    "batch": config(batch_size=0),
    "batch truth": config(batch_size=True),
    "gguf without path": {"gguf": [{"name": "x"}], "tasks": [GEN]},
    "url": {"servers": [{**SERVER, "url": "localhost:8000"}], "tasks": [GEN]},
    "url with a password": {"servers": [{**SERVER, "url": "http://me:secret@host/v1"}], "tasks": [GEN]},
    "url with a query": {"servers": [{**SERVER, "url": "http://host/v1?key=secret"}], "tasks": [GEN]},
    "literal key": {"servers": [{**SERVER, "api_key": "sk-secret"}], "tasks": [GEN]},
    "literal key_env": {"servers": [{**SERVER, "key_env": "sk-secret"}], "tasks": [GEN]},
    "literal key_env of a service": {"servers": [{**SERVER, "key_env": "hf_secret"}], "tasks": [GEN]},
    "api": {"servers": [{**SERVER, "api": "responses"}], "tasks": [GEN]},
    "timeout": {"servers": [{**SERVER, "timeout": 0}], "tasks": [GEN]},
    "kind": task(kind="chat"),
    "no data": config(tasks=[{"name": "x", "kind": "probes"}]),
    "empty name": task(name=" "),
    "limit": task(limit=0),
    "limit as text": task(limit="3"),
    "half": task(half="val"),
    "scoring of a generation": task(scoring="options"),
    "references of probes": task(kind="probes", references=False),
    "instruction without generated": choice(instruction="x"),
    "answers": choice(answers="number"),
    "brace": task(prompt="a { b"),
    "empty placeholder": task(prompt="a {} b"),
    "column of another kind": task(columns={"answer": "a"}),
    "unknown column field": task(columns={"refrence": "a"}),
    "one option column": choice(columns={"options": ["a"]}),
    "constant with another key": choice(columns={"options": {"values": ["a", "b"]}}),
    "where empty": task(where={"a": []}),
    "replace no mapping": task(replace={"a": "b"}),
    "header": task(header="no"),
    "preset": config(tasks=["medqaa"]),
    "not a mapping": [1],
}  # fmt: skip
SECRETS = ("sk-secret", "hf_secret", "me:secret", "key=secret")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "pt", "sft"):
        (tmp_path / name).mkdir()
    for name in ("d.jsonl", "a.gguf", "b.gguf"):
        (tmp_path / name).write_text("")
    (tmp_path / "t.yaml").write_text("{name: t, kind: perplexity, data: d.jsonl}")
    return tmp_path


def agrees(name: str, value: Any) -> bool:
    return bool(Draft202012Validator(schema(name)).is_valid(value))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_committed_schemas_are_those_of_the_code(name):
    """Made by: python -m engine.evaluate.schema docs"""
    Draft202012Validator.check_schema(schema(name))
    assert (ROOT / "docs" / "schemas" / f"{name}.json").read_text(encoding="utf-8") == text(name)


def test_the_tables_of_the_docs_are_those_of_the_code():
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert with_tables(page) == page


@pytest.mark.parametrize("cls", [Task, EvalConfig, Decoding, GgufFile, Server])
def test_every_field_is_described_once(cls):
    assert list(field_docs(cls)) == list(cls.__dataclass_fields__)


@pytest.mark.parametrize("name", GOOD)
def test_both_take_good_configs(name, folder):
    parse_config(GOOD[name], roots=[folder])
    assert agrees("eval", GOOD[name]), list(Draft202012Validator(schema("eval")).iter_errors(GOOD[name]))


@pytest.mark.parametrize("name", BAD)
def test_both_refuse_bad_configs(name, folder):
    with pytest.raises(BadRecipeError) as error:
        parse_config(BAD[name], roots=[folder])
    assert not any(secret in str(error.value) for secret in SECRETS)  # keys are never repeated
    assert not agrees("eval", BAD[name])


def test_both_take_what_is_shipped():
    for preset in PRESETS:
        assert agrees("task", yaml.safe_load(preset_path(preset).read_text()))
    for path in (ROOT / "training" / "demo" / "configs").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        if "tasks" in raw and "search" not in raw:
            assert agrees("eval", raw), path


def test_a_resolved_config_fits_too(folder):
    for raw in GOOD.values():
        assert agrees("eval", json.loads(json.dumps(parse_config(raw, roots=[folder]).to_dict())))


@pytest.mark.parametrize(
    "prompt", ["", "a", "{a}", "{{", "}}", "{{a}}", "{a}}", "{{a}", "{{{a}}}", "{}", "{ }", "a\n{b c}", "}"]
)
def test_prompts_are_judged_alike(prompt):
    try:
        split_prompt(prompt)
        good = True
    except ValueError:
        good = False
    assert bool(re.search(PROMPT, prompt)) == good
