"""Manifests: real ones against the schema, later checks that find every change, and files that are none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadInputError, MedmergeError, TargetExistsError
from engine.jobs import EventWriter
from engine.merge.job import run_merge
from engine.merge.manifest import FORMAT, SCHEMA, is_merge, read_manifest
from engine.merge.manifest_check import check_manifest
from engine.weights.tensorfile import file_sha256
from tests.conftest import MakeAdapter, build_model

SCHEMA_DOCUMENT = json.loads(SCHEMA.read_text())


def sha(path: Path) -> str:
    """Independent of the engine's own."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def world(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases/tiny, bases/other, adapters/pt and adapters/sft. Copy it before changing anything."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_llama, root / "bases" / "tiny")
    build_model("llama", root / "bases" / "other", seed=5)
    shutil.copytree(make_adapter(tiny_llama, seed=1), root / "adapters" / "pt")
    shutil.copytree(make_adapter(tiny_llama, seed=2, rank=4, use_dora=True), root / "adapters" / "sft")
    return root


def merge(root: Path, out: str = "merges/m", verify: bool = False, **document: Any) -> dict[str, Any]:
    """Merge in `root`; `adapters` and `models` give {label: weight}."""
    recipe: dict[str, Any] = {"base": str(root / "bases" / "tiny"), "output": str(root / out)}
    for key, folder in (("adapters", "adapters"), ("models", "bases")):
        if key in document:
            entries = document.pop(key)
            recipe[key] = {
                name: {"path": str(root / folder / name), "weight": w} for name, w in entries.items()
            }
    recipe |= document
    return run_merge(
        {"recipe": {k: v for k, v in recipe.items() if v is not None}, "verify": verify}, EventWriter()
    )


CASES: dict[str, dict[str, Any]] = {
    "linear": {"adapters": {"pt": 0.3}},
    "by selector": {
        "adapters": {"pt": {"default": 0.3, "layers 0-0": 0.5, "*.mlp.*": [0.1, 0.9]}, "sft": 0.7}
    },
    "ties": {
        "adapters": {"pt": 0.3, "sft": 0.7},
        "method": "ties",
        "parameters": {"density": 0.4, "lambda": 0.9},
    },
    "slerp": {
        "adapters": {"pt": 1, "sft": 1},
        "method": "slerp",
        "parameters": {"t": {"default": 0.4, "mlp": 0.1}},
    },
    "dare": {"adapters": {"pt": 0.3}, "method": "dare_ties", "parameters": {"density": 0.4, "seed": 9}},
    "soup": {"models": {"tiny": 1, "other": 3}, "method": "soup", "base": None},
    "models onto a base": {"models": {"other": 0.5}, "method": "task_arithmetic", "vocabulary": "keep_first"},
    "adapter": {"adapters": {"pt": 0.3}, "output": {"kind": "adapter"}},
}


@pytest.mark.parametrize("case", CASES)
def test_real_manifests_keep_to_the_schema_and_name_every_hash(
    world: Path, tmp_path: Path, case: str
) -> None:
    import jsonschema

    document = dict(CASES[case])
    out = tmp_path / "m"
    if "output" in document:
        document["output"] = {**document["output"], "path": str(out)}
    else:
        document["output"] = str(out)
    merge(world, verify=case == "linear", **document)
    manifest = json.loads((out / "medmerge.json").read_text())
    jsonschema.validators.Draft202012Validator(SCHEMA_DOCUMENT).validate(manifest)
    assert manifest.keys() <= SCHEMA_DOCUMENT["properties"].keys()  # nothing that is not documented
    assert manifest["format"] == FORMAT and manifest["method"] == document.get("method", "linear")
    assert manifest["output"]["files"] == {
        path.name: sha(path) for path in out.iterdir() if path.name != "medmerge.json"
    }
    inputs = [manifest["base"], *manifest["adapters"].values(), *manifest["models"].values()]
    for described in [part for part in inputs if part is not None]:
        assert described["files"]
        for name, found in described["files"].items():
            assert found == sha(Path(described["path"]) / name)
    shards = [d for d in (manifest["base"], *manifest["models"].values()) if d and case != "adapter"]
    assert all("model.safetensors" in described["files"] for described in shards)
    assert check_manifest(out, EventWriter())["exit_code"] == 0


def test_a_gguf_alone_carries_its_manifest_beside_it(world: Path, tmp_path: Path) -> None:
    import jsonschema

    root = shutil.copytree(world, tmp_path / "w")
    out = {"path": str(root / "m.gguf"), "kind": "gguf", "gguf": ["q8_0", "f16"]}
    result = merge(root, verify=True, adapters={"pt": {"default": 0.3, "mlp": 0.5}}, output=out)
    files = [root / "m-q8_0.gguf", root / "m-f16.gguf"]
    for file in files:
        manifest = json.loads((root / f"{file.name}.json").read_text())
        jsonschema.validators.Draft202012Validator(SCHEMA_DOCUMENT).validate(manifest)
        assert manifest["output"]["files"] == {file.name: sha(file)} and manifest["verification"]["ok"]
        assert manifest["base"]["files"]["model.safetensors"] == sha(root / "bases/tiny/model.safetensors")
        assert check_manifest(file, EventWriter())["message"].startswith("all ")
    assert result["manifest"]["output"]["dtype"] == "q8_0" and manifest["output"]["dtype"] == "f16"
    renamed = files[0].rename(root / "n.gguf")
    (root / "m-q8_0.gguf.json").rename(root / "n.gguf.json")
    moved = tmp_path / "moved"
    root.rename(moved)
    found = check_manifest(moved / "n.gguf", EventWriter())
    assert found["exit_code"] == 0 and [part["part"] for part in found["moved"]] == ["base", "adapter pt"]
    for target, key in (
        (moved / renamed.name, "changed"),
        (moved / "adapters/pt/adapter_config.json", "inputs_changed"),
    ):
        with target.open("r+b") as file:
            file.write(b"\0")
        found = check_manifest(moved / "n.gguf", EventWriter())
        assert found["exit_code"] == 1 and found[key] == [str(target)]
    with pytest.raises(TargetExistsError, match=r"m-f16\.gguf"):
        merge(moved, adapters={"pt": 0.3}, output={**out, "path": str(moved / "m.gguf")})
    (moved / "m-f16.gguf").unlink()
    with pytest.raises(TargetExistsError, match=r"m-f16\.gguf\.json"):
        merge(moved, adapters={"pt": 0.3}, output={**out, "path": str(moved / "m.gguf")})


def test_what_a_manifest_says_of_method_and_variants(world: Path, tmp_path: Path) -> None:
    ties = merge(world, **CASES["ties"] | {"output": str(tmp_path / "ties")})["manifest"]
    assert ties["parameters"] == {"density": 0.4, "lambda": 0.9, "normalize": True}
    assert ties["densities"] == {"pt": 0.4, "sft": 0.4} and ties["vocabulary"] is None
    assert ties["adapters"]["pt"]["variants"] == {"lora": 14}
    assert ties["adapters"]["sft"]["variants"] == {"dora": 14}
    soup = merge(world, **CASES["soup"] | {"output": str(tmp_path / "soup")})["manifest"]
    assert soup["base"] is None and list(soup["models"]) == ["tiny", "other"] and soup["asked"]["other"] == 3
    assert soup["vocabulary"] == "error" and soup["adapters"] == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("method"),
        lambda m: m.update(format="medmerge.merge/3"),
        lambda m: m["output"]["files"].update({"../x": "0" * 64}),
        lambda m: m["output"]["files"].update({"x": "0" * 63}),
        lambda m: m["adapters"]["pt"].pop("sha256"),
        lambda m: m["parameters"].update(weigth=3),
        lambda m: m.update(asked={"pt": "a lot"}),
    ],
)
def test_the_schema_is_not_empty(
    world: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    import jsonschema

    manifest = merge(world, **CASES["linear"] | {"output": str(tmp_path / "m")})["manifest"]
    change(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validators.Draft202012Validator(SCHEMA_DOCUMENT).validate(manifest)


def test_the_example_in_the_docs_keeps_to_the_schema() -> None:
    import jsonschema

    page = (Path(__file__).parents[3] / "docs" / "manifest.md").read_text()
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    jsonschema.validators.Draft202012Validator(SCHEMA_DOCUMENT).validate(example)
    for name in SCHEMA_DOCUMENT["properties"]:
        assert f"`{name}`" in page, f"docs/manifest.md does not explain {name}"


# --- checking later -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with a merge in merges/m. Copy it before changing anything."""
    root = tmp_path_factory.mktemp("merged") / "w"
    shutil.copytree(world, root)
    merge(root, adapters={"pt": 0.3, "sft": 0.7})
    return root


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    """The same, at another place: all that is absolute in the manifest points to the first."""
    shutil.copytree(merged, tmp_path / "moved")
    return tmp_path / "moved"


@pytest.fixture
def alone(copy: Path) -> Path:
    """As `copy`, with a manifest that was made right here."""
    shutil.rmtree(copy / "merges")
    merge(copy, adapters={"pt": 0.3, "sft": 0.7})
    return copy


def verdict(root: Path) -> dict[str, Any]:
    return check_manifest(root / "merges" / "m", EventWriter())


def test_a_merge_moved_alone_is_checked_where_it_is(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged / "merges" / "m", tmp_path / "elsewhere" / "renamed")
    found = check_manifest(tmp_path / "elsewhere" / "renamed", EventWriter())
    assert (found["ok"], found["exit_code"], found["moved"]) == (True, 0, [])


def test_a_merge_moved_with_its_inputs_finds_them(alone: Path) -> None:
    moved = alone.rename(alone.with_name("again"))
    found = verdict(moved)
    assert found["exit_code"] == 0 and found["ok"]
    assert {entry["part"]: entry["path"] for entry in found["moved"]} == {
        "base": str(moved / "bases" / "tiny"),
        "adapter pt": str(moved / "adapters" / "pt"),
        "adapter sft": str(moved / "adapters" / "sft"),
    }
    (moved / "adapters" / "pt" / "adapter_config.json").write_text("{}")
    found = verdict(moved)
    assert found["exit_code"] == 1 and "(adapter pt)" in found["message"]


def test_inputs_that_are_gone_are_exit_4_and_named(alone: Path) -> None:
    shutil.rmtree(alone / "adapters" / "sft")
    found = verdict(alone)
    assert (found["ok"], found["exit_code"]) == (False, 4)
    assert found["inputs_missing"] == [
        str(alone / "adapters" / "sft" / name)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert "adapter sft" in found["message"] and "adapter pt" not in found["message"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "key", "name"),
    [
        (lambda w: flip(w / "merges/m/model.safetensors"), "changed", "merges/m/model.safetensors"),
        (lambda w: flip(w / "merges/m/config.json"), "changed", "merges/m/config.json"),
        (lambda w: (w / "merges/m/tokenizer.json").unlink(), "missing", "merges/m/tokenizer.json"),
        (
            lambda w: (w / "merges/m/model-2.safetensors").write_bytes(b""),
            "extra",
            "merges/m/model-2.safetensors",
        ),
        (lambda w: (w / "merges/m/.hidden").write_bytes(b""), "extra", "merges/m/.hidden"),
        (lambda w: (w / "merges/m/link").symlink_to("/etc"), "extra", "merges/m/link"),
        (lambda w: (w / "merges/m/loop").symlink_to("loop"), "extra", "merges/m/loop"),
        (lambda w: os.mkfifo(w / "merges/m/pipe"), "extra", "merges/m/pipe"),
        (
            lambda w: flip(w / "bases/tiny/model.safetensors"),
            "inputs_changed",
            "bases/tiny/model.safetensors",
        ),
        (lambda w: flip(w / "bases/tiny/tokenizer.json"), "inputs_changed", "bases/tiny/tokenizer.json"),
        (
            lambda w: flip(w / "adapters/pt/adapter_model.safetensors"),
            "inputs_changed",
            "adapters/pt/adapter_model.safetensors",
        ),
    ],
)
def test_every_change_is_found_and_named(
    alone: Path, spoil: Callable[[Path], Any], key: str, name: str
) -> None:
    spoil(alone)
    found = verdict(alone)
    assert (found["ok"], found["exit_code"]) == (False, 1) and found[key] == [str(alone / name)]
    lists = ("changed", "missing", "extra", "inputs_changed", "inputs_missing", "unreadable", "inconsistent")
    assert [other for other in lists if found[other]] == [key]


@pytest.mark.parametrize("place", ["merges/m/tokenizer.json", "bases/tiny/config.json"])
def test_special_files_in_place_of_named_ones_are_not_waited_for(alone: Path, place: str) -> None:
    (alone / place).unlink()
    os.mkfifo(alone / place)
    found = verdict(alone)
    assert str(alone / place) in (found["missing"] or found["inputs_missing"]) and not found["ok"]


def test_links_are_followed_and_said(alone: Path) -> None:
    """As in a Hugging Face cache: the content counts, and where it lies is said."""
    path = alone / "merges" / "m" / "config.json"
    path.rename(alone / "blob")
    path.symlink_to(alone / "blob")
    found = verdict(alone)
    assert found["exit_code"] == 0 and found["links"] == [str(path)]
    (alone / "blob").write_text("{}")
    assert verdict(alone)["changed"] == [str(path)]


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "merges" / "m" / "medmerge.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["adapters"]["pt"].update(sha256="0" * 64), "adapters.pt.sha256 is not the hash"),
        (lambda m: m["recipe"]["adapters"]["pt"].update(path="/other"), "adapters.pt is another folder"),
        (lambda m: m["recipe"]["adapters"]["pt"].update(weight=0.9), "another weight of pt"),
        (lambda m: m["asked"].update(sft=0.1), "another weight of sft"),
        (lambda m: m["recipe"]["adapters"].pop("pt"), "'pt' is only in adapters"),
        (lambda m: m["recipe"].update(method="ties"), "method is 'ties', and method is 'linear'"),
        (lambda m: m["recipe"].update(base="/other"), "another folder than base.path"),
        (lambda m: m["recipe"].update(adapters=[]), "no mapping"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    alone: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    edit(alone, change)
    found = verdict(alone)
    assert found["exit_code"] == 1 and says in "; ".join(found["inconsistent"]) and says in found["message"]


FIRST = Path(__file__).parent / "manifest-1.json"


def test_manifests_of_format_1_are_read(alone: Path) -> None:
    """One written by version 0.1, with the paths and hashes of the files here put in."""
    first = json.loads(FIRST.read_text())
    new = json.loads((alone / "merges" / "m" / "medmerge.json").read_text())
    assert first["format"] == "medmerge.merge/1" and not {"method", "models", "parameters"} & first.keys()
    first["recipe"] = new["recipe"]
    first["asked"] = new["asked"]
    first["output"]["files"] = new["output"]["files"]
    for old, here in (
        (first["base"], new["base"]),
        *zip(first["adapters"].values(), new["adapters"].values(), strict=True),
    ):
        old |= {"path": here["path"], "files": here["files"]} | (
            {"sha256": here["sha256"]} if "sha256" in here else {}
        )
    (alone / "merges" / "m" / "medmerge.json").write_text(json.dumps(first))
    assert is_merge(alone / "merges" / "m")
    found = verdict(alone)
    assert found["exit_code"] == 0, found["message"]
    assert read_manifest(alone / "merges" / "m")["method"] == "linear"
    flip(alone / "merges" / "m" / "model.safetensors")
    assert verdict(alone)["exit_code"] == 1


PART = {"path": "/x", "files": {"a": "0" * 64}}
WHOLE = {
    "format": FORMAT,
    "recipe": {},
    "method": "linear",
    "output": PART,
    "base": PART,
    "adapters": {},
    "models": {},
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "medmerge.merge/3"}, {"format": None}, {"output": None}, {"output": {}}, {"adapters": []},
        {"models": None}, {"recipe": 3}, {"base": None}, {"base": {"files": {}}}, {"base": {"path": 3, "files": {}}},
        {"base": PART | {"relative": 1}}, {"adapters": {"pt": 3}}, {"adapters": {"pt": {"path": "/x"}}},
        *({"output": {"files": {name: "0" * 64}}} for name in ("", "..", ".", "/etc/passwd", "a/../b", "../a", "a\0")),
        *({"output": {"files": {"a": value}}} for value in ("", "0" * 63, "0" * 65, "g" * 64, "A" * 64, None, 3)),
    ],
)  # fmt: skip
def test_manifests_that_are_none_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "medmerge.json"
    path.write_text(json.dumps(WHOLE))
    assert check_manifest(tmp_path, EventWriter())["exit_code"] == 1  # well formed: only its file is missing
    path.write_text(json.dumps(WHOLE | change))
    with pytest.raises(BadInputError, match=r"medmerge\.json"):
        check_manifest(tmp_path, EventWriter())


def test_names_written_twice_are_refused(tmp_path: Path) -> None:
    text = json.dumps(WHOLE)
    (tmp_path / "medmerge.json").write_text(text.replace('"a":', '"a": "' + "1" * 64 + '", "a":'))
    with pytest.raises(BadInputError, match="twice"):
        check_manifest(tmp_path, EventWriter())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_manifest_is_told_by_a_typed_error(
    merged: Path, tmp_path: Path, data: st.DataObject
) -> None:
    manifest = json.loads((merged / "merges" / "m" / "medmerge.json").read_text())
    place: Any = manifest
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(sorted(inner)))]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    (tmp_path / "medmerge.json").write_text(json.dumps(manifest))
    try:
        found = check_manifest(tmp_path, EventWriter())
    except MedmergeError as error:
        assert "medmerge.json" in error.message
    else:
        assert found["exit_code"] == 1 and not found["ok"]  # the files are not in this folder


def test_the_hash_is_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom((4 << 20) + 17))
    assert file_sha256(tmp_path / "f") == sha(tmp_path / "f")
