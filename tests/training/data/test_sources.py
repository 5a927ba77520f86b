"""Sources: what a config may say, weights, held-out rows, what the manifest says about a file."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadDataError, BadRecipeError
from training.data.samples import Sample
from training.data.sources import (
    DataFile,
    Source,
    copies,
    describe,
    held_out_keys,
    parse_sources,
    read_source,
    sample_key,
)


def key(text: str) -> bytes:
    return sample_key(Sample(Path("a"), 1, text=text))


def test_a_config_names_paths_or_mappings() -> None:
    assert parse_sources("a.txt") == parse_sources(["a.txt"]) == (Source("a.txt"),)
    mapping = {"path": "b.csv", "weight": 2, "columns": {"text": "body"}, "split": "line", "limit": 5}
    wanted = Source("b.csv", 2.0, split="line", columns={"text": "body"}, limit=5)
    assert parse_sources(["a.txt", mapping]) == (Source("a.txt"), wanted)
    assert parse_sources(mapping) == parse_sources((wanted,)) == (wanted,)
    assert parse_sources([json.loads(json.dumps(asdict(wanted)))]) == (wanted,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data is empty"),
        ("", "data must be a path"),
        ([1], "data must be a path or a mapping"),
        (["a", None], r"data\[1\] must be a path"),
        ({"weight": 1}, "path is missing"),
        ({"path": "a", "wieght": 1}, "unknown key 'wieght'"),
        ({"path": "a", "weight": 0}, "weight is 0, expected a number above 0"),
        ({"path": "a", "weight": math.nan}, "weight is nan"),
        ({"path": "a", "weight": True}, "weight is True"),
        ({"path": "a", "weight": "2"}, "weight is '2'"),
        ({"path": "a", "layout": "chat"}, "layout is 'chat', expected one of auto, text, alpaca"),
        ({"path": "a", "split": "page"}, "split is 'page'"),
        ({"path": "a", "limit": -1}, "limit must be a whole number"),
        ({"path": "a", "columns": {"quary": "q"}}, r"data\.columns: unknown key 'quary'"),
        ({"path": "a", "columns": ["q"]}, r"data\.columns must map names to texts"),
        ({"path": "a", "tags": {"role": "q"}}, r"data\.tags: unknown key 'role'"),
        ({"path": "a", "name": 3}, "name must be a text"),
    ],
)
def test_bad_configs_name_the_key(value: Any, message: str) -> None:
    with pytest.raises(BadRecipeError, match=message):
        parse_sources(value)


def test_the_nearest_known_key_is_offered() -> None:
    with pytest.raises(BadRecipeError) as caught:
        parse_sources({"path": "a", "wieght": 1})
    assert "did you mean 'weight'?" in caught.value.hint


def test_limit_takes_the_first_rows_and_sample_any_so_many(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(100)))

    def rows(**how: int) -> list[int]:
        return [sample.index for sample in read_source(Source(str(path), **how), "pt")]

    assert rows(limit=3) == [0, 1, 2] and len(rows()) == len(rows(limit=500)) == 100
    chosen = rows(sample=10)
    assert (
        chosen == sorted(chosen) == rows(sample=10) and len(set(chosen)) == 10 and chosen != list(range(10))
    )
    assert set(rows(sample=5)) <= set(chosen)
    assert max(rows(sample=10, limit=20)) < 20
    with pytest.raises(BadDataError, match="a sample of 101 rows was asked, there are 100"):
        rows(sample=101)
    path.write_text('{"text": "a"}\n{"text"')
    assert rows(limit=1) == [0]  # the rest is not read


def test_keys_are_of_the_content_alone() -> None:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    one, two = Sample(Path("a"), 1, messages=turns), Sample(Path("b"), 7, messages=turns, index=6)
    assert sample_key(one) == sample_key(two) and len(sample_key(one)) == 16
    assert key("a") != key("a ") and key("q") != sample_key(one)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 20), st.integers(0, 5))
def test_weights_are_met_on_average_and_only_by_seed_and_content(weight: float, seed: int) -> None:
    keys = [key(str(n)) for n in range(2000)]
    numbers = [copies(one, weight, seed) for one in keys]
    assert set(numbers) <= {math.floor(weight), math.floor(weight) + 1}
    share = weight % 1
    tolerance = 5 * math.sqrt(share * (1 - share) / len(keys)) + 1e-9
    assert abs(np.mean(numbers) - weight) <= tolerance
    assert [copies(one, weight, seed) for one in reversed(keys)] == numbers[::-1]
    assert {one for one in keys if copies(one, 0.3, seed)} <= {one for one in keys if copies(one, 0.6, seed)}


def test_held_out_rows_hang_on_seed_and_content() -> None:
    keys = [key(str(n)) for n in range(100)]
    chosen = held_out_keys(keys + keys[:50], 10, 1)
    assert len(chosen) == 10 and chosen <= set(keys)
    assert chosen == held_out_keys(keys[::-1], 10, 1) != held_out_keys(keys, 10, 2)
    assert held_out_keys(keys, 0, 1) == set() and len(held_out_keys(keys, 50, 1)) == 50
    packed = np.frombuffer(b"".join(keys), dtype="V16")
    assert chosen == held_out_keys(packed, 10, 1)
    with pytest.raises(
        BadDataError, match=r"51 held-out rows were asked of 100 different rows: the eval split is"
    ):
        held_out_keys(keys, 51, 1)
    with pytest.raises(BadDataError):
        held_out_keys([keys[0]] * 10, 1, 1)  # one content, ten times


def test_a_description_is_name_hash_and_rows(tmp_path: Path) -> None:
    one, two = tmp_path / "b.txt", tmp_path / "a.jsonl"
    one.write_text("x\n\ny")
    two.write_text('{"text": "z"}\n')
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two)}
    assert describe(Source(str(one))) == DataFile("b.txt", hashes["b.txt"], 2)
    assert describe(Source(str(one), split="document", weight=3, limit=1)).rows == 1
    listed = f"{hashes['a.jsonl']}  a.jsonl\n{hashes['b.txt']}  b.txt\n"
    assert describe(Source(str(tmp_path))) == DataFile(
        tmp_path.name, hashlib.sha256(listed.encode()).hexdigest(), 2
    )
