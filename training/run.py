"""One LoRA run from settings to adapter: audit, encode, train, save. Called by `training.job` and `training.fewshot`.

The run folder (WORKSPACE/runs/NAME):

    train.json     settings, base and data by hash, audit; written first, so that a killed run can be resumed
    audit.json     the whole report of the audit
    tokens/        the encoded documents, while the run goes on
    checkpoints/   the newest ones
    curve.jsonl    loss, held-out loss and the rest, step by step

The adapter folder appears whole, at the end, with `training.json` beside the weights.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import templates
from engine.atomic import refuse_existing, write_json
from engine.claim import claim
from engine.errors import BadDataError, BadInputError, MedmergeError
from engine.jobs.events import EventWriter
from training import checkpoints, processes
from training.artifact import base_identity
from training.config import TrainConfig
from training.data.sources import DataFile, Source, describe
from training.fit import CHECKPOINTS, fit, steps_of
from training.prepare import Drop, Encoder, Prepared, data_files, load_tokenizer, prepare

RUN_FILE = "train.json"
AUDIT_FILE = "audit.json"
TOKENS = "tokens"
NAMES = {"template_text": "the text of the template", "audit": "what the audit finds (data or tests)"}
SHOWN_FINDINGS = 50  # in a manifest; all of them are in audit.json


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, checked: shared by all runs of a few-shot curve."""

    tokenizer: Any
    files: list[DataFile]
    story: dict[str, Any]  # base, data, template, audit: for train.json and the adapter's manifest
    drop: Drop


def read_inputs(config: TrainConfig, run_folder: Path, events: EventWriter) -> Inputs:
    """Hash, audit and check what the run is made from. Raises BadInputError and kin for what cannot be used."""
    tokenizer = load_tokenizer(Path(config.base))
    encoder = Encoder(config, tokenizer)
    for warning in encoder.warnings:
        events.warning(warning)
    files = data_files(config, events)
    events.progress(0, 1, "steps", f"hashing {Path(config.base).name}", phase="base")
    base = base_identity(Path(config.base))
    events.progress(1, 1, "steps", phase="base")
    report = audit_report(config, run_folder, events)
    audited, drop = judge(config, report)
    story = {
        "base": {**base, "files": _small_files(Path(config.base))},
        "data": [dataclasses.asdict(item) for item in files],
        "template": config.template,
        "template_text": templates.describe(encoder.template) if encoder.template else None,
        "audit": audited,
    }
    return Inputs(tokenizer, files, story, drop)


def _small_files(base: Path) -> dict[str, str]:
    """SHA-256 of the base's files that decide tokens and architecture."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return {
        name: hashlib.sha256((base / name).read_bytes()).hexdigest()
        for name in names
        if (base / name).is_file()
    }


def audit_report(config: TrainConfig, run_folder: Path, events: EventWriter) -> dict[str, Any] | None:
    """The audit of the data against the `tests`, kept in the run folder; None when nothing is to be looked for."""
    if not config.tests and config.duplicates == "keep":
        return None
    from training.audit.report import audit_files

    report = audit_files(
        [Path(name) for name in config.files],
        [Path(name) for name in config.tests],
        events,
        column=config.audit_column,
        scratch=run_folder,
    )
    write_json(run_folder / AUDIT_FILE, report)
    return report


def judge(config: TrainConfig, report: dict[str, Any] | None) -> tuple[dict[str, Any], Drop]:
    """(what the manifest says of the audit, the rows to leave out).

    Raises BadDataError when there are leaks and the settings refuse them.
    """
    if report is None:
        return {"tests": [], "leaks": None, "note": "no test files were named, so nothing was checked"}, {}
    leaks = report["leaks"]
    if leaks and config.on_leak == "refuse":
        first = leaks[0]
        raise BadDataError(
            f"{len(leaks)} leaks: {first['train_file']} row {first['train_row']} repeats "
            f"{first['test_file']} row {first['test_row']} ({first['detector']})",
            "on_leak: drop trains without those rows, on_leak: allow with them (the manifest will say so); "
            "see all of them with: medmerge audit --train ... --test ...",
        )
    from training.audit.report import rows_to_drop

    drop: Drop = rows_to_drop(
        report,
        leaks=config.on_leak == "drop",
        duplicates="none" if config.duplicates == "keep" else config.duplicates,
    )
    odd = [source.path for source in config.data if source.split != "auto" and drop.get(source.path)]
    if odd:
        raise BadDataError(
            f"{odd[0]}: the audit found rows to drop, and it counts paragraphs where the run splits otherwise",
            'leave split out, or write the texts as JSON lines: {"text": ...}',
        )
    return {
        "tests": [dataclasses.asdict(describe(Source(name))) for name in config.tests],
        "leaks": len(leaks) if config.tests else None,
        "on_leak": config.on_leak,
        "duplicates": config.duplicates,
        "dropped_rows": sum(len(rows) for rows in drop.values()),
        "counts": _by_name(report["counts"]),
        "findings": [_by_name(leak) for leak in leaks[:SHOWN_FINDINGS]],
    }, drop


def _by_name(value: Any) -> Any:
    """Paths as file names: a manifest says nothing of another machine's folders."""
    if isinstance(value, dict):
        names = [_by_name(key) for key in value]
        if len(set(names)) < len(names):  # the same name in two folders
            names = ["/".join(Path(key).parts[-2:]) for key in value]
        return {name: _by_name(item) for name, item in zip(names, value.values(), strict=True)}
    if isinstance(value, list):
        return [_by_name(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def train(config: TrainConfig, run_folder: Path, events: EventWriter, resume: bool = False) -> dict[str, Any]:
    """Run it all; returns the result of the job: adapter, run, steps, tokens, losses.

    With `resume` a run that was killed at any moment goes on from its newest whole checkpoint, or from the start
    when it has none, and ends with the same adapter, bit for bit on a CPU, as if it had not been interrupted.

    Raises: BadInputError and kin for what was given, MedmergeError when the loss is not a number or memory or disk
    run out, CancelledError.
    """
    check_output(Path(config.output), run_folder)
    for note in config.notes:
        events.warning(note)
    if config.kind == "pt" and not config.packing:
        events.warning(
            "packing: false has no meaning for plain text, which is always one stream cut into blocks"
        )
    with claim(run_folder):
        if not resume:
            open_run(config, run_folder)
        try:
            inputs = read_inputs(config, run_folder, events)
            same_inputs(run_folder, inputs.story)
            return run_fit(config, run_folder, run_folder / TOKENS, inputs, events, resume)
        except BaseException:
            if not resume and checkpoints.newest(run_folder / CHECKPOINTS, required=False) is None:
                shutil.rmtree(run_folder, ignore_errors=True)  # nothing to resume from: do not block the name
            raise


def check_output(output: Path, run_folder: Path) -> None:
    """Raise BadInputError for an adapter folder that could not be made once the training is done."""
    refuse_existing(output)
    for one, other in ((output, run_folder), (run_folder, output)):
        if one.absolute() == other.absolute() or other.absolute() in one.absolute().parents:
            raise BadInputError(
                f"the adapter {output} and the run folder {run_folder} would lie in each other",
                "choose another output, for example adapters/NAME",
            )
    parent = output.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(
            f"cannot make the folder {parent}: {error.strerror}", "choose another output"
        ) from error
    if not os.access(parent, os.W_OK):
        raise BadInputError(f"cannot write in {parent}", "choose an output folder you can write to")


def run_fit(
    config: TrainConfig,
    run_folder: Path,
    tokens: Path,
    inputs: Inputs,
    events: EventWriter,
    resume: bool,
    keep_tokens: bool = False,
) -> dict[str, Any]:
    """Encode, train, save, with inputs that were read already; in this process or in several."""
    prepared = prepare(config, inputs.tokenizer, tokens, events, inputs.drop, inputs.files)
    _announce(prepared, config, events)
    count = processes.wanted(config)
    resume = resume and checkpoints.newest(run_folder / CHECKPOINTS, required=False) is not None
    if count > 1:
        result = processes.launch(config, run_folder, tokens, inputs.story, events, resume, count)
    else:
        processes.use_one_device()
        result = fit(config, run_folder, prepared, inputs.tokenizer, inputs.story, events, resume)
    if not keep_tokens:
        shutil.rmtree(tokens, ignore_errors=True)
    return result


def _announce(prepared: Prepared, config: TrainConfig, events: EventWriter) -> None:
    counts = prepared.counts
    padded = counts["blocks"] * config.cutoff
    room = f", {100 * (1 - counts['tokens'] / padded):.1f}% of the blocks' room left empty" if padded else ""
    events.log(
        f"{counts['documents']:,} documents in {counts['blocks']:,} blocks: {counts['tokens']:,} tokens an epoch, "
        f"{counts['trained_tokens']:,} of them trained{room if config.packing else ''}; "
        f"{steps_of(config, counts['blocks']):,} steps; {counts['held_out_documents']:,} documents held out"
    )
    if counts.get("eval_overlap"):
        events.warning(
            f"{counts['eval_overlap']:,} of {counts['eval_documents']:,} evaluation samples are trained on as well: "
            "the held-out loss is too good"
        )


def open_run(config: TrainConfig, run_folder: Path) -> None:
    """Make a new run's folder with train.json in it. Raises BadInputError when something is there."""
    if (run_folder / RUN_FILE).exists():
        raise BadInputError(
            f"{run_folder} holds a run already", f"continue it with: medmerge train --resume {run_folder}"
        )
    if run_folder.exists() and any(run_folder.iterdir()):
        raise BadInputError(f"{run_folder} is there and is no run", "choose another name")
    begin_run(config, run_folder)


def begin_run(config: TrainConfig, run_folder: Path) -> None:
    """Write a run's train.json: enough to resume it from the start."""
    run_folder.mkdir(parents=True, exist_ok=True)
    write_json(
        run_folder / RUN_FILE,
        {
            "format": "medmerge.run/1",
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": dataclasses.asdict(config),
        },
    )


def same_inputs(run_folder: Path, story: dict[str, Any]) -> None:
    """Note what the run is made from in train.json, or compare it with what was noted.

    Raises BadInputError when base, tokenizer, template, data or tests have changed since the run was started.
    """
    path = run_folder / RUN_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedmergeError(f"{path} cannot be read: {error}") from error
    now = json.loads(json.dumps(story))
    for key in ("base", "data", "template_text", "audit"):
        if key in before and before[key] != now[key]:
            raise BadInputError(
                f"{NAMES.get(key, key)} is not what it was when {run_folder} was started",
                "start a new run for changed inputs",
            )
    write_json(path, {**before, **story})
