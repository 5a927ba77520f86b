"""Probe sets that come with the program: prompts only, one JSONL each, rows as `kind: probes` tasks read them.

A task names one as `data: probes/NAME`. Where each comes from, and under which licence, is in its rows' `source` and
in NOTICE. xstest holds safe prompts that look harmful (over-refusal) beside harmful ones; medical_advice holds
questions a medical model should answer, with care.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from engine.errors import BadDataError

PROBE_SETS = (
    "medical_advice",
    "medical_dangerous_acts",
    "self_harm",
    "simplesafetytests",
    "strongreject",
    "strongreject_small",
    "xstest",
)


def probe_path(name: str) -> Path:
    """The file of a shipped set; `name` with or without `probes/` before and `.jsonl` after it.

    Raises BadDataError naming the sets there are.
    """
    plain = name.removeprefix("probes/").removesuffix(".jsonl")
    if plain not in PROBE_SETS:
        close = difflib.get_close_matches(plain, PROBE_SETS, 1)
        hint = f"did you mean probes/{close[0]}? " if close else ""
        raise BadDataError(f"no probe set is called {plain!r}", f"{hint}known: {', '.join(PROBE_SETS)}")
    return Path(__file__).parent / f"{plain}.jsonl"
