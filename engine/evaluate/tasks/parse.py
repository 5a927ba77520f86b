"""Tasks as people write them, read and checked: a mapping in a config, a task file, a preset, or `use:` of one.

Called by engine/evaluate/config.py for every entry of `tasks:`, and by `medmerge tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.evaluate.tasks.prompt import split_prompt
from engine.evaluate.tasks.task import FIELDS, Task
from engine.evaluate.values import Checker, kind_of, nearest, read_yaml

FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
KEYS = ("use", *Task.__dataclass_fields__)
MOST_STEPS = 10  # of task files that use one another

# Settings that mean something for one kind only; at their default they are allowed everywhere.
ONLY = {
    "references": "generation",
    "max_tokens": "perplexity",
    **dict.fromkeys(
        ("scoring", "shuffle", "answers", "instruction", "style", "description", "mixed_options"),
        "multiple_choice",
    ),
}
_APART = ("data", "columns", "where", "replace")  # read by functions of their own
Values = dict[str, Any]


def preset_path(name: str) -> Path:
    """The YAML of a preset. Raises BadRecipeError naming those there are."""
    if name not in PRESETS:
        raise BadRecipeError(f"no preset is called {name!r}", nearest(name, PRESETS, "presets"))
    return FOLDER / f"{name}.yaml"


def load_task(source: str | Path, roots: Sequence[Path] = (), **changes: Any) -> Task:
    """The task of a file or preset, with some fields changed: `load_task("medqa", data="test.jsonl")`."""
    here = [*roots, Path.cwd()]
    changes = {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    return parse_task({"use": str(source), **changes}, Checker(str(source), here), "")


def preset_values(name: str) -> Values:
    """What a preset says, with what it uses; not yet a whole task (`data` may be missing)."""
    return _values({"use": name}, Checker(name, []), "", ())


def parse_task(raw: Any, check: Checker, key: str) -> Task:
    """A checked task from an entry of `tasks:`; `key` names it in errors ("tasks[0]").

    Raises BadRecipeError: an unknown key, a value of the wrong type, a setting that has no meaning for the kind, a
    column field or placeholder that makes no sense, a task file that is missing or leads back to itself.
    """
    values = _values({"use": raw} if isinstance(raw, str) else raw, check, key, ())
    for name in ("name", "kind", "data"):
        if values.get(name) is None:
            hint = f"this task reads: {values['origin']}" if name == "data" and values.get("origin") else ""
            raise check.error(_join(key, name), "is missing", hint)
    kind = values["kind"]
    for name, wanted in ONLY.items():
        default = Task.__dataclass_fields__[name].default
        if values.get(name, default) != default and kind != wanted:
            raise check.error(_join(key, name), f"has no meaning for a {kind} task, only for {wanted}")
    if values.get("instruction") and values.get("scoring") != "generated":
        raise check.error(_join(key, "instruction"), "has no meaning unless scoring is generated")
    for name in values.get("columns", {}):
        if name not in FIELDS[kind]:
            known = ", ".join(FIELDS[kind])
            raise check.error(
                _join(key, f"columns.{name}"), f"has no meaning for a {kind} task", f"fields: {known}"
            )
    return Task(**values)


def _values(raw: Any, check: Checker, key: str, before: tuple[Path, ...]) -> Values:
    """Checked values of a mapping, on top of those of what it uses. Not yet a whole task."""
    given = check.mapping(raw, key, KEYS)
    values: Values = {}
    if "use" in given:
        path = _find(check.text(given["use"], _join(key, "use")), check, _join(key, "use"))
        if path in before or len(before) > MOST_STEPS:
            way = " -> ".join(file.name for file in (*before, path))
            raise check.error(_join(key, "use"), f"leads back to itself: {way}")
        values = _values(
            read_yaml(path), Checker(str(path), [path.parent, *check.roots]), "", (*before, path)
        )
    for name, value in given.items():
        if name in Task.__dataclass_fields__ and name not in _APART:
            values[name] = check.value(Task, name, value, _join(key, name))
    if "data" in given:
        values["data"] = _data(given["data"], check, _join(key, "data"))
    if "prompt" in given:
        try:
            split_prompt(values["prompt"])
        except ValueError as error:
            raise check.error(_join(key, "prompt"), str(error)) from error
    if "columns" in given:
        own = _columns(given["columns"], check, _join(key, "columns"))
        merged = {**values.get("columns", {}), **own}
        values["columns"] = {name: column for name, column in merged.items() if column is not None}
    for name, reader in (("where", _where), ("replace", _replace)):
        if name in given:
            values[name] = reader(given[name], check, _join(key, name))
    return values


def _find(name: str, check: Checker, key: str) -> Path:
    """The file a `use:` (or a bare entry) names: a preset by its name, else a YAML file."""
    if name in PRESETS:
        return preset_path(name)
    if not name.endswith((".yaml", ".yml")):
        hint = nearest(name, PRESETS, "presets")
        raise check.error(key, f"is {name!r}, which is neither a preset nor a .yaml file", hint)
    path = check.path(name, key).resolve()
    if not path.is_file():
        raise check.error(key, f"is {name}, which is not a file")
    return path


def _data(value: Any, check: Checker, key: str) -> Path:
    path = check.path(value, key)
    if path.is_dir():
        raise check.error(key, f"is {value}, which is a folder", "name one file")
    return path


def _columns(raw: Any, check: Checker, key: str) -> Values:
    known = {name for names in FIELDS.values() for name in names}
    found: Values = {}
    for name, column in check.mapping(raw, key, known).items():
        at = f"{key}.{name}"
        if column is None:  # takes a field of the used task away
            found[name] = None
        elif isinstance(column, Mapping):
            found[name] = {"value": _constant(check.mapping(column, at, ("value",), ("value",)), check, at)}
        elif isinstance(column, list) and name == "options":
            found[name] = [check.text(item, f"{at}[{n}]") for n, item in enumerate(column)]
            if not 2 <= len(column) <= 26:
                raise check.error(at, f"should be 2 to 26 columns, and is {len(column)}")
        else:
            found[name] = check.text(column, at)
    return found


def _constant(given: Values, check: Checker, key: str) -> Any:
    value = given["value"]
    if isinstance(value, list):
        return [check.text(item, f"{key}.value[{n}]") for n, item in enumerate(value)]
    return check.text(value, f"{key}.value")


def _where(raw: Any, check: Checker, key: str) -> Values:
    if not isinstance(raw, Mapping):
        raise check.error(key, f"should be a mapping of columns to values, and is {kind_of(raw)}")
    for column, value in raw.items():
        check.text(column, key)
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float | bool | None) for item in items):
            raise check.error(f"{key}.{column}", "should be a value or a list of values")
    return dict(raw)


def _replace(raw: Any, check: Checker, key: str) -> Values:
    if not isinstance(raw, Mapping):
        raise check.error(key, f"should be a mapping of columns to {{value: words}}, and is {kind_of(raw)}")
    found: Values = {}
    for column, words in raw.items():
        check.text(column, key)
        if not isinstance(words, Mapping) or not words:
            raise check.error(f"{key}.{column}", "should be a mapping of values to words")
        found[column] = {}
        for value, word in words.items():
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise check.error(
                    f"{key}.{column}", f"has the value {value!r}, which should be text in quotes"
                )
            found[column][str(value)] = check.text(word, f"{key}.{column}.{value}")
    return found


def _join(key: str, name: str) -> str:
    return f"{key}.{name}".lstrip(".")
