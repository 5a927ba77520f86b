"""The target of `medmerge audit`.

params: {"train": [files], "test": [files]} and, where asked, "column", "id_columns", "workers", "clean" (a folder to
write the cleaned training files to) and "drop_duplicates" ("none", "exact", "near").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.atomic import refuse_existing
from engine.errors import BadInputError
from engine.jobs.events import EventWriter

DROP_DUPLICATES = ("none", "exact", "near")


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """The result of `audit_files`, with "exit_code": 1 when anything leaks (also with "clean"), 0 otherwise.

    Duplicates within the training data are reported and do not change the exit code: they waste training, they
    do not spoil a measurement. With "clean", "cleaned" says what was written (see `training.audit.clean`).
    """
    from training.audit.clean import snapshot, write_clean
    from training.audit.report import audit_files

    train = [Path(name) for name in params["train"]]
    test = [Path(name) for name in params.get("test") or []]
    if not train:
        raise BadInputError("no training file was given", "medmerge audit --train FILE... --test FILE...")
    repeated = [str(path) for number, path in enumerate(train) if path in train[:number]]
    if repeated:
        raise BadInputError(f"{repeated[0]} is given twice with --train", "name each file once")
    drop = params.get("drop_duplicates") or "none"
    if drop not in DROP_DUPLICATES:
        raise BadInputError(f"drop_duplicates is {drop!r}, expected one of {', '.join(DROP_DUPLICATES)}")
    clean = Path(params["clean"]) if params.get("clean") else None
    if drop != "none" and clean is None:
        raise BadInputError("--drop-duplicates has nothing to write to", "add --clean DIR")
    if clean is not None:
        refuse_existing(clean)
    before = snapshot(train)
    result = audit_files(
        train,
        test,
        events,
        column=params.get("column") or "",
        id_columns=params.get("id_columns") or (),
        scratch=events.path.parent if events.path else None,
        workers=params.get("workers"),
    )
    result["exit_code"] = 1 if result["leaks"] else 0
    if clean is not None:
        result["cleaned"] = write_clean(clean, train, result, before, drop, events)
    return result
