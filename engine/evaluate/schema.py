"""JSON Schemas (draft 2020-12) of eval and sweep configs and of task files, made from the dataclasses.

Types, choices, defaults and limits come from the fields, the words from the docstrings, so that editor, parser and
docs say one thing. `python -m engine.evaluate.schema docs` writes docs/schemas/*.json and the tables of docs/tasks.md;
tests compare. Called by `medmerge tasks --schema` as well.

What only the parser checks: files that exist; labels of weights that are adapters; names, mixtures and labels that
stand twice; lengths and steps of a line; a port above 65535; a template for servers without a base; whole numbers
written as 3.0; and everything about a task that is used from a file (`use`).
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import typing
from pathlib import Path
from typing import Any

from engine.evaluate.config import (
    DECODING_WORDS,
    KEY_NAME,
    SERVER_URL,
    Decoding,
    EvalConfig,
    GgufFile,
    Server,
)
from engine.evaluate.tasks.parse import ONLY, PRESETS, preset_values
from engine.evaluate.tasks.task import FIELDS, Task
from engine.evaluate.values import limits_of

SCHEMAS = ("eval", "task")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
Json = dict[str, Any]

TEXT: Json = {"type": "string", "pattern": r"\S"}
NUMBER: Json = {"type": "number"}
SCALAR: Json = {"type": ["string", "number", "boolean", "null"]}
PROMPT = r"^$|^(?=[\s\S]*\S)(?:[^{}]|\{\{|\}\}|\{[^{}]*[^{}\s][^{}]*\})*$"
USE: Json = {
    "description": "a preset or a task file; the other fields change it (columns are merged, the rest replaced)",
    "anyOf": [{"enum": list(PRESETS)}, {"type": "string", "pattern": r"\.ya?ml$"}],
}


def schema(name: str) -> Json:
    """The schema `eval` (evaluations and sweeps) or `task` (a task file)."""
    if name == "task":
        title = "a task of medmerge"
        return {"$schema": DRAFT, "title": title, **_task()}
    return {"$schema": DRAFT, "title": "an evaluation or a sweep of medmerge", **_eval()}


def field_docs(cls: Any) -> dict[str, str]:
    """What the docstring of a dataclass says about each field, in one line each."""
    docs: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        found = re.match(r"(\w+): (.*)", line)
        if found and found.group(1) in cls.__dataclass_fields__:
            name = found.group(1)
            docs[name] = found.group(2)
        elif name and line.startswith("    "):
            docs[name] += " " + line.strip()
        else:
            name = ""
    return docs


def _plain(cls: Any, name: str) -> Json:
    """The schema of a field that is text, a number, a truth value or one of several words."""
    hint, limits = limits_of(cls, name)
    kinds = typing.get_args(hint) or (hint,)
    default = cls.__dataclass_fields__[name].default
    found: Json
    if limits.choices:
        found = {"enum": list(limits.choices)}
    elif bool in kinds:
        found = {"type": "boolean"}
    elif int in kinds:
        found = {
            "type": ["integer", "null"] if type(None) in kinds else "integer",
            "minimum": limits.least or 0,
        }
    elif float in kinds:
        found = {"type": "number"}
        found |= {} if limits.low == -math.inf else {"minimum": limits.low}
        found |= {} if limits.high == math.inf else {"maximum": limits.high}
    else:
        found = {"type": "string", **({} if default == "" else {"pattern": r"\S"})}
        if default == "":
            found["pattern"] = r"^$|\S"
    if isinstance(default, str | int | float | bool | None):
        found["default"] = default
    return found


def _object(cls: Any, special: dict[str, Json], required: list[str]) -> Json:
    docs = field_docs(cls)
    properties = {
        name: {"description": docs[name], **(special[name] if name in special else _plain(cls, name))}
        for name in cls.__dataclass_fields__
    }
    found: Json = {"type": "object", "additionalProperties": False, "properties": properties}
    return found | ({"required": required} if required else {})


def _task() -> Json:
    """A task file: any fields, for what uses it may add the rest."""
    column = {"anyOf": [TEXT, {"type": "null"}, _constant()]}
    options = {"anyOf": [*column["anyOf"], {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 26}]}
    fields = dict.fromkeys(name for names in FIELDS.values() for name in names)
    values = {"anyOf": [SCALAR, {"type": "array", "items": SCALAR, "minItems": 1}]}
    words = {"type": "object", "minProperties": 1, "additionalProperties": TEXT}
    special: dict[str, Json] = {
        "data": TEXT,
        "prompt": {"type": "string", "pattern": PROMPT, "default": ""},
        "columns": {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: options if name == "options" else column for name in fields},
        },
        "where": {"type": "object", "propertyNames": {"pattern": r"\S"}, "additionalProperties": values},
        "replace": {"type": "object", "propertyNames": {"pattern": r"\S"}, "additionalProperties": words},
    }
    found = _object(Task, special, [])
    found["properties"] = {"use": USE, **found["properties"]}
    found["allOf"] = [_for_kind(kind) for kind in FIELDS]
    found["allOf"].append(
        {
            "if": {
                "properties": {"instruction": {"minLength": 1}},
                "required": ["instruction"],
                "not": {"required": ["use"]},
            },
            "then": {"properties": {"scoring": {"const": "generated"}}, "required": ["scoring"]},
        }
    )
    return found


def _constant() -> Json:
    value = {"anyOf": [TEXT, {"type": "array", "items": TEXT}]}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {"value": value},
        "required": ["value"],
    }


def _for_kind(kind: str) -> Json:
    """What a task of this kind may say: its fields as columns, and other kinds' settings at their defaults only."""
    fixed: Json = {
        name: {"const": Task.__dataclass_fields__[name].default}
        for name, only in ONLY.items()
        if only != kind
    }
    columns = {"propertyNames": {"enum": list(FIELDS[kind])}}
    return {
        "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
        "then": {"properties": {**fixed, "columns": columns}},
    }


def _eval() -> Json:
    from engine.templates import BUILTIN

    number_map = {"type": "object", "additionalProperties": NUMBER}
    steps = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "from": NUMBER,
            "to": NUMBER,
            "step": {"type": "number", "exclusiveMinimum": 0},
            "points": {"type": "integer", "minimum": 2},
        },
        "required": ["from", "to"],
        "oneOf": [{"required": ["step"]}, {"required": ["points"]}],
    }
    axis = {"anyOf": [{"type": "array", "items": NUMBER, "minItems": 1}, steps]}
    spreads = [
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                name: {
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {"anyOf": [*axis["anyOf"], {"const": "rest"}]}
                    if name == "line"
                    else axis,
                }
            },
            "required": [name],
        }
        for name in ("grid", "line")
    ]
    mixture = [number_map, {"type": "string"}, *spreads]
    words = {"enum": list(DECODING_WORDS)}
    most = _plain(Decoding, "max_new_tokens")
    decoding = _object(Decoding, {}, ["name"])
    decoding["properties"]["top_p"] = {
        **{k: v for k, v in decoding["properties"]["top_p"].items() if k != "minimum"}, "exclusiveMinimum": 0,
    }  # fmt: skip
    named = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"use": words, "max_new_tokens": most},
        "required": ["use"],
    }
    file = _object(GgufFile, {"path": TEXT}, ["path"])
    server = _object(
        Server,
        {
            "url": {"type": "string", "pattern": f"^{SERVER_URL.pattern}$"},
            "key_env": {"type": "string", "pattern": f"^({KEY_NAME.pattern})?$", "default": ""},
        },
        ["name", "url"],
    )
    whole = {"anyOf": [{"required": ["use"]}, {"required": ["name", "kind", "data"]}]}
    task = {"anyOf": [*USE["anyOf"], {"$ref": "#/$defs/task", "type": "object", **whole}]}
    special: dict[str, Json] = {
        "base": {"anyOf": [TEXT, {"type": "null"}]},
        "adapters": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": r"\S"},
            "additionalProperties": TEXT,
        },
        "weights": {
            "anyOf": [{"type": "null"}, *mixture, {"type": "array", "items": {"anyOf": mixture}}],
        },
        "tasks": {"type": "array", "minItems": 1, "items": task},
        "templates": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {"enum": ["model", *BUILTIN]},
            "default": ["model"],
        },
        "decoding": {
            "anyOf": [words, {"type": "array", "minItems": 1, "items": {"anyOf": [words, named, decoding]}}],
            "default": [{"name": "greedy"}],
        },
        "seeds": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {"type": "integer", "minimum": 0},
            "default": [42],
        },
        "gguf": {"type": ["array", "null"], "items": {"anyOf": [TEXT, file]}},
        "servers": {"type": ["array", "null"], "items": server},
    }
    found = _object(EvalConfig, special, ["tasks"])
    has_base = {"properties": {"base": {"type": "string"}}, "required": ["base"]}
    some = {"type": "array", "minItems": 1}
    found["if"] = has_base
    found["then"] = {
        "if": {"properties": {"adapters": {"type": "object", "minProperties": 1}}, "required": ["adapters"]},
        "then": {"required": ["weights"], "properties": {"weights": {"not": {"type": "null"}}}},
        "anyOf": [  # a base without mixtures is there for its template, and something else is measured
            {"properties": {"weights": {"not": {"type": "array", "maxItems": 0}}}},
            {"properties": {"gguf": some}, "required": ["gguf"]},
            {"properties": {"servers": some}, "required": ["servers"]},
        ],
    }
    found["else"] = {
        "description": "without a base there are no mixtures, only files or servers",
        "anyOf": [
            {"properties": {"gguf": some}, "required": ["gguf"]},
            {"properties": {"servers": some}, "required": ["servers"]},
        ],
        "properties": {
            "adapters": {"anyOf": [{"type": "null"}, {"maxProperties": 0}]},
            "weights": {"anyOf": [{"type": "null"}, {"maxItems": 0, "maxProperties": 0, "maxLength": 0}]},
        },
    }
    found["$defs"] = {"task": _task()}
    return found


def text(name: str) -> str:
    return json.dumps(schema(name), indent=2, ensure_ascii=False) + "\n"


def fields_table() -> str:
    """The fields of a task as rows of Markdown."""
    rows = []
    for name, words in field_docs(Task).items():
        default = (
            _plain(Task, name).get("default", "")
            if name not in ("data", "columns", "where", "replace")
            else ""
        )
        shown = "" if default == "" else f"`{json.dumps(default)}`".replace('"', "")
        rows.append(f"| `{name}` | {shown} | {words} |")
    return "\n".join(["| field | default | |", "|---|---|---|", *rows])


def presets_table() -> str:
    """The presets as rows of Markdown: kind, where the data are published, their licence."""
    rows = []
    for name in PRESETS:
        values = preset_values(name)
        scoring = f" ({values['scoring']})" if "scoring" in values else ""
        rows.append(f"| `{name}` | {values['kind']}{scoring} | {values['origin']} | {values['licence']} |")
    return "\n".join(["| preset | kind | data | licence |", "|---|---|---|---|", *rows])


def with_tables(page: str) -> str:
    """docs/tasks.md with both tables made anew between their marks."""
    for name, made in (("fields", fields_table()), ("presets", presets_table())):
        begin, end = f"<!-- {name}: python -m engine.evaluate.schema docs -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    docs = Path(sys.argv[1])
    for each in SCHEMAS:
        (docs / "schemas" / f"{each}.json").write_text(text(each), encoding="utf-8")
    tasks = docs / "tasks.md"
    tasks.write_text(with_tables(tasks.read_text(encoding="utf-8")), encoding="utf-8")
