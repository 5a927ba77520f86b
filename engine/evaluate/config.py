"""The config of an evaluation or a sweep: YAML in, a checked `EvalConfig` with absolute paths out.

An evaluation is of one model, a sweep of a list of them (mixtures of a base and adapters, GGUF files, servers); both
times templates x decoding settings x tasks. docs/schemas/eval.json says the same as JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from engine.errors import BadRecipeError
from engine.evaluate.mixtures import parse_weights
from engine.evaluate.tasks.parse import parse_task
from engine.evaluate.tasks.task import KINDS, SCORINGS, Task
from engine.evaluate.values import Checker, Limits, kind_of, read_yaml

__all__ = [
    "KINDS", "SCORINGS", "Decoding", "EvalConfig", "GgufFile", "Server", "Task", "load_config", "parse_config",
    "read_yaml",
]  # fmt: skip

DTYPES = ("bfloat16", "float16", "float32")
COMPUTES = ("auto", "float32", "model")
DEVICES = ("auto", "cpu", "cuda")
APIS = ("completions", "chat")
DECODING_WORDS = ("paper", "greedy")
LITERAL_KEYS = ("key", "api_key", "apikey", "token", "password", "secret", "authorization", "headers")
# not what common services begin their keys with: a key put here by mistake would be kept with the run
KEY_NAME = re.compile(r"(?!(?:sk|pk|hf|gsk|ghp)_)[A-Za-z_][A-Za-z0-9_]{0,63}")
SERVER_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?")
KEY_HINT = "put the key into an environment variable and name that: key_env: MY_SERVER_KEY"


@dataclass(frozen=True)
class Decoding:
    """How text is drawn. The model's own generation_config is never used silently.

    name: its label in tables; unique in a config.
    temperature: 0 is greedy; then top_p, top_k and the seed have no effect.
    top_p: only the likeliest tokens that together have this probability are drawn from; 1 is no restriction.
    top_k: only so many of the likeliest tokens are drawn from; 0 is no restriction.
    max_new_tokens: an answer is cut after so many tokens.
    """

    name: str
    temperature: Annotated[float, Limits(low=0, high=100)] = 0.0
    top_p: Annotated[float, Limits(low=0, high=1)] = 1.0  # 0 is refused
    top_k: Annotated[int, Limits(least=0)] = 0
    max_new_tokens: Annotated[int, Limits(least=1)] = 256

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


# The grid of arXiv 2601.18350: (temperature, top_p), and greedy.
PAPER = ((0.2, 0.7), (0.6, 0.8), (0.95, 0.7))


def paper_decoding(max_new_tokens: int = 256) -> tuple[Decoding, ...]:
    """The paper's three ways of drawing, and greedy."""
    drawn = [Decoding(f"T{t:g} p{p:g}", t, p, 0, max_new_tokens) for t, p in PAPER]
    return (*drawn, Decoding("greedy", max_new_tokens=max_new_tokens))


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, run through llama.cpp.

    name: its label in tables (default: the file's name without .gguf; with it where the base is called the same).
    path: the file.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server; only texts are taken from it.

    name: its label in tables.
    url: where it is, for example http://localhost:8000/v1; http or https, no user, password or query in it.
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
    api: Annotated[str, Limits(choices=APIS)] = "completions"
    key_env: str = ""
    concurrency: Annotated[int, Limits(least=1)] = 8
    timeout: Annotated[float, Limits(low=0.001)] = 300.0
    retries: Annotated[int, Limits(least=0)] = 5


@dataclass(frozen=True)
class EvalConfig:
    """A checked config; every path is absolute.

    base: the model folder that mixtures are made on. May be left out where only gguf files or servers are measured.
    adapters: label to adapter folder.
    weights: the mixtures: a list of {label: weight}, of the words `base` or a label (that adapter alone at 1), or
        {grid: ...} and {line: ...}. A label that is not named has weight 0. [] beside gguf files or servers: the
        base is there for its template alone.
    tasks: what is measured: tasks written out, task files or presets by name, or {use: FILE_OR_PRESET, ...} with
        fields changed.
    templates: chat templates, by name; `model` is the base's own.
    decoding: how text is drawn: a list of settings; the word `paper` stands for the paper's four, `greedy` for greedy.
    seeds: of sampled decoding; greedy has none.
    dtype: what a mixture is rounded to (as a merge written in that dtype would be).
    compute: `model` multiplies in dtype; `float32` widens the rounded weights first (same weights, float32
        arithmetic); `auto` takes float32 on a CPU without bf16 instructions, else `model`.
    device: where it runs; `auto` is cuda where there is one.
    batch_size: at most so many samples at a time.
    gguf: GGUF files that are measured as they are: paths, or {name, path}.
    servers: OpenAI-compatible servers that are measured (tasks that need no likelihood).
    """

    base: Path | None
    adapters: dict[str, Path]
    weights: tuple[dict[str, float], ...]
    tasks: tuple[Task, ...]
    templates: tuple[str, ...] = ("model",)
    decoding: tuple[Decoding, ...] = (Decoding("greedy"),)
    seeds: tuple[int, ...] = (42,)
    dtype: Annotated[str, Limits(choices=DTYPES)] = "bfloat16"
    compute: Annotated[str, Limits(choices=COMPUTES)] = "auto"
    device: Annotated[str, Limits(choices=DEVICES)] = "auto"
    batch_size: Annotated[int, Limits(least=1)] = 16
    gguf: tuple[GgufFile, ...] = ()
    servers: tuple[Server, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values, readable by `parse_config`."""
        raw = asdict(self)
        raw["base"] = str(self.base) if self.base else None
        raw["adapters"] = {label: str(path) for label, path in self.adapters.items()}
        for key in ("weights", "tasks", "templates", "decoding", "seeds", "gguf", "servers"):
            raw[key] = list(raw[key])
        for task in raw["tasks"]:
            task["data"] = str(task["data"])
        for file in raw["gguf"]:
            file["path"] = str(file["path"])
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


def parse_config(
    raw: Any, where: str = "config", roots: Sequence[Path] = (), mode: str = "sweep"
) -> EvalConfig:
    """A checked config from plain values; `where` begins every error, `roots` resolve relative paths.

    With mode "eval" there must be one model: one mixture, one GGUF file or one server (with a base beside it for its
    template).
    """
    check = Checker(where, roots)
    raw = check.mapping(raw, "", EvalConfig.__dataclass_fields__, needed=("tasks",))
    taken = check.path(raw["base"], "base").name if raw.get("base") is not None else ""
    gguf = tuple(_gguf(item, f"gguf[{n}]", check, taken) for n, item in enumerate(_some(raw, "gguf", check)))
    servers = tuple(
        _server(item, f"servers[{n}]", check) for n, item in enumerate(_some(raw, "servers", check))
    )
    check.unique([file.name for file in gguf] + [server.name for server in servers], "gguf and servers")
    base, adapters, weights = _mixtures(raw, bool(gguf or servers), check, mode)
    models = len(weights) + len(gguf) + len(servers)
    if mode == "eval" and models != 1:
        what = (
            f"weights holds {len(weights)} mixtures"
            if models == len(weights)
            else f"it names {models} models"
        )
        raise BadRecipeError(
            f"{where}: {what}, and an evaluation is of one", "use medmerge sweep for several"
        )
    tasks = tuple(
        parse_task(item, check, f"tasks[{n}]") for n, item in enumerate(check.list_of(raw, "tasks"))
    )
    check.unique([task.name for task in tasks], "tasks")
    templates = _templates(check.list_of(raw, "templates", ["model"]), check)
    if base is None and "model" in templates and any(server.api == "completions" for server in servers):
        raise check.error(
            "templates", "is model, the base's own, and there is no base",
            "name a template for the server's model (qwen3_nothink, llama3, ...), or use api: chat",
        )  # fmt: skip
    seeds = [check.whole(seed, "seeds", 0) for seed in check.list_of(raw, "seeds", [42])]
    check.unique([str(seed) for seed in seeds], "seeds")
    plain = {
        name: check.value(EvalConfig, name, raw[name], name)
        for name in ("dtype", "compute", "device", "batch_size")
        if name in raw
    }
    return EvalConfig(
        base=base,
        adapters=adapters,
        weights=weights,
        tasks=tasks,
        templates=templates,
        decoding=_decoding_list(raw, check),
        seeds=tuple(seeds),
        gguf=gguf,
        servers=servers,
        **plain,
    )


def _some(raw: Mapping[str, Any], key: str, check: Checker) -> list[Any]:
    value = raw.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise check.error(key, f"should be a list, and is {kind_of(value)}")
    return value


def _mixtures(
    raw: Mapping[str, Any], others: bool, check: Checker, mode: str
) -> tuple[Path | None, dict[str, Path], tuple[dict[str, float], ...]]:
    """Base, adapters and weights; without a base there are neither.

    Where files or servers are measured, a base may be there for its template alone: `weights: []`, or an evaluation
    that names no mixture.
    """
    if raw.get("base") is None:
        if not others:
            raise check.error("base", "is missing")
        for name in ("adapters", "weights"):
            if raw.get(name):
                raise check.error("base", f"is missing, and {name} need one")
        return None, {}, ()
    listed = raw.get("adapters") or {}
    if not isinstance(listed, Mapping):
        raise check.error("adapters", "should be a mapping of labels to folders")
    adapters = {
        check.text(label, "adapters"): check.path(path, f"adapters.{label}") for label, path in listed.items()
    }
    given = raw.get("weights")
    if others and (given == [] or (given is None and not adapters and mode == "eval")):
        return check.path(raw["base"], "base"), adapters, ()
    return check.path(raw["base"], "base"), adapters, parse_weights(given, adapters, check)


def _templates(names: list[Any], check: Checker) -> tuple[str, ...]:
    from engine.templates import BUILTIN

    check.unique(names, "templates")
    return tuple(check.choice(name, "templates", ("model", *BUILTIN)) for name in names)


def _decoding_list(raw: Mapping[str, Any], check: Checker) -> tuple[Decoding, ...]:
    """Settings written out, and the words for known ones: `paper`, `greedy`, {use: paper, max_new_tokens: 64}."""
    value = raw.get("decoding", [{"name": "greedy"}])
    found: list[Decoding] = []
    for n, item in enumerate(
        [value] if isinstance(value, str) else check.list_of({"decoding": value}, "decoding")
    ):
        key = f"decoding[{n}]"
        if isinstance(item, str) or (isinstance(item, Mapping) and "use" in item):
            given = check.mapping(
                {"use": item} if isinstance(item, str) else item, key, ("use", "max_new_tokens")
            )
            at = key if isinstance(item, str) else f"{key}.use"
            word = check.choice(given["use"], at, DECODING_WORDS)
            most = given.get("max_new_tokens", Decoding.max_new_tokens)
            most = check.value(Decoding, "max_new_tokens", most, f"{key}.max_new_tokens")
            found += paper_decoding(most) if word == "paper" else [Decoding("greedy", max_new_tokens=most)]
        else:
            given = check.mapping(item, key, Decoding.__dataclass_fields__, ("name",))
            values = {k: check.value(Decoding, k, v, f"{key}.{k}") for k, v in given.items()}
            if values.get("top_p") == 0:
                raise check.error(f"{key}.top_p", "is 0, which leaves no token; greedy is temperature: 0")
            found.append(Decoding(**values))
    check.unique([d.name for d in found], "decoding")
    return tuple(found)


def _gguf(raw: Any, key: str, check: Checker, taken: str) -> GgufFile:
    """taken: the base's name, which is its label: a quantisation of it is often called the same."""
    given = check.mapping({"path": raw} if isinstance(raw, str) else raw, key, ("name", "path"), ("path",))
    path = check.path(given["path"], f"{key}.path")
    if not path.is_file():
        raise check.error(f"{key}.path", f"is {given['path']}, which is not a file")
    default = path.name if path.stem == taken else path.stem
    return GgufFile(check.text(given.get("name", default), f"{key}.name"), path)


def _server(raw: Any, key: str, check: Checker) -> Server:
    """A server; whatever looks like a key is refused, without repeating it: configs are kept with the run."""
    if isinstance(raw, Mapping):
        for name in raw:
            if str(name).lower().replace("-", "_") in LITERAL_KEYS:
                raise check.error(f"{key}.{name}", "does not belong into a config", KEY_HINT)
    given = check.mapping(raw, key, Server.__dataclass_fields__, ("name", "url"))
    values = {k: check.value(Server, k, v, f"{key}.{k}") for k, v in given.items()}
    if values.get("key_env") and not KEY_NAME.fullmatch(values["key_env"]):
        raise check.error(
            f"{key}.key_env", "should be the name of an environment variable (A-Z, 0-9, _)", KEY_HINT
        )
    if re.search(r"[@?#]", values["url"]):
        raise check.error(f"{key}.url", "holds a user, a password, a query or a fragment", KEY_HINT)
    try:
        good = bool(SERVER_URL.fullmatch(values["url"])) and (urlsplit(values["url"]).port or 1) > 0
    except ValueError:  # a port that is none
        good = False
    if not good:
        hint = "for example http://localhost:8000/v1"
        raise check.error(
            f"{key}.url", f"should be an http:// or https:// address, and is {values['url']}", hint
        )
    return Server(**{**values, "url": values["url"].rstrip("/")})
