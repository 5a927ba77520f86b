"""The target of `medmerge audit`: params {"train": [files], "test": [files]}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from engine.jobs.events import EventWriter


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """{"leaks", "duplicates", "counts", "exit_code"}: 1 when anything leaks, 0 otherwise.

    Duplicates within the training data are reported and do not change the exit code: they waste training, they
    do not spoil a measurement.
    """
    from training.audit.report import audit_files

    train = [Path(name) for name in params["train"]]
    test = [Path(name) for name in params.get("test") or []]
    if not train:
        raise BadInputError("no training file was given", "medmerge audit --train FILE... --test FILE...")
    result = audit_files(train, test, events)
    result["exit_code"] = 1 if result["leaks"] else 0
    return result
