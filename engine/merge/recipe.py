"""A recipe: what to merge, as a person wrote it (YAML or command line), checked and with absolute paths.

    base: bases/qwen3-14b
    method: linear                        # or task_arithmetic: the same exact sum
    adapters:
      pt:  {path: adapters/pt,  weight: 0.3}
      sft: {path: adapters/sft, weight: {default: 0.7, "layers 0-9": 0.5, "*.mlp.*": 0.8}}
    output: {path: merges/pt03-sft07, dtype: bfloat16}

Relative paths are looked up from the recipe's folder, then from the workspace. `Recipe.to_dict()` is the same
document with absolute paths; jobs and manifests carry that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.errors import BadRecipeError
from engine.merge.selectors import DEFAULT, check_selector

LINEAR_METHODS = ("linear", "task_arithmetic")
PLANNED_METHODS = ("slerp", "ties", "dare_linear", "dare_ties", "soup")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "fp32": "float32",
    "f32": "float32",
}
_KEYS = ("base", "method", "adapters", "output")
_ADAPTER_KEYS = ("path", "weight")
_OUTPUT_KEYS = ("path", "dtype")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FLOAT32_MAX = 3.4028234663852886e38
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a recipe. `weights` maps selectors (see engine.merge.selectors) to coefficients."""

    label: str
    path: Path
    weights: dict[str, float]

    @property
    def uniform(self) -> float | None:
        """The one weight of all its tensors, None when selectors give several."""
        return self.weights[DEFAULT] if list(self.weights) == [DEFAULT] else None


@dataclass(frozen=True)
class Recipe:
    """W_merged = W_base + sum over adapters of weight * dW, rounded once to `dtype` (None: the base's own)."""

    base: Path
    method: str
    adapters: tuple[AdapterEntry, ...]
    output: Path
    dtype: str | None = None  # "bfloat16", "float16", "float32"

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a document of its own format, with absolute paths (what `parse` reads)."""
        output = {"path": str(self.output)} | ({"dtype": self.dtype} if self.dtype else {})
        return {
            "base": str(self.base),
            "method": self.method,
            "adapters": {
                entry.label: {
                    "path": str(entry.path),
                    "weight": dict(entry.weights) if entry.uniform is None else entry.uniform,
                }
                for entry in self.adapters
            },
            "output": output,
        }


def read_recipe(path: Path, places: Sequence[Path] = ()) -> Recipe:
    """Read a YAML recipe. Relative paths: to the recipe's folder, then to `places` (the workspace).

    Raises BadRecipeError naming the file and the key.
    """
    if path.is_dir():
        raise BadRecipeError(f"{path} is a folder, not a recipe", "a recipe is a YAML file")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadRecipeError(f"{path} is {path.stat().st_size} bytes, too large for a recipe")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadRecipeError(f"{path} is not UTF-8 text: {error}") from error
    try:
        raw = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise BadRecipeError(
            f"{path} is not valid YAML: {error}", "see docs for the recipe format"
        ) from error
    except RecursionError as error:
        raise BadRecipeError(f"{path} is nested too deeply to be a recipe") from error
    return parse(raw, str(path), [path.absolute().parent, *places])


def parse(raw: object, where: str, places: Sequence[Path]) -> Recipe:
    """A recipe from a parsed document. `where` names it in errors; relative paths are looked up in `places`.

    Raises:
        BadRecipeError: unknown, missing or doubled keys, wrong types, weights that are not finite numbers,
            methods of another version, inputs that do not exist.
    """
    document = _mapping(raw, where)
    if "models" in document:
        raise BadRecipeError(
            f"{where}: `models:` (merging full checkpoints) is not in this version",
            "name LoRA adapters under `adapters:`",
        )
    _known(document, _KEYS, where)
    method = document.get("method", "linear")
    _check_method(method, where)
    adapters = _mapping(_required(document, "adapters", where), f"{where}: adapters")
    if not adapters:
        raise BadRecipeError(f"{where}: adapters is empty", "name at least one adapter")
    output = document.get("output")
    if isinstance(output, str):
        output = {"path": output}
    output = _mapping(_required({"output": output}, "output", where), f"{where}: output")
    if output.get("gguf"):
        raise BadRecipeError(
            f"{where}: output.gguf is not in this version",
            "merge first, then: medmerge gguf MERGE --type TYPE",
        )
    _known(output, (*_OUTPUT_KEYS, "gguf"), f"{where}: output")
    return Recipe(
        base=_input(_required(document, "base", where), f"{where}: base", places),
        method=str(method),
        adapters=tuple(_entry(label, value, where, places) for label, value in adapters.items()),
        output=_output(_required(output, "path", f"{where}: output"), f"{where}: output.path", places),
        dtype=dtype_name(output.get("dtype"), f"{where}: output.dtype"),
    )


def dtype_name(value: object, where: str) -> str | None:
    """ "bfloat16", "float16" or "float32" from any common spelling; None stays None (the base's own dtype)."""
    if value is None:
        return None
    name = _DTYPE_ALIASES.get(str(value).lower(), str(value).lower())
    if name not in DTYPES:
        raise BadRecipeError(f"{where}: dtype {value!r} is not one of {', '.join(DTYPES)}")
    return name


def _check_method(method: object, where: str) -> None:
    if method in LINEAR_METHODS:
        return
    known = f"this version merges with {' and '.join(LINEAR_METHODS)}"
    if method in PLANNED_METHODS:
        raise BadRecipeError(f"{where}: method {method} is not in this version", known)
    raise BadRecipeError(f"{where}: there is no method {method!r}{_near(str(method), LINEAR_METHODS)}", known)


def _entry(label: str, value: object, where: str, places: Sequence[Path]) -> AdapterEntry:
    if not _LABEL.fullmatch(label):
        raise BadRecipeError(f"{where}: adapter label {label!r}: use letters, digits, '.', '_' and '-'")
    where = f"{where}: adapters.{label}"
    entry = _mapping(value, where)
    _known(entry, _ADAPTER_KEYS, where)
    path = _input(_required(entry, "path", where), f"{where}.path", places)
    return AdapterEntry(label, path, _weights(_required(entry, "weight", where), f"{where}.weight"))


def _weights(value: object, where: str) -> dict[str, float]:
    if not isinstance(value, dict):
        return {DEFAULT: _number(value, where)}
    chosen = _mapping(value, where)
    if not chosen:
        raise BadRecipeError(f"{where} is empty", "give a number, or `default: NUMBER`")
    for selector in chosen:
        check_selector(selector, where)
    return {selector: _number(item, f"{where}[{selector!r}]") for selector, item in chosen.items()}


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecipeError(f"{where} should be a number, and is {value!r}")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:  # NaN fails every comparison
        raise BadRecipeError(f"{where} is {_short(value)}, which is no finite weight")
    return float(value)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecipeError(f"{where} should be a mapping of names to values, and is {_short(value)}")
    for key in value:
        if not isinstance(key, str):
            raise BadRecipeError(f"{where}: key {key!r} should be text", "put it in quotes")
    return value


def _required(mapping: dict[str, Any], key: str, where: str) -> Any:
    if mapping.get(key) is None:
        raise BadRecipeError(f"{where}: `{key}` is missing")
    return mapping[key]


def _known(mapping: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in mapping:
        if key not in keys:
            raise BadRecipeError(
                f"{where}: unknown key {key!r}{_near(key, keys)}", f"known keys: {', '.join(keys)}"
            )


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(value: object, where: str) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadRecipeError(f"{where} should be a path, and is {_short(value)}")
    return Path(value).expanduser()


def _input(value: object, where: str, places: Sequence[Path]) -> Path:
    path = _path(value, where)
    for place in places or [Path.cwd()]:
        if (place / path).exists():
            return (place / path).absolute()
    looked = "" if path.is_absolute() else f"looked in {', '.join(map(str, places or [Path.cwd()]))}; "
    raise BadRecipeError(
        f"{where}: {value} does not exist", f"{looked}models are read from disk, never downloaded"
    )


def _output(value: object, where: str, places: Sequence[Path]) -> Path:
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
