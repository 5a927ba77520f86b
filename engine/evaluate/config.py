"""The config of an evaluation or a sweep: YAML in, a checked `EvalConfig` with absolute paths out.

An evaluation is one mixture, a sweep a list of them; both times templates x decoding settings x tasks.
Unknown keys are errors that name the nearest known one, since a misspelt `limt:` would silently change a run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from engine.evaluate.tasks.task import KINDS, SCORINGS, Task

DTYPES = ("bfloat16", "float16", "float32")
COMPUTES = ("auto", "float32", "model")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Decoding:
    """How text is drawn. temperature 0 is greedy; then top_p, top_k and the seed have no effect.

    top_k 0 and top_p 1 mean no restriction. The model's own generation_config is never used silently.
    """

    name: str
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, run through llama.cpp.

    name: its label in tables.
    path: the file.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server; only texts are taken from it.

    name: its label in tables.
    url: where it is, for example http://localhost:8000/v1.
    model: which of its models (empty: the first that it lists).
    api: `completions`: our template's text goes to /completions; `chat`: messages go to /chat/completions, and the
        server's own template is used.
    key_env: the name of the environment variable that holds the key. Never the key itself.
    concurrency: so many requests at a time.
    timeout: seconds a request may take.
    retries: so many more tries when a request fails.
    """

    name: str
    url: str
    model: str = ""
    api: str = "completions"
    key_env: str = ""
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 5


@dataclass(frozen=True)
class EvalConfig:
    """A checked config; every path is absolute.

    dtype: what a mixture is rounded to (as a merge written in that dtype would be).
    compute: `model` multiplies in dtype; `float32` widens the rounded weights first (same weights, float32
        arithmetic); `auto` takes float32 on a CPU without bf16 instructions, else `model`.
    """

    base: Path | None
    adapters: dict[str, Path]
    weights: tuple[dict[str, float], ...]
    tasks: tuple[Task, ...]
    templates: tuple[str, ...] = ("model",)
    decoding: tuple[Decoding, ...] = (Decoding("greedy"),)
    seeds: tuple[int, ...] = (42,)
    dtype: str = "bfloat16"
    compute: str = "auto"
    device: str = "auto"
    batch_size: int = 16
    gguf: tuple[GgufFile, ...] = ()
    servers: tuple[Server, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values, readable by `parse_config`."""
        raw = asdict(self)
        raw["base"] = str(self.base)
        raw["adapters"] = {label: str(path) for label, path in self.adapters.items()}
        for key in ("weights", "tasks", "templates", "decoding", "seeds"):
            raw[key] = list(raw[key])
        for task in raw["tasks"]:
            task["data"] = str(task["data"])
        return raw

    def limited(self, limit: int | None) -> EvalConfig:
        """The same with at most `limit` rows per task."""
        if limit is None:
            return self
        if limit < 1:
            raise BadRecipeError(f"--limit must be at least 1, and is {limit}")
        return replace(self, tasks=tuple(replace(t, limit=min(limit, t.limit or limit)) for t in self.tasks))


def load_config(path: Path, workspace: Path | None = None, mode: str = "sweep") -> EvalConfig:
    """Read and check a YAML config. Relative paths are looked up in the workspace, then beside the config.

    Raises:
        BadRecipeError: not readable, not YAML, a key that is unknown, missing, doubled or of the wrong kind,
            a path that does not exist; the message starts with the file and names the key.
    """
    raw = read_yaml(path)
    roots = [root for root in (workspace, path.parent.absolute()) if root is not None]
    return parse_config(raw, str(path), roots, mode)


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
    except yaml.YAMLError as error:
        raise BadRecipeError(f"{path} is not valid YAML: {error}") from error


def parse_config(
    raw: Any, where: str = "config", roots: Sequence[Path] = (), mode: str = "sweep"
) -> EvalConfig:
    """A checked config from plain values; `where` begins every error, `roots` resolve relative paths.

    With mode "eval" the weights must be one mixture (a mapping, or a list of one).
    """
    check = _Checker(where, roots)
    raw = check.mapping(raw, "", set(EvalConfig.__dataclass_fields__), needed=("base", "tasks"))
    adapters = check.adapters(raw.get("adapters"))
    weights = check.weights(raw.get("weights"), adapters)
    if mode == "eval" and len(weights) != 1:
        raise BadRecipeError(
            f"{where}: weights holds {len(weights)} mixtures, and an evaluation is of one",
            "use medmerge sweep for several",
        )
    tasks = tuple(check.task(item, f"tasks[{n}]") for n, item in enumerate(check.list_of(raw, "tasks")))
    check.unique([task.name for task in tasks], "tasks")
    decoding = tuple(
        check.decoding(item, f"decoding[{n}]")
        for n, item in enumerate(check.list_of(raw, "decoding", [{"name": "greedy"}]))
    )
    check.unique([d.name for d in decoding], "decoding")
    return EvalConfig(
        base=check.path(raw["base"], "base"),
        adapters=adapters,
        weights=weights,
        tasks=tasks,
        templates=check.templates(check.list_of(raw, "templates", ["model"])),
        decoding=decoding,
        seeds=tuple(check.whole(s, "seeds", 0) for s in check.list_of(raw, "seeds", [42])),
        dtype=check.choice(raw.get("dtype", "bfloat16"), "dtype", DTYPES),
        compute=check.choice(raw.get("compute", "auto"), "compute", COMPUTES),
        device=check.choice(raw.get("device", "auto"), "device", DEVICES),
        batch_size=check.whole(raw.get("batch_size", 16), "batch_size", 1),
    )


class _Checker:
    """Checks single values; every error names the config and the key."""

    def __init__(self, where: str, roots: Sequence[Path]) -> None:
        self.where, self.roots = where, roots

    def error(self, key: str, message: str, hint: str = "") -> BadRecipeError:
        return BadRecipeError(f"{self.where}: {key} {message}" if key else f"{self.where} {message}", hint)

    def mapping(self, raw: Any, key: str, known: set[str], needed: Sequence[str] = ()) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            raise self.error(key, f"should be a mapping, and is {_kind(raw)}")
        for name in raw:
            if name not in known:
                near = difflib.get_close_matches(str(name), sorted(known), 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise self.error(f"{key}.{name}".lstrip("."), "is not a known key", hint)
        for name in needed:
            if raw.get(name) is None:
                raise self.error(f"{key}.{name}".lstrip("."), "is missing")
        return dict(raw)

    def list_of(self, raw: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
        value = raw.get(key, default)
        if not isinstance(value, list) or not value:
            raise self.error(key, f"should be a list with something in it, and is {_kind(value)}")
        return value

    def text(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"should be text, and is {_kind(value)}")
        return value

    def whole(self, value: Any, key: str, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"should be a whole number of at least {least}, and is {value!r}")
        return value

    def number(self, value: Any, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high:
            span = "a number" if low == -math.inf else f"a number from {low:g} to {high:g}"
            raise self.error(key, f"should be {span}, and is {value!r}")
        return float(value)

    def choice(self, value: Any, key: str, known: Sequence[str]) -> str:
        if value not in known:
            near = difflib.get_close_matches(str(value), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else ""
            raise self.error(key, f"is {value!r}, and should be one of {', '.join(known)}", hint)
        return str(value)

    def unique(self, names: list[str], key: str) -> None:
        for n, name in enumerate(names):
            if name in names[:n]:
                raise self.error(key, f"has two entries named {name!r}")

    def path(self, value: Any, key: str) -> Path:
        typed = Path(self.text(value, key)).expanduser()
        for candidate in [typed] if typed.is_absolute() else [root / typed for root in self.roots] or [typed]:
            if candidate.exists():
                return candidate.absolute()
        looked = "" if typed.is_absolute() else "looked in " + " and ".join(map(str, self.roots))
        raise self.error(key, f"is {value}, which does not exist", looked)

    def adapters(self, raw: Any) -> dict[str, Path]:
        if raw is None:
            return {}
        if not isinstance(raw, Mapping):
            raise self.error("adapters", "should be a mapping of labels to folders")
        return {
            self.text(label, "adapters"): self.path(path, f"adapters.{label}") for label, path in raw.items()
        }

    def weights(self, raw: Any, adapters: Mapping[str, Path]) -> tuple[dict[str, float], ...]:
        if raw is None:
            if adapters:
                raise self.error("weights", "is missing", "for example [{pt: 0.3, sft: 0.7}]")
            return ({},)
        mixtures = [raw] if isinstance(raw, Mapping) else raw
        if not isinstance(mixtures, list) or not mixtures:
            raise self.error("weights", "should be a list of mixtures like {pt: 0.3, sft: 0.7}")
        found: list[dict[str, float]] = []
        for n, mixture in enumerate(mixtures):
            key = f"weights[{n}]"
            given = self.mapping(mixture, key, set(adapters))
            whole = {label: self.number(given.get(label, 0), f"{key}.{label}") for label in adapters}
            if whole in found:
                raise self.error(key, f"is the same mixture as weights[{found.index(whole)}]")
            found.append(whole)
        return tuple(found)

    def templates(self, names: list[Any]) -> tuple[str, ...]:
        from engine.templates import BUILTIN

        known = ("model", *BUILTIN)
        self.unique(names, "templates")
        return tuple(self.choice(name, "templates", known) for name in names)

    def task(self, raw: Any, key: str) -> Task:
        given = self.mapping(raw, key, set(Task.__dataclass_fields__), ("name", "kind", "data"))
        kind = self.choice(given["kind"], f"{key}.kind", KINDS)
        only = {"scoring": "multiple_choice", "references": "generation", "max_tokens": "perplexity"}
        for name, wanted in only.items():
            default = Task.__dataclass_fields__[name].default
            if given.get(name, default) != default and kind != wanted:
                raise self.error(f"{key}.{name}", f"has no meaning for a {kind} task, only for {wanted}")
        references = given.get("references", True)
        if not isinstance(references, bool):
            raise self.error(f"{key}.references", f"should be true or false, and is {references!r}")
        limit, system = given.get("limit"), given.get("system", "")
        return Task(
            name=self.text(given["name"], f"{key}.name"),
            kind=kind,
            data=self.path(given["data"], f"{key}.data"),
            limit=None if limit is None else self.whole(limit, f"{key}.limit", 1),
            scoring=self.choice(given.get("scoring", "letters"), f"{key}.scoring", SCORINGS),
            references=references,
            max_tokens=self.whole(given.get("max_tokens", 1024), f"{key}.max_tokens", 2),
            system=system if system == "" else self.text(system, f"{key}.system"),
        )

    def decoding(self, raw: Any, key: str) -> Decoding:
        given = self.mapping(raw, key, set(Decoding.__dataclass_fields__), ("name",))
        top_p = self.number(given.get("top_p", 1.0), f"{key}.top_p", 0, 1)
        if top_p == 0:
            raise self.error(f"{key}.top_p", "is 0, which leaves no token; greedy is temperature: 0")
        return Decoding(
            name=self.text(given["name"], f"{key}.name"),
            temperature=self.number(given.get("temperature", 0), f"{key}.temperature", 0, 100),
            top_p=top_p,
            top_k=self.whole(given.get("top_k", 0), f"{key}.top_k", 0),
            max_new_tokens=self.whole(given.get("max_new_tokens", 256), f"{key}.max_new_tokens", 1),
        )


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true/false"}
    return names.get(type(value), f"{value!r}") + (" that is empty" if value in ([], {}, "") else "")
