"""A recipe: what to merge, as a person wrote it (YAML or command line), checked and with absolute paths.

    base: bases/qwen3-14b
    method: linear                        # METHODS below; docs/merging.md has the formulas
    adapters:                             # or `models:` to merge full checkpoints
      pt:  {path: adapters/pt,  weight: 0.3}
      sft: {path: adapters/sft, weight: {default: 0.7, "layers 0-9": 0.5, "*.mlp.*": [0.8, 0.4]}}
    parameters: {density: 0.5, seed: 42}  # those of the method
    output: {path: merges/pt03-sft07, dtype: bfloat16}

Relative paths are looked up from the recipe's folder, then from the workspace. `Recipe.to_dict()` is the same
document with absolute paths; jobs and manifests carry that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.merge.document import (
    flag,
    input_path,
    known_keys,
    mapping,
    near,
    number,
    output_path,
    read_yaml,
    required,
    short,
)
from engine.merge.selectors import DEFAULT, Spec, check_selector, spec_to_document

# The parameters that mean something to each method.
METHODS: dict[str, tuple[str, ...]] = {
    "linear": ("normalize",),
    "task_arithmetic": ("lambda",),
    "soup": (),
    "slerp": ("t",),
    "ties": ("density", "lambda", "normalize"),
    "dare_linear": ("density", "lambda", "normalize", "rescale", "seed"),
    "dare_ties": ("density", "lambda", "normalize", "rescale", "seed"),
}
LINEAR = ("linear", "task_arithmetic", "soup")  # methods whose result is linear in the weights
NEEDS_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties")  # also where full models are merged
TRIMS = ("ties", "dare_linear", "dare_ties")  # methods that keep only a part (`density`) of each delta
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "fp32": "float32",
    "f32": "float32",
}
LARGEST_WEIGHT = 1e9  # what the verifier takes as well
KINDS = ("checkpoint", "adapter", "gguf")
VOCABULARY = ("error", "intersection", "keep_first")
_KEYS = ("base", "method", "adapters", "models", "parameters", "vocabulary", "output")
_ENTRY_KEYS = ("path", "weight", "density")
_OUTPUT_KEYS = ("path", "dtype", "kind", "rank", "gguf")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Entry:
    """One adapter or model of a recipe. `weights` maps selectors (engine.merge.selectors) to coefficients."""

    label: str
    path: Path
    weights: Spec
    kind: str = "adapter"  # or "model"
    density: Spec | None = None  # None: the recipe's own

    @property
    def uniform(self) -> float | None:
        """The one weight of all its tensors, None when selectors or a gradient give several."""
        value = self.weights.get(DEFAULT)
        return value if list(self.weights) == [DEFAULT] and isinstance(value, float) else None


@dataclass(frozen=True)
class Parameters:
    """What a method needs beside the weights; `normalize` None means the method's own default."""

    t: Spec = field(default_factory=lambda: {DEFAULT: 0.5})
    density: Spec = field(default_factory=lambda: {DEFAULT: 0.5})
    lam: float = 1.0
    normalize: bool | None = None
    rescale: bool = True
    seed: int = 0

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        everything = {
            "t": spec_to_document(self.t),
            "density": spec_to_document(self.density),
            "lambda": self.lam,
            "normalize": self.normalize,
            "rescale": self.rescale,
            "seed": self.seed,
        }
        return {name: everything[name] for name in names if everything[name] is not None}


@dataclass(frozen=True)
class Recipe:
    """What to merge, how, and where to; the dtype None is the base's own."""

    base: Path | None  # None: models alone; the first is then the reference
    method: str
    entries: tuple[Entry, ...]
    output: Path
    dtype: str | None = None  # "bfloat16", "float16", "float32"
    parameters: Parameters = field(default_factory=Parameters)
    kind: str = "checkpoint"
    rank: int | None = None  # of a merged adapter: None concatenates ranks, a number truncates by SVD
    gguf: tuple[str, ...] = ()
    vocabulary: str = "error"

    @property
    def reference(self) -> Path:
        """The folder whose layout, config and tokenizer the merge has: the base, else the first model."""
        return self.base or self.entries[0].path

    @property
    def adapters(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind == "adapter")

    @property
    def models(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind == "model")

    @property
    def normalize(self) -> bool:
        """Whether weights are divided by their sum: the recipe's word, else the method's default."""
        if self.parameters.normalize is not None:
            return self.parameters.normalize
        return self.method in ("soup", "ties") or (self.method == "linear" and bool(self.models))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a document of its own format, with absolute paths (what `parse` reads)."""
        document: dict[str, Any] = {"base": str(self.base)} if self.base else {}
        document["method"] = self.method
        document["models" if self.models else "adapters"] = {
            entry.label: {"path": str(entry.path), "weight": spec_to_document(entry.weights)}
            | ({"density": spec_to_document(entry.density)} if entry.density else {})
            for entry in self.entries
        }
        if parameters := self.parameters.to_dict(METHODS[self.method]):
            document["parameters"] = parameters
        if self.models:
            document["vocabulary"] = self.vocabulary
        output: dict[str, Any] = {"path": str(self.output)}
        output |= {"dtype": self.dtype} if self.dtype else {}
        output |= {"kind": self.kind} if self.kind != "checkpoint" else {}
        output |= {"rank": self.rank} if self.rank else {}
        output |= {"gguf": list(self.gguf)} if self.gguf else {}
        return {**document, "output": output}


def read_recipe(path: Path, places: Sequence[Path] = ()) -> Recipe:
    """Read a YAML recipe. Relative paths: to the recipe's folder, then to `places` (the workspace).

    Raises BadRecipeError naming the file and the key.
    """
    return parse(read_yaml(path), str(path), [path.absolute().parent, *places])


def parse(raw: object, where: str, places: Sequence[Path]) -> Recipe:
    """A recipe from a parsed document. `where` names it in errors; relative paths are looked up in `places`.

    Raises:
        BadRecipeError: unknown, missing or doubled keys, wrong types, weights that are not finite numbers,
            parameters the method does not have, inputs that do not exist.
    """
    document = mapping(raw, where)
    known_keys(document, _KEYS, where)
    method = document.get("method", "linear")
    if not isinstance(method, str) or method not in METHODS:
        raise BadRecipeError(
            f"{where}: there is no method {short(method)}{near(str(method), list(METHODS))}",
            f"methods: {', '.join(METHODS)}",
        )
    entries = _entries(document, str(method), where, places)
    output = document.get("output")
    if isinstance(output, str):
        output = {"path": output}
    output = mapping(required({"output": output}, "output", where), f"{where}: output")
    known_keys(output, _OUTPUT_KEYS, f"{where}: output")
    recipe = Recipe(
        base=_base(document, str(method), entries, where, places),
        method=str(method),
        entries=entries,
        output=output_path(required(output, "path", f"{where}: output"), f"{where}: output.path", places),
        dtype=dtype_name(output.get("dtype"), f"{where}: output.dtype"),
        parameters=_parameters(document.get("parameters"), str(method), f"{where}: parameters"),
        kind=_choice(output.get("kind", "checkpoint"), KINDS, f"{where}: output.kind"),
        rank=_rank(output.get("rank"), f"{where}: output.rank"),
        gguf=_types(output.get("gguf"), f"{where}: output.gguf"),
        vocabulary=_choice(document.get("vocabulary", "error"), VOCABULARY, f"{where}: vocabulary"),
    )
    _check_output(recipe, where)
    return recipe


def dtype_name(value: object, where: str) -> str | None:
    """ "bfloat16", "float16" or "float32" from any common spelling; None stays None (the base's own dtype)."""
    if value is None:
        return None
    name = _DTYPE_ALIASES.get(str(value).lower(), str(value).lower())
    if name not in DTYPES:
        raise BadRecipeError(f"{where}: dtype {value!r} is not one of {', '.join(DTYPES)}")
    return name


def _entries(document: dict[str, Any], method: str, where: str, places: Sequence[Path]) -> tuple[Entry, ...]:
    given = [key for key in ("adapters", "models") if document.get(key) is not None]
    if len(given) != 1:
        raise BadRecipeError(
            f"{where}: give either `adapters:` or `models:`" + (", not both" if given else ""),
            "adapters are LoRA folders merged onto `base:`; models are full checkpoints",
        )
    key = given[0]
    listed = mapping(document[key], f"{where}: {key}")
    if not listed:
        raise BadRecipeError(f"{where}: {key} is empty", f"name at least one of the {key}")
    kind = key.removesuffix("s")
    entries = tuple(_entry(label, value, kind, method, where, places) for label, value in listed.items())
    if kind == "model" and len(entries) + (document.get("base") is not None) < 2:
        raise BadRecipeError(f"{where}: one model alone is nothing to merge", "name two or more models")
    if kind == "adapter" and method == "soup":
        raise BadRecipeError(
            f"{where}: soup averages full models, and these are adapters", "use `models:`, or linear"
        )
    if method == "slerp" and len(entries) != 2:
        raise BadRecipeError(
            f"{where}: slerp goes between two {key}, and {len(entries)} are named",
            "t 0 is the first, t 1 the second",
        )
    return entries


def _entry(label: str, value: object, kind: str, method: str, where: str, places: Sequence[Path]) -> Entry:
    if not _LABEL.fullmatch(label):
        raise BadRecipeError(f"{where}: {kind} label {label!r}: use letters, digits, '.', '_' and '-'")
    where = f"{where}: {kind}s.{label}"
    entry = mapping(value, where)
    known_keys(entry, _ENTRY_KEYS, where)
    path = input_path(required(entry, "path", where), f"{where}.path", places)
    if kind == "model" or method == "slerp":
        entry = {"weight": 1.0, **entry}
    weights = _spec(required(entry, "weight", where), f"{where}.weight", -LARGEST_WEIGHT, LARGEST_WEIGHT)
    density = None
    if entry.get("density") is not None:
        if method not in TRIMS:
            raise BadRecipeError(f"{where}.density means nothing to {method}", f"only to {', '.join(TRIMS)}")
        density = _spec(entry["density"], f"{where}.density", 0.0, 1.0)
    return Entry(label, path, weights, kind, density)


def _base(
    document: dict[str, Any], method: str, entries: Sequence[Entry], where: str, places: Sequence[Path]
) -> Path | None:
    if document.get("base") is None and entries[0].kind == "model":
        if method in NEEDS_BASE:
            raise BadRecipeError(
                f"{where}: {method} needs `base:`", "it merges what each model changed, seen from the base"
            )
        return None
    return input_path(required(document, "base", where), f"{where}: base", places)


def _parameters(raw: object, method: str, where: str) -> Parameters:
    given = mapping(raw if raw is not None else {}, where)
    for key in given:
        users = [name for name, keys in METHODS.items() if key in keys]
        if users and method not in users:
            raise BadRecipeError(
                f"{where}.{key} means nothing to {method}", f"it belongs to {', '.join(users)}"
            )
    known_keys(given, METHODS[method], where)
    default = Parameters()
    seed = given.get("seed", default.seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise BadRecipeError(f"{where}.seed should be a whole number from 0, and is {short(seed)}")
    return Parameters(
        t=_spec(given["t"], f"{where}.t", 0.0, 1.0) if "t" in given else default.t,
        density=_spec(given["density"], f"{where}.density", 0.0, 1.0)
        if "density" in given
        else default.density,
        lam=number(given["lambda"], f"{where}.lambda") if "lambda" in given else default.lam,
        normalize=flag(given["normalize"], f"{where}.normalize") if "normalize" in given else None,
        rescale=flag(given["rescale"], f"{where}.rescale") if "rescale" in given else default.rescale,
        seed=seed,
    )


def _spec(value: object, where: str, low: float | None = None, high: float | None = None) -> Spec:
    """A number, a gradient (list of numbers), or selectors to those; within [low, high] where given."""
    if not isinstance(value, dict):
        return {DEFAULT: _level(value, where, low, high)}
    chosen = mapping(value, where)
    if not chosen:
        raise BadRecipeError(f"{where} is empty", "give a number, or `default: NUMBER`")
    for selector in chosen:
        check_selector(selector, where)
    return {selector: _level(item, f"{where}[{selector!r}]", low, high) for selector, item in chosen.items()}


def _level(value: object, where: str, low: float | None, high: float | None) -> float | tuple[float, ...]:
    if isinstance(value, list):
        if len(value) < 2:
            raise BadRecipeError(f"{where}: a gradient has two or more numbers", "first layer to last")
        return tuple(_bounded(item, f"{where}[{i}]", low, high) for i, item in enumerate(value))
    return _bounded(value, where, low, high)


def _bounded(value: object, where: str, low: float | None, high: float | None) -> float:
    found = number(value, where)
    if (low is not None and found < low) or (high is not None and found > high):
        raise BadRecipeError(f"{where} is {found:g}, and should lie between {low:g} and {high:g}")
    return found


def _choice(value: object, choices: Sequence[str], where: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise BadRecipeError(f"{where} is {short(value)}", f"one of: {', '.join(choices)}")
    return str(value)


def _rank(value: object, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRecipeError(f"{where} should be a whole number from 1, and is {short(value)}")
    return value


def _types(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    types = [value] if isinstance(value, str) else value
    if not isinstance(types, list) or not all(isinstance(item, str) and item for item in types):
        raise BadRecipeError(f"{where} should be a GGUF type or a list of them, and is {short(value)}")
    return tuple(dict.fromkeys(item.lower() for item in types))


def _check_output(recipe: Recipe, where: str) -> None:
    """Raise BadRecipeError for outputs that do not go with the method or with each other."""
    if recipe.kind == "adapter":
        if recipe.models or recipe.method not in ("linear", "task_arithmetic"):
            raise BadRecipeError(
                f"{where}: output.kind adapter needs adapters merged by linear or task_arithmetic",
                "other methods leave no low-rank delta",
            )
        if recipe.gguf:
            raise BadRecipeError(f"{where}: an adapter output writes no GGUF", "medmerge gguf ADAPTER does")
        if recipe.dtype not in (None, "float32"):
            raise BadRecipeError(f"{where}: an adapter is written in float32", "leave output.dtype out")
    elif recipe.rank is not None:
        raise BadRecipeError(f"{where}: output.rank is for output.kind adapter", "remove one of them")
    if recipe.adapters and recipe.vocabulary != "error":
        raise BadRecipeError(f"{where}: vocabulary means nothing to adapters", "it is for `models:`")
    if recipe.kind == "gguf" and not recipe.gguf:
        raise BadRecipeError(f"{where}: output.kind gguf needs output.gguf", "for example gguf: [q4_k_m]")
