"""Merged adapters against dense float64 sums, dense SVDs and PEFT's own loading of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import BadAdapterError, BadRecipeError, TargetExistsError
from engine.jobs.events import EventWriter
from engine.merge import combine as room
from engine.merge.combine import Part, combine
from engine.merge.manifest_check import check_manifest
from engine.weights import Adapter, Checkpoint
from tests.engine.weights.variants import VARIANTS

Dense = dict[str, np.ndarray]


def dense(folder: Path) -> Dense:
    """{module: float64 delta} by the formula of the PEFT documentation, read by the safetensors library."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if module == pattern or module.endswith("." + pattern):
                alpha = value
        rank = a.shape[0]
        found[module] = alpha / (rank**0.5 if config.get("use_rslora") else rank) * b @ a
    return found


def part(label: str, folder: Path, base: Path, weight: float = 1.0, **by_suffix: float) -> Part:
    """Every tensor of the adapter with `weight`, or the weight of the last part of its module's name."""
    names = Adapter.open(folder).match(Checkpoint.open(base))
    return Part(label, folder, {n: by_suffix.get(n.split(".")[-2], weight) for n in names})


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture
def three(tiny_llama: Path, make_adapter: Any) -> dict[str, Path]:
    """Adapters of different rank, kind of scale, patterns and targets."""
    return {
        "pt": make_adapter(tiny_llama, rank=8, seed=1),
        "sft": make_adapter(tiny_llama, rank=4, seed=2, use_rslora=True),
        "mlp": make_adapter(
            tiny_llama, rank=6, seed=3, target_modules=["up_proj", "down_proj"],
            rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"down_proj": 5},
        ),
    }  # fmt: skip


def test_stacked_is_the_sum_in_our_reader_and_in_peft(tiny_llama, three, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    parts = [
        part("pt", three["pt"], tiny_llama, 0.3),
        part("sft", three["sft"], tiny_llama, -0.7, q_proj=0.25, v_proj=0.0),
        part("mlp", three["mlp"], tiny_llama, 2.0),
    ]
    result = combine(tiny_llama, parts, tmp_path / "merged", EventWriter())
    out = Path(result["out"])
    assert out == tmp_path / "merged" and result["exit_code"] == 0 and result["verdict"]["ok"]
    deltas = {p.label: dense(p.path) for p in parts}
    wanted: Dense = {}
    for p in parts:
        for module, delta in deltas[p.label].items():
            wanted[module] = wanted.get(module, 0) + p.weights[f"{module}.weight"] * delta
    found = dense(out)
    assert found.keys() == wanted.keys()
    for module in wanted:
        assert relative(found[module], wanted[module]) < 1e-7
    ranks = {module: factor.rank for module, factor in Adapter.open(out).factors.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 12 and ranks["model.layers.0.self_attn.v_proj"] == 8
    assert ranks["model.layers.0.mlp.up_proj"] == 18 and ranks["model.layers.1.mlp.up_proj"] == 14

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    before = {name: value.double().numpy().copy() for name, value in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    for name, value in merged.items():
        delta = value.double().numpy() - before[name]
        if name.removesuffix(".weight") in wanted:
            # PEFT adds in float32: one rounding of each weight
            np.testing.assert_allclose(delta, wanted[name.removesuffix(".weight")], rtol=0, atol=3e-7)
        else:
            assert not delta.any(), name


def test_svd_is_the_best_approximation_and_says_its_error(tiny_llama, three, tmp_path):
    parts = [part("pt", three["pt"], tiny_llama, 0.6), part("sft", three["sft"], tiny_llama, 0.4)]
    result = combine(tiny_llama, parts, tmp_path / "merged", EventWriter(), rank=5)
    assert result["verdict"]["ok"] and result["combined"]["rank"] == 5
    pt, sft, found = dense(three["pt"]), dense(three["sft"]), dense(tmp_path / "merged")
    lost = whole = 0.0
    rows = {row["name"]: row for row in result["combined"]["per_module"]}
    for module in pt:
        wanted = 0.6 * pt[module] + 0.4 * sft[module]
        u, s, vt = np.linalg.svd(wanted)
        best = (u[:, :5] * s[:5]) @ vt[:5]
        assert relative(found[module], best) < 1e-6
        assert np.linalg.matrix_rank(found[module], tol=1e-6 * s[0]) == 5
        error = relative(best, wanted)
        assert rows[module]["error"] == pytest.approx(error, rel=1e-9)
        assert rows[module]["energy"] == pytest.approx(np.sum(s[:5] ** 2) / np.sum(s**2), rel=1e-9)
        share = np.cumsum(s**2) / np.sum(s**2)
        assert rows[module]["rank_99"] == int(np.searchsorted(share, 0.99)) + 1
        lost, whole = lost + np.sum((best - wanted) ** 2), whole + np.sum(wanted**2)
    assert result["combined"]["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    assert result["verdict"]["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)


def test_svd_at_full_rank_loses_nothing(tiny_llama, three, tmp_path):
    parts = [part("pt", three["pt"], tiny_llama, 0.3), part("sft", three["sft"], tiny_llama, 0.7)]
    result = combine(tiny_llama, parts, tmp_path / "merged", EventWriter(), rank=100)
    assert result["combined"]["error"] < 1e-12 and result["combined"]["rank"] == 12
    pt, sft, found = dense(three["pt"]), dense(three["sft"]), dense(tmp_path / "merged")
    for module in pt:
        assert relative(found[module], 0.3 * pt[module] + 0.7 * sft[module]) < 1e-6


def test_peft_puts_nothing_on_other_modules(tiny_llama, make_adapter, tmp_path):
    """q_proj of layer 0 only: a short target name would also match layer 1."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    one = make_adapter(tiny_llama, seed=4, target_modules=["layers.0.self_attn.q_proj"])
    combine(tiny_llama, [part("a", one, tiny_llama)], tmp_path / "merged", EventWriter())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "merged")
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted == ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]


EXACT = ("plain", "patterns", "rslora", "embedding", "tied_lora_embedding", "conv1d", "conv1d_mixed")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_summed_as_peft_merges_it_or_refused_by_name(variant, name, tmp_path):
    """The variant at 0.5 and at -2 beside itself: PEFT's merge of the result is base - 1.5 * PEFT's own delta."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    case = variant(name)
    adapter, base = Adapter.open(case.adapter), Checkpoint.open(case.base)
    names = list(adapter.changes(base))
    parts = [Part(label, case.adapter, dict.fromkeys(names, w)) for label, w in (("a", 0.5), ("b", -2.0))]
    if name not in EXACT:
        words = "|".join(v.partition(":")[0] for v in adapter.variants) or "ties its embeddings"
        with pytest.raises(BadAdapterError, match=f"{words}|target_parameters|output side alone"):
            combine(case.base, parts, tmp_path / "merged", EventWriter())
        assert list(tmp_path.iterdir()) == []
        return
    result = combine(case.base, parts, tmp_path / "merged", EventWriter())
    assert result["verdict"]["ok"], result["verdict"]
    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    if case.untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    before = {key: value.double().numpy().copy() for key, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, tmp_path / "merged").merge_and_unload().state_dict()
    changed = 0
    for key, value in merged.items():
        mine = next((k for k in (key, key.removeprefix("transformer.")) if k in case.merged), None)
        if mine is None:
            continue  # a tied copy that is not on disk
        delta = case.merged[mine].astype(np.float64) - before[key]
        changed += bool(np.abs(delta).max() > 1e-3)
        np.testing.assert_allclose(value.double().numpy() - before[key], -1.5 * delta, rtol=0, atol=2e-6)
    assert changed >= 2


def test_adapters_of_other_trainers_are_summed_with_peft_s(tiny_llama, make_adapter, tmp_path):
    """torch.compile's and FSDP's prefixes, no prefix, `.default.`: the same modules under other names."""
    plain, other = make_adapter(tiny_llama, seed=1), make_adapter(tiny_llama, seed=2)
    wanted, second = dense(plain), dense(other)
    tensors = load_file(other / "adapter_model.safetensors")
    dialects = (
        lambda key: key.removeprefix("base_model.model."),
        lambda key: "_orig_mod." + key,
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("base_model.model.model.", "base_model.model."),  # trained on the inner model
    )
    for n, rename in enumerate(dialects):
        save_file({rename(key): value for key, value in tensors.items()}, other / "adapter_model.safetensors")
        parts = [part("a", plain, tiny_llama, 0.3), part("b", other, tiny_llama, 0.7)]
        for order, pair in (("ab", parts), ("ba", parts[::-1])):
            out = tmp_path / f"merged-{n}-{order}"
            result = combine(tiny_llama, pair, out, EventWriter())
            assert result["verdict"]["ok"] and result["verdict"]["modules_checked"] == 14
            found = dense(out)
            assert found.keys() == wanted.keys()
            for module in wanted:
                assert relative(found[module], 0.3 * wanted[module] + 0.7 * second[module]) < 1e-7


def test_manifest_tokenizer_and_template(tiny_llama, make_adapter, tmp_path):
    one, two = make_adapter(tiny_llama, seed=1), make_adapter(tiny_llama, seed=2)
    (one / "chat_template.jinja").write_text("A")
    (two / "chat_template.jinja").write_text("B")
    for folder in (one, two):
        (folder / "training.json").write_text(json.dumps({"kind": "sft", "template": "chatml"}))
    events = EventWriter()
    parts = [part("one", one, tiny_llama, 0.5), part("two", two, tiny_llama, 0.5, q_proj=0.1)]
    result = combine(tiny_llama, parts, tmp_path / "merged", events, document={"method": "linear"})
    out = tmp_path / "merged"
    assert (out / "chat_template.jinja").read_text() == "A"
    assert any(
        "chat_template.jinja of adapter two" in e.data["message"] for e in events.kept if e.type == "warning"
    )
    assert Adapter.open(out).template == "chatml"
    manifest = json.loads((out / "medmerge.json").read_text())
    assert manifest == result["manifest"]
    assert (
        manifest["asked"]["one"] == 0.5
        and manifest["asked"]["two"]["model.layers.1.self_attn.q_proj.weight"] == 0.1
    )
    assert manifest["verification"]["ok"] and manifest["recipe"] == {"method": "linear"}
    assert check_manifest(out, EventWriter())["ok"]
    (out / "adapter_config.json").write_text("{}")
    assert check_manifest(out, EventWriter())["changed"] == [str(out / "adapter_config.json")]
    assert not list(out.glob(".*"))


def test_a_wrong_file_is_rejected(tiny_llama, three, tmp_path, monkeypatch):
    """A bug in the writer is seen by the check: here one module's weight is 1.0001 of what was asked."""
    right = room._term

    def wrong(label: str, weight: float, factor: Any) -> Any:
        return right(
            label, weight * (1.0001 if factor.module.endswith("layers.1.mlp.up_proj") else 1), factor
        )

    monkeypatch.setattr(room, "_term", wrong)
    parts = [part("pt", three["pt"], tiny_llama, 0.3), part("sft", three["sft"], tiny_llama, 0.7)]
    for rank in (None, 3):
        result = combine(tiny_llama, parts, tmp_path / f"merged-{rank}", EventWriter(), rank=rank)
        assert result["exit_code"] == 1 and result["verdict"]["verdict"] == "unknown_delta"
        assert result["verdict"]["wrong"] == ["model.layers.1.mlp.up_proj"]
        assert result["out"] == str(tmp_path / f"merged-{rank}.rejected")
        assert not (tmp_path / f"merged-{rank}").exists() and Path(result["out"]).is_dir()


@pytest.mark.parametrize("spoil", ["config", "swap", "missing", "stray"])
def test_the_check_sees_damage(tiny_llama, three, tmp_path, spoil):
    from engine.merge.combine_check import check_combined

    parts = [part("pt", three["pt"], tiny_llama, 0.3)]
    combine(tiny_llama, parts, tmp_path / "merged", EventWriter())
    file, config = (
        tmp_path / "merged" / "adapter_model.safetensors",
        tmp_path / "merged" / "adapter_config.json",
    )
    tensors = load_file(file)
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    if spoil == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 16}))
    elif spoil == "swap":
        other = first.replace("layers.0", "layers.1")
        tensors[f"{first}.lora_B.weight"] = tensors[f"{other}.lora_B.weight"]
    elif spoil == "missing":
        del tensors[f"{first}.lora_A.weight"], tensors[f"{first}.lora_B.weight"]
    else:
        for half in "AB":
            tensors[f"base_model.model.lm_head.lora_{half}.weight"] = tensors[f"{first}.lora_{half}.weight"]
    save_file(tensors, file)
    verdict = check_combined(tmp_path / "merged", [(p.path, p.weights) for p in parts], {}, EventWriter())
    code = {
        "config": "unknown_delta",
        "swap": "unknown_delta",
        "missing": "missing",
        "stray": "unexpected_change",
    }
    assert not verdict["ok"] and verdict["exit_code"] == 1 and verdict["verdict"] == code[spoil]


def test_what_cannot_be_summed_is_refused_by_name(tiny_llama, make_adapter, tmp_path):
    plain = make_adapter(tiny_llama, seed=1)
    target = tmp_path / "merged"
    with pytest.raises(BadRecipeError, match="every weight is 0"):
        combine(tiny_llama, [part("a", plain, tiny_llama, 0.0)], target, EventWriter())
    with pytest.raises(BadRecipeError, match="beyond float32"):
        combine(tiny_llama, [part("a", plain, tiny_llama, 1e41)], target, EventWriter())
    with pytest.raises(BadRecipeError, match="rank is 0"):
        combine(tiny_llama, [part("a", plain, tiny_llama)], target, EventWriter(), rank=0)
    with pytest.raises(BadRecipeError, match="is inside"):
        combine(tiny_llama, [part("a", plain, tiny_llama)], plain / "merged", EventWriter())
    tensors = load_file(plain / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, plain / "adapter_model.safetensors")
    with pytest.raises(BadAdapterError, match="NaN"):
        combine(tiny_llama, [part("a", plain, tiny_llama)], target, EventWriter())
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    with pytest.raises(TargetExistsError):
        combine(tiny_llama, [part("a", plain, tiny_llama)], target, EventWriter())
