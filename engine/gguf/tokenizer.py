"""A checkpoint's tokenizer in GGUF's words: tokens, types, merges, pre-tokenizer, special ids, chat template.

`tokenizer.ggml.pre` names how llama.cpp splits text before merging. A wrong name costs quality silently, so it
is recognised by the structure of tokenizer.json's pre-tokenizer and never guessed; `engine.gguf.check` then
compares token ids of the finished file with the tokenizer's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadModelError
from engine.gguf.architecture import Architecture
from engine.weights import Checkpoint
from engine.weights.checkpoint import read_json

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The steps of the pre-tokenizer, then llama.cpp's name (src/llama-vocab.cpp, the regexes of each type).
# llama-bpe also means that a word found whole in the vocabulary is taken whole (`ignore_merges`).
_KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((f"split:{_QWEN2}",), False): "qwen2",
    ((f"split:{_LLAMA3}",), True): "llama-bpe",
    ((f"split:{_LLAMA3}",), False): "smaug-bpe",
    ((f"split:{_QWEN35}",), False): "qwen35",
}
NAMES = tuple(sorted(set(_KNOWN.values())))


@dataclass(frozen=True)
class Tokenizer:
    """What a GGUF needs of a byte-level BPE or SentencePiece-style BPE tokenizer.

    model: "gpt2" (byte-level) or "llama" (SentencePiece with byte fallback). `scores` only for the latter.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special: dict[str, int]  # "bos", "eos", "unk", "pad", "eot" -> id
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str

    @classmethod
    def of(cls, model: Checkpoint, architecture: Architecture, pre: str = "") -> Tokenizer:
        """Read tokenizer.json and the files beside it; `pre` overrides the recognised pre-tokenizer.

        Raises BadModelError: no tokenizer.json, a kind that has no GGUF form here, an unknown pre-tokenizer,
        more tokens than the embedding has rows.
        """
        path = model.folder / "tokenizer.json"
        hint = "save the model with its fast tokenizer (tokenizer.save_pretrained)"
        raw = read_json(path, BadModelError, hint)
        config = _optional(model.folder / "tokenizer_config.json")
        bpe = raw.get("model") or {}
        if bpe.get("type", "BPE") != "BPE" or not isinstance(bpe.get("vocab"), dict):
            raise BadModelError(f"{path}: model type {bpe.get('type')!r} cannot be written as GGUF, only BPE")
        sentencepiece = bool(bpe.get("byte_fallback"))
        tokens, types = _vocabulary(path, raw, architecture.vocabulary, sentencepiece)
        merges = _merges(path, bpe)
        add_bos, add_eos, special = _special(model, path, config)
        return cls(
            model="llama" if sentencepiece else "gpt2",
            pre="default" if sentencepiece else pre or recognise(path, raw),
            tokens=tuple(tokens),
            types=tuple(types),
            merges=() if sentencepiece else tuple(" ".join(pair) for pair in merges),
            scores=_scores(tokens, types, merges) if sentencepiece else (),
            special=special,
            add_bos=add_bos,
            add_eos=add_eos,
            add_space=sentencepiece and _adds_space(raw),
            chat_template=chat_template(model.folder, config),
        )

    def write(self, writer: Any) -> None:
        """Add the keys to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.add_space)
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def recognise(path: Path, raw: dict[str, Any]) -> str:
    """llama.cpp's name of tokenizer.json's pre-tokenizer. Raises BadModelError when it is none it has.

    An unknown one is an error and not "default": the file would work, and answer worse for no visible reason.
    """
    steps = _steps(raw.get("pre_tokenizer"))
    ignore_merges = bool((raw.get("model") or {}).get("ignore_merges"))
    name = _KNOWN.get((steps, ignore_merges))
    if name is None:
        raise BadModelError(
            f"{path}: its pre-tokenizer is none that is known here ({json.dumps(raw.get('pre_tokenizer'))[:300]})",
            f"if you know llama.cpp's name for it, give it with --pre (known here: {', '.join(NAMES)}); "
            "the token ids are then still compared",
        )
    return name


def _steps(pre: Any) -> tuple[str, ...]:
    """The splitting steps of a pre-tokenizer as text; ByteLevel without its own regex splits nothing."""
    if not isinstance(pre, dict):
        return (repr(pre),)
    kind = pre.get("type")
    if kind == "Sequence":
        return tuple(step for part in pre.get("pretokenizers", []) for step in _steps(part))
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return ("gpt2",) if pre.get("use_regex", True) else ()
    if kind == "Digits" and pre.get("individual_digits"):
        return ("digits",)
    pattern = (pre.get("pattern") or {}).get("Regex")
    if kind == "Split" and pattern and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return (f"split:{pattern}",)
    return (json.dumps(pre, sort_keys=True),)


def _vocabulary(path: Path, raw: dict[str, Any], size: int, bytes_too: bool) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; ids without a token become unused `[PADn]`, as llama.cpp's converter does."""
    by_id: dict[int, tuple[str, int]] = {}
    try:
        for text, number in raw["model"]["vocab"].items():
            byte = bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            by_id[int(number)] = (str(text), BYTE if byte else NORMAL)
        for entry in raw.get("added_tokens", []):
            kind = CONTROL if entry.get("special") else USER_DEFINED
            by_id[int(entry["id"])] = (str(entry["content"]), kind)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadModelError(f"{path}: its vocabulary is malformed ({error!r})") from error
    unknown = raw["model"].get("unk_token")
    if bytes_too and unknown in raw["model"]["vocab"]:
        by_id[int(raw["model"]["vocab"][unknown])] = (str(unknown), UNKNOWN)
    if by_id and max(by_id) >= size:
        raise BadModelError(
            f"{path} has token id {max(by_id)}, and the embedding has {size} rows",
            "tokenizer and weights do not belong together",
        )
    filled = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _merges(path: Path, bpe: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; tokenizer.json holds them as pairs, or as "a b" in older files."""
    pairs = []
    for merge in bpe.get("merges") or []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise BadModelError(f"{path}: merge {merge!r:.80} is not a pair of tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> tuple[float, ...]:
    """SentencePiece scores that merge in the order of the merges: minus the rank of the merge that makes a token."""
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    lowest = -float(len(merges) + 1)
    return tuple(
        -float(rank[text]) if kind == NORMAL and text in rank else (lowest if kind == NORMAL else 0.0)
        for text, kind in zip(tokens, types, strict=True)
    )


def _adds_space(raw: dict[str, Any]) -> bool:
    text = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _special(model: Checkpoint, path: Path, config: dict[str, Any]) -> tuple[bool, bool, dict[str, int]]:
    """Whether BOS and EOS are added when encoding (asked of the tokenizer itself), and the ids of named tokens.

    EOS is the tokenizer's own (the end of a turn in a chat model); another one that generation_config.json
    names becomes EOT, so that llama.cpp stops at either.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing finer
        raise BadModelError(f"{path} cannot be read: {error}", "save the tokenizer again") from error
    generation = _optional(model.folder / "generation_config.json")
    special: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        entry = config.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if number is None:
            number = next(iter(_ids(model.config.get(f"{name}_token_id"))), None)
        if number is not None:
            special[name] = number
    ends = _ids(generation.get("eos_token_id")) or _ids(model.config.get("eos_token_id"))
    others = [number for number in ends if number != special.get("eos")]
    if "eos" not in special and others:
        special["eos"] = others.pop(0)
    if others:
        special["eot"] = others[0]
    size = int(model.config.get("vocab_size", 0))
    special = {name: number for name, number in special.items() if 0 <= number < size}
    encoded = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    added = len(encoded) > len(plain)
    add_bos = added and encoded[0] == special.get("bos", -1) and encoded[0] != plain[0]
    add_eos = added and encoded[-1] == special.get("eos", -1) and encoded[-1] != plain[-1]
    return add_bos, add_eos, special


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [int(item) for item in values if isinstance(item, int) and not isinstance(item, bool)]


def chat_template(folder: Path, config: dict[str, Any] | None = None) -> str:
    """The model's Jinja template: chat_template.jinja, else `chat_template` in tokenizer_config.json, else ""."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = (config if config is not None else _optional(folder / "tokenizer_config.json")).get(
        "chat_template"
    )
    if isinstance(found, list):  # several by name: the one called default is the model's
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, BadModelError, "correct or delete it") if path.is_file() else {}
