"""LLaMA-Factory's dataset_info.json: its data set names become sources.

Called by whoever reads a LLaMA-Factory config. The meaning is that of src/llamafactory/data/parser.py:
- where `columns` is given, a column it leaves out is not used; without `columns` they are instruction, input, output
  (no system, no history) for alpaca, and conversations for sharegpt;
- where `tags` is given, a tag it leaves out is none; without, they are from, value, human, gpt, system;
- `split`, `folder`: a file has the one split train, and `folder` is of the hub.
What needs the network, a preference, a picture or a tool is refused by name.

Where we differ: `num_samples` rows are chosen by a hash of their number, not by numpy's random state, and asking for
more rows than there are is an error, not a repetition.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError
from training.data.rows import TEXT_SUFFIXES
from training.data.samples import TAGS
from training.data.sources import Source, check_keys

FILE = "dataset_info.json"
HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
KEYS = (
    "file_name", "file_sha1", "formatting", "columns", "tags", "split", "folder", "num_samples", "subset", "revision",
    "ranking", *HUBS,
)  # fmt: skip
ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
}
ALPACA_DEFAULT = {
    "instruction": "instruction",
    "input": "input",
    "output": "output",
    "system": "",
    "history": "",
}
# Columns of other ways of training: a row of them is more than a conversation.
FOREIGN = ("tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
TOOL_TAGS = ("observation_tag", "function_tag")  # may be named: turns that use them are refused when read


def resolve(names: Sequence[str], info: Path) -> tuple[Source, ...]:
    """The sources of these data sets. `info` is the dataset_info.json, or the folder it is in (`dataset_dir`).

    Raises BadRecipeError naming the data set and the key for what is unknown or not possible here.
    """
    path = info / FILE if info.is_dir() else info
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadRecipeError(
            f"cannot read {path}: {error.strerror}", f"give the folder with {FILE}"
        ) from error
    except ValueError as error:
        raise BadRecipeError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadRecipeError(f"{path}: expected an object of data sets")
    return tuple(_source(name, table, path) for name in names)


def _source(name: str, table: dict[str, Any], path: Path) -> Source:
    if name not in table:
        near = difflib.get_close_matches(name, table, 3)
        raise BadRecipeError(
            f"{path} has no data set {name!r}",
            f"did you mean {' or '.join(near)}?" if near else "add it there",
        )
    entry, where = table[name], f"{path}, {name}"
    if not isinstance(entry, dict):
        raise BadRecipeError(f"{where}: expected an object, found {entry!r:.60}")
    check_keys(entry, KEYS, where)
    for key in HUBS:
        if key in entry:
            raise BadRecipeError(
                f"{where}: {key} needs the network or runs a script, and is not read here",
                "download the data set and name its file with file_name",
            )
    if entry.get("ranking"):
        raise BadRecipeError(f"{where}: ranking: preference data train no pt or sft adapter")
    if entry.get("subset"):
        raise BadRecipeError(f"{where}: subset has no meaning for a file", "remove it")
    if entry.get("split", "train") != "train":
        raise BadRecipeError(
            f"{where}: split is {entry['split']!r}; a file has only train", "name the file of it"
        )
    file = entry.get("file_name")
    if not isinstance(file, str) or not file:
        raise BadRecipeError(f"{where}: file_name is missing")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise BadRecipeError(
            f"{where}: formatting is {formatting!r}, expected alpaca or sharegpt",
            "OpenAI messages are sharegpt with tags (role_tag: role, content_tag: content, user_tag: user, …)",
        )
    number = entry.get("num_samples") or 0
    if type(number) is not int or number < 0:
        raise BadRecipeError(f"{where}: num_samples must be a whole number, found {number!r}")
    columns = _columns(entry.get("columns"), formatting, where)
    return Source(
        path=str(path.parent / file),
        layout=formatting,
        split="line" if _is_text(path.parent / file) else "auto",  # as HF's text loader does
        columns=columns,
        tags=_tags(entry.get("tags"), where) if formatting == "sharegpt" else {},
        name=name,
        sample=number,
    )


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in TEXT_SUFFIXES


def _columns(columns: Any, formatting: str, where: str) -> dict[str, str]:
    if columns is None:
        return dict(ALPACA_DEFAULT) if formatting == "alpaca" else {"messages": "conversations", "system": ""}
    _check_names(columns, f"{where}.columns")
    check_keys(columns, (*ALPACA, "messages", *FOREIGN), f"{where}.columns")
    for key in FOREIGN:
        if columns.get(key):
            raise BadRecipeError(
                f"{where}: column {key} is not trained here", "only texts and conversations are"
            )
    if formatting == "alpaca":
        return {ours: columns.get(theirs) or "" for theirs, ours in ALPACA.items()}
    if not columns.get("messages"):
        raise BadRecipeError(f"{where}: columns.messages is missing for sharegpt")
    return {"messages": columns["messages"], "system": columns.get("system") or ""}


def _tags(tags: Any, where: str) -> dict[str, str]:
    if tags is None:
        return {}
    _check_names(tags, f"{where}.tags")
    check_keys(tags, (*TAGS, *TOOL_TAGS), f"{where}.tags")
    for key in TAGS[:-1]:
        if not tags.get(key):
            raise BadRecipeError(f"{where}: tags.{key} is missing", "tags that are given are given whole")
    return {key: tags.get(key) or "" for key in TAGS}


def _check_names(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(name, str | None) for name in value.values()):
        raise BadRecipeError(f"{where} must map names to texts, found {value!r:.60}")
