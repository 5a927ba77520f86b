"""One process's part of a run: model, loop, adapter. Called by `training.run` (alone) or `training.worker` (several).

Everything before it (audit, encoding) is done once, by `training.run`; everything here may be done by several
processes at once, of which the first one writes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from engine.errors import BadRecipeError, CancelledError, MedmergeError
from engine.jobs.events import EventWriter
from training import checkpoints
from training.artifact import FORMAT, curve_of, save_adapter, settings_for_manifest
from training.config import TrainConfig
from training.curve import NAME as CURVE
from training.prepare import Prepared, end_token, packing_words

CHECKPOINTS = "checkpoints"


def fit(
    config: TrainConfig,
    run_folder: Path,
    prepared: Prepared,
    tokenizer: Any,
    story: dict[str, Any],
    events: EventWriter,
    resume: bool,
) -> dict[str, Any]:
    """Train and save; returns {adapter, run, steps, tokens, losses, seconds}.

    `story` goes into the adapter's manifest: base, data, audit, template, started. Raises MedmergeError when the
    loss is not a number or memory or disk run out, CancelledError once a checkpoint is saved.
    """
    import torch
    import transformers

    from training.model import lora_model
    from training.reporter import Reporter
    from training.stopping import Stopper
    from training.trainer import EpochOrder, LoraTrainer, TrainSet, out_of_memory, token_counts

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    run_seed = config.seed + config.shots_seed
    transformers.set_seed(run_seed)
    checkpoint = checkpoints.newest(run_folder / CHECKPOINTS) if resume else None
    steps = steps_of(config, len(prepared.train))
    args = arguments(config, steps, run_folder)
    torn = checkpoints.remove_torn(run_folder / CHECKPOINTS) if resume and args.process_index == 0 else []
    if torn:
        events.log(f"{', '.join(torn)}: half-written and removed")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token(config, tokenizer, None)
    started = time.time()
    try:
        model, how = lora_model(config)
        how = dataclasses.replace(
            how, processes=args.world_size, distributed=config.distributed if args.world_size > 1 else ""
        )
        events.log(f"{how.device}; attention {how.attention}; base {how.base_dtype}")
        reporter = Reporter(
            events,
            run_folder / CURVE,
            prepared.held_out,
            pad,
            config.eval_every,
            config.eval_batch_size or config.batch_size,
        )
        stopper = Stopper(immediate=args.world_size == 1)
        data = TrainSet(prepared.train, config.batch_size * args.world_size)
        trainer = LoraTrainer(
            pad=pad,
            stopper=stopper,
            order=EpochOrder(data, run_seed),
            keep=config.keep_checkpoints,
            after_step=reporter.after_step,
            rewind=reporter.rewind,
            model=model,
            args=args,
            callbacks=[reporter],
        )
        reporter.trainer = trainer
        with stopper:
            _loop(trainer, checkpoint, steps, stopper)
        seconds = round(time.time() - started, 1)
        history = trainer.state.log_history
        tokens = dict(zip(("processed", "trained", "padding"), token_counts(history), strict=True))
        tokens |= {
            "per_epoch_processed": prepared.counts["tokens"],
            "per_epoch_trained": prepared.counts["trained_tokens"],
        }
        evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        last_eval = evaluations[-1] if evaluations else None
        manifest = {
            "format": FORMAT,
            "kind": config.kind,
            **story,
            "settings": settings_for_manifest(config),
            "samples": prepared.counts,
            "tokens": tokens,
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "resumed": bool(checkpoint),
            **dataclasses.asdict(how),
            "final": {
                "loss": losses[-1] if losses else None,
                "eval_loss": last_eval,
                "eval_perplexity": math.exp(min(last_eval, 50.0)) if last_eval is not None else None,
                "packing": packing_words(config),
            },
            "curve": curve_of(history),
            "versions": versions(),
            "commit": commit(),
        }
        save_adapter(trainer, manifest, Path(config.output), Path(config.base).name)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MedmergeError(
            f"out of memory while training (batch_size {config.batch_size}, cutoff {config.cutoff}, base in "
            f"{config.dtype}): {str(error).splitlines()[0]:.120}",
            memory_advice(config),
        ) from error
    return {
        "adapter": config.output,
        "run": str(run_folder),
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "loss": losses[-1] if losses else None,
        "eval_loss": last_eval,
        "first_eval_loss": evaluations[0] if evaluations else None,
        "eval_perplexity": manifest["final"]["eval_perplexity"],
        "seconds": seconds,
        "packing": packing_words(config),
    }


def _loop(trainer: Any, checkpoint: Path | None, steps: int, stopper: Any) -> None:
    """Train to the end. On a stop or a failure that leaves the weights whole, the last step is saved first."""
    if checkpoint and checkpoints.step_of(checkpoint) >= steps:
        trainer.load_finished(checkpoint)
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except CancelledError:
        saved = trainer.save_last_step()
        where = f"the checkpoint of step {trainer.state.global_step} is kept" if saved else "no step was done"
        raise CancelledError(f"cancelled; {where}") from None
    if stopper.asked:
        raise CancelledError(f"cancelled; the checkpoint of step {trainer.state.global_step} is kept")


def memory_advice(config: TrainConfig) -> str:
    """What to change, in the order that costs least."""
    advice = []
    if config.batch_size > 1:
        advice.append(
            f"batch_size 1 with accumulation {config.batch_size * config.accumulation} (the same result)"
        )
    if not config.gradient_checkpointing:
        advice.append("gradient_checkpointing: true (the same result, a third slower)")
    if config.dtype == "float32":
        advice.append("dtype: bfloat16")
    advice.append(f"cutoff {max(16, config.cutoff // 2)}")
    if config.quantization == "none":
        advice.append("quantization: nf4 (CUDA)")
    return "set " + ", or ".join(advice) + "; then start again, or resume if a checkpoint was kept"


def steps_of(config: TrainConfig, blocks: int) -> int:
    """Optimizer steps: every epoch ends with a step, be it of fewer blocks."""
    batches = math.ceil(blocks / config.batch_size)
    return config.max_steps or math.ceil(round(math.ceil(batches / config.accumulation) * config.epochs, 6))


def arguments(config: TrainConfig, steps: int, run_folder: Path) -> Any:
    """transformers' TrainingArguments for these settings; nothing is reported anywhere but to our events, and to
    TensorBoard files in the run folder where that is asked."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    fsdp = several and config.distributed == "fsdp"
    args = TrainingArguments(
        output_dir=str(run_folder / CHECKPOINTS),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        max_steps=steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_epsilon=config.epsilon,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=cuda and config.dtype != "float32",
        use_cpu=not cuda,
        **(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
            if config.gradient_checkpointing
            else {}
        ),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="no",
        report_to=_report_to(config, run_folder),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if several and not cuda else None,
        fsdp=True if fsdp else None,
        fsdp_config={} if fsdp else None,
        seed=config.seed,
        data_seed=config.seed,
    )
    args.gradient_accumulation_steps = config.accumulation // args.world_size
    return args


def _report_to(config: TrainConfig, run_folder: Path) -> str:
    if not config.tensorboard:
        return "none"
    if importlib.util.find_spec("tensorboard") is None and importlib.util.find_spec("tensorboardX") is None:
        raise BadRecipeError(
            "tensorboard: true needs the tensorboard package", "pip install tensorboard, or leave it out"
        )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_folder / "tensorboard")
    return "tensorboard"


def versions() -> dict[str, str]:
    """The packages that a result depends on."""
    names = ("medmerge-tui", "torch", "transformers", "peft", "accelerate", "tokenizers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of this program where it runs from a checkout, with "+" when files were changed; else ""."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return said[0] + ("+" if said[1] else "")
