"""Does the chat template in use fit what an adapter was trained with? One answer for adapters, merges and GGUFs.

`Trained` says what something was trained with: from an adapter's `training.json`, or from the manifest of the
merge it went into (which records the same). Chat, evaluation and the app compare it with the template chosen.
engine/gguf/trained.py finds both for whatever a person talks to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine import templates
from engine.errors import BadModelError

if TYPE_CHECKING:
    from engine.weights import Adapter

Fit = Literal["fits", "differs", "unknown"]
CHAT_ADVICE = "--template {name}"  # how the template is chosen on the command line
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12  # hex digits of a hash that a message shows


@dataclass(frozen=True)
class Trained:
    """The template an adapter was trained with. Neither `plain` nor a `template`: nobody knows."""

    label: str
    template: str = ""
    sha256: str = ""  # of its text (engine.templates.describe); "" where only the name is known
    plain: bool = False  # trained on plain text (PT): no template is right or wrong for it
    within: str = ""  # the merge it is in, "" for an adapter of its own

    @property
    def known(self) -> bool:
        return self.plain or bool(self.template)

    def to_dict(self) -> dict[str, Any]:
        """As a manifest records it; `from_record` reads it."""
        return {
            "template": self.template or None,
            "template_sha256": self.sha256 or None,
            "template_known": self.known,
        }


@dataclass(frozen=True)
class Chosen:
    """The template in use. `sha256` is "" where its text is not known (a model without a readable template)."""

    name: str
    sha256: str = ""


def of_adapter(label: str, adapter: Adapter) -> Trained:
    """What an adapter's `training.json` says; a folder name that looks like PT says nothing."""
    training = adapter.training
    text = training.get("template_text")
    sha256 = _hash(text.get("sha256")) if isinstance(text, Mapping) else ""
    name = str(training.get("template") or "")
    # Runs on plain text leave `template` at its default and have no text of one.
    plain = training.get("kind") == "pt" and not sha256 and name in ("", "model")
    return Trained(label, "" if plain else name, sha256, plain)


def from_record(label: str, record: Mapping[str, Any], within: str = "") -> Trained:
    """From an entry of a manifest's `adapters` (or the same in a GGUF's metadata)."""
    name, sha256 = str(record.get("template") or ""), _hash(record.get("template_sha256"))
    known = record.get("template_known")
    if known is None:  # written before manifests said so
        plain = record.get("kind") == "pt" and not sha256 and name in ("", "model")
    else:
        plain = known is True and not name
    return Trained(label, "" if plain else name, sha256, plain, within)


def of_manifest(manifest: Mapping[str, Any], within: str = "") -> list[Trained]:
    """All adapters in a merge: its own, then those inside its base and models that are merges themselves."""
    found = [from_record(label, entry, within) for label, entry in _entries(manifest.get("adapters"))]
    models = [manifest.get("base"), *(model for _, model in _entries(manifest.get("models")))]
    for model in models:
        parent = model.get("medmerge") if isinstance(model, Mapping) else None
        if isinstance(parent, Mapping):
            inside = _entries(parent.get("templates"))
            found += [from_record(label, entry, within) for label, entry in inside]
    return found


def records(trained: Iterable[Trained], prefix: str = "") -> dict[str, dict[str, Any]]:
    """{label: record} for a manifest; labels that are there twice are numbered."""
    found: dict[str, dict[str, Any]] = {}
    for one in trained:
        label, number = f"{prefix}{one.label}", 1
        while label in found:
            number += 1
            label = f"{prefix}{one.label}-{number}"
        found[label] = one.to_dict()
    return found


def choose(name: str, model: Path | None = None) -> Chosen:
    """The template of that name as `engine.templates.load` finds it; "model" of a folder without one has no hash.

    Raises BadRecipeError for a name that does not exist.
    """
    if name == "model" and model is None:
        return Chosen(name)
    try:
        return Chosen(name, templates.describe(templates.load(name, model))["sha256"])
    except BadModelError:  # it has none, or a broken one: whoever renders with it says so
        return Chosen(name)


def judge(trained: Trained, chosen: Chosen) -> Fit:
    """By the hash of the texts where both are known, else by name. Plain text fits every template."""
    if trained.plain:
        return "fits"
    if not trained.template:
        return "unknown"
    mine = trained.sha256 or _built_in(trained.template)
    theirs = chosen.sha256 or _built_in(chosen.name)
    same = mine == theirs if mine and theirs else trained.template == chosen.name
    return "fits" if same else "differs"


def warning(trained: Trained, chosen: Chosen, advice: str = CHAT_ADVICE) -> str:
    """A sentence naming both templates and what to do; "" when it fits. `advice` shows how a template is chosen."""
    fit = judge(trained, chosen)
    if fit == "fits":
        return ""
    who = f"adapter {trained.label}" if trained.label else "an adapter"
    who += f" in {trained.within}" if trained.within else ""
    if fit == "unknown":
        return (
            f"{who}: template unknown (nothing says what it was trained with), and template {chosen.name} is used: "
            f"if its author names another, choose {advice.format(name='NAME')}"
        )
    if trained.template == chosen.name:
        return (
            f"{who} was trained with template {trained.template} (SHA-256 {trained.sha256[:_SHOWN]}), and "
            f"template {chosen.name} is another text here ({chosen.sha256[:_SHOWN]}): use the base it was trained "
            "on, or the text in its training.json as chat_template.jinja"
        )
    return (
        f"{who} was trained with template {trained.template}, and template {chosen.name} is used: "
        f"choose {advice.format(name=trained.template)}, or expect other answers than it was trained for"
    )


def warnings(trained: Iterable[Trained], chosen: Chosen, advice: str = CHAT_ADVICE) -> list[str]:
    """The warnings of several adapters, each once."""
    said = (warning(one, chosen, advice) for one in trained)
    return list(dict.fromkeys(words for words in said if words))


def agreed(trained: Iterable[Trained]) -> Trained | None:
    """What several adapters were all trained with, plain text apart; None when one is unknown or they differ."""
    found = list(trained)
    heard = [one for one in found if not one.plain]
    if not heard:
        return replace(found[0]) if found else None
    first = heard[0]
    for one in heard:
        if not one.template or judge(one, Chosen(first.template, first.sha256)) != "fits":
            return None
    return next((one for one in heard if one.sha256), first)


@functools.cache
def _built_in(name: str) -> str:
    """The hash of a built-in template as this version writes it, "" for other names."""
    return templates.describe(templates.BUILTIN[name])["sha256"] if name in templates.BUILTIN else ""


def _hash(value: Any) -> str:
    return value if isinstance(value, str) and _SHA256.fullmatch(value) else ""


def _entries(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, Mapping):
        return []
    return [(str(label), entry) for label, entry in value.items() if isinstance(entry, Mapping)]
