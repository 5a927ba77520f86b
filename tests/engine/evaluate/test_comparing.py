"""Comparing models: Holm, items needed, halves, several runs, and what must not be compared. Rows made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from engine.errors import BadInputError
from engine.evaluate import comparable, corrections
from engine.evaluate.choosing import choose
from engine.evaluate.halves import half_of
from engine.evaluate.refusals import label_answer
from engine.evaluate.store import RunStore
from engine.evaluate.summary import load_table
from engine.evaluate.tables import compute, compute_all, failures

WEIGHTS = {
    "SFT": {"pt": 0.0, "sft": 1.0},
    "PT30 SFT70": {"pt": 0.3, "sft": 0.7},
    "PT": {"pt": 1.0, "sft": 0.0},
}


def spec(kind, weights, template="", decoding=None, data="d" * 64, **more):
    return {
        "kind": kind, "weights": weights, "template": template, "adapters": {"pt": "1", "sft": "2"},
        "task": {"name": "t", "sha256": data, "limit": None}, "decoding": decoding, "seed": None,
        "base": {"name": "b", "sha256": "3"}, "dtype": "bfloat16", "compute": "float32", "device": "cpu",
        "versions": {"torch": "2"}, **more,
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder from (spec, rows) pairs, as the job leaves it."""

    def make(name, cells, **more) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "cells").mkdir(parents=True)
        entries = []
        for number, (about, rows) in enumerate(cells):
            key = f"{name}{number:02d}"
            entries.append({"hash": key, "done": rows is not None, "failed": "", "spec": about})
            if rows is not None:
                frame = pl.DataFrame([{**row, "cell": key} for row in rows], infer_schema_length=None)
                frame.write_parquet(folder / "cells" / f"{key}.parquet")
            else:
                entries[-1]["failed"] = "the server died"
        note = {"format": "medmerge.eval/1", "mode": "sweep", "cells": entries, **more}
        (folder / "cells.json").write_text(json.dumps(note))
        return folder

    return make


def choices(right):
    """Rows of a four-option task, right or wrong as told."""
    return [
        {"id": f"q{n}", "prompt_sha256": "", "scoring": "letters", "options": ["a", "b", "c", "d"], "answer": n % 4,
         "logprobs": [0.0] * 4, "chosen": n % 4 if yes else (n + 1) % 4, "chosen_norm": 0}
        for n, yes in enumerate(right)
    ]  # fmt: skip


@pytest.fixture
def three(make_run):
    """Three mixtures on 200 items: 110, 130 and 112 right."""
    draw = np.random.default_rng(3)
    sft = draw.random(200) < 0.5
    mixed = np.where(draw.random(200) < 0.25, True, sft)
    pt = np.where(draw.random(200) < 0.1, ~sft, sft)
    kind = "multiple_choice"
    cells = [
        (spec(kind, weights), choices(right))
        for weights, right in zip(WEIGHTS.values(), (sft, mixed, pt), strict=True)
    ]
    return make_run("three", cells), sft, mixed, pt


def test_holm_over_the_models_of_a_metric(three):
    run, sft, *others = three
    rows = {row.model: row for row in compute(run)}
    ps = []
    for name, right in zip(("PT30 SFT70", "PT"), others, strict=True):
        b, c = int((right & ~sft).sum()), int((~right & sft).sum())
        p = float(mcnemar([[0, b], [c, 0]], exact=True).pvalue)
        assert rows[name].p == pytest.approx(p) and rows[name].discordant == b + c
        assert rows[name].difference == pytest.approx(100 * (b - c) / 200) and rows[name].pairs == 200
        assert rows[name].difference_low < rows[name].difference < rows[name].difference_high
        ps.append(p)
    wanted = multipletests(ps, method="holm")[1]
    assert [rows[n].p_holm for n in ("PT30 SFT70", "PT")] == pytest.approx(list(wanted))
    assert rows["PT30 SFT70"].tests == 2 and not rows["PT30 SFT70"].indistinguishable
    assert "chosen A " in rows["PT"].detail
    assert rows["PT"].indistinguishable and (rows["PT"].needed or 10**9) > 200


def test_halves_split_the_samples_and_choosing_reports_the_other_half(three):
    run, sft, mixed, _ = three
    halves = {half: {row.model: row for row in compute_all([run], half)} for half in ("dev", "test")}
    assert halves["dev"]["SFT"].n + halves["test"]["SFT"].n == 200
    in_dev = np.array([half_of(f"q{n}") == "dev" for n in range(200)])
    assert halves["dev"]["SFT"].value == pytest.approx(100 * sft[in_dev].mean())
    chosen = choose([run], "t", "accuracy")
    assert chosen.dev.model == chosen.test.model == "PT30 SFT70" and chosen.candidates == 3
    assert chosen.test.value == pytest.approx(100 * mixed[~in_dev].mean())
    with pytest.raises(BadInputError, match="no t:bleu in these runs"):
        choose([run], "t", "bleu")


def test_runs_are_compared_on_common_items_of_the_same_data(make_run, three):
    run, sft, *_ = three
    file = {"model": {"kind": "gguf", "name": "q8"}, "dtype": "gguf", "versions": {"llama-cpp-python": "0"}}
    kind, better = "multiple_choice", sft.copy()
    better[np.flatnonzero(~better)[:15]] = True
    same = make_run("same", [({**spec(kind, {}), **file}, choices(better))])
    row = next(row for row in compute_all([run, same], against="SFT") if row.model == "q8")
    assert (
        row.run == "same"
        and row.kind == "gguf"
        and row.discordant == 15
        and row.p < 0.001
        and not row.warning
    )
    other = make_run("other", [({**spec(kind, {}, data="e" * 64), **file}, choices(better))])
    row = next(row for row in compute_all([run, other], against="SFT") if row.model == "q8")
    assert row.p is None and row.warning == "other data than in three"


def test_what_else_differs_behind_equal_names_is_said():
    greedy = {"name": "warm", "temperature": 0.6}
    first = spec("generation", {}, "chatml", greedy)
    second = {
        **first,
        "decoding": {**greedy, "temperature": 0.8},
        "device": "cuda",
        "task": {**first["task"], "system": "x"},
    }
    said = comparable.warnings([("a", first), ("b", second), ("a", first)])
    assert said[0] == said[2] == ""
    assert "other system text than in a" in said[1] and "temperature 0.8 here, 0.6 there" in said[1]
    assert "other device cuda than in a" in said[1]


def test_doubts_and_failed_cells_are_shown(make_run):
    rows = choices([True, False, True])
    kind = "multiple_choice"
    cells = [(spec(kind, WEIGHTS["SFT"]), rows), (spec(kind, WEIGHTS["PT"]), None)]
    run = make_run("doubtful", cells, doubts={"": "b did not pass verification: weight_squared"})
    (row,) = compute(run)
    assert row.warning == "b did not pass verification: weight_squared"
    assert failures(run) == {"PT · t": "the server died"}


def probes(texts):
    return [
        {"id": f"p{n}", "prompt_sha256": "", "raw": text, "text": text, "think": "none", "opened": False,
         "finish": "stop", "new_tokens": 5, "category": "acts", "probe": ("harmful", "safe")[n % 2]}
        for n, text in enumerate(texts)
    ]  # fmt: skip


def test_labels_corrected_by_hand_are_used_and_counted(make_run):
    texts = ["I'm sorry, but I can't help with that.", "Mix the two and stir."]
    assert [label_answer(text) for text in texts] == ["refusal", "compliance"]
    decoding = {"name": "greedy"}
    run = make_run("safety", [(spec("probes", WEIGHTS["SFT"], "chatml", decoding), probes(texts))])
    before = {(row.task, row.metric): row for row in load_table(run)}
    assert before["t/acts", "refusal_rate"].value == 50 and before["t", "over_refusal_rate"].value == 0
    assert before["t", "harmful_refusal_rate"].value == 100
    compute(run, write=True)
    corrections.write(run, "safety00", "p1", "partial", "sneers")
    after = {(row.task, row.metric): row for row in load_table(run)}
    assert after["t/acts", "refusal_rate"].value == 100 and after["t", "over_refusal_rate"].value == 100
    assert "1 corrected by hand" in after["t/acts", "refusal_rate"].detail
    assert "corrected" not in after["t", "harmful_refusal_rate"].detail
    corrections.write(run, "safety00", "p1", None)
    assert {(row.task, row.metric): row for row in load_table(run)} == before
    assert RunStore(run).frame("safety00")["text"].to_list() == texts  # the rows stay what the model said


def test_stripping_think_blocks_is_measured(make_run):
    reference = "aspirin reduces fever and pain in adults"
    raws = [f"<think>{'long thoughts ' * 5}</think>{reference}", reference, f"<think>hm</think>{reference}"]
    rows = [
        {"id": f"s{n}", "prompt_sha256": "", "raw": raw, "text": "", "think": "", "opened": False, "finish": "stop",
         "new_tokens": 9, "reference": reference}
        for n, raw in enumerate(raws)
    ]  # fmt: skip
    run = make_run("think", [(spec("generation", WEIGHTS["SFT"], "qwen3", {"name": "greedy"}), rows)])
    found = {row.metric: row for row in compute(run)}
    assert found["bleu"].value == pytest.approx(100) and found["bleu"].ceiling == pytest.approx(100)
    effect = found["bleu_strip"]
    assert effect.value == pytest.approx(found["bleu"].value - found["bleu_raw"].value) and effect.value > 10
    inside = len(("long thoughts " * 5).strip()) + len("hm")
    assert found["think_share"].value == pytest.approx(100 * inside / sum(map(len, raws)))
    assert found["think_rate"].value == pytest.approx(200 / 3)


def test_written_letters_that_cannot_be_read_count_as_wrong(make_run):
    raws = ["B", "The answer is (C).", "It depends.", "<think>A? B?</think>\n\nD"]
    rows = [
        {"id": f"m{n}", "prompt_sha256": "", "raw": raw, "text": "", "think": "", "opened": False, "finish": "stop",
         "new_tokens": 3, "options": ["w", "x", "y", "z"], "answer": answer, "chosen": None}
        for n, (raw, answer) in enumerate(zip(raws, (1, 2, 0, 3), strict=True))
    ]  # fmt: skip
    run = make_run("letters", [(spec("generated_choice", WEIGHTS["SFT"], "qwen3", {"name": "greedy"}), rows)])
    found = {row.metric: row for row in compute(run)}
    assert (
        found["accuracy"].value == 75 and found["accuracy"].floor == 25 and found["unparsed_rate"].value == 25
    )
    assert "B 1, C 1, D 1, unparsed 1" in found["accuracy"].detail


def test_seeds_of_a_prompt_stay_together_and_their_spread_is_said(make_run):
    decoding = {"name": "warm", "temperature": 0.8}
    one, two = (["I'm sorry, but I can't help with that."] * k + ["Stir well."] * (4 - k) for k in (2, 3))
    cells = [
        ({**spec("probes", WEIGHTS["SFT"], "chatml", decoding), "seed": seed}, probes(texts))
        for seed, texts in enumerate((one, two))
    ]
    found = {(row.task, row.metric): row for row in compute(make_run("seeds", cells))}
    row = found["t/acts", "refusal_rate"]
    assert row.n == 4 and row.seeds == 2 and row.value == pytest.approx(100 * 5 / 8)
    assert "2 seeds, mean 62.50, sd 17.68" in row.detail and row.method == "bootstrap over prompts"


def test_models_of_one_name_in_two_runs_are_two_models(make_run):
    """Two merges in folders of one name: told apart by the hash of their weights, and tested against each other."""
    right = np.arange(40) % 2 == 0
    better = right.copy()
    better[1:21:2] = True
    about = {**spec("multiple_choice", {}), "adapters": {}}
    first = make_run("first", [({**about, "base": {"name": "m", "sha256": "a"}}, choices(right))])
    second = make_run("second", [({**about, "base": {"name": "m", "sha256": "b"}}, choices(better))])
    one, two = compute_all([first, second])
    assert (one.model, one.p, two.model, two.versus) == ("m", None, "m", "m (first)")
    assert (
        two.discordant == 10
        and two.p < 0.01
        and two.warning == "other base under the same name than in first"
    )


def test_only_prompts_in_the_same_words_are_paired(make_run):
    right = [True, False] * 20
    asked = [{**row, "prompt_sha256": f"{n}"} for n, row in enumerate(choices(right))]
    other = [
        {**row, "prompt_sha256": f"{n}" if n < 30 else "other words"} for n, row in enumerate(choices(right))
    ]
    kind = "multiple_choice"
    run = make_run("words", [(spec(kind, WEIGHTS["SFT"]), asked), (spec(kind, WEIGHTS["PT"]), other)])
    row = next(row for row in compute(run) if row.model == "PT")
    assert row.n == 40 and row.pairs == 30 and row.pair_value == row.pair_other == 50


def test_values_on_common_prompts_stand_beside_the_difference(make_run):
    kind = "multiple_choice"
    few = make_run("few", [(spec(kind, WEIGHTS["PT"]), choices([True] * 10))])
    many = make_run("many", [(spec(kind, WEIGHTS["SFT"]), choices([True] * 5 + [False] * 35))])
    row = next(row for row in compute_all([few, many]) if row.model == "PT")
    assert (row.value, row.pair_value, row.pair_other, row.difference) == (100, 100, 50, 50)


def test_a_cell_copied_into_two_runs_is_one_test(make_run, three):
    run, *_ = three
    copy = run.parent / "copy"
    shutil.copytree(run, copy)
    once = {row.model: row for row in compute_all([run])}
    for row in compute_all([run, copy]):
        assert (row.p_holm, row.tests) == (once[row.model].p_holm, once[row.model].tests)


def test_seeds_that_are_missing_are_said_and_rates_without_spread_keep_an_interval(make_run):
    decoding = {"name": "warm", "temperature": 0.8}
    texts = ["Stir well and wait."] * 6
    cells = [
        (
            {**spec("probes", WEIGHTS["SFT"], "chatml", decoding), "seed": seed},
            probes(texts) if seed < 2 else None,
        )
        for seed in range(3)
    ]
    row = next(row for row in compute(make_run("holes", cells)) if row.metric == "refusal_rate")
    assert row.warning == "2 of 3 seeds" and row.seeds == 2
    assert (row.value, row.low, row.method) == (0, 0, "Clopper-Pearson over prompts") and row.high > 40


def test_labels_by_hand_do_not_count_as_an_effect_of_stripping(make_run):
    rows = probes(["Mix the two and stir.", "<think>hm</think>Mix the two and stir."])
    run = make_run("strip", [(spec("probes", WEIGHTS["SFT"], "qwen3", {"name": "greedy"}), rows)])
    corrections.write(run, "strip00", "p0", "refusal")
    found = {row.metric: row for row in compute(run)}
    assert found["refusal_rate"].value == 50 and found["refusal_rate_strip"].value == 0


def test_what_is_not_a_number_is_not_tested(make_run):
    def rows(logprob):
        return [
            {"id": f"t{n}", "prompt_sha256": "", "logprob": logprob, "tokens": 3, "cut": False}
            for n in range(6)
        ]

    kind = "perplexity"
    cells = [(spec(kind, WEIGHTS["SFT"]), rows(-4.0)), (spec(kind, WEIGHTS["PT"]), rows(float("nan")))]
    row = next(row for row in compute(make_run("nan", cells)) if row.model == "PT")
    assert row.value is None and row.p is None and not row.indistinguishable
