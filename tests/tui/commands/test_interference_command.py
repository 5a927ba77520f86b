"""`medmerge interference`: table, CSV and JSON say the same numbers; the strip."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.workspace import Workspace
from tests.conftest import MakeAdapter
from tui.cli import main
from tui.commands.interference import strip_text
from tui.strip import cells


@pytest.fixture(scope="module")
def flags(tiny_llama: Path, make_adapter: MakeAdapter) -> list[str]:
    pt = make_adapter(tiny_llama, seed=1)
    sft = make_adapter(tiny_llama, seed=2, rank=4, target_modules=["q_proj", "up_proj"])
    return ["interference", "--base", str(tiny_llama), "--adapter", f"pt={pt}", "--adapter", f"sft={sft}"]


def test_three_formats_one_result(
    flags: list[str], workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--workspace", str(workspace.root)]
    assert main([*flags, "--format", "json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main([*flags, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["module"] for row in rows] == [module["name"] for module in said["modules"]]
    assert len(rows) == 4
    for row, module in zip(rows, said["modules"], strict=True):
        assert (row["first"], row["second"]) == ("pt", "sft")
        assert (
            float(row["norm_first"]) == module["norm"]["pt"]
            and float(row["norm_second"]) == module["norm"]["sft"]
        )
        for name in ("cosine", "norm_ratio", "sign_conflict", "column_angle_smallest", "row_angle_median"):
            assert float(row[name]) == module[name]
        assert 0 <= float(row["column_angle_smallest"]) <= float(row["column_angle_median"]) <= 90
    assert main(flags) == 0
    table = capsys.readouterr().out
    assert f"cosine {said['overall']['cosine']:.3f}" in table and "by layer, 0 to 1" in table
    assert f"{said['overall']['column_angle_smallest']:.1f}° smallest" in table
    assert "only in pt: 10 modules" in table and "\x1b" not in table
    for kind in ("q_proj", "up_proj"):
        assert any(line.startswith(f"  {kind}") for line in table.splitlines())


def test_cells_show_size_sign_and_gaps() -> None:
    assert cells([0.0, 0.1, 0.4, 0.8, None, math.nan], 0.8) == "▁▁▄█  "
    assert cells([-0.01, -0.5, -0.8], 0.8) == "░▒▓"
    assert cells([0.2, 0.5, 0.8, None], 0.8, width=2) == "▄█"  # means of equal parts
    assert cells([0.8, -0.8], 0.8, colour=True) == "\x1b[34m█\x1b[0m\x1b[31m▓\x1b[0m"
    assert cells([0.0], 0.0) == "▁"


def test_strip_text_is_data_and_fits() -> None:
    strip = {"layers": list(range(200)), "kinds": ["q\x1b[31m"], "cosine": [[0.5] * 100 + [-0.25] * 100]}
    lines = strip_text(strip, 40, colour=False).splitlines()
    assert lines[0] == "cosine by layer, 0 to 199: █ is 0.50, ░▒▓ below 0"
    assert "\x1b" not in lines[1] and len(lines[1]) <= 40
    assert "█" in lines[1] and "▒" in lines[1]
    assert strip_text({"layers": [], "kinds": [], "cosine": []}, 40, False) == ""
