"""mergekit YAML as a recipe: what is read, what is refused by name, what is noted. Numbers: tests/peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadInputError, BadRecipeError
from engine.merge.mergekit import Imported, from_mergekit, is_mergekit, read_mergekit
from engine.merge.recipe import parse
from tests.peers.inputs import inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("mergekit") / "inputs")


def read(text: str, models: Path) -> Imported:
    return from_mergekit(yaml.safe_load(text), "merge.yml", [models])


def refuse(text: str, models: Path) -> str:
    with pytest.raises(BadRecipeError) as caught:
        read(text, models)
    assert "merge.yml" in caught.value.message
    return str(caught.value)


TWO = "models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.7}}]\n"
LORAS = (
    "models: [{model: base+pt, parameters: {weight: 0.3}}, {model: base+sft, parameters: {weight: 0.9}}]\n"
)


@pytest.mark.parametrize(
    ("document", "answer"),
    [
        ({"merge_method": "ties", "models": []}, True),
        ({"slices": []}, True),
        ({"models": [{"model": "a"}]}, True),
        ({"models": {"a": {"path": "a"}}}, False),
        ({"base": "b", "method": "linear", "adapters": {}}, False),
        ([1], False),
        (None, False),
    ],
)
def test_is_mergekit(document: object, answer: bool) -> None:
    assert is_mergekit(document) is answer


def test_a_file_is_read_with_paths_from_its_folder(models: Path) -> None:
    path = models / "merge.yml"
    path.write_text("merge_method: linear\ndtype: float16\n" + TWO)
    try:
        found = read_mergekit(path)
    finally:
        path.unlink()
    assert found == Imported(
        {
            "method": "linear",
            "models": {
                "a": {"path": str(models / "a"), "weight": 0.3},
                "b": {"path": str(models / "b"), "weight": 0.7},
            },
            "output": {"dtype": "float16"},
        },
        (),
    )


def test_lora_pairs_are_adapters_on_their_base(models: Path) -> None:
    found = read("merge_method: task_arithmetic\nbase_model: base\n" + LORAS, models).recipe
    assert found["base"] == str(models / "base")
    assert found["adapters"] == {
        "pt": {"path": str(models / "pt"), "weight": 0.3},
        "sft": {"path": str(models / "sft"), "weight": 0.9},
    }
    assert "models" not in found


def test_linear_of_lora_pairs_divides_by_the_sum_of_all_weights(models: Path) -> None:
    """mean of (W + d1), (W + d2) and W itself with weights .3, .9, .8: W + .15 d1 + .45 d2."""
    text = "merge_method: linear\n" + LORAS.replace("]\n", ", {model: base, parameters: {weight: 0.8}}]\n")
    found = read(text, models).recipe
    assert [entry["weight"] for entry in found["adapters"].values()] == pytest.approx([0.15, 0.45])
    assert "scale the base" in refuse(text + "parameters: {normalize: false}", models)
    assert "sum to 0" in refuse(text.replace("0.8", "-1.2"), models)


def test_normalize_of_task_arithmetic_goes_into_the_weights(models: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: base\nparameters: {normalize: true}\n"
    found = read(text + TWO.replace("0.7", "1.2"), models).recipe
    assert [entry["weight"] for entry in found["models"].values()] == pytest.approx([0.2, 0.8])


def test_slerp_of_two_models_and_of_two_adapters(models: Path) -> None:
    found = read(
        "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.4}", models
    )
    assert list(found.recipe["models"]) == ["b", "a"]  # t 0 is the base
    assert found.recipe["parameters"] == {"t": 0.4}
    assert "base" not in found.recipe
    found = read(
        "merge_method: slerp\nbase_model: base+sft\nmodels: [{model: base+pt}]\nparameters: {t: 0.4}", models
    )
    assert list(found.recipe["adapters"]) == ["sft", "pt"]
    assert found.recipe["base"] == str(models / "base")


def test_ties_with_every_parameter(models: Path) -> None:
    text = """
merge_method: ties
base_model: base
models:
  - {model: base, parameters: {weight: 3}}
  - {model: a, parameters: {weight: 1, density: 0.5, lambda: 3}}
  - {model: b, parameters: {density: 0.25}}
parameters: {weight: 0.5, normalize: false, lambda: 0.5, int8_mask: 1.0, gamma: 0.01}
dtype: bfloat16
out_dtype: float16
name: mine
"""
    found = read(text, models)
    assert found.recipe["models"] == {
        "a": {"path": str(models / "a"), "weight": 1.0, "density": 0.5},
        "b": {"path": str(models / "b"), "weight": 0.5, "density": 0.25},
    }
    assert found.recipe["parameters"] == {"normalize": False, "lambda": 0.5}
    assert found.recipe["output"] == {"dtype": "float16"}
    notes = "\n".join(found.notes)
    for said in (
        "base is the base",
        "int8_mask",
        "gamma",
        "lambda is no parameter of one model",
        "bfloat16",
        "name",
    ):
        assert said in notes, said


def test_filters_turn_round_and_unmatched_ones_are_noted(models: Path) -> None:
    text = """
merge_method: task_arithmetic
base_model: base
models:
  - model: base+pt
    parameters:
      weight:
        - {filter: q_proj, value: 0.1}
        - {filter: embed_tokens, value: 0.9}
        - {filter: self_attn, value: [0.2, 0.4]}
        - {value: 0.5}
"""
    found = read(text, models)
    weight = found.recipe["adapters"]["pt"]["weight"]
    assert weight == {"default": 0.5, "*self_attn*": [0.2, 0.4], "*q_proj*": 0.1}
    assert list(weight) == ["default", "*self_attn*", "*q_proj*"]  # the last that matches wins here
    assert any("embed_tokens" in note for note in found.notes)


def test_several_slices_give_a_weight_by_layer(models: Path) -> None:
    text = """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.2}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.8}}
  - sources:
      - {model: a, layer_range: [2, 3], parameters: {weight: 0.6}}
      - {model: b, layer_range: [2, 3], parameters: {weight: 0.4}}
"""
    weight = read(text, models).recipe["models"]["a"]["weight"]
    assert weight == {
        "default": 0.2, "layers 2-2": 0.6, "model.norm.weight": 0.6, "lm_head.weight": 0.6,
    }  # fmt: skip
    assert "whole model in order" in refuse(text.replace("[2, 3]", "[1, 3]"), models)
    assert "the slices make 2 layers" in refuse(
        text[: text.index("  - sources:\n      - {model: a, layer_range: [2")], models
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: della\nbase_model: base\n" + TWO, "merge_method della has no counterpart"),
        ("merge_method: passthrough\n" + TWO, "passthrough"),
        ("modules: {}\n" + TWO, "merge_method"),
        ("modules: {default: {}}\nmerge_method: linear", "modules"),
        ("merge_method: linear\nmodels: [{model: a}, {model: b}]", "no weight at"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "weight has no counterpart"),
        ("merge_method: linear\nmodels: [{model: org/other}]", "never downloaded"),
        ("merge_method: linear\nmodels: [{model: a@main}]", "revision"),
        ("merge_method: linear\nmodels: [{model: a+b+pt}]", "MODEL+LORA"),
        ("merge_method: linear\nmodels: {a: 1}", "should be a list"),
        ("merge_method: ties\n" + TWO, "needs `base_model:`"),
        ("merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n" + TWO, "one other model"),
        ("merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nmodels: [{model: base+pt}]", "between a base"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", "no t at"),
        ("merge_method: linear\nmodels: [{model: base+pt, parameters: {weight: 1}}, {model: a}]", "another base"),
        ("merge_method: ties\nbase_model: base\nparameters: {rescale: true}\n" + TWO, "rescale"),
        ("merge_method: ties\nbase_model: base\nparameters: {lambda: [1, 2]}\n" + TWO, "lambda differs"),
        ("merge_method: linear\ntokenizer_source: union\n" + TWO, "tokenizer_source 'union'"),
        ("merge_method: linear\ntokenizer: {source: base, pad_to_multiple_of: 8}\n" + TWO, "pad_to_multiple_of"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]", "empty list"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]", "should have `value`"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: big}}]", "should be a number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "no finite weight"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "listed twice"),
    ],
)  # fmt: skip
def test_refused_by_name(text: str, said: str, models: Path) -> None:
    assert said in refuse(text, models)


def test_tokenizer_source_base_merges_tokens_by_name(models: Path) -> None:
    found = read("merge_method: linear\ntokenizer_source: base\n" + TWO, models)
    assert found.recipe["vocabulary"] == "intersection"
    found = read("merge_method: linear\ntokenizer: {source: a}\n" + TWO, models)
    assert found.recipe["vocabulary"] == "intersection"
    assert "tokenizer of" in refuse("merge_method: linear\ntokenizer_source: b\n" + TWO, models)


def test_labels_are_told_apart(models: Path) -> None:
    other = models / "more" / "a"
    if not other.exists():
        other.parent.mkdir()
        other.symlink_to(models / "b")
    found = read(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: more/a}]", models
    )
    listed: dict[str, Any] = found.recipe["models"]
    assert list(listed) == ["a", "a-2"]


NUMBERS = st.one_of(
    st.floats(-2, 2), st.integers(-1, 4), st.booleans(), st.none(), st.sampled_from(["x", "0.5", ""])
)
SETTINGS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.fixed_dictionaries({"value": inner}, optional={"filter": st.sampled_from(["mlp", "*", 3, None])}),
    ),
    max_leaves=5,
)
PARAMETERS = st.one_of(
    st.none(),
    st.lists(NUMBERS, max_size=2),
    st.dictionaries(
        st.sampled_from(["weight", "density", "t", "normalize", "lambda", "other"]), SETTINGS, max_size=3
    ),
)
MODELS = st.sampled_from(
    ["a", "b", "base", "base+pt", "base+sft", "a+pt", "missing", "", "a@x", {"model": "a"}, 3, None]
)
SOURCES = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"model": MODELS},
        optional={
            "parameters": PARAMETERS,
            "layer_range": st.sampled_from([[0, 3], [0, 2], [2, 3], [3], "x", None]),
        },
    ),
)
DOCUMENTS = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(
            ["linear", "slerp", "ties", "task_arithmetic", "dare_ties", "dare_linear", "x", 1]
        )
    },
    optional={
        "models": st.one_of(NUMBERS, st.lists(SOURCES, max_size=3)),
        "slices": st.lists(st.fixed_dictionaries({"sources": st.lists(SOURCES, max_size=3)}), max_size=2),
        "base_model": MODELS,
        "parameters": PARAMETERS,
        "dtype": st.sampled_from(["bfloat16", "float32", "int64", 3]),
        "tokenizer_source": st.sampled_from(["base", "union", "a", 3]),
        "tokenizer": st.one_of(st.none(), st.fixed_dictionaries({"source": MODELS})),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS)
def test_any_document_is_read_or_refused_for_a_person(document: dict[str, Any], models: Path) -> None:
    """Whatever is written there: a recipe that the recipe's own reader takes or refuses, or a typed error."""
    try:
        recipe = from_mergekit(document, "merge.yml", [models]).recipe
        recipe["output"]["path"] = str(models.parent / "out")
        parse(recipe, "merge.yml", [])
    except BadInputError as error:
        assert error.message
