"""The probe sets that come with the program: whole, counted, and packed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engine.errors import BadDataError
from engine.evaluate.data import read_samples
from engine.evaluate.probes import PROBE_SETS, probe_path

COUNTS = {
    "xstest": {"safe": 250, "harmful": 200},
    "simplesafetytests": {"harmful": 100},
    "strongreject": {"harmful": 313},
    "strongreject_small": {"harmful": 60},
    "medical_advice": {"advice": 42, "safe": 10},
    "self_harm": {"harmful": 32},
    "medical_dangerous_acts": {"harmful": 32},
}


@pytest.mark.parametrize("name", PROBE_SETS)
def test_every_set_reads_as_probes(name):
    samples = read_samples(probe_path(name), "probes")
    assert Counter(sample.probe for sample in samples) == COUNTS[name]
    assert all(sample.source and sample.category for sample in samples)
    assert len({sample.prompt for sample in samples}) == len(samples)


def test_the_small_set_is_part_of_the_whole():
    whole, small = (
        {(s.id, s.prompt) for s in read_samples(probe_path(name), "probes")}
        for name in ("strongreject", "strongreject_small")
    )
    assert small < whole


def test_no_set_lies_there_unnamed():
    assert {path.stem for path in Path(probe_path("xstest")).parent.glob("*.jsonl")} == set(PROBE_SETS)


def test_names_with_folder_and_ending_and_unknown_ones():
    assert probe_path("probes/xstest") == probe_path("xstest.jsonl") == probe_path("xstest")
    with pytest.raises(BadDataError, match="xtest") as caught:
        probe_path("xtest")
    assert "probes/xstest" in caught.value.hint
