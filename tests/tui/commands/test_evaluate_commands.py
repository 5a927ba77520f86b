"""`medmerge eval`, `sweep` and `report`: from a YAML file to a table, and what they refuse."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml

from engine.evaluate.summary import MetricRow
from tui.cli import main
from tui.commands.report import cell, human_table, latex, markdown


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
    assert "PT against SFT on text (ppl)" in said and "paired bootstrap" in said
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
