"""`medmerge eval`, `sweep` and `report`: from a YAML file to a table, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import unicodedata

import numpy as np
import polars as pl
import pytest
import yaml

from engine.evaluate.summary import MetricRow
from tui.cli import main
from tui.commands.eval import render
from tui.commands.report import cell, human_table, latex, markdown
from tui.commands.report_words import comparisons


def metric_row(**changes):
    values = {
        "run": "r", "model": "PT30 SFT70", "weights": {"pt": 0.3, "sft": 0.7}, "template": "model",
        "decoding": "greedy",
        "task": "qa", "metric": "bleu", "value": 6.5, "low": 4.0, "high": 9.0, "n": 48, "floor": 4.4,
    }  # fmt: skip
    return MetricRow(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "6.5 [4.0 9.0] (4.4)"),
        ({"floor": 20.3}, "6.5 [4.0 9.0] (20.3) !"),
        ({"p": 0.12, "versus": "SFT"}, "6.5 [4.0 9.0] (4.4) ≈"),
        ({"p": 0.01, "versus": "SFT"}, "6.5 [4.0 9.0] (4.4)"),
        ({"value": None}, "n/a"),
        ({"metric": "perplexity", "floor": None, "value": 7.071}, "7.07 [4.00 9.00]"),
        (
            {"metric": "accuracy", "majority": 30.0, "value": 27, "low": 20, "high": 35, "floor": 25},
            "27.0 [20.0 35.0] at chance",
        ),
        (
            {"metric": "accuracy", "majority": 30.0, "value": 66.4, "low": 63.7, "high": 69, "floor": 25},
            "66.4 [63.7 69.0]",
        ),
    ],
)
def test_a_cell_says_its_interval_and_what_it_is_worth(changes, text):
    assert cell(metric_row(**changes)) == text


def test_likelihoods_stand_on_every_line_of_their_model():
    rows = [
        metric_row(model=model, decoding=decoding, value=value)
        for model, decoding, value in (
            ("SFT", "greedy", 17.8),
            ("SFT", "t06", 16.1),
            ("PT", "greedy", 2.0),
            ("PT", "t06", 1.9),
        )
    ]
    rows += [
        metric_row(
            model=model,
            decoding="",
            metric="reference_perplexity",
            value=value,
            low=None,
            high=None,
            floor=None,
        )
        for model, value in (("SFT", 3.8), ("PT", 4.79))
    ]
    lines = human_table(rows).splitlines()
    assert "template model" in lines[0]  # the same on every line: said once
    assert lines[1].split() == ["model", "decoding", "BLEU", "(floor)", "ref", "ppl"]
    assert [line.split()[0] for line in lines[2:6]] == ["SFT", "SFT", "PT", "PT"]
    assert [line.split()[-1] for line in lines[2:6]] == ["3.80", "3.80", "4.79", "4.79"]


def test_other_formats_escape_what_their_format_would_read():
    rows = [metric_row(task="a_b|c", model="50% & more")]
    assert r"a_b\|c" in markdown(rows) and r"50\% \& more" in latex(rows) and r"a\_b|c" in latex(rows)


def test_eval_sweep_and_report(sweep_files, capsys):
    workspace, config = sweep_files
    assert main(["sweep", str(config), "--workspace", str(workspace), "--limit", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    run = workspace / "runs" / "sweep"
    assert result["run"] == str(run) and result["cells"] == 3
    assert main(["report", "sweep", "--workspace", str(workspace), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    wanted = {
        "run",
        "model",
        "weights",
        "template",
        "decoding",
        "task",
        "metric",
        "value",
        "low",
        "high",
        "n",
        "floor",
    }
    assert wanted <= set(rows[0]) and {row["n"] for row in rows} == {3}
    assert rows == result["rows"]
    assert main(["report", str(run), "--workspace", str(workspace), "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["metric"] for row in table] == [row["metric"] for row in rows]
    assert main(["report", "sweep", "--workspace", str(workspace)]) == 0
    assert "PT30 SFT70" in capsys.readouterr().out
    there = ["report", "sweep", "--workspace", str(workspace)]
    assert main([*there, "--words", "--all"]) == 0
    said = capsys.readouterr().out
    assert "PT against SFT on text (ppl)" in said and "(paired " in said
    assert main([*there, "--pivot", "text:perplexity", "--against", "PT"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == ["SFT", "PT30", "PT"]
    assert main([*there, "--choose", "text:perplexity", "--json"]) in (
        0,
        2,
    )  # three texts may all be in one half
    capsys.readouterr()
    for wrong in (
        ["--pivot", "text"],
        ["--pivot", "text:bleu"],
        ["--against", "nobody"],
        ["--choose", "x:y"],
    ):
        assert main([*there, *wrong]) == 2
    assert "there are: text:perplexity" in capsys.readouterr().err
    # a second run of that name gets a number; one named by hand is refused
    assert main(["eval", str(config), "--workspace", str(workspace)]) == 2
    assert "one" in capsys.readouterr().err
    assert main(["sweep", str(config), "--workspace", str(workspace), "--out", "sweep"]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.fixture
def sweep_files(workspace, tmp_path, tiny_qwen3, make_adapter):
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"id": str(n), "text": f"Aspirin reduces fever {n} times."}) + "\n" for n in range(4)
        )
    )
    config = {
        "base": str(tiny_qwen3),
        "adapters": {
            "pt": str(make_adapter(tiny_qwen3, seed=1)),
            "sft": str(make_adapter(tiny_qwen3, seed=2)),
        },
        "weights": [{"sft": 1}, {"pt": 0.3, "sft": 0.7}, {"pt": 1}],
        "device": "cpu",
        "tasks": [{"name": "text", "kind": "perplexity", "data": "text.jsonl"}],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    return workspace.root, path


def test_refusals(sweep_files, capsys):
    workspace, config = sweep_files
    there = ["--workspace", str(workspace)]
    assert main(["sweep", str(config), "--workers", "2", *there]) == 2
    assert "--workers is for --executor ray" in capsys.readouterr().err
    assert main(["sweep", str(config), "--executor", "ray", "--workers", "0", *there]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert main(["report", "nothing", *there]) == 2
    assert "no run nothing" in capsys.readouterr().err
    assert main(["sweep", "no.yaml", *there]) == 2
    assert main(["sweep", str(config), "--out", "../up", *there]) == 2
    assert main(["sweep", str(config), "--resume", *there]) == 2
    assert "no run" in capsys.readouterr().err
    assert main(["sweep", str(config), "--limit", "0", *there]) == 2
    (config.parent / "text.jsonl").write_text('{"id": "a"}\n')
    assert main(["sweep", str(config), *there]) == 2
    assert "text.jsonl line 1" in capsys.readouterr().err
    assert not (workspace / "runs" / "sweep").exists()  # nothing is left behind


# ---- what names may do, and what report refuses: runs written by hand

NASTY = "t\x1b]0;pwn\x07a"


@pytest.fixture
def write_run(workspace):
    """Writes a run of multiple choice as the job leaves it: {label: which of the questions were right}."""

    def write(run, models, parent=None, failed=(), **task):
        folder = (parent or workspace.runs) / run
        (folder / "cells").mkdir(parents=True)
        entries = []
        for number, (label, right) in enumerate({**models, **dict.fromkeys(failed)}.items()):
            spec = {
                "kind": "multiple_choice", "weights": {}, "template": "", "adapters": {}, "decoding": None,
                "seed": None, "task": {"name": "t", "sha256": "d" * 64, "limit": None, **task}, "base": {"name": "b"},
                "model": {"kind": "gguf", "name": label, "sha256": label}, "dtype": "gguf", "compute": "",
                "device": "cpu", "versions": {},
            }  # fmt: skip
            key = f"{run}{number:02d}"
            done = right is not None
            entries.append(
                {"hash": key, "done": done, "failed": "" if done else "it died\x1b[2J", "spec": spec}
            )
            if done:
                rows = [
                    {"id": f"q{n}", "prompt_sha256": str(n), "scoring": "letters", "options": list("abcd"),
                     "answer": n % 4, "logprobs": [0.0] * 4, "chosen": (n if yes else n + 1) % 4, "chosen_norm": 0,
                     "cell": key}
                    for n, yes in enumerate(right)
                ]  # fmt: skip
                pl.DataFrame(rows).write_parquet(folder / "cells" / f"{key}.parquet")
        note = {"format": "medmerge.eval/1", "mode": "sweep", "cells": entries}
        (folder / "cells.json").write_text(json.dumps(note))
        return folder

    return write


@pytest.fixture
def report(workspace, capsys):
    """Runs `medmerge report`; (exit code, stdout, stderr)."""

    def run(*args):
        code = main(["report", *map(str, args), "--workspace", str(workspace.root)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def unseen(text):
    return [char for char in text if char != "\n" and unicodedata.category(char) == "Cc"]


@pytest.mark.parametrize(
    "options",
    [[], ["--words"], ["--pivot", f"{NASTY}:accuracy"], ["--choose", f"{NASTY}:accuracy"]]
    + [["--format", name] for name in ("csv", "markdown", "latex")],
)
def test_no_escape_sequence_or_line_break_of_a_name_is_printed(options, write_run, report):
    rng = np.random.default_rng(1)
    models = {
        "a\nb": rng.random(60) < 0.5,
        "=1+1|c": rng.random(60) < 0.2,
        "\x9b2J\u202ed": rng.random(60) < 0.9,
    }
    write_run("r", models, failed=["bad\x1bone"], name=NASTY)
    code, out, err = report("r", *options)
    assert code == 0 and "a b" in out and not unseen(out + err) and "\u202e" not in out
    assert "\nb" not in out  # the label stays on one line
    if "csv" in options:
        table = list(csv.DictReader(io.StringIO(out)))
        assert {row["model"] for row in table} == {"a b", "'=1+1|c", "\ufffd2J\ufffdd"}
        assert all(row["difference"][:1] != "'" for row in table)  # numbers stay numbers
        assert any(row["difference"].startswith("-") for row in table)
    if "markdown" in options:
        assert len({line.replace(r"\|", "").count("|") for line in out.splitlines()}) == 1


def test_warnings_go_with_exports_and_marks_are_tex():
    rows = [
        metric_row(warning="50% only\n\\input{x}", p=0.5, versus="SFT"),
        metric_row(model="[b] a\u2020"),
        metric_row(model="PT", metric="rouge1", warning="of a metric that is not shown"),
    ]
    text = latex(rows)
    assert (
        r"$\approx$ $\triangle$" in text and "\n{}[" not in text and r"[b] a\dag{}" in text and text.isascii()
    )
    assert text.endswith("\\end{tabular}\n% PT30 SFT70: 50% only \\input{x}.")
    assert markdown(rows).splitlines()[-2:] == ["", r"- PT30 SFT70: 50% only \\input{x}."]
    only = latex([metric_row(run="[2pt] r", model="m")])
    assert "\n{}[2pt] r & m" in only  # a bracket after \\ would be its option


def test_options_that_contradict_each_other_are_refused(write_run, report):
    write_run("r", {"a": [True] * 30 + [False] * 30, "b": [True, False] * 30})
    for options in (
        ["--words", "--pivot", "t:accuracy"],
        ["--words", "--format", "csv"],
        ["--pivot", "t:accuracy", "--format", "latex"],
        ["--words", "--json"],
        ["--words", "--format", "json"],
        ["--json", "--format", "csv"],
        ["--choose", "t:accuracy", "--half", "dev"],
    ):
        code, out, err = report("r", *options)
        assert code == 2 and not (out and "--json" not in options) and options[0] in err
    code, out, _ = report("r", "--pivot", "t:accuracy", "--json")
    assert code == 0 and [row["model"] for row in json.loads(out)["rows"]] == ["a", "b"]
    for name, lines in (("csv", 3), ("markdown", 4), ("latex", 8)):
        code, out, err = report("r", "--choose", "t:accuracy", "--format", name)
        assert code == 0 and "chosen on the dev half" in err and len(out.splitlines()) == lines
    assert "chosen on the dev half" in report("r", "--choose", "t:accuracy")[1]


def test_choosing_says_what_is_the_case(write_run, report):
    write_run("empty", {}, failed=["a"])
    for options in (["--choose", "t:accuracy"], ["--pivot", "t:accuracy"], ["--half", "dev"]):
        code, _, err = report("empty", *options)
        assert code == 2 and "nothing is measured yet in empty" in err and "there are" not in err
    write_run("tested", {"a": [True, False] * 20}, half="test")
    code, _, err = report("tested", "--choose", "t:accuracy")
    assert code == 2 and "task t was measured on its test half only" in err
    write_run("two", {"a": [True, False] * 20}), write_run("three", {"b": [True] * 30}, sha256="e" * 64)
    code, out, _ = report("two", "three", "--choose", "t:accuracy")
    assert code == 0 and "in three" in out.split("chosen on")[1]
    assert "were not measured alike: n from" in out and "b of three: other data" in out
    write_run("one", {"q": [True]})  # one question: it is in one half
    code, _, err = report("one", "--choose", "t:accuracy")
    assert code == 2 and "half" in err


def test_a_run_named_twice_is_one_and_two_of_a_name_are_refused(write_run, report, workspace, tmp_path):
    folder = write_run("la", {"a": [True, False] * 5}, failed=["gone"])
    (tmp_path / "link").symlink_to(folder)
    once = json.loads(report("la", "--json")[1])
    assert json.loads(report("la", folder, f"{folder}/../la", tmp_path / "link", "--json")[1]) == once
    other = write_run("la", {"a": [True] * 10}, parent=tmp_path / "runs2")
    code, _, err = report("la", other)
    assert code == 2 and "two runs are called la" in err and str(other) in err and "rename" in err
    write_run("lb", {"b": [True] * 10}, failed=["gone"])
    assert list(json.loads(report("la", "lb", "--json")[1])["failed"]) == ["la · gone · t", "lb · gone · t"]


def test_a_sentence_is_about_the_prompts_both_were_asked():
    rows = [
        metric_row(model="SFT", value=50.0, n=100),
        metric_row(
            value=66.0, p=0.01, versus="SFT", pair_value=40.0, pair_other=30.0, difference=10.0, pairs=10
        ),
    ]
    assert ": 40.0 against 30.0, difference +10.0" in comparisons(rows, ())
    old = [rows[0], metric_row(value=66.0, p=0.01, versus="SFT", difference=16.0, pairs=100)]
    assert ": 66.0 against 50.0, difference +16.0" in comparisons(old, ())


@pytest.mark.parametrize("part", ["tasks", "decoding", "adapters"])
def test_names_in_configs_are_printable(part, sweep_files, capsys):
    workspace, path = sweep_files
    config = yaml.safe_load(path.read_text())
    config["tasks"][0] |= {"kind": "generation", "system": "two\nlines\t\x1b"}  # a prompt may hold anything
    if part == "tasks":
        config["tasks"][0]["name"] = NASTY
    elif part == "decoding":
        config["decoding"] = [{"name": "a\nb"}]
    else:
        config["adapters"] = {"p\u202et": config["adapters"].pop("pt"), **config["adapters"]}
    path.write_text(yaml.safe_dump(config))
    assert main(["sweep", str(path), "--workspace", str(workspace)]) == 2
    err = capsys.readouterr().err
    assert "holds the control character U+" in err and part in err and not unseen(err)
    assert "system" not in err


def test_reasons_of_failed_cells_are_cleaned_after_a_run(capsys):
    result = {
        "rows": [metric_row(task=NASTY).to_dict()],
        "reused": 0,
        "cells": 1,
        "seconds": 1.0,
        "run": "r\x1b[2J",
    }
    out = render({**result, "failed": {f"a · {NASTY}": "no\x9b2J"}})
    assert not unseen(out + capsys.readouterr().err)
