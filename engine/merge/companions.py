"""The files beside the weights of a merge: config, tokenizer, templates, index, changed only where they must be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from engine.merge.layout import longer
from engine.merge.plan import Plan
from engine.merge.recipe import DTYPES
from engine.merge.vocabulary import is_table
from engine.weights import Checkpoint
from engine.weights.checkpoint import COMPANIONS, INDEX

_TOKENIZER = tuple(
    name for name in COMPANIONS
    if name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template"))
)  # fmt: skip


def copy_companions(plan: Plan, folder: Path) -> None:
    """Tokenizer, chat template, generation config and index beside the weights; config.json as it must be."""
    base, tokenizer = plan.base, new_tokenizer(plan)
    for path in base.companions:
        if tokenizer is not None and path.name in _TOKENIZER:
            continue
        target = folder / path.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if tokenizer is not None:
        for name in _TOKENIZER:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    config = config_text(plan)
    if config is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")
    if base.index_path is not None:
        (folder / INDEX).write_text(_index(plan, base), encoding="utf-8")


def new_tokenizer(plan: Plan) -> Path | None:
    """The folder of the adapter whose longer tables are in the merge and that has a tokenizer; else None."""
    for tensor in plan.changed:
        for part in tensor.parts:
            if (
                part.rows is None
                and is_table(tensor.target.name)
                and longer(part.change) == tensor.target.shape[0] != tensor.source.shape[0]
                and part.label in plan.adapters
                and (plan.adapters[part.label].folder / "tokenizer.json").is_file()
            ):
                return plan.adapters[part.label].folder
    return None


def config_text(plan: Plan) -> str | None:
    """config.json of the output where it must differ, None where the input's is copied as it is.

    It differs where the dtype changes, where the head gets a tensor of its own, and where tokens were added.
    """
    base, dtype = plan.base, plan.recipe.dtype
    changes: dict[str, Any] = {}
    if dtype is not None and any(t.is_float and t.dtype != DTYPES[dtype] for t in base.tensors.values()):
        key = "torch_dtype" if "torch_dtype" in base.config and "dtype" not in base.config else "dtype"
        changes[key] = dtype
    if plan.untied:
        changes["tie_word_embeddings"] = False
    rows = {
        tensor.target.shape[0]
        for tensor in plan.changed
        if is_table(tensor.target.name) and tensor.target.shape != tensor.source.shape
    }
    if rows:
        changes["vocab_size"] = max(rows)
    if not changes:
        return None
    return json.dumps({**base.config, **changes}, indent=2, ensure_ascii=False) + "\n"


def _index(plan: Plan, base: Checkpoint) -> str:
    assert base.index_path is not None
    index = json.loads(base.index_path.read_text(encoding="utf-8"))
    total = sum(tensor.target.nbytes for tensor in plan.tensors)
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    for shard in plan.shards:
        for tensor in shard.tensors:
            index["weight_map"].setdefault(tensor.target.name, shard.name)
    return json.dumps(index, indent=2) + "\n"
