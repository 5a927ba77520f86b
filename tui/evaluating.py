"""What can be measured here, and the config that a choice of it makes: the form of the evaluate screen without widgets.

`offers` reads the heads of data files (in a thread); the rest is pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tui.snapshots import DataFile, TaskOffer

# The demo's evaluation sets by the name of their file: what their data alone does not say.
KNOWN: dict[str, dict[str, Any]] = {
    "medquad_short": {"kind": "generation", "limit": 48},
    "medquad_match": {"kind": "multiple_choice", "scoring": "options", "limit": 60},
    "medqa": {"kind": "multiple_choice", "limit": 100},
    "pubmedqa": {"kind": "multiple_choice", "limit": 100},
    "safety": {"kind": "probes"},
    "medical_text": {"kind": "perplexity"},
}
KINDS = {  # keys that a row has -> the kind of task its file makes; the first that fits
    "probes": ("prompt", "category", "kind"),
    "instructions": ("prompt", "instruction_id_list"),
    "multiple_choice": ("question", "options", "answer"),
    "generation": ("prompt", "reference"),
    "perplexity": ("text",),
}
KIND_WORDS = {
    "generation": "overlap", "multiple_choice": "choice", "probes": "refusals", "perplexity": "perplexity",
    "instructions": "instructions",
}  # fmt: skip
LINES = (
    ("0", "none"), ("3", "3 points"), ("5", "5 points"), ("11", "11 points"),
    ("g3", "grid 3 × 3"), ("g5", "grid 5 × 5"),
)  # fmt: skip
DEMO_LINE = (
    (0.0, 1.0),
    (0.3, 0.7),
    (0.5, 0.5),
    (0.7, 0.3),
    (1.0, 0.0),
)  # (PT, SFT): with the paper's 0.3 / 0.7
PAPER = (("T0.2 p0.7", 0.2, 0.7), ("T0.6 p0.8", 0.6, 0.8), ("T0.95 p0.7", 0.95, 0.7))
DECODINGS = (("greedy", "greedy"), ("paper", "the paper's four"), ("own", "own"))
DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")
MOST_BYTES = 256_000_000  # a larger file's rows are not counted


@dataclass(frozen=True)
class Wish:
    """What the form says. models: of `base`, `pt`, `sft`. line: a key of LINES. limit: 0 for all rows."""

    base: str
    adapters: dict[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    line: str = "5"
    ggufs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()  # paths of offers
    templates: tuple[str, ...] = ("model",)
    decoding: str = "greedy"
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 0
    max_tokens: int = 64
    seeds: tuple[int, ...] = (42,)
    limit: int = 0


def weights_of(wish: Wish) -> list[dict[str, float]]:
    """The mixtures, each once, from SFT to PT; [] when there are none. Without adapters it is the base as it is."""
    labels = list(wish.adapters)
    if not labels:
        return [{}] if wish.base else []
    pairs: list[tuple[float, float]] = []
    if wish.line.startswith("g"):
        steps = int(wish.line[1:])
        marks = [round(i / (steps - 1), 4) for i in range(steps)]
        pairs = [(pt, sft) for sft in marks for pt in marks]
    elif wish.line == "5":
        pairs = list(DEMO_LINE)
    elif wish.line != "0":
        steps = int(wish.line)
        pairs = [(round(i / (steps - 1), 4), round(1 - i / (steps - 1), 4)) for i in range(steps)]
    named = {"base": (0.0, 0.0), "sft": (0.0, 1.0), "pt": (1.0, 0.0)}
    pairs = [named[name] for name in named if name in wish.models] + pairs
    found: list[dict[str, float]] = []
    for pt, sft in pairs:
        whole = {"pt": pt, "sft": sft}
        mixture = {label: whole[label] for label in labels if label in whole}
        lost = any(value for label, value in whole.items() if label not in mixture)
        if not lost and mixture not in found:
            found.append(mixture)
    return found


def decodings_of(wish: Wish) -> list[dict[str, Any]]:
    limit = {"max_new_tokens": wish.max_tokens}
    greedy: dict[str, Any] = {"name": "greedy", "temperature": 0, **limit}
    if wish.decoding == "paper":
        drawn = [{"name": name, "temperature": t, "top_p": p, **limit} for name, t, p in PAPER]
        return [*drawn, greedy]
    if wish.decoding == "own" and wish.temperature > 0:
        name = f"T{wish.temperature:g} p{wish.top_p:g}" + (f" k{wish.top_k}" if wish.top_k else "")
        own: dict[str, Any] = {"name": name, "temperature": wish.temperature, "top_p": wish.top_p, **limit}
        return [{**own, "top_k": wish.top_k} if wish.top_k else own]
    return [greedy]


def problem(wish: Wish) -> str:
    """Why the wish makes no config; "" when it does."""
    if not wish.base and not wish.ggufs:
        return "choose a base: put a model folder into bases/, or make the demo (1)"
    if not weights_of(wish) and not wish.ggufs:
        return "choose a model, a line of mixtures, or a GGUF file"
    if not wish.tasks:
        return "choose a task: data files belong into data/"
    if not wish.templates:
        return "choose a template"
    if not wish.seeds:
        return "give a seed: a whole number, or several with spaces between"
    if not 0 <= wish.top_p <= 1 or wish.temperature < 0 or wish.max_tokens < 1:
        return "top-p is between 0 and 1, temperature at least 0, tokens at least 1"
    return ""


def config_of(wish: Wish, offers: Iterable[TaskOffer]) -> dict[str, Any]:
    """The config document (engine.evaluate.config) with absolute paths."""
    document: dict[str, Any] = {}
    mixtures = weights_of(wish)
    if mixtures:
        document["base"] = wish.base
        if wish.adapters:
            document["adapters"] = dict(wish.adapters)
            document["weights"] = mixtures
    if wish.ggufs:
        document["gguf"] = [{"name": Path(path).stem, "path": path} for path in wish.ggufs]
    document["templates"] = list(wish.templates)
    document["decoding"] = decodings_of(wish)
    document["seeds"] = list(wish.seeds)
    document["tasks"] = [limited(offer, wish.limit).document for offer in _chosen(wish, offers)]
    return document


def _chosen(wish: Wish, offers: Iterable[TaskOffer]) -> list[TaskOffer]:
    return [offer for offer in offers if offer.path in wish.tasks and not offer.error]


def limited(offer: TaskOffer, limit: int) -> TaskOffer:
    """The offer with at most `limit` rows (0: as it is)."""
    if not limit:
        return offer
    own = offer.says("limit") or limit
    return replace(offer, document={**offer.document, "limit": min(limit, own)})


def counted(wish: Wish, offers: Iterable[TaskOffer]) -> tuple[int, int, int]:
    """(models, cells, samples) that the wish makes; the samples of a file too large to count are left out."""
    models = len(weights_of(wish)) + len(wish.ggufs)
    cells = samples = 0
    for offer in (limited(one, wish.limit) for one in _chosen(wish, offers)):
        here = _settings(wish, offer)
        cells += here
        samples += here * min(offer.rows, offer.says("limit") or offer.rows)
    return models, models * cells, models * samples


def _settings(wish: Wish, offer: TaskOffer) -> int:
    """Cells of one model on one task, as engine.evaluate.cells counts them."""
    read = offer.kind == "perplexity" or (
        offer.kind == "multiple_choice" and offer.says("scoring") != "generated"
    )
    if read:
        return 1
    drawn = sum(len(wish.seeds) if one["temperature"] > 0 else 1 for one in decodings_of(wish))
    references = 1 if offer.kind == "generation" and offer.says("references") is not False else 0
    return len(wish.templates) * (drawn + references)


# ---- what there is to measure -------------------------------------------------------------------------------


def configs(files: Sequence[DataFile], folder: Path) -> tuple[tuple[str, str], ...]:
    """Evaluation configs that are there, as (path, name): YAML files with tasks, in data/ and in `folder`."""
    places = [Path(file.path) for file in files] + (sorted(folder.iterdir()) if folder.is_dir() else [])
    found = []
    for path in places:
        if path.suffix.lower() in (".yaml", ".yml") and path.is_file() and _has_tasks(path):
            found.append((str(path), path.name))
    return tuple(found)


def _has_tasks(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(200_000)
    except (OSError, UnicodeDecodeError):
        return False
    keys = {line.partition(":")[0] for line in text.splitlines()}
    return "tasks" in keys and "search" not in keys and "budget" not in keys


def offers(files: Sequence[DataFile], root: Path) -> tuple[TaskOffer, ...]:
    """What can be measured: data files whose first row is that of a kind of task, data files named like a preset, task
    files, and the probe sets that come with the program. Training data is left out."""
    found = []
    for file in files:
        suffix = Path(file.name).suffix.lower()
        if "train" in file.name and suffix in DATA:
            continue
        offer = _data_offer(Path(file.path), file.nbytes) if suffix == ".jsonl" else None
        if offer is None and suffix in DATA:
            offer = _preset_offer(Path(file.path))
        if suffix in (".yaml", ".yml"):
            offer = _task_offer(Path(file.path), root)
        if offer is not None:
            found.append(offer)
    names = [offer.name for offer in found]
    return (*found, *(offer for offer in _shipped() if offer.name not in names))


def _data_offer(path: Path, nbytes: int) -> TaskOffer | None:
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
        row = json.loads(first)
    except (OSError, ValueError):
        return None
    kind = kind_of(row)
    known = KNOWN.get(path.stem, {})
    if not kind or (known and known["kind"] != kind):
        return None
    document = {"name": path.stem, "kind": kind, **known, "data": str(path)}
    return TaskOffer(path.stem, str(path), kind, _rows(path, nbytes), document)


def _preset_offer(path: Path) -> TaskOffer | None:
    """A data file with the name of a preset in its own: that preset on this file."""
    from engine.evaluate.tasks import PRESETS

    told = _letters(path.stem)
    names = sorted((name for name in PRESETS if _letters(name) in told), key=len)
    if not names:
        return None
    document = {"use": names[-1], "name": path.stem, "data": str(path)}
    return _checked(path.stem, path, document, path.parent)


def _letters(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def _task_offer(path: Path, root: Path) -> TaskOffer | None:
    """A task file: a mapping with a kind or another task; other YAML files are configs."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(raw, Mapping) or "tasks" in raw or not ("use" in raw or "kind" in raw):
        return None
    if raw.get("kind") in ("pt", "sft"):
        return None  # a training config
    name = str(raw.get("name") or path.stem)
    document = {"use": str(path)} if raw.get("name") else {"use": str(path), "name": name}
    return _checked(name, path, document, root)


def _checked(name: str, path: Path, document: dict[str, Any], root: Path) -> TaskOffer:
    """The offer of a task that the engine reads; with its error where it cannot."""
    from engine.errors import MedmergeError
    from engine.evaluate.tasks import load_task

    changes = {key: value for key, value in document.items() if key != "use"}
    try:
        task = load_task(document["use"], [root], **changes)
    except MedmergeError as error:
        return TaskOffer(name, str(path), document=document, error=error.message)
    data = Path(task.data)
    lines = data.suffix.lower() == ".jsonl" and data.is_file() and not task.where
    rows = _rows(data, data.stat().st_size) if lines else 0
    said = {"kind": task.kind, "limit": task.limit, "scoring": task.scoring, "references": task.references}
    return TaskOffer(name, str(path), task.kind, rows, document, said=said)


def _shipped() -> list[TaskOffer]:
    """The probe sets that come with the program."""
    from engine.evaluate.probes import PROBE_SETS, probe_path

    found = []
    for name in PROBE_SETS:
        path = probe_path(name)
        document = {"name": name, "kind": "probes", "data": f"probes/{name}"}
        rows = _rows(path, path.stat().st_size)
        found.append(TaskOffer(name, f"probes/{name}", "probes", rows, document, shipped=True))
    return found


def kind_of(row: Any) -> str:
    """The kind of task whose rows look like this one; "" for none."""
    if not isinstance(row, dict):
        return ""
    return next((kind for kind, keys in KINDS.items() if all(key in row for key in keys)), "")


def _rows(path: Path, nbytes: int) -> int:
    if nbytes > MOST_BYTES:
        return 0
    try:
        return sum(1 for line in path.read_bytes().splitlines() if line.strip())
    except OSError:
        return 0
