"""The app and the commands start without any model library: heavy work is always another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "llama_cpp", "accelerate", "polars", "sacrebleu", "rouge_score")
EVERY_SCREEN = """
import tui.start, tui.palette, tui.reading
from tui.app import _import_screens
_import_screens()
"""


def loaded_after(code: str) -> set[str]:
    """Names of the top-level modules a fresh interpreter holds after `code`."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys\nprint(' '.join({{n.partition('.')[0] for n in sys.modules}}))",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    ["import tui.app", "import tui.cli; tui.cli.build_parser()", EVERY_SCREEN],
    ids=["app", "cli", "screens"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded_after(code).isdisjoint(HEAVY)


def test_the_first_paint_waits_for_no_array_library() -> None:
    loaded = loaded_after("import tui.app, tui.backend, tui.screens.home")
    assert loaded.isdisjoint({"numpy", "scipy", "psutil", "yaml", "textual_plot"})
