"""dataset_info.json against an independent reading of it by LLaMA-Factory's rules (parser.py, converter.py)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadDataError, BadRecipeError
from training.data.dataset_info import resolve
from training.data.samples import Sample
from training.data.sources import read_source


def samples(
    folder: Path, entry: dict[str, Any], rows: list[dict[str, Any]], kind: str = "sft"
) -> list[Sample]:
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(
        json.dumps({"set": {"file_name": "data.json", **entry}, "other": 5})
    )
    (source,) = resolve(["set"], folder)
    assert source.name == "set"
    return list(read_source(source, kind))


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in sample.messages]


ROW = {
    "instruction": "i",
    "input": "n",
    "output": "o",
    "system": "s",
    "history": [["h", "r"]],
    "p": "p2",
    "x": "",
}


def reference(row: dict[str, Any], columns: dict[str, str] | None) -> list[tuple[str, str]]:
    """AlpacaDatasetConverter, written from its description: `columns` replaces all defaults at once."""
    names = {"prompt": "instruction", "query": "input", "response": "output"} if columns is None else columns
    get = {part: row[names[part]] for part in names}
    found = [("system", get["system"])] if get.get("system") else []
    for question, answer in get.get("history") or []:
        found += [("user", question), ("assistant", answer)]
    query = [get[part] for part in ("prompt", "query") if get.get(part)]
    return [*found, ("user", "\n".join(query)), ("assistant", get["response"])]


def all_columns() -> list[dict[str, str] | None]:
    choices = {
        "prompt": ["instruction", "p"],
        "query": [None, "input", "x"],
        "response": ["output"],
        "history": [None, "history"],
        "system": [None, "system"],
    }
    return [
        None,
        *(
            {part: name for part, name in zip(choices, names, strict=True) if name}
            for names in itertools.product(*choices.values())
        ),
    ]


@pytest.mark.parametrize("columns", all_columns(), ids=str)
def test_alpaca_as_llama_factory_reads_it(tmp_path: Path, columns: dict[str, str] | None) -> None:
    entry = {} if columns is None else {"columns": columns}
    (sample,) = samples(tmp_path, entry, [ROW])
    assert turns(sample) == reference(ROW, columns)


def test_plain_text_is_prompt_and_query(tmp_path: Path) -> None:
    assert (
        samples(tmp_path, {"columns": {"prompt": "text"}}, [{"text": "t", "input": "n"}], "pt")[0].text == "t"
    )
    assert samples(tmp_path, {}, [ROW], "pt")[0].text == "i\nn"
    (tmp_path / "lines.txt").write_text("one\ntwo\n\nthree\n")
    info = {"set": {"file_name": "lines.txt", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (source,) = resolve(["set"], tmp_path / "dataset_info.json")
    assert [sample.text for sample in read_source(source, "pt")] == ["one", "two", "three"]


def test_sharegpt_with_its_tags(tmp_path: Path) -> None:
    turns_ = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    wanted = [("system", "s"), ("user", "q"), ("assistant", "a")]
    (sample,) = samples(tmp_path, {"formatting": "sharegpt"}, [{"conversations": turns_, "system": "unused"}])
    assert turns(sample) == wanted
    entry = {"formatting": "sharegpt", "columns": {"messages": "c", "system": "sys"}}
    assert turns(samples(tmp_path, entry, [{"c": turns_[1:], "sys": "col"}])[0])[0] == ("system", "col")
    openai = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    messages = [{"role": role, "content": text} for role, text in wanted]
    assert turns(samples(tmp_path, openai, [{"messages": messages}])[0]) == wanted
    del openai["tags"]["system_tag"]  # then there is none, as there
    with pytest.raises(BadDataError, match="role 'system' is not one of user, assistant"):
        samples(tmp_path, openai, [{"messages": messages}])


def test_num_samples(tmp_path: Path) -> None:
    rows = [{"instruction": str(n), "input": "", "output": "a"} for n in range(20)]
    assert len(samples(tmp_path, {"num_samples": 7, "split": "train", "folder": "x"}, rows)) == 7


def test_a_column_left_out_by_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="no row has a column 'input'"):
        samples(tmp_path, {}, [{"instruction": "q", "output": "a"}])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "a/b"}, "set: hf_hub_url needs the network"),
        ({"ms_hub_url": "a/b"}, "ms_hub_url needs the network"),
        ({"script_url": "a"}, "script_url needs the network or runs a script"),
        ({"cloud_file_name": "s3://a"}, "cloud_file_name"),
        ({"ranking": True}, "ranking: preference data"),
        ({"columns": {"prompt": "p", "kto_tag": "k"}}, "column kto_tag is not trained here"),
        ({"columns": {"prompt": "p", "images": "k"}}, "column images is not trained here"),
        (
            {"formatting": "sharegpt", "columns": {"messages": "m", "tools": "t"}},
            "column tools is not trained",
        ),
        ({"formatting": "sharegpt", "columns": {"system": "m"}}, r"columns\.messages is missing"),
        ({"formatting": "sharegpt", "tags": {"role_tag": "r"}}, r"tags\.content_tag is missing"),
        ({"formatting": "openai"}, "formatting is 'openai'"),
        ({"columns": {"promt": "p"}}, r"columns: unknown key 'promt'"),
        ({"columns": ["prompt"]}, "columns must map names to texts"),
        ({"colums": {}}, "unknown key 'colums'"),
        ({"split": "test"}, "split is 'test'; a file has only train"),
        ({"subset": "a"}, "subset has no meaning for a file"),
        ({"num_samples": "9"}, "num_samples must be a whole number"),
        ({"file_name": None}, "file_name is missing"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipeError, match=message):
        samples(tmp_path, entry, [ROW])


def test_unknown_names_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BadRecipeError, match="cannot read"):
        resolve(["set"], tmp_path)
    path = tmp_path / "dataset_info.json"
    path.write_text('{"medquad": {"file_name": "a.json"}, "broken": 1}')
    with pytest.raises(BadRecipeError, match="has no data set 'medqaud'") as caught:
        resolve(["medqaud"], tmp_path)
    assert "did you mean medquad?" in caught.value.hint
    with pytest.raises(BadRecipeError, match="broken: expected an object"):
        resolve(["broken"], tmp_path)
    for content, message in (("{", "not valid JSON"), ("[]", "expected an object of data sets")):
        path.write_text(content)
        with pytest.raises(BadRecipeError, match=message):
            resolve(["set"], tmp_path)
