"""LLaMA-Factory's training YAML read as our settings; what has no meaning here is named. Called by `training.config`.

The keys and their defaults are those of hiyouga/LLaMA-Factory, src/llamafactory/hparams/ (model, data, finetuning
and training arguments) and of transformers' TrainingArguments behind them. A YAML relies on the defaults of the
program it was written for, so a key it leaves out gets *theirs*, not ours: rank 8, alpha twice the rank, no dropout,
cutoff 2048, learning rate 5e-5, linear schedule without warm-up, 3 epochs, 8 rows a device, nothing held out, packing
for pt and none for sft, gradient checkpointing on, evaluation and checkpoints every 500 steps.
A key that would change what is learned and cannot be followed is refused; other keys become notes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from engine.errors import BadRecipeError

TEMPLATES = {"qwen3_nothink": "qwen3_nothink", "chatml": "chatml", "llama3": "llama3"}  # and qwen3, two ways
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
}
ATTENTION = {"auto": "auto", "sdpa": "sdpa", "fa2": "flash_attention_2", "disabled": "eager"}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
OURS = ("tests", "on_leak", "duplicates", "audit_column", "shots", "shots_seed", "threads", "processes")


def _words(text: str) -> list[str]:
    return text.split()


# Keys that `_Reader.settings` reads.
MAPPED = _words(
    "model_name_or_path stage do_train finetuning_type lora_rank lora_alpha lora_dropout lora_target use_rslora "
    "use_dora quantization_bit quantization_method quantization_type dataset dataset_dir eval_dataset template "
    "enable_thinking preserve_thinking cutoff_len train_on_prompt mask_history packing neat_packing mix_strategy "
    "interleave_probs max_samples val_size per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate num_train_epochs max_steps lr_scheduler_type warmup_ratio "
    "warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim bf16 fp16 pure_bf16 "
    "flash_attn gradient_checkpointing disable_gradient_checkpointing seed save_steps save_strategy eval_steps "
    "eval_strategy evaluation_strategy save_total_limit logging_steps output_dir report_to deepspeed fsdp "
    "resume_from_checkpoint"
)

# Would change what is learned: refused when they ask for something.
REFUSED = {
    "adapter_name_or_path": "training starts from a new adapter; merge the old one into the base first",
    "add_special_tokens": "the vocabulary is never changed",
    "add_tokens": "the vocabulary is never changed",
    "additional_target": "only LoRA matrices are trained, no other module",
    "default_system": "put the system text into the data (a `system` column or a system turn)",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "loraplus_lr_ratio": "A and B share one learning rate",
    "lr_scheduler_kwargs": "the schedules take no further settings",
    "mixture_of_depths": "the model's layers are not changed",
    "neftune_noise_alpha": "no noise is added to the embeddings",
    "new_special_tokens_config": "the vocabulary is never changed",
    "pissa_init": "a PiSSA adapter is no plain LoRA on this base and could not be merged as one",
    "resize_vocab": "the vocabulary is never changed",
    "rope_scaling": "the model's positions are not changed",
    "shift_attn": "S^2-attention is not offered",
    "tokenized_path": "give the texts: masks and audit need them",
    "train_from_scratch": "the base's weights are used",
    "use_adam_mini": "the optimizer is AdamW",
    "use_apollo": "the optimizer is AdamW",
    "use_asft_loss": "the loss is plain cross-entropy",
    "use_badam": "the optimizer is AdamW",
    "use_dft_loss": "the loss is plain cross-entropy",
    "use_eaft_loss": "the loss is plain cross-entropy",
    "use_galore": "the optimizer is AdamW",
    "use_llama_pro": "the model's layers are not changed",
    "use_muon": "the optimizer is AdamW",
}

_FAST, _LOOP = "it changes speed or memory only", "the run does this in its own way"
_IMAGES = "data are texts"
_GENERATION = "decoding belongs to `medmerge eval` and `medmerge chat`"
# Would not change what is learned: named in a note, whatever they say.
NOTED = {
    **dict.fromkeys(
        _words(
            "preprocessing_num_workers preprocessing_batch_size dataloader_num_workers dataloader_pin_memory "
            "dataloader_prefetch_factor dataloader_persistent_workers low_cpu_mem_usage use_fast_tokenizer use_unsloth "
            "use_unsloth_gc enable_liger_kernel use_reentrant_gc use_v1_kernels torch_compile tf32 ddp_timeout "
            "ddp_find_unused_parameters ddp_backend fsdp_config double_quantization upcast_layernorm "
            "upcast_lmhead_output torch_empty_cache_steps offload_folder data_shared_file_system "
            "include_num_input_tokens_seen include_effective_tokens_per_second bf16_full_eval eval_accumulation_steps "
            "group_by_length length_column_name ray_num_workers ray_init_kwargs master_addr master_port "
            "ray_run_name ray_storage_path placement_strategy resources_per_worker use_cpu"
        ),
        _FAST,
    ),
    **dict.fromkeys(
        _words(
            "plot_loss logging_strategy logging_dir logging_first_step log_level disable_tqdm run_name do_eval "
            "save_only_model save_safetensors save_on_each_node load_best_model_at_end metric_for_best_model "
            "greater_is_better early_stopping_steps eval_on_start eval_delay compute_accuracy eval_on_each_dataset "
            "print_param_status remove_unused_columns label_names use_swanlab data_seed disable_shuffling"
        ),
        _LOOP,
    ),
    **dict.fromkeys(
        _words(
            "do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty "
            "skip_special_tokens predict_with_generate do_predict eval_num_beams generation_max_length "
            "generation_num_beams infer_backend infer_dtype use_kv_cache"
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        _words(
            "media_dir image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen "
            "freeze_vision_tower freeze_multi_modal_projector freeze_language_model tool_format"
        ),
        _IMAGES,
    ),
    **dict.fromkeys(
        _words("export_dir export_size export_device export_quantization_bit"), "`medmerge merge` exports"
    ),
    **dict.fromkeys(
        _words(
            "cache_dir model_revision hf_hub_token ms_hub_token om_hub_token push_to_hub hub_model_id hub_token"
        ),
        "nothing is fetched from or sent to a hub",
    ),
    "trust_remote_code": "code that comes with a model is never run",
    "overwrite_output_dir": "a result is never overwritten: choose another output_dir",
    "overwrite_cache": "encoded data are used again only if they are from the same files and settings",
    "streaming": "data always stream",
    "buffer_size": "rows are shuffled over the whole data",
    "ignore_pad_token_for_loss": "padding never carries loss",
    "split_special_tokens": "a text that spells a control token is refused",
    "moe_aux_loss_coef": "the loss is plain cross-entropy",
}


def is_llamafactory(values: Mapping[str, Any]) -> bool:
    """Whether a config speaks LLaMA-Factory's language."""
    return "model_name_or_path" in values or "stage" in values


def from_llamafactory(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our settings (for `config.from_mapping`), and a note on every key that was not followed to the letter.

    Keys of ours that LLaMA-Factory has not (`tests`, `on_leak`, ...) may stand beside theirs. Raises BadRecipeError
    naming `where` and the key for what cannot be followed.
    """
    reader = _Reader(values, where)
    settings = reader.settings()
    reader.leftovers()
    return settings, tuple(reader.notes)


class _Reader:
    """One YAML: typed access with LLaMA-Factory's defaults, and the notes made on the way. null is "not said"."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = {str(key): value for key, value in values.items() if value is not None}
        self.where = where
        self.notes: list[str] = []

    def refuse(self, key: str, why: str, hint: str = "") -> BadRecipeError:
        return BadRecipeError(f"{self.where}: {key}: {self.values.get(key)!r} {why}", hint)

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        try:
            if not isinstance(value, bool):
                return float(value)  # a text too: YAML reads 1e-4 as one
        except (TypeError, ValueError):
            pass
        raise self.refuse(key, "is no number")

    def whole(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise self.refuse(key, "is no whole number")
        return int(value)

    def yes(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "is neither true nor false")
        return value

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "is no text")
        return value

    def names(self, key: str) -> list[str]:
        """A comma list or a YAML list."""
        value = self.values.get(key, [])
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise self.refuse(key, "is no list of names")
        return [part.strip() for part in parts if part.strip()]

    def choice(self, key: str, default: str, known: Mapping[str, str]) -> str:
        value = self.text(key, default)
        if value not in known:
            raise self.refuse(key, "has no equivalent here", f"possible: {', '.join(known)}")
        return known[value]

    def settings(self) -> dict[str, Any]:
        kind = self.choice("stage", "sft", {"pt": "pt", "sft": "sft"})
        self.choice("finetuning_type", "lora", {"lora": "lora"})
        for key in ("model_name_or_path", "dataset", "output_dir"):
            if not self.values.get(key):
                raise BadRecipeError(
                    f"{self.where}: {key} is missing", "a run needs a model, data and an output"
                )
        if not self.yes("do_train", True):
            raise self.refuse("do_train", "asks for no training", "see `medmerge eval`")
        for key, why in REFUSED.items():
            if self.values.get(key):
                raise self.refuse(key, "cannot be followed", why)
        return {
            "kind": kind,
            "base": self.text("model_name_or_path"),
            "output": self.text("output_dir"),
            **self._data(),
            **self._conversation(kind),
            **self._adapter(),
            **self._optimizer(),
            **self._loop(),
            **self._machine(),
            **{key: self.values[key] for key in OURS if key in self.values},
        }

    def _data(self) -> dict[str, Any]:
        folder = self.text("dataset_dir", "data")
        if folder == "ONLINE" or folder.startswith("REMOTE:"):
            raise self.refuse("dataset_dir", "is on a hub", "give a folder with dataset_info.json")
        limit = self.whole("max_samples", 0)
        mixing = self.text("mix_strategy", "concat")
        if mixing not in ("concat", "interleave_once"):  # these two use every row once
            self.notes.append(
                f"mix_strategy: {mixing} depends on the sizes of the data sets; here every row is used once an epoch "
                "(for another mix say data: [{path, weight}, ...])"
            )
        if "interleave_probs" in self.values:
            self.notes.append("interleave_probs: not followed, see `weight` of a data set")
        held = self.number("val_size", 0.0)
        if held and "eval_dataset" in self.values:
            raise self.refuse("val_size", "and eval_dataset exclude each other")
        if 0 < held < 1:
            self.notes.append(f"val_size: a share of {held:g}, but at most 1,000 rows are held out")

        def sources(key: str) -> list[dict[str, Any]]:
            return [{"path": name, **({"limit": limit} if limit else {})} for name in self.names(key)]

        return {
            "data": sources("dataset"),
            "eval_data": sources("eval_dataset"),
            "dataset_info": folder,
            "held_out": held,
        }

    def _conversation(self, kind: str) -> dict[str, Any]:
        prompts, history = self.yes("train_on_prompt"), self.yes("mask_history")
        neat = self.yes("neat_packing")
        packing = neat or self.yes("packing", kind == "pt")
        if (prompts or history or neat) and kind == "pt":
            raise BadRecipeError(
                f"{self.where}: train_on_prompt, mask_history and neat_packing are for stage sft",
                "plain text trains every token, and documents never see each other",
            )
        if prompts and history:
            raise self.refuse("mask_history", "and train_on_prompt exclude each other")
        if kind == "pt" and not packing:
            self.notes.append(
                "packing: plain text is always packed; no document loses what lies behind the cutoff"
            )
        if kind == "sft" and packing and not neat:
            self.notes.append(
                "packing: without neat_packing LLaMA-Factory lets packed samples see each other; here they never do"
            )
        return {
            "template": self._template(kind, history),
            "cutoff": self.whole("cutoff_len", 2048),
            "train_on_prompt": prompts,
            "mask_history": history,
            "packing": packing,
        }

    def _template(self, kind: str, history: bool) -> str:
        asked = self.text("template", "")
        if asked == "qwen3":
            if self.yes("preserve_thinking") and history:
                raise self.refuse("preserve_thinking", "with mask_history has no equivalent here")
            return "qwen3" if self.yes("enable_thinking", True) else "qwen3_empty_think"
        for key in ("enable_thinking", "preserve_thinking"):
            if key in self.values:
                self.notes.append(f"{key}: no effect with template {asked or 'model'}")
        if not asked:
            if kind == "sft":
                self.notes.append("template: not said, so the model's own chat template is used")
            return "model"
        if asked not in TEMPLATES:
            raise self.refuse(
                "template",
                "has no equivalent here",
                f"possible: {', '.join(sorted([*TEMPLATES, 'qwen3']))}; leave the key out for the model's own "
                "chat template",
            )
        return TEMPLATES[asked]

    def _adapter(self) -> dict[str, Any]:
        rank = self.whole("lora_rank", 8)
        targets = self.names("lora_target") or ["all"]
        bits = self.whole("quantization_bit", 0)
        if bits not in (0, 4):
            raise self.refuse("quantization_bit", "is not possible here", "4 (nf4), or leave it out")
        if bits:
            self.choice("quantization_method", "bnb", {"bnb": "bnb", "bitsandbytes": "bnb"})
            self.choice("quantization_type", "nf4", {"nf4": "nf4"})
        return {
            "rank": rank,
            "alpha": self.number("lora_alpha", 0) or 2 * rank,
            "dropout": self.number("lora_dropout", 0.0),
            "targets": ["all-linear"] if "all" in targets else targets,
            "rslora": self.yes("use_rslora"),
            "dora": self.yes("use_dora"),
            "quantization": "nf4" if bits else "none",
        }

    def _optimizer(self) -> dict[str, Any]:
        optimizer = self.text("optim", "adamw_torch")
        if optimizer not in ADAMW:
            if "adamw" not in optimizer or "schedule_free" in optimizer:
                raise self.refuse("optim", "is not offered", f"possible: {', '.join(ADAMW)}")
            self.notes.append(f"optim: {optimizer} is trained as plain AdamW (its states in float32)")
        schedule = self.choice("lr_scheduler_type", "linear", SCHEDULES)
        steps, most = self.number("warmup_steps", 0), max(self.whole("max_steps", -1), 0)
        warmup = self.number("warmup_ratio", 0.0)
        if steps:  # wins over the share; below 1 it is a share (transformers 5)
            warmup = steps / most if steps >= 1 and most else steps
        if self.values.get("lr_scheduler_type") == "constant" and warmup:
            self.notes.append(
                "warmup: no effect with lr_scheduler_type constant (constant_with_warmup has one)"
            )
            warmup = 0.0
        return {
            "learning_rate": self.number("learning_rate", 5e-5),
            "weight_decay": self.number("weight_decay", 0.0),
            "beta1": self.number("adam_beta1", 0.9),
            "beta2": self.number("adam_beta2", 0.999),
            "epsilon": self.number("adam_epsilon", 1e-8),
            "max_grad_norm": self.number("max_grad_norm", 1.0) or 1e9,  # 0: never clipped
            "schedule": schedule,
            "warmup": warmup,
            "max_steps": most,
        }

    def _loop(self) -> dict[str, Any]:
        accumulation = self.whole("gradient_accumulation_steps", 1)
        self.notes.append(
            f"gradient_accumulation_steps: {accumulation} batches a step over all processes together, where "
            f"LLaMA-Factory takes {accumulation} on each GPU; for the same step on N GPUs multiply it by N"
        )
        if "logging_steps" in self.values:
            self.notes.append("logging_steps: every step is logged")
        strategy = self.text("eval_strategy", self.text("evaluation_strategy", "no"))
        if strategy == "epoch" or self.text("save_strategy", "steps") in ("epoch", "no", "best"):
            self.notes.append(
                "eval_strategy, save_strategy: evaluated and saved every so many steps, not by epoch"
            )
        if "resume_from_checkpoint" in self.values:
            self.notes.append("resume_from_checkpoint: a stopped run goes on with --resume RUN")
        return {
            "epochs": self.number("num_train_epochs", 3.0),
            "batch_size": self.whole("per_device_train_batch_size", 8),
            "eval_batch_size": self.whole("per_device_eval_batch_size", 8),
            "accumulation": accumulation,
            "seed": self.whole("seed", 42),
            "eval_every": self._every("eval_steps"),
            "save_every": self._every("save_steps"),
            "keep_checkpoints": self.whole("save_total_limit", 2),
            "tensorboard": self._tensorboard(),
        }

    def _every(self, key: str) -> int:
        steps = self.number(key, 500)
        if 0 < steps < 1:
            self.notes.append(f"{key}: a share of the steps is not followed; every 500 steps")
            return 500
        return self.whole(key, 500)

    def _tensorboard(self) -> bool:
        asked = self.names("report_to")
        others = [name for name in asked if name not in ("none", "tensorboard", "all")]
        if others:
            self.notes.append(f"report_to: {', '.join(others)} is not served, only tensorboard")
        return "tensorboard" in asked or "all" in asked

    def _machine(self) -> dict[str, Any]:
        if self.yes("fp16"):
            raise self.refuse("fp16", "is not offered", "bf16: true, or neither for the machine's own choice")
        half = self.yes("bf16") or self.yes("pure_bf16")
        if self.yes("pure_bf16"):
            self.notes.append("pure_bf16: the base is in bfloat16, the adapter trains in float32")
        if "deepspeed" in self.values:
            self.notes.append(
                "deepspeed: not used; for a model that does not fit one GPU say distributed: fsdp"
            )
        sharded = self.values.get("fsdp")
        checkpointing = not self.yes("disable_gradient_checkpointing") or self.yes("gradient_checkpointing")
        return {
            "dtype": "bfloat16" if half else "auto",
            "attention": self.choice("flash_attn", "auto", ATTENTION),
            "gradient_checkpointing": checkpointing,
            "distributed": "fsdp" if sharded else str(self.values.get("distributed", "ddp")),
        }

    def leftovers(self) -> None:
        """Notes on the keys that are known and not needed, and on those nobody knows."""
        known = [*MAPPED, *NOTED, *REFUSED, *OURS, "distributed"]
        for key in self.values:
            if key in NOTED:
                self.notes.append(f"{key}: not needed, {NOTED[key]}")
            elif key not in known:
                near = difflib.get_close_matches(key, known, 1)
                self.notes.append(f"{key}: unknown, ignored" + (f"; did you mean {near[0]}?" if near else ""))
