"""A model folder: config.json, safetensors shards (with or without an index), and the files beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import BadModelError
from engine.weights.tensorfile import TensorFile, TensorInfo, file_sha256, no_duplicates, read_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What a complete model carries besides weights; copied along with a merge. Not its README: that describes
# another model.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "vocab.txt", "spiece.model",
    "tekken.json", "LICENSE", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A model folder read by headers only. `tensors` maps every tensor name to where it lies."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[TensorFile, ...]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a folder with config.json and safetensors weights.

        Raises:
            BadModelError: not a folder, no config, no weights, pickle weights, an index that names missing
                shards or tensors, a tensor in two shards.
            BadTensorFileError: a shard that is truncated or damaged.
        """
        if not _is_folder(folder):
            raise BadModelError(
                f"{folder} is not a folder", "give a model folder with config.json and safetensors"
            )
        config = read_json(folder / "config.json", BadModelError, "a model folder has config.json")
        shards = [TensorFile.open(path) for path in _shard_paths(folder)]
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name, tensor in shard.tensors.items():
                if name in tensors:
                    raise BadModelError(
                        f"tensor {name!r} is in both {tensors[name].file.name} and {shard.path.name}"
                    )
                tensors[name] = tensor
        _check_index(folder, tensors)
        return cls(folder, config, tuple(shards), tensors)

    @property
    def name(self) -> str:
        """What the folder says it is called: `name` in medmerge.json (demo base, merges), else the folder name."""
        try:
            return str(read_json(self.folder / "medmerge.json", BadModelError, "")["name"])
        except (BadModelError, KeyError):
            return self.folder.name

    @property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, e.g. "LlamaForCausalLM" ("" when it names none)."""
        named = self.config.get("architectures") or [""]
        return str(named[0]) if isinstance(named, list) else ""

    @property
    def dtype(self) -> str:
        """The dtype that holds most bytes, e.g. "BF16"."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda key: sizes[key]) if sizes else ""

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def layers(self) -> int:
        """Number of transformer layers as config.json says, 0 when it does not."""
        said = self.config.get("num_hidden_layers")
        return said if type(said) is int and said > 0 else 0

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor: config.json's word, else whether lm_head is absent."""
        said = self.config.get("tie_word_embeddings")
        return "lm_head.weight" not in self.tensors if said is None else bool(said)

    @property
    def companions(self) -> list[Path]:
        """Tokenizer, templates and configs beside the weights that exist here."""
        found = [self.folder / name for name in COMPANIONS if (self.folder / name).is_file()]
        extra = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
        return found + extra

    @property
    def index_path(self) -> Path | None:
        """The index of a sharded checkpoint, None for a single file."""
        path = self.folder / INDEX
        return path if path.is_file() else None

    @cached_property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of every shard by file name; reads all weights once (slow for big models), then is kept."""
        return {shard.path.name: file_sha256(shard.path) for shard in self.shards}


def _shard_paths(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = _weight_map(index)
        shard_names = sorted(set(names.values()))
        for name in shard_names:
            if Path(name).name != name or not name.endswith(".safetensors") or name.startswith("."):
                raise BadModelError(
                    f"{index} names the shard {name!r}, which is not a plain file name ending in .safetensors"
                )
            if not _is_file(folder / name):
                raise BadModelError(
                    f"{index} names {name!r}, which is not in {folder}", "the download is incomplete"
                )
        return [folder / name for name in shard_names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise BadModelError(
            f"{folder} holds pickle weights (.bin/.pt), which are never loaded: they can run code",
            "load it with transformers where you trust it, and save_pretrained(...) as safetensors",
        )
    found = sorted(folder.glob("*.safetensors"))
    hint = (
        f"found {found[0].name}, but no {SINGLE} and no {INDEX}" if found else f"expected {SINGLE} or {INDEX}"
    )
    if (folder / "adapter_config.json").is_file():
        hint = "this is an adapter; the base is the model it was trained from"
    raise BadModelError(f"{folder} has no model weights", hint)


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor names to shard names."""
    raw = read_json(index, BadModelError, "download it again", unique=True)
    names = raw.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise BadModelError(f"{index} has no weight_map from tensor names to file names", "download it again")
    return names


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    """Whether there is a regular file or a link to one; False for what cannot even be a path."""
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that cannot be entered
        return False


def _check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    if not (folder / INDEX).is_file():
        return
    weight_map = _weight_map(folder / INDEX)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise BadModelError(f"{folder / INDEX} says {name!r} is in {file!r}, and it is not")
    strays = tensors.keys() - weight_map.keys()
    if strays:
        raise BadModelError(f"{folder / INDEX} does not name {sorted(strays)[0]!r}, which is in a shard")


def read_json(
    path: Path, error_class: type[BadModelError] | type[Any], hint: str, unique: bool = False
) -> dict[str, Any]:
    """A JSON object from a file, or `error_class` naming the file. `unique`: no name may be there twice."""
    try:
        text = read_regular(path).decode("utf-8")
        value = json.loads(text, object_pairs_hook=no_duplicates if unique else None)
    except FileNotFoundError as error:
        raise error_class(f"{path} is missing", hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise error_class(f"{path} cannot be read as JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise error_class(f"{path} should hold a JSON object", hint)
    return value
