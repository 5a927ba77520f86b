"""GGUF files read back: right ones pass, and every failure we claim to name is planted and named.

Wrong files are made by torch from the adapters' own files (tests/engine/gguf/conftest.py) and written with the
converter; quantising is llama.cpp's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import BadAdapterError, BadInputError, BadRecipeError
from engine.gguf.lora import convert_adapter
from engine.gguf.mixture import Mixture
from engine.gguf.outputs import write_ggufs
from engine.gguf.verify import GgufVerdict, verify_gguf
from engine.jobs.events import EventWriter
from tests.conftest import MakeAdapter, build_model
from tests.engine.gguf.conftest import Family, deltas_by_torch, merged_by_torch, to_gguf

Families = dict[str, Family]
ASKED = {"pt": 0.3, "sft": 0.7}


def mixed(family: Family, out: Path, kind: str, weights: Any = None) -> Path:
    """A GGUF straight from base and adapters, not verified while it is made."""
    mixture = Mixture(family.base, family.adapters, weights or family.weights)
    write_ggufs(mixture, {kind: out}, EventWriter(), verify=False)
    return out


def check(file: Path, family: Family, weights: dict[str, float] | None = None, **more: Any) -> GgufVerdict:
    return verify_gguf(file, family.base, family.adapters, weights, EventWriter(), threads=2, **more)


def codes(verdict: GgufVerdict) -> list[str]:
    return [finding.code for finding in verdict.verdict.findings]


# ---- right files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", "f32"), ("llama", "f16"), ("qwen3", "bf16"), ("llama", "q8_0"), ("qwen3", "q8_0"),
        ("llama", "q4_k_m"), ("qwen3", "q4_k_m"), ("llama", "q4_0"), ("qwen3", "q5_1"), ("llama", "q2_k"),
        ("qwen3", "q3_k_m"), ("llama", "iq4_nl"),
    ],
)  # fmt: skip
def test_a_mixture_is_right_in_every_type(families: Families, tmp_path: Path, name: str, kind: str) -> None:
    family = families[name]
    verdict = check(mixed(family, tmp_path / "m.gguf", kind), family, ASKED)
    assert verdict.ok and verdict.exit_code == 0, verdict.to_json()["findings"]
    result = verdict.to_json()
    assert result["elements_differing"] == 0 and result["tensors_unexpected"] == []
    assert result["format"]["route"] == "direct"
    assert result["tensors_checked"] == sum(result["format"]["types"].values())
    for label, weight in ASKED.items():
        error = result["standard_error"][label]
        assert 0 < error < 0.002
        assert abs(result["effective_weights"][label] - result["expected_weights"][label]) < max(error, 1e-4)
        # a coarse type shrinks all values a little, so "expected" may be off by more than the error
        assert abs(result["effective_weights"][label] - weight) < 4 * error + 0.02 * weight + 1e-4
    if kind != "f32":  # float32 sums of another order differ in their last bits
        assert result["format"]["reproduced_share"] > 0.98


@pytest.mark.parametrize("name, kind", [("llama", "q8_0"), ("qwen3", "q4_k_m"), ("llama", "f16")])
def test_by_way_of_a_bfloat16_checkpoint(families: Families, tmp_path: Path, name: str, kind: str) -> None:
    """Merged by torch, rounded to bfloat16, then written: right, and said so; strict about it."""
    family = families[name]
    merged = merged_by_torch(family, tmp_path / "merged", lambda tensor: ASKED)
    file = to_gguf(merged, tmp_path / "m.gguf", kind)
    verdict = check(file, family, ASKED)
    assert verdict.ok and verdict.format["route"] == "BF16", verdict.to_json()["findings"]
    alone = verify_gguf(file, merged, {}, None, EventWriter())
    assert alone.ok and alone.to_json()["effective_weights"] is None
    other = verify_gguf(file, family.base, {}, None, EventWriter())
    assert codes(other) == ["unexpected_change"] and len(other.verdict.tensors_wrong) == 14


def test_weights_by_tensor(families: Families, tmp_path: Path) -> None:
    family = families["llama"]
    names = list(deltas_by_torch(family.adapters["pt"]))
    weights = {"pt": {n: 0.2 if ".layers.0." in n else 0.5 for n in names}, "sft": 0.7}
    file = mixed(family, tmp_path / "m.gguf", "q4_k_m", weights)
    right = check(file, family, {"pt": 0.2, "sft": 0.7}, per_tensor_weights={"pt": weights["pt"]})
    assert right.ok
    wrong = check(file, family, {"pt": 0.2, "sft": 0.7})
    assert codes(wrong)[0] in ("other_weights", "partly_applied") and wrong.exit_code == 1
    assert all("layers.1" in name.replace("blk.", "layers.") for name in wrong.verdict.tensors_wrong)


def test_the_fit_is_a_dense_least_squares_fit(families: Families, tmp_path: Path) -> None:
    """Against numpy's lstsq on the whole file, dequantised by the gguf package, in float64."""
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    family = families["qwen3"]
    file = mixed(family, tmp_path / "m.gguf", "q4_k_m", {"pt": 0.25, "sft": -0.4})
    verdict = check(file, family, {"pt": 0.25, "sft": -0.4})
    stored = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in GGUFReader(file).tensors}
    state = load_file(family.base / "model.safetensors")
    deltas = [deltas_by_torch(folder) for folder in family.adapters.values()]
    from engine.gguf.tensors import gguf_name

    change, columns = [], []
    for tensor in deltas[0]:
        value = stored[str(gguf_name(tensor))] - state[tensor].double().numpy()
        change.append(value.ravel())
        columns.append(np.stack([delta[tensor].numpy().ravel() for delta in deltas]))
    x, y = np.concatenate(columns, axis=1).T, np.concatenate(change)
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    found = list((verdict.verdict.effective_weights or {}).values())
    assert np.abs(np.array(found) - solution).max() < 1e-6
    rest = np.linalg.norm(y - x @ solution) / np.linalg.norm(y)
    assert verdict.verdict.residual == pytest.approx(rest, rel=1e-4)


# ---- planted failures --------------------------------------------------------------------------------------

PLANTED: dict[str, tuple[dict[str, float], str, str]] = {
    "nothing applied": ({"pt": 0.0, "sft": 0.0}, "base_unchanged", ""),
    "exchanged": ({"pt": 0.7, "sft": 0.3}, "swapped", "pt sft"),
    "squared": ({"pt": 0.09, "sft": 0.49}, "weight_squared", ""),
    "pt left out": ({"pt": 0.0, "sft": 0.7}, "missing", "pt"),
    "double": ({"pt": 0.6, "sft": 1.4}, "scaled_by", "2"),
    "1.25 times": ({"pt": 0.375, "sft": 0.875}, "scaled_by", "1.25"),
    "others": ({"pt": 0.55, "sft": 0.2}, "other_weights", "pt 0.55, sft 0.2"),
    "1.001 times": ({"pt": 0.3003, "sft": 0.7007}, "scaled_by", "1.001"),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name, kind", [("llama", "q8_0"), ("qwen3", "q4_k_m")])
def test_wrong_weights_are_named(
    families: Families, tmp_path: Path, name: str, kind: str, planted: str
) -> None:
    inside, code, detail = PLANTED[planted]
    family = families[name]
    verdict = check(mixed(family, tmp_path / "m.gguf", kind, inside), family, ASKED)
    first = verdict.verdict.findings[0]
    assert verdict.exit_code == 1
    if planted == "1.001 times":  # found for certain; which of two names is a matter of digits
        assert first.code in ("scaled_by", "other_weights"), first
        shift = [verdict.verdict.effective_weights[k] - verdict.verdict.expected_weights[k] for k in ASKED]  # type: ignore[index]
        assert shift == pytest.approx([0.0003, 0.0007], abs=2e-4) and min(shift) > 1e-4
        return
    assert (first.code, first.detail) == (code, detail), first
    for label, weight in inside.items():
        assert abs((verdict.verdict.effective_weights or {})[label] - weight) < 0.02


@pytest.mark.parametrize("name, kind", [("llama", "q4_k_m"), ("qwen3", "q8_0")])
def test_an_adapter_applied_in_part(families: Families, tmp_path: Path, name: str, kind: str) -> None:
    family = families[name]
    merged = merged_by_torch(family, tmp_path / "merged", lambda t: ASKED if ".layers.0." in t else {})
    verdict = check(to_gguf(merged, tmp_path / "m.gguf", kind), family, ASKED)
    first = verdict.verdict.findings[0]
    assert first.code == "partly_applied" and "layers.1" in first.detail and "layers.0" not in first.detail


def test_a_tensor_that_says_nothing_is_not_called_right(families: Families, tmp_path: Path) -> None:
    """One module's delta is far below the type's steps: that module fits the base and the mixture alike."""
    from safetensors.torch import load_file, save_file

    adapters = {}
    for label, folder in families["llama"].adapters.items():
        adapters[label] = shutil.copytree(folder, tmp_path / label)
        state = load_file(adapters[label] / "adapter_model.safetensors")
        for key, value in state.items():
            if "layers.1.mlp.down_proj.lora_B" in key:
                value *= 1e-6
        save_file(state, adapters[label] / "adapter_model.safetensors", {"format": "pt"})
    family = Family(families["llama"].base, adapters)
    verdict = check(to_gguf(family.base, tmp_path / "m.gguf", "q4_k_m"), family, ASKED)
    assert codes(verdict) == ["base_unchanged"]
    assert "blk.1.ffn_down.weight" not in verdict.verdict.tensors_wrong


@pytest.mark.parametrize("name, kind", [("llama", "q8_0"), ("qwen3", "q4_k_m")])
def test_something_else_inside(families: Families, tmp_path: Path, name: str, kind: str) -> None:
    import torch

    generator = torch.Generator().manual_seed(5)

    def stranger(tensor: str, value: Any) -> Any:
        if "up_proj" not in tensor:
            return value
        return value + 0.01 * torch.randn(value.shape, generator=generator, dtype=value.dtype)

    family = families[name]
    merged = merged_by_torch(family, tmp_path / "merged", lambda t: ASKED, extra=stranger)
    verdict = check(to_gguf(merged, tmp_path / "m.gguf", kind), family, ASKED)
    assert codes(verdict)[0] == "unknown_delta"
    assert sorted(verdict.verdict.tensors_wrong) == ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight"]


def test_sums_rounded_on_the_way(families: Families, tmp_path: Path) -> None:
    """PT merged and rounded to bfloat16, then SFT: the weights are right and the roundings are not."""
    import torch

    family = families["llama"]
    pt, sft = (deltas_by_torch(folder) for folder in family.adapters.values())

    def sequential(tensor: str, value: Any) -> Any:
        if tensor not in pt:
            return value
        return (value + 0.3 * pt[tensor]).to(torch.bfloat16).double() + 0.7 * sft[tensor]

    merged = merged_by_torch(family, tmp_path / "merged", lambda t: {}, extra=sequential)
    verdict = check(to_gguf(merged, tmp_path / "m.gguf", "q8_0"), family, ASKED)
    assert codes(verdict) == ["low_precision_sums"] and verdict.exit_code == 1


@pytest.mark.parametrize(
    "changes, names",
    [
        (lambda t, v: v * 1.01 if t == "model.norm.weight" else v, ["output_norm.weight"]),
        (lambda t, v: v + 0.001 if "embed_tokens" in t else v, ["token_embd.weight"]),
    ],
)
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_tensors_no_adapter_touches(
    families: Families, tmp_path: Path, kind: str, changes: Callable[..., Any], names: list[str]
) -> None:
    family = families["llama"]
    merged = merged_by_torch(family, tmp_path / "merged", lambda t: ASKED, extra=changes)
    verdict = check(to_gguf(merged, tmp_path / "m.gguf", kind), family, ASKED)
    assert codes(verdict) == ["unexpected_change"] and list(verdict.verdict.tensors_wrong) == names


def test_a_tensor_missing_and_one_too_many(families: Families, tmp_path: Path) -> None:
    family = families["qwen3"]
    file = mixed(family, tmp_path / "m.gguf", "q8_0")
    data = file.read_bytes()
    assert data.count(b"blk.1.attn_q_norm.weight") == 1
    file.write_bytes(data.replace(b"blk.1.attn_q_norm.weight", b"blk.1.attn_q_nurm.weight"))
    verdict = check(file, family, ASKED)
    assert [(f.code, f.detail) for f in verdict.verdict.findings] == [
        ("unexpected_change", "blk.1.attn_q_norm.weight"), ("unexpected_change", "blk.1.attn_q_nurm.weight"),
    ]  # fmt: skip
    assert verdict.verdict.tensors_unexpected == ("blk.1.attn_q_nurm.weight",) and verdict.exit_code == 1


def test_zeroed_blocks_do_not_pass(families: Families, tmp_path: Path) -> None:
    """A block whose scale is 0 spans a grid of one point: nothing may count as "outside of it" for that reason."""
    from engine.gguf.reader import GgufFile

    family = families["llama"]
    file = mixed(family, tmp_path / "m.gguf", "q4_k_m")
    tensor = GgufFile.open(file).tensors["blk.0.ffn_gate.weight"]
    with file.open("r+b") as opened:
        opened.seek(tensor.start)
        opened.write(bytes(tensor.nbytes))
    verdict = check(file, family, ASKED)
    assert verdict.exit_code == 1 and verdict.verdict.tensors_wrong == ("blk.0.ffn_gate.weight",)


def _tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def _swap_merges(raw: dict[str, Any]) -> None:
    merges = raw["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def _swap_tokens(raw: dict[str, Any]) -> None:
    vocab = raw["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]


@pytest.mark.parametrize(
    "change, detail, says",
    [
        (lambda f: _tokenizer(f, _swap_merges), "tokenizer", "tokenizer.ggml.merges"),
        (lambda f: _tokenizer(f, _swap_tokens), "tokenizer", "tokenizer.ggml.tokens"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "chat_template", "another"),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat_template", "has none"),
        (
            lambda f: (f / "config.json").write_text(
                json.dumps(json.loads((f / "config.json").read_text()) | {"rms_norm_eps": 1e-4})
            ),
            "config",
            "layer_norm_rms_epsilon",
        ),
    ],
)
def test_tokenizer_template_and_config(
    families: Families, tmp_path: Path, change: Callable[[Path], Any], detail: str, says: str
) -> None:
    family = families["llama"]
    other = shutil.copytree(family.base, tmp_path / "other")
    change(other)
    file = mixed(Family(other, family.adapters), tmp_path / "m.gguf", "q8_0")
    verdict = check(file, family, ASKED)
    first = verdict.verdict.findings[0]
    assert (first.code, first.detail) == ("unexpected_change", detail) and says in first.message
    assert verdict.exit_code == 1


# ---- without weights; what cannot be told ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind, inside",
    [
        ("llama", "q8_0", {"pt": 0.3, "sft": 0.7}),
        ("qwen3", "q4_k_m", {"pt": 0.25, "sft": -0.4}),
        ("llama", "q4_k_m", {"pt": 0.0, "sft": 1.0}),
    ],
)
def test_what_is_in_there(
    families: Families, tmp_path: Path, name: str, kind: str, inside: dict[str, float]
) -> None:
    family = families[name]
    verdict = check(mixed(family, tmp_path / "m.gguf", kind, inside), family)
    assert verdict.ok and verdict.verdict.asked is None and verdict.verdict.guessed == inside


def test_the_base_alone_is_named_without_weights(families: Families, tmp_path: Path) -> None:
    family = families["qwen3"]
    verdict = check(to_gguf(family.base, tmp_path / "b.gguf", "q4_k_m"), family)
    assert codes(verdict) == ["base_unchanged"] and verdict.exit_code == 1


def test_deltas_too_small_for_the_type_cannot_be_told(
    families: Families, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = families["llama"].base
    faint = {label: make_adapter(base, b_std=1e-6, seed=s) for label, s in (("pt", 1), ("sft", 2))}
    family = Family(base, faint)
    verdict = check(mixed(family, tmp_path / "m.gguf", "q4_k_m"), family, ASKED)
    assert codes(verdict) == ["not_identifiable"] and verdict.exit_code == 4
    assert min(e for e in (verdict.standard_error or {}).values() if e is not None) > 0.05
    fine = check(mixed(family, tmp_path / "f.gguf", "f32"), family, ASKED)
    assert fine.ok


def test_the_same_adapter_twice_cannot_be_told_apart(families: Families, tmp_path: Path) -> None:
    pt = families["llama"].adapters["pt"]
    family = Family(families["llama"].base, {"a": pt, "b": pt}, {"a": 0.3, "b": 0.7})
    verdict = check(mixed(family, tmp_path / "m.gguf", "q8_0"), family, {"a": 0.3, "b": 0.7})
    assert codes(verdict) == ["not_identifiable"] and verdict.exit_code == 4
    assert verdict.standard_error == {"a": None, "b": None}


# ---- refusals, memory --------------------------------------------------------------------------------------


def test_refusals_by_name(families: Families, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    family = families["llama"]
    lora = tmp_path / "lora.gguf"
    convert_adapter(family.adapters["pt"], family.base, lora, "f32", EventWriter())
    with pytest.raises(BadInputError, match="'adapter', not a model"):
        check(lora, family, ASKED)
    file = mixed(family, tmp_path / "m.gguf", "q8_0")
    with pytest.raises(BadRecipeError, match="sft"):
        check(file, family, {"pt": 0.3})
    narrow = build_model("llama", tmp_path / "narrow")
    with pytest.raises(BadAdapterError, match="another base"):
        check(file, Family(narrow, family.adapters), ASKED)


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of 25 MB as float32 is judged in blocks of 256 kB."""
    import tracemalloc

    from engine.gguf.architecture import Architecture
    from engine.gguf.reader import GgufFile
    from engine.gguf.verify import measure
    from engine.gguf.verify.asked import pair_tensors
    from engine.weights import Checkpoint

    folder = build_model("llama", tmp_path / "m", hidden_size=256, intermediate_size=256, vocab_size=24_576)
    base = Checkpoint.open(folder)
    file = GgufFile.open(to_gguf(folder, tmp_path / "m.gguf", "q8_0"))
    pairs = pair_tensors(file, base, Architecture.of(base), {}).pairs
    largest = next(pair for pair in pairs if pair.stored.name == "token_embd.weight")
    monkeypatch.setattr(measure, "BLOCK_ELEMENTS", 1 << 16)
    tracemalloc.start()
    stats = measure.measure(largest, np.zeros(0), "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stats.judged == 24_576 * 256 and stats.wrong == 0
    assert peak < 10_000_000 < 24_576 * 256 * 4
