"""May two lines of a table be compared? Says in words what differs between them beside the model.

Model, template and decoding stand in the table for all to see; what does not (other data, other prompts, another
precision behind the same names) is a warning on the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.evaluate.summary import label_of

Spec = Mapping[str, Any]
_ITEMS = {"sha256": "data", "limit": "number of samples", "half": "half of the data", "where": "rows chosen"}
_PROMPT = {
    "system": "system text", "prompt": "prompt", "columns": "columns", "scoring": "scoring", "style": "prompt style",
    "description": "description", "language": "language", "instruction": "instruction", "shuffle": "option order",
    "replace": "words put in", "empty": "treatment of empty rows", "header": "header",
    "max_tokens": "cut of long texts", "answers": "reading of answers",
}  # fmt: skip


def warnings(groups: Sequence[tuple[str, Spec]]) -> list[str]:
    """For each (run, spec) of a table: how it differs from the first group of the same task, or "".

    Compared are the data and prompt of the task, what one decoding name stands for, and the precision and
    libraries of mixtures (files and servers are other models to begin with).
    """
    firsts: dict[tuple[str, ...], tuple[str, Spec]] = {}
    found = []
    for run, spec in groups:
        said = []
        task = ("task", str(spec["task"]["name"]), str(spec.get("kind")))
        decoding = ("decoding", str((spec.get("decoding") or {}).get("name", "")), *task[1:])
        keys = [(task, _task_differs), (decoding, _decoding_differs)]
        keys.append((("model", label_of(spec)), _model_differs))
        if not spec.get("model"):
            keys.append((("precision", *task[1:]), _precision_differs))
        for key, differs in keys:
            if key in firsts:
                other_run, other = firsts[key]
                words = differs(spec, other)
                if words:
                    said.append(f"{words} than in {other_run}" if other_run != run else words)
            else:
                firsts[key] = (run, spec)
        found.append("; ".join(said))
    return found


def same_items(first: Spec, second: Spec) -> bool:
    """Whether two groups were asked the same samples in the same words, so that pairing them means something."""
    names = [name for name in (*_ITEMS, *_PROMPT) if name not in ("limit", "half")]
    return all(
        _same(first["task"].get(name), second["task"].get(name))
        for name in names
        if name not in ("limit", "half")
    )


def _same(first: Any, second: Any) -> bool:
    return json.dumps(first, sort_keys=True, default=str) == json.dumps(second, sort_keys=True, default=str)


def _task_differs(spec: Spec, other: Spec) -> str:
    names = {**_ITEMS, **_PROMPT}
    differing = [
        words for name, words in names.items() if not _same(spec["task"].get(name), other["task"].get(name))
    ]
    return f"other {', '.join(differing)}" if differing else ""


def _model_differs(spec: Spec, other: Spec) -> str:
    """One name, two models: another base or file, or other adapters."""
    differing = []
    if (spec.get("base") or {}).get("sha256") != (other.get("base") or {}).get("sha256"):
        differing.append("base")
    if not _same(spec.get("adapters"), other.get("adapters")):
        differing.append("adapters")
    return f"other {' and '.join(differing)} under the same name" if differing else ""


def _decoding_differs(spec: Spec, other: Spec) -> str:
    first, second = spec.get("decoding") or {}, other.get("decoding") or {}
    differing = [
        f"{name} {first.get(name)} here, {second.get(name)} there"
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]
    return f"other decoding under the same name ({'; '.join(differing)})" if differing else ""


def _precision_differs(spec: Spec, other: Spec) -> str:
    differing = [
        f"{name} {spec.get(name)}"
        for name in ("dtype", "compute", "device")
        if spec.get(name, "") != other.get(name, "")
    ]
    if not _same(spec.get("versions"), other.get("versions")):
        differing.append("library versions")
    return f"other {', '.join(differing)}" if differing else ""
