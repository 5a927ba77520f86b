"""One LoRA run from settings to adapter: read, audit, encode, pack, train, save. Called by `training.job`.

The run folder (WORKSPACE/runs/NAME) holds `train.json` (settings and hashes, written first) and `checkpoints/`;
the adapter folder appears whole, at the end, with `training.json` beside the weights.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import templates
from engine.atomic import new_folder, refuse_existing, write_json
from engine.errors import BadDataError, BadInputError, BadModelError, BadRecipeError
from engine.jobs.events import EventWriter
from training import corpora, masking, packing
from training.audit.report import audit_files
from training.config import TrainConfig
from training.corpora import Sample
from training.masking import Encoded
from training.packing import Block

FORMAT = "medmerge.training/1"
RUN_FILE = "train.json"
MANIFEST = "training.json"
KEEP_CHECKPOINTS = 2


@dataclass(frozen=True)
class Prepared:
    """Everything a run reads, as it will be trained on."""

    train: list[Block]
    held_out: list[Block]
    data: list[corpora.DataFile]
    documents: int
    tokens: int  # of one epoch, processed
    trained_tokens: int  # of one epoch, with loss


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local model folder. Raises BadModelError."""
    from transformers import AutoTokenizer

    if not (folder / "config.json").is_file():
        raise BadModelError(f"{folder} is not a model folder (no config.json)", "give the base model's folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadModelError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def end_token(config: TrainConfig, tokenizer: Any, template: templates.Template | None) -> int:
    """The id that ends a document: the template's stop token when the tokenizer has it, else its EOS."""
    if template is not None and template.stop:
        known = tokenizer.convert_tokens_to_ids(template.stop[0])
        if isinstance(known, int) and known != tokenizer.unk_token_id:
            return known
    if tokenizer.eos_token_id is None:
        raise BadModelError(f"the tokenizer of {config.base} has no EOS token", "choose a built-in template")
    return int(tokenizer.eos_token_id)


def choose_template(config: TrainConfig, tokenizer: Any) -> templates.Template | None:
    """The run's template; None for pt with the model's own, which needs none.

    Raises BadRecipeError when a mark of the template is no single token of this tokenizer.
    """
    if config.kind == "pt" and config.template == "model":
        return None
    template = templates.load(config.template, Path(config.base))
    for mark in template.stop[:1]:
        if len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
            raise BadRecipeError(
                f"template {config.template} ends turns with {mark}, which is not a token of {config.base}",
                "choose the template of this model family, or `model`",
            )
    return template


def encode(config: TrainConfig, samples: Sequence[Sample], tokenizer: Any, events: EventWriter) -> list[Encoded]:
    template = choose_template(config, tokenizer)
    encoded = []
    for number, sample in enumerate(samples, 1):
        if config.kind == "pt":
            encoded.append(masking.encode_text(sample, tokenizer, end_token(config, tokenizer, template)))
        else:
            assert template is not None
            encoded.append(
                masking.encode_conversation(
                    sample,
                    tokenizer,
                    template,
                    config.cutoff,
                    train_on_prompt=config.train_on_prompt,
                    mask_history=config.mask_history,
                )
            )
        events.progress(number, len(samples), "rows", phase="encode")
    return [item for item in encoded if item.trained]


def pack(config: TrainConfig, documents: Sequence[Encoded]) -> list[Block]:
    if config.kind == "pt":
        return packing.cut_stream(documents, config.cutoff)
    return packing.pack_whole(documents, config.cutoff) if config.packing else packing.one_each(documents)


def prepare(config: TrainConfig, tokenizer: Any, events: EventWriter) -> Prepared:
    """Read and encode the data; the held-out rows are chosen before anything is packed."""
    samples: list[Sample] = []
    files = []
    for name in config.data:
        rows = corpora.read_samples(Path(name), config.kind)
        files.append(corpora.describe(Path(name), len(rows)))
        samples += rows
    training, held = corpora.hold_out(samples, config.held_out, config.seed)
    documents = encode(config, training, tokenizer, events)
    if not documents:
        raise BadDataError(f"no row of {', '.join(config.data)} leaves a token to train on", "raise cutoff")
    blocks = pack(config, documents)
    processed = sum(len(block.ids) for block in blocks)
    trained = sum(label != masking.IGNORE for block in blocks for label in block.labels)
    held_blocks = pack(config, encode(config, held, tokenizer, events)) if held else []
    return Prepared(blocks, held_blocks, files, len(documents), processed, trained)


def base_identity(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of a base: of its one weight file, or of the list of hashes of its shards."""
    import hashlib

    from training.demo.base import sha256_file

    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise BadModelError(f"{folder} holds no safetensors weights", "convert it to safetensors first")
    hashes = [sha256_file(path) for path in shards]
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"name": folder.name, "sha256": digest}


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
    tests = [dataclasses.asdict(corpora.describe(Path(name), report["counts"]["rows"][name])) for name in config.tests]
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
                f"{key} is not what it was when {run_folder} was started", "start a new run for changed inputs"
            )


def train(config: TrainConfig, run_folder: Path, events: EventWriter, resume: bool = False) -> dict[str, Any]:
    """Run it all; returns the result of the job: adapter, run, steps, tokens, losses.

    Raises: BadInputError and kin for what was given, MedmergeError when the loss is not a number.
    """
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainingArguments

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
    steps = steps_of(config, len(prepared.train))
    events.log(
        f"{prepared.documents} documents in {len(prepared.train)} blocks: {prepared.tokens:,} tokens an epoch, "
        f"{prepared.trained_tokens:,} of them trained; {steps} steps"
    )
    cuda = torch.cuda.is_available()
    dtype = {"auto": torch.bfloat16 if cuda else torch.float32}.get(config.dtype) or getattr(torch, config.dtype)
    transformers.set_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(
        config.base, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token(config, tokenizer, None)
    arguments = TrainingArguments(
        output_dir=str(run_folder / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=cuda and dtype == torch.bfloat16,
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
    reporter = Reporter(events, prepared.held_out, pad, config.eval_every)
    trainer = LoraTrainer(pad=pad, model=model, args=arguments, train_dataset=prepared.train, callbacks=[reporter])
    reporter.trainer = trainer
    started = time.time()
    trainer.train(resume_from_checkpoint=newest_checkpoint(run_folder) if resume else None)
    seconds = time.time() - started
    history = trainer.state.log_history
    manifest = {
        "format": FORMAT,
        "kind": config.kind,
        **identity,
        "template": config.template,
        "settings": settings_for_manifest(config),
        "tokens": {
            "processed": trainer.tokens,
            "trained": trainer.trained_tokens,
            "per_epoch_processed": prepared.tokens,
            "per_epoch_trained": prepared.trained_tokens,
        },
        "held_out_rows": config.held_out,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(0) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "base_dtype": str(dtype).removeprefix("torch."),
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
        "tokens": manifest["tokens"],
        "eval_loss": evaluations[-1] if evaluations else None,
        "first_eval_loss": evaluations[0] if evaluations else None,
        "seconds": round(seconds, 1),
    }


def steps_of(config: TrainConfig, blocks: int) -> int:
    """Optimizer steps: every epoch ends with a step, be it of fewer blocks."""
    batches = math.ceil(blocks / config.batch_size)
    return config.max_steps or math.ceil(math.ceil(batches / config.accumulation) * config.epochs)


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


def settings_for_manifest(config: TrainConfig) -> dict[str, Any]:
    """All settings but the paths, which say nothing on another machine."""
    values = dataclasses.asdict(config)
    return {key: value for key, value in values.items() if key not in ("base", "data", "tests", "output")}


def curve_of(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """[{step, loss, lr}] and [{step, eval_loss}] in the order they were measured."""
    curve = []
    for entry in history:
        if "loss" in entry:
            curve.append({"step": entry["step"], "loss": entry["loss"], "lr": entry["learning_rate"]})
        elif "eval_loss" in entry:
            curve.append({"step": entry["step"], "eval_loss": entry["eval_loss"]})
    return curve


def save_adapter(model: Any, manifest: dict[str, Any], output: Path, base_name: str) -> None:
    """Write a PEFT folder: adapter_model.safetensors (bfloat16), adapter_config.json, training.json."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model).items())
    }
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BadInputError(f"the trained adapter holds NaN or infinity in {broken[0]}", "lower learning_rate")
    with new_folder(output) as partial:
        save_file(state, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_model.safetensors").chmod(0o644)
        peft_config = model.peft_config["default"]
        peft_config.save_pretrained(partial)
        path = partial / "adapter_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {"base_model_name_or_path": base_name, "inference_mode": True}
        if isinstance(values.get("target_modules"), list):
            values["target_modules"] = sorted(values["target_modules"])
        write_json(path, values)
        write_json(partial / MANIFEST, manifest)
