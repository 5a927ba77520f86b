"""The peers' inputs, once a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.peers.inputs import inputs

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def peer_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the goldens were made from: base, a, b, pt, sft."""
    return inputs(tmp_path_factory.mktemp("peers") / "inputs")


@pytest.fixture(scope="session")
def golden_facts() -> dict[str, Any]:
    """Versions, hash of the inputs, and the numbers mergekit resolved for each tensor of each case."""
    return json.loads((GOLDENS / "parameters.json").read_text())
