"""Reading a YAML document field by field: every complaint names the file, the key and what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import BadRecipeError

_FLOAT32_MAX = 3.4028234663852886e38
_MAX_BYTES = 1_000_000


def read_yaml(path: Path, what: str = "recipe") -> object:
    """The parsed document of a YAML file. Raises BadRecipeError: unreadable, too large, not YAML, a doubled key."""
    if path.is_dir():
        raise BadRecipeError(f"{path} is a folder, not a {what}", f"a {what} is a YAML file")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadRecipeError(f"{path} is {path.stat().st_size} bytes, too large for a {what}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRecipeError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadRecipeError(f"{path} is not UTF-8 text: {error}") from error
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise BadRecipeError(
            f"{path} is not valid YAML: {error}", "docs/merging.md shows the recipe format"
        ) from error
    except RecursionError as error:
        raise BadRecipeError(f"{path} is nested too deeply to be a {what}") from error


def number(value: object, where: str) -> float:
    """A finite number that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecipeError(f"{where} should be a number, and is {short(value)}")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:  # NaN fails every comparison
        raise BadRecipeError(f"{where} is {short(value)}, which is no finite weight")
    return float(value)


def flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise BadRecipeError(f"{where} should be true or false, and is {short(value)}")
    return value


def mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecipeError(f"{where} should be a mapping of names to values, and is {short(value)}")
    for key in value:
        if not isinstance(key, str):
            raise BadRecipeError(f"{where}: key {key!r} should be text", "put it in quotes")
    return value


def required(document: dict[str, Any], key: str, where: str) -> Any:
    if document.get(key) is None:
        raise BadRecipeError(f"{where}: `{key}` is missing")
    return document[key]


def known_keys(document: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in document:
        if key not in keys:
            raise BadRecipeError(
                f"{where}: unknown key {key!r}{near(key, keys)}", f"known keys: {', '.join(keys)}"
            )


def near(word: str, known: Sequence[str]) -> str:
    """A guess at what was meant, as the end of a sentence."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(value: object, where: str) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadRecipeError(f"{where} should be a path, and is {short(value)}")
    return Path(value).expanduser()


def input_path(value: object, where: str, places: Sequence[Path]) -> Path:
    path = _path(value, where)
    for place in places or [Path.cwd()]:
        if (place / path).exists():
            return (place / path).absolute()
    looked = (
        ""
        if path.is_absolute()
        else f"looked in {', '.join(dict.fromkeys(map(str, places or [Path.cwd()])))}; "
    )
    raise BadRecipeError(
        f"{where}: {value} does not exist", f"{looked}models are read from disk, never downloaded"
    )


def output_path(value: object, where: str, places: Sequence[Path]) -> Path:
    """An output path: in the first place that has the parent folder already, else in the first place."""
    path = _path(value, where)
    candidates = [(place / path).absolute() for place in places or [Path.cwd()]]
    return next((found for found in candidates if found.parent.is_dir()), candidates[0])


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice and reads 1e-1 as a number (YAML 1.2)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice or is no name", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)
