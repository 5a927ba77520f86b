"""The small files of a merged adapter: adapter_config.json as PEFT reads it, training.json for our own, tokenizer.

Called by engine/merge/combine.py.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.jobs.events import EventWriter
from engine.template_check import agreed, of_adapter
from engine.weights import Adapter, Checkpoint
from engine.weights.tensorfile import file_sha256

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def adapter_config(base: Checkpoint, sources: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A LoraConfig for modules of these ranks ({module: rank}), each with scale alpha / r = 1.

    The commonest rank is `r`; others stand in `rank_pattern` and, equal, in `alpha_pattern`. `target_modules` are
    last parts of names where those mean exactly these modules of the base, else whole module names: PEFT would
    put an untrained adapter on every further module a short name matches.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = _patterns(ranks, common)
    names = {source.base_name for source in sources if source.base_name}
    tasks = {str(source.config.get("task_type")) for source in sources if source.config.get("task_type")}
    return {
        "peft_type": "LORA",
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": names.pop() if len(names) == 1 else base.name,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": _targets(base, ranks),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(bool(source.config.get("fan_in_fan_out")) for source in sources),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _patterns(ranks: Mapping[str, int], common: int) -> dict[str, int]:
    """{last part or module name: rank} of the modules that do not have the common rank."""
    by_last: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        by_last.setdefault(name.rsplit(".", 1)[-1], set()).add(rank)
    found = {}
    for name, rank in ranks.items():
        last = name.rsplit(".", 1)[-1]
        if len(by_last[last]) == 1:
            if rank != common:
                found[last] = rank
        elif rank != common:
            found[name] = rank
    return found


def _targets(base: Checkpoint, ranks: Mapping[str, int]) -> list[str]:
    lasts = {name.rsplit(".", 1)[-1] for name in ranks}
    meant = {
        tensor.rpartition(".")[0]
        for tensor in base.tensors
        if tensor.rpartition(".")[0].rsplit(".", 1)[-1] in lasts
    }
    return sorted(lasts if meant <= ranks.keys() else ranks)


def training_note(sources: Mapping[str, Adapter]) -> dict[str, Any] | None:
    """training.json of the merged adapter: chat template and base that all sources agree on.

    None when they agree on no template. A source trained on plain text has no say in it; where all were, the result
    is of kind "pt" as they are. The base is named where every source names the same one.
    """
    found = agreed(of_adapter(label, source) for label, source in sources.items())
    if found is None:
        return None
    note: dict[str, Any] = {
        "format": "medmerge.training/1",
        "kind": "pt" if found.plain else "merged",
        "template": found.template or None,
        "template_text": None,
    }
    texts = [source.training.get("template_text") for source in sources.values()]
    if found.sha256:
        note["template_text"] = next(
            t for t in texts if isinstance(t, dict) and t.get("sha256") == found.sha256
        )
    bases = [source.training.get("base") for source in sources.values()]
    if isinstance(bases[0], dict) and all(base == bases[0] for base in bases):
        note["base"] = bases[0]
    return note


def copy_tokenizer(adapters: Mapping[str, Adapter], folder: Path, events: EventWriter) -> None:
    """Tokenizer and template files of the first source that has any; says when another's differ."""
    chosen = ""
    for label, adapter in adapters.items():
        found = [adapter.folder / name for name in TOKENIZER_FILES if (adapter.folder / name).is_file()]
        if not found:
            continue
        if not chosen:
            chosen = label
            for path in found:
                shutil.copyfile(path, folder / path.name)
            continue
        for path in found:
            mine = folder / path.name
            if not mine.is_file() or file_sha256(mine) != file_sha256(path):
                events.warning(f"{path.name} of adapter {label} differs from {chosen}'s: {chosen}'s is kept")
