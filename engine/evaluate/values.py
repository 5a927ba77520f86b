"""Single values of a YAML document, checked: used by the readers of configs and of tasks.

What a field may hold is said once, in its dataclass (`Limits`); engine/evaluate/schema.py writes the same down as
JSON Schema. Unknown keys are errors that name the nearest known one, since a misspelt `limt:` would silently
change a run.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadDataError, BadRecipeError

# Keys whose text names a line or column of tables; prompts and system texts may hold line breaks.
_NAMES = re.compile(r"(?:(?:tasks|decoding|gguf|servers)\[\d+\]\.)?name|adapters")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
_BIDI = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Limits:
    """What a field may hold besides its type: `limit: Annotated[int | None, Limits(least=1)] = None`."""

    choices: Sequence[str] = ()
    least: int | None = None  # of whole numbers
    low: float = -math.inf
    high: float = math.inf


def limits_of(cls: type, name: str) -> tuple[Any, Limits]:
    """(type, limits) of a dataclass field."""
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    if typing.get_origin(hint) is typing.Annotated:
        kind, limits = typing.get_args(hint)
        return kind, limits
    return hint, Limits()


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file. Raises BadRecipeError: not readable, not YAML, a key that stands twice."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """YAML keeps the last of two equal keys without a word; here that is an error."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                line = node.value[n][0].start_mark.line + 1
                raise BadRecipeError(f"{path}: key {key!r} stands twice (again in line {line})")
        return loader.construct_mapping(node, deep=True)

    UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipeError(f"cannot read the config {path}: {error}") from error
    try:
        return yaml.load(text, Loader=UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadRecipeError(f"{path} is not valid YAML: {error}") from error


def nearest(name: str, known: Iterable[str], of: str = "known") -> str:
    """`did you mean limit?`, or else all names there are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"{of}: {', '.join(names)}"


class Checker:
    """Checks single values; every error names the file and the key. Relative paths are looked up in `roots`."""

    def __init__(self, where: str, roots: Sequence[Path]) -> None:
        self.where, self.roots = where, roots

    def error(self, key: str, message: str, hint: str = "") -> BadRecipeError:
        return BadRecipeError(f"{self.where}: {key} {message}" if key else f"{self.where} {message}", hint)

    def mapping(self, raw: Any, key: str, known: Iterable[str], needed: Sequence[str] = ()) -> dict[str, Any]:
        known = set(known)
        if not isinstance(raw, Mapping):
            raise self.error(key, f"should be a mapping, and is {kind_of(raw)}")
        for name in raw:
            if name not in known:
                raise self.error(f"{key}.{name}".lstrip("."), "is not a known key", nearest(str(name), known))
        for name in needed:
            if raw.get(name) is None:
                raise self.error(f"{key}.{name}".lstrip("."), "is missing")
        return dict(raw)

    def value(self, cls: type, name: str, value: Any, key: str) -> Any:
        """A value as the field `name` of a dataclass wants it: its type, then its limits."""
        kind, limits = limits_of(cls, name)
        if value is None and type(None) in typing.get_args(kind):
            return None
        kinds = [k for k in (typing.get_args(kind) or (kind,)) if k is not type(None)]
        if limits.choices:
            return self.choice(value, key, limits.choices)
        if kinds[0] is bool:
            return self.truth(value, key)
        if kinds[0] is int:
            return self.whole(value, key, limits.least or 0)
        if kinds[0] is float:
            return self.number(value, key, limits.low, limits.high)
        if kinds[0] is str:
            return value if value == "" and _default(cls, name) == "" else self.text(value, key)
        raise TypeError(f"{cls.__name__}.{name} has no reader")

    def list_of(self, raw: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
        value = raw.get(key, default)
        if not isinstance(value, list) or not value:
            raise self.error(key, f"should be a list with something in it, and is {kind_of(value)}")
        return value

    def text(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value.strip():
            hint = "YAML reads yes and no without quotes as true and false" if isinstance(value, bool) else ""
            raise self.error(key, f"should be text, and is {kind_of(value)}", hint)
        if _NAMES.fullmatch(key):
            for char in value:
                if unicodedata.category(char) in _UNPRINTABLE or char in _BIDI:
                    raise self.error(
                        key, f"is {value!a}, which holds the control character U+{ord(char):04X}",
                        "a name is one line of printable text: tables, terminals and files show it",
                    )  # fmt: skip
        return value

    def truth(self, value: Any, key: str) -> bool:
        if not isinstance(value, bool):
            raise self.error(key, f"should be true or false, and is {value!r}")
        return value

    def whole(self, value: Any, key: str, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"should be a whole number of at least {least}, and is {value!r}")
        return value

    def number(self, value: Any, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high:
            span = "a number"
            if low != -math.inf:
                span += f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
            raise self.error(key, f"should be {span}, and is {value!r}")
        return float(value)

    def choice(self, value: Any, key: str, known: Sequence[str]) -> str:
        if not isinstance(value, str) or value not in known:
            near = difflib.get_close_matches(str(value), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else ""
            names = ", ".join(name or "''" for name in known)
            raise self.error(key, f"is {value!r}, and should be one of {names}", hint)
        return str(value)

    def unique(self, names: list[str], key: str) -> None:
        for n, name in enumerate(names):
            if name in names[:n]:
                raise self.error(key, f"has two entries named {name!r}")

    def path(self, value: Any, key: str) -> Path:
        """An existing file or folder, absolute; `probes/NAME` may be a set that comes with the program."""
        try:
            typed = Path(self.text(value, key)).expanduser()
            for candidate in (
                [typed] if typed.is_absolute() else [root / typed for root in self.roots] or [typed]
            ):
                if candidate.exists():
                    return candidate.absolute()
        except (OSError, RuntimeError) as error:  # too long, not permitted; ~name of nobody
            words = error.strerror if isinstance(error, OSError) else error
            raise self.error(key, f"is {value:.60}, which cannot be looked up: {words}") from error
        if str(value).startswith("probes/"):
            from engine.evaluate.probes import probe_path

            try:
                return probe_path(str(value)).absolute()
            except BadDataError as error:
                raise self.error(key, f"is {value}: {error.message}", error.hint) from error
        looked = "" if typed.is_absolute() else "looked in " + " and ".join(map(str, self.roots))
        raise self.error(key, f"is {value}, which does not exist", looked)


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true/false"}
    return names.get(type(value), f"{value!r}") + (" that is empty" if value in ([], {}, "") else "")


def _default(cls: Any, name: str) -> Any:
    return cls.__dataclass_fields__[name].default
