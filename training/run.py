"""One LoRA run from settings to adapter: audit, prepare, train, save. Called by `training.job`.

The run folder (WORKSPACE/runs/NAME) holds `train.json` (settings and hashes, written first) and `checkpoints/`;
the adapter folder appears whole, at the end, with `training.json` beside the weights.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from engine.atomic import refuse_existing, write_json
from engine.errors import BadDataError, BadInputError, BadModelError, BadRecipeError
from engine.jobs.events import EventWriter
from training import corpora
from training.artifact import FORMAT, base_identity, curve_of, save_adapter, settings_for_manifest
from training.audit.report import audit_files
from training.config import TrainConfig
from training.prepare import end_token, load_tokenizer, prepare

RUN_FILE = "train.json"
KEEP_CHECKPOINTS = 2


def audit(config: TrainConfig, events: EventWriter) -> dict[str, Any]:
    """The leakage audit of the run's data against its `tests`. Raises BadDataError when it finds leaks."""
    if not config.tests:
        return {"tests": [], "leaks": None, "note": "no test files were named, so nothing was checked"}
    report = audit_files([Path(name) for name in config.data], [Path(name) for name in config.tests], events)
    if report["leaks"]:
        first = report["leaks"][0]
        raise BadDataError(
            f"{len(report['leaks'])} leaks: {first['train_file']} row {first['train_row']} repeats "
            f"{first['test_file']} row {first['test_row']} ({first['detector']})",
            "see all of them with: medmerge audit --train ... --test ...; remove those rows from the data",
        )
    tests = [
        dataclasses.asdict(corpora.describe(Path(name), report["counts"]["rows"][name]))
        for name in config.tests
    ]
    return {"tests": tests, "leaks": 0}


def begin(config: TrainConfig, run_folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """Write train.json, or on resume compare it: same settings, same base, same data, else BadInputError."""
    path = run_folder / RUN_FILE
    settled = {"format": "medmerge.run/1", "config": dataclasses.asdict(config), **identity}
    settled = json.loads(json.dumps(settled))
    if not resume:
        if path.exists():
            raise BadInputError(
                f"{run_folder} holds a run already", f"continue it with: medmerge train --resume {run_folder}"
            )
        run_folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settled)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in ("base", "data"):
        if before.get(key) != settled[key]:
            raise BadInputError(
                f"{key} is not what it was when {run_folder} was started",
                "start a new run for changed inputs",
            )


def train(config: TrainConfig, run_folder: Path, events: EventWriter, resume: bool = False) -> dict[str, Any]:
    """Run it all; returns the result of the job: adapter, run, steps, tokens, losses.

    Raises: BadInputError and kin for what was given, MedmergeError when the loss is not a number.
    """
    import torch
    import transformers

    from training.trainer import LoraTrainer, Reporter

    output = Path(config.output)
    refuse_existing(output)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(Path(config.base))
    audited = audit(config, events)
    prepared = prepare(config, tokenizer, events)
    identity = {
        "base": base_identity(Path(config.base)),
        "data": [dataclasses.asdict(item) for item in prepared.data],
    }
    begin(config, run_folder, identity, resume)
    checkpoint = newest_checkpoint(run_folder) if resume else None
    steps = steps_of(config, len(prepared.train))
    events.log(
        f"{prepared.documents} documents in {len(prepared.train)} blocks: {prepared.tokens:,} tokens an epoch, "
        f"{prepared.trained_tokens:,} of them trained; {steps} steps"
    )
    transformers.set_seed(config.seed)
    model, how = lora_model(config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token(config, tokenizer, None)
    reporter = Reporter(events, prepared.held_out, pad, config.eval_every)
    trainer = LoraTrainer(
        pad=pad,
        model=model,
        args=arguments(config, steps, run_folder),
        train_dataset=prepared.train,
        callbacks=[reporter],
    )
    reporter.trainer = trainer
    started = time.time()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        if not has_checkpoint(run_folder):  # nothing to resume from: do not block the name
            shutil.rmtree(run_folder, ignore_errors=True)
        raise
    seconds = round(time.time() - started, 1)
    history = trainer.state.log_history
    tokens = {
        "processed": trainer.tokens,
        "trained": trainer.trained_tokens,
        "per_epoch_processed": prepared.tokens,
        "per_epoch_trained": prepared.trained_tokens,
    }
    manifest = {
        "format": FORMAT,
        "kind": config.kind,
        **identity,
        "template": config.template,
        "settings": settings_for_manifest(config),
        "tokens": tokens,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        **how,
        "curve": curve_of(history),
        "audit": audited,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    save_adapter(trainer.model, manifest, output, Path(config.base).name)
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "adapter": str(output),
        "run": str(run_folder),
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "eval_loss": evaluations[-1] if evaluations else None,
        "first_eval_loss": evaluations[0] if evaluations else None,
        "seconds": seconds,
    }


def lora_model(config: TrainConfig) -> tuple[Any, dict[str, str]]:
    """The base with fresh LoRA layers (float32, B = 0), and how it runs: device, attention, base dtype.

    Raises BadModelError for a folder transformers cannot load, BadRecipeError for targets that match nothing.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from training import attention

    cuda = torch.cuda.is_available()
    dtype = {"auto": torch.bfloat16 if cuda else torch.float32}.get(config.dtype) or getattr(
        torch, config.dtype
    )
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        kind = attention.choose(
            AutoConfig.from_pretrained(config.base, **local), "cuda" if cuda else "cpu", config.cutoff
        )
        model = AutoModelForCausalLM.from_pretrained(
            config.base, dtype=dtype, use_safetensors=True, attn_implementation=kind, **local
        )
    except (OSError, ValueError) as error:
        raise BadModelError(f"{config.base} cannot be loaded: {str(error).splitlines()[0]}") from error
    model.config.use_cache = False
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets[0] if config.targets == ("all-linear",) else list(config.targets),
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(model, adapter)
    except ValueError as error:
        raise BadRecipeError(f"targets {list(config.targets)} do not fit {config.base}: {error}") from error
    device = torch.cuda.get_device_name(0) if cuda else f"cpu, {torch.get_num_threads()} threads"
    return model, {"device": device, "attention": kind, "base_dtype": str(dtype).removeprefix("torch.")}


def arguments(config: TrainConfig, steps: int, run_folder: Path) -> Any:
    """transformers' TrainingArguments for these settings; nothing is reported anywhere but to our events."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run_folder / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=math.ceil(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=cuda and config.dtype != "float32",
        use_cpu=not cuda,
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=KEEP_CHECKPOINTS,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        seed=config.seed,
        data_seed=config.seed,
    )


def steps_of(config: TrainConfig, blocks: int) -> int:
    """Optimizer steps: every epoch ends with a step, be it of fewer blocks."""
    batches = math.ceil(blocks / config.batch_size)
    return config.max_steps or math.ceil(math.ceil(batches / config.accumulation) * config.epochs)


def has_checkpoint(run_folder: Path) -> bool:
    """Whether the run has a checkpoint that was written to its end."""
    return any(run_folder.glob("checkpoints/checkpoint-*/trainer_state.json"))


def newest_checkpoint(run_folder: Path) -> str:
    """The checkpoint with the highest step that was written to its end (trainer_state.json is its last file)."""
    found = sorted(
        (int(path.parent.name.rpartition("-")[2]), path.parent)
        for path in run_folder.glob("checkpoints/checkpoint-*/trainer_state.json")
    )
    if not found:
        raise BadInputError(
            f"{run_folder} has no checkpoint to resume from", "remove that folder and start the run anew"
        )
    return str(found[-1][1])
