"""The tokenizer in the GGUF reads text as the checkpoint's own does, or the file is not made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.errors import BadModelError
from engine.gguf import tokenizer as ours
from engine.gguf.check import PROBES
from engine.gguf.convert import Conversion, convert
from engine.jobs.events import EventWriter
from tests.conftest import SPECIAL_TOKENS, TOKENIZER_TEXT

# As in the tokenizer.json of Qwen2/Qwen3 and of Llama 3.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
TEXTS = [
    *TOKENIZER_TEXT,
    *PROBES,
    "1 12 123 1234 12345 2024-01-31 100000",
    "\n\n1. a\n\n2. b",
    "they'LL we'll",
] * 4


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: split(QWEN),
    "llama-bpe": lambda: split(LLAMA3),
    "smaug-bpe": lambda: split(LLAMA3),
}


def with_tokenizer(source: Path, target: Path, tokenizer: Tokenizer) -> Path:
    """A copy of a tiny model with this tokenizer; the embedding has 384 rows."""
    shutil.copytree(source, target)
    tokenizer.save(str(target / "tokenizer.json"))
    return target


def byte_level(pre: Any, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@pytest.mark.parametrize("name", PRE)
def test_pre_tokenizers_are_recognised_and_read_the_same(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """compare_tokens runs inside convert: it raises when llama.cpp's ids differ on any probe."""
    folder = with_tokenizer(tiny_llama, tmp_path / "m", byte_level(PRE[name](), name == "llama-bpe"))
    plan = Conversion.plan(folder)
    assert plan.tokenizer.pre == name
    convert(plan, tmp_path / "m.gguf", "f16", EventWriter())


@pytest.mark.parametrize("name, wrong", [("smollm", "gpt-2"), ("qwen2", "gpt-2"), ("llama-bpe", "qwen2")])
def test_a_wrong_pre_tokenizer_is_caught(name: str, wrong: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(tiny_llama, tmp_path / "m", byte_level(PRE[name](), name == "llama-bpe"))
    with pytest.raises(BadModelError, match="does not read text"):
        convert(Conversion.plan(folder, pre=wrong), tmp_path / "m.gguf", "f16", EventWriter())
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_unknown_pre_tokenizer_is_an_error_with_a_way_out(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(tiny_llama, tmp_path / "m", byte_level(split(r"\p{L}+|\p{N}+|\s+")))
    with pytest.raises(BadModelError, match="--pre"):
        Conversion.plan(folder)
    assert Conversion.plan(folder, pre="qwen2").tokenizer.pre == "qwen2"


def test_real_names_of_real_structures() -> None:
    """The pre-tokenizer of Qwen3's own tokenizer.json, word for word."""
    qwen3 = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }
    assert ours.recognise(Path("t"), {"pre_tokenizer": qwen3, "model": {"ignore_merges": False}}) == "qwen2"
    with pytest.raises(BadModelError):
        ours.recognise(Path("t"), {"pre_tokenizer": qwen3, "model": {"ignore_merges": True}})
    with pytest.raises(BadModelError):
        ours.recognise(Path("t"), {"pre_tokenizer": None, "model": {}})


def test_sentencepiece_style(tiny_llama: Path, tmp_path: Path) -> None:
    """Llama 2's kind: BPE over "▁" words with byte fallback. Scores are made from the order of merges."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted({char for text in TOKENIZER_TEXT for char in text.replace(" ", "▁")} | {"▁"})
    vocab |= {letter: len(vocab) + index for index, letter in enumerate(letters)}
    merges = []
    for left, right in ("▁t", "he", "in", "er", "▁a", "ou", "th", "▁d"):
        merges.append((left, right))
    merges += [("▁t", "he"), ("▁", "the"), ("in", "g"), ("▁a", "s")]
    merges = [pair for pair in merges if pair[0] in vocab or any(a + b == pair[0] for a, b in merges)]
    for left, right in list(merges):
        if right not in vocab and not any(a + b == right for a, b in merges):
            merges.remove((left, right))
        else:
            vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder = with_tokenizer(tiny_llama, tmp_path / "m", tokenizer)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    plan = Conversion.plan(folder)
    assert plan.tokenizer.model == "llama" and plan.tokenizer.add_bos
    assert plan.tokenizer.types[:4] == (ours.UNKNOWN, ours.CONTROL, ours.CONTROL, ours.BYTE)
    convert(plan, tmp_path / "m.gguf", "f16", EventWriter())


def test_types_special_ids_and_padding(tiny_llama: Path) -> None:
    from engine.gguf.architecture import Architecture
    from engine.weights import Checkpoint

    model = Checkpoint.open(tiny_llama)
    model.config["eos_token_id"] = [2, 0]
    found = ours.Tokenizer.of(model, Architecture.of(model))
    assert len(found.tokens) == 384 and found.types[:3] == (ours.CONTROL,) * 3
    assert found.special["bos"] == 1 and found.special["eos"] == 2 and found.special["pad"] == 0
    assert not found.add_bos and not found.add_eos and "<|im_start|>" in found.chat_template
    used = len(json.loads((tiny_llama / "tokenizer.json").read_text())["model"]["vocab"])
    assert all(kind == ours.UNUSED for kind in found.types[used:])
    assert found.tokens[used:] == tuple(f"[PAD{number}]" for number in range(used, 384))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"added_tokens": [{"id": "x"}]}, "vocabulary is malformed"),
        ({"added_tokens": [{"id": 400, "content": "<x>", "special": True}]}, "has token id 400"),
        ({"merges": ["a b c"]}, "not a pair"),
    ],
)
def test_broken_tokenizers(tiny_llama: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    raw = json.loads(path.read_text())
    if "merges" in change:
        raw["model"]["merges"] = change.pop("merges")
    path.write_text(json.dumps(raw | change))
    with pytest.raises(BadModelError, match=says):
        Conversion.plan(tmp_path / "m")


def test_named_templates_use_the_default(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert ours.chat_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert ours.chat_template(tmp_path) == "J"
