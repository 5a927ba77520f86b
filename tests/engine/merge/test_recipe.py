"""Recipes: what a person may write, what is refused and by which words; weights by selector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BadRecipeError
from engine.merge.recipe import parse, read_recipe
from engine.merge.selectors import layer_of, matches, resolve

GOOD = """\
base: bases/b
method: linear
adapters:
  pt:  {path: adapters/pt, weight: 0.3}
  sft: {path: adapters/sft, weight: {default: 0.7, "layers 0-9": 0.5, "*.mlp.*": 8e-1}}
output: {path: merges/m, dtype: bf16}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder in ("bases/b", "adapters/pt", "adapters/sft", "merges"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def written(place: Path, text: str) -> Path:
    (place / "recipe.yaml").write_text(text)
    return place / "recipe.yaml"


def test_reads_a_recipe_and_round_trips(place: Path) -> None:
    recipe = read_recipe(written(place, GOOD))
    assert recipe.base == place / "bases/b" and recipe.output == place / "merges/m"
    assert recipe.dtype == "bfloat16" and recipe.method == "linear"
    pt, sft = recipe.adapters
    assert pt.uniform == 0.3 and pt.path == place / "adapters/pt"
    assert sft.uniform is None and sft.weights == {"default": 0.7, "layers 0-9": 0.5, "*.mlp.*": 0.8}
    assert parse(recipe.to_dict(), "again", []) == recipe


def test_paths_from_the_recipes_folder_then_the_workspace(place: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "notes"
    (elsewhere / "adapters/pt").mkdir(parents=True)
    recipe = read_recipe(written(elsewhere, GOOD), [place])
    assert recipe.adapters[0].path == elsewhere / "adapters/pt"
    assert recipe.adapters[1].path == place / "adapters/sft"
    assert recipe.output == place / "merges/m"  # the first place that has a folder merges/


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("method: linear", "methods: linear", r"unknown key 'methods'; did you mean 'method'"),
        ("method: linear", "method: soup", r"soup averages full models"),
        ("weight: 0.3", "weight: 0.3, density: 0.5", r"density means nothing to linear"),
        ("weight: 0.3", "weight: [0.3]", r"a gradient has two or more numbers"),
        ("weight: 0.3", "weight: [0.3, no]", r"weight\[1\] should be a number"),
        ("method: linear", "method: linaer", r"did you mean 'linear'"),
        ("method: linear", "method: [linear]", r"there is no method \['linear'\]"),
        ("weight: 0.3", "wieght: 0.3", r"unknown key 'wieght'; did you mean 'weight'"),
        ("weight: 0.3", "weight: .nan", r"adapters\.pt\.weight is nan"),
        ("weight: 0.3", "weight: -.inf", r"adapters\.pt\.weight is -inf"),
        ("weight: 0.3", "weight: 1e39", r"no finite weight"),
        ("weight: 0.3", "weight: 1" + "0" * 400, r"no finite weight"),
        ("weight: 0.3", "weight: yes", r"should be a number, and is True"),
        ("weight: 0.3", "weight: '0.3'", r"should be a number"),
        ("weight: 0.3", "weight: {}", r"is empty"),
        ("weight: 0.3", "weight: null", r"`weight` is missing"),
        (", weight: 0.3", "", r"`weight` is missing"),
        ("layers 0-9", "layers 9-0", r"empty range"),
        ("layers 0-9", "layers first", r"not understood"),
        ("bf16", "int4", r"dtype 'int4' is not one of bfloat16"),
        ("base: bases/b", "base: Qwen/Qwen3-14B", r"base: Qwen/Qwen3-14B does not exist"),
        ("base: bases/b", "base: 7", r"base should be a path, and is 7"),
        ("base: bases/b\n", "", r"`base` is missing"),
        ("output: {path: merges/m, dtype: bf16}", "", r"`output` is missing"),
        ("dtype: bf16", "gguf: [8]", r"output\.gguf should be a GGUF type"),
        ("dtype: bf16", "kind: lora", r"output\.kind is 'lora'"),
        ("weight: 0.3", "weight: 1e10", r"should lie between -1e\+09 and 1e\+09"),
        ("dtype: bf16", "kind: adapter, dtype: bf16", r"an adapter is written in float32"),
        ("method: linear", "vocabulary: keep_first", r"vocabulary means nothing to adapters"),
        ("dtype: bf16", "rank: 8", r"output\.rank is for output\.kind adapter"),
        ("dtype: bf16", "kind: gguf", r"output\.kind gguf needs output\.gguf"),
        ("dtype: bf16", "kind: adapter, rank: 0", r"whole number from 1"),
        ("  sft:", "  pt:", r"written twice"),
        ("  pt: ", "  no: ", r"key False should be text"),
        ("  pt: ", '  "p t": ', r"adapter label 'p t'"),
        ("adapters:", "adapters: [", r"not valid YAML"),
        (GOOD, "- a\n- b\n", r"should be a mapping"),
        (GOOD, "", r"should be a mapping of names to values, and is nothing"),
        (GOOD, "!!python/object/apply:os.system ['true']", r"not valid YAML"),
        (GOOD, "[" * 5000, r"nested too deeply|not valid YAML"),
    ],
)
def test_refuses_with_the_key_and_the_file(place: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    path = written(place, GOOD.replace(old, new))
    with pytest.raises(BadRecipeError, match=says) as caught:
        read_recipe(path)
    assert str(path) in caught.value.message


def test_refuses_files_that_are_no_text(place: Path) -> None:
    (place / "r.yaml").write_bytes(b"\xff\xfe\x00")
    for path, says in ((place, "is a folder"), (place / "none", "cannot read"), (place / "r.yaml", "UTF-8")):
        with pytest.raises(BadRecipeError, match=says):
            read_recipe(path)


NAMES = [f"model.layers.{i}.{m}.weight" for i in range(12) for m in ("self_attn.q_proj", "mlp.up_proj")]


def test_selectors_are_whole_names() -> None:
    assert not matches("model.layers.1.*", "model.layers.10.mlp.up_proj.weight")
    assert not matches("layers 1", "model.layers.10.mlp.up_proj.weight")
    assert matches("layer 10", "model.layers.10.mlp.up_proj.weight")
    assert matches("*.mlp.*", "model.layers.3.mlp.up_proj.weight")
    assert matches("*up_proj", "model.layers.3.mlp.up_proj.weight")
    assert layer_of("transformer.h.7.attn.c_attn.weight") == 7 and layer_of("lm_head.weight") is None


def test_the_last_matching_selector_wins() -> None:
    chosen, decided = resolve({"default": 1.0, "layers 0-5": 0.5, "*.mlp.*": 0.25}, NAMES, "pt")
    for name in NAMES:
        layer = int(name.split(".")[2])
        assert chosen[name] == (0.25 if ".mlp." in name else 0.5 if layer <= 5 else 1.0)
    assert decided == {"default": 6, "layers 0-5": 6, "*.mlp.*": 12}


def test_selectors_that_match_nothing_and_tensors_without_weight() -> None:
    with pytest.raises(BadRecipeError, match=r"'\*\.moe\.\*' matches none of its 24 tensors"):
        resolve({"default": 1.0, "*.moe.*": 0.5}, NAMES, "pt")
    with pytest.raises(BadRecipeError, match="layers 20-30"):
        resolve({"default": 1.0, "layers 20-30": 0.5}, NAMES, "pt")
    with pytest.raises(BadRecipeError, match="no selector gives"):
        resolve({"*.mlp.*": 0.5}, NAMES, "pt")


@given(
    first=st.integers(0, 15),
    length=st.integers(0, 15),
    weight=st.floats(-2, 2, allow_nan=False),
    data=st.data(),
)
def test_layer_ranges_decide_exactly_their_layers(first: int, length: int, weight: float, data: Any) -> None:
    names = [f"model.layers.{i}.x.weight" for i in range(32)]
    data.draw(st.randoms()).shuffle(names)
    chosen, _ = resolve({"default": 9.0, f"layers {first}-{first + length}": weight}, names, "pt")
    assert {n for n, w in chosen.items() if w != 9.0} == {
        f"model.layers.{i}.x.weight" for i in range(first, first + length + 1)
    }


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(
    document=json_like
    | st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("base", "method", "adapters", "output", "models"), json_like)
    )
)
def test_any_document_is_a_recipe_or_a_typed_error(document: object) -> None:
    with pytest.raises(BadRecipeError):
        parse(document, "fuzz", [Path("/nonexistent")])
