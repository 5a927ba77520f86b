"""The merge's numbers: against float64, against PEFT, and the properties it must keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.jobs import EventWriter
from engine.merge import schedule, stream
from engine.merge.execute import merge
from engine.merge.plan import make_plan
from engine.merge.recipe import parse
from engine.weights.tensorfile import file_sha256
from tests.conftest import MakeAdapter
from tests.engine.merge.references import assert_is_merge, load_model


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    """PT of rank 8 on all linear layers, SFT of rank 4 with rsLoRA on attention only."""
    return (
        make_adapter(tiny_llama, seed=1, name="pt"),
        make_adapter(
            tiny_llama,
            rank=4,
            seed=2,
            name="sft",
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "o_proj"],
        ),
    )


def run(base: Path, mixture: list[tuple[Path, Any]], out: Path, **options: Any) -> dict[str, Any]:
    """A merge without verification: these tests have their own reference."""
    document = {
        "base": str(base),
        "adapters": {
            f"a{i}": {"path": str(path), "weight": weight} for i, (path, weight) in enumerate(mixture)
        },
        "output": {"path": str(out), "dtype": options.pop("dtype", None)},
    }
    return merge(parse(document, "test", []), EventWriter(), verify=False, **options)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_every_element_is_right(
    tiny_llama: Path, adapters: tuple[Path, Path], tmp_path: Path, dtype: str | None
) -> None:
    pt, sft = adapters
    result = run(tiny_llama, [(pt, 0.3), (sft, 0.7)], tmp_path / "m", dtype=dtype)
    kind = getattr(torch, dtype) if dtype else None
    assert_is_merge(tmp_path / "m", tiny_llama, [(pt, 0.3), (sft, 0.7)], kind)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == (dtype or "bfloat16")
    assert result["bytes_written"] == (tmp_path / "m" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("elements", [64, 700, 4096])
def test_any_block_size_is_right(
    tiny_llama: Path,
    adapters: tuple[Path, Path],
    tmp_path: Path,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedule, "BLOCK_ELEMENTS", elements)
    run(tiny_llama, [(adapters[0], 0.3), (adapters[1], -0.7)], tmp_path / "m", threads=3)
    assert_is_merge(tmp_path / "m", tiny_llama, [(adapters[0], 0.3), (adapters[1], -0.7)])


def test_equals_peft_cat_in_float32(
    tiny_llama: Path, adapters: tuple[Path, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pt, sft = adapters[0], make_adapter(tiny_llama, rank=4, seed=9)  # PEFT's "cat" is wrong with rsLoRA
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), pt, adapter_name="pt"
    )
    model.load_adapter(str(sft), adapter_name="sft")
    model.add_weighted_adapter(["pt", "sft"], [0.3, 0.7], "both", combination_type="cat")
    model.set_adapter("both")
    theirs = model.merge_and_unload().state_dict()
    run(tiny_llama, [(pt, 0.3), (sft, 0.7)], tmp_path / "m", dtype="float32")
    ours = load_model(tmp_path / "m")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)


def test_equals_peft_on_a_transposed_base(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """GPT-2 keeps its weights (in, out): fan_in_fan_out adapters add the transposed delta."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(base)
    adapter = make_adapter(base, rank=4, seed=7, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    theirs = loaded.merge_and_unload().state_dict()
    run(base, [(adapter, 1.0)], tmp_path / "m")
    assert_is_merge(tmp_path / "m", base, [(adapter, 1.0)])
    for name, tensor in load_model(tmp_path / "m").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)


def test_sharded_equals_single(
    tiny_llama: Path, tiny_llama_sharded: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    mixture = [(adapters[0], 0.3), (adapters[1], 0.7)]
    run(tiny_llama, mixture, tmp_path / "single")
    run(tiny_llama_sharded, mixture, tmp_path / "sharded")
    single, sharded = load_model(tmp_path / "single"), load_model(tmp_path / "sharded")
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    assert {path.name for path in tiny_llama_sharded.iterdir()} | {"medmerge.json"} == {
        path.name for path in (tmp_path / "sharded").iterdir()
    }


def test_sharded_in_another_dtype_loads_in_transformers(
    tiny_llama_sharded: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(tiny_llama_sharded, [(adapters[0], 0.5)], tmp_path / "m", dtype="float32")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    tensors = load_model(tmp_path / "m")
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.float32
    assert torch.equal(model.state_dict()["lm_head.weight"], tensors["lm_head.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_tied_base_keeps_its_embeddings(tiny_qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_qwen3, seed=4)
    run(tiny_qwen3, [(adapter, 1.0)], tmp_path / "m")
    assert_is_merge(tmp_path / "m", tiny_qwen3, [(adapter, 1.0)])
    assert "lm_head.weight" not in load_model(tmp_path / "m")


def test_weight_zero_leaves_the_base_bit_equal(
    tiny_llama: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run(tiny_llama, [(adapters[0], 0.0), (adapters[1], -0.0)], tmp_path / "m")
    assert file_sha256(tmp_path / "m" / "model.safetensors") == file_sha256(tiny_llama / "model.safetensors")
    assert result["manifest"]["output"]["tensors_changed"] == 0


def test_weights_by_selector(tiny_llama: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    weights = {"default": 0.7, "layers 0-0": 0.5, "*.mlp.*": 0.0, "*.1.mlp.up_proj": -1.0}
    run(tiny_llama, [(adapters[0], weights), (adapters[1], 0.25)], tmp_path / "m")

    def by_hand(name: str) -> float:
        if name == "model.layers.1.mlp.up_proj.weight":
            return -1.0
        return 0.0 if ".mlp." in name else 0.5 if ".layers.0." in name else 0.7

    assert_is_merge(tmp_path / "m", tiny_llama, [(adapters[0], by_hand), (adapters[1], 0.25)])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.tuples(*[st.floats(-3, 3, allow_nan=False).map(lambda w: round(w, 3))] * 2),
    threads=st.integers(1, 5),
)
def test_any_weights_any_order_any_threads(
    tiny_llama: Path,
    adapters: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    weights: tuple[float, float],
    threads: int,
) -> None:
    mixture = list(zip(adapters, weights, strict=True))
    out = tmp_path_factory.mktemp("any")
    run(tiny_llama, mixture, out / "there", threads=threads)
    run(tiny_llama, mixture[::-1], out / "back", threads=1)
    assert_is_merge(out / "there", tiny_llama, mixture)
    assert_is_merge(out / "back", tiny_llama, mixture)


def test_threads_do_not_change_a_byte(
    tiny_llama: Path, adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "BLOCK_ELEMENTS", 512)
    hashes = set()
    for threads in (1, 2, 7):
        result = run(
            tiny_llama, [(adapters[0], 0.3), (adapters[1], 0.7)], tmp_path / f"m{threads}", threads=threads
        )
        hashes.add(result["manifest"]["output"]["files"]["model.safetensors"])
    assert len(hashes) == 1


def test_the_manifest_names_every_file_by_its_hash(
    tiny_llama_sharded: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "m"
    manifest = run(tiny_llama_sharded, [(adapters[0], 0.3), (adapters[1], 0.7)], out)["manifest"]
    assert json.loads((out / "medmerge.json").read_text()) == manifest
    assert manifest["asked"] == {"a0": 0.3, "a1": 0.7}
    assert manifest["output"]["files"] == {
        path.name: file_sha256(path) for path in out.iterdir() if path.name != "medmerge.json"
    }
    weights_and_index = {path.name for path in tiny_llama_sharded.glob("model*")}
    assert weights_and_index <= manifest["base"]["files"].keys()
    for name, sha in manifest["base"]["files"].items():
        assert file_sha256(tiny_llama_sharded / name) == sha
    for label, folder in zip(("a0", "a1"), adapters, strict=True):
        for name, sha in manifest["adapters"][label]["files"].items():
            assert file_sha256(folder / name) == sha
    assert "not verified" in manifest["verification"]["message"]
    # a merge of a merge says what it stands on
    second = run(out, [(adapters[0], 0.1)], tmp_path / "m2")["manifest"]
    assert second["base"]["medmerge"]["asked"] == {"a0": 0.3, "a1": 0.7}


def test_copied_tensors_of_any_kind_keep_their_bytes(
    tiny_llama: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """Integers, booleans, empty tensors and scalars beside the weights; infinity in a buffer is no NaN."""
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    extra = {
        "counts": torch.arange(7),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "mask": torch.tensor([0.0, -np.inf], dtype=torch.float16),
    }
    save_file({**load_model(tiny_llama), **extra}, base / "model.safetensors")
    (base / "config.json").write_text((tiny_llama / "config.json").read_text())
    run(base, [(adapters[0], 0.3)], tmp_path / "m")
    assert_is_merge(tmp_path / "m", base, [(adapters[0], 0.3)])
    run(base, [(adapters[0], 0.3)], tmp_path / "m32", dtype="float32")
    after = load_model(tmp_path / "m32")
    assert torch.equal(after["counts"], extra["counts"]) and torch.equal(after["flags"], extra["flags"])
    assert after["mask"].dtype == torch.float32 and after["scalar"].item() == 1.5


def test_memory_and_progress_do_not_depend_on_luck(
    tiny_llama: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    events = EventWriter()
    plan = make_plan(
        parse(
            {
                "base": str(tiny_llama),
                "adapters": {"pt": {"path": str(adapters[0]), "weight": 1}},
                "output": str(tmp_path / "m"),
            },
            "test",
            [],
        )
    )
    (tmp_path / "m").mkdir()
    stream.stream_merge(plan, tmp_path / "m", events)
    last = [event.data for event in events.kept if event.type == "progress"][-1]
    assert (
        last["done"] == last["total"] == plan.bytes_written
        and last["unit"] == "B"
        and last["phase"] == "merge"
    )
