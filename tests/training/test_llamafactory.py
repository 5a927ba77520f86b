"""LLaMA-Factory's YAML as our settings: texts of its examples' shape, the paper's settings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine import templates
from engine.errors import BadRecipeError
from training import llamafactory
from training.config import TrainConfig, from_mapping
from training.config import read as read_config
from training.llamafactory import from_llamafactory, is_llamafactory

EXAMPLE = """
### model
model_name_or_path: models/some-4b
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/some-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
LEAST = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}


def read(**changes: Any) -> tuple[TrainConfig, tuple[str, ...]]:
    values, notes = from_llamafactory({**LEAST, **changes}, "x.yaml")
    return from_mapping(values, "x.yaml"), notes


def noted(notes: tuple[str, ...], key: str) -> str:
    found = [note for note in notes if note.startswith(f"{key}:")]
    assert len(found) == 1, (key, notes)
    return found[0]


def test_an_example_of_theirs() -> None:
    values = yaml.safe_load(EXAMPLE)
    assert is_llamafactory(values) and not is_llamafactory({"kind": "sft", "base": "b"})
    ours, notes = from_llamafactory(values, "x.yaml")
    config = from_mapping(ours, "x.yaml")
    assert (config.kind, config.base, config.output) == ("sft", "models/some-4b", "saves/some-4b/lora/sft")
    assert [(one.path, one.limit) for one in config.data] == [("identity", 1000), ("alpaca_en_demo", 1000)]
    assert config.dataset_info == "data"
    assert (config.rank, config.alpha, config.dropout, config.targets) == (8, 16, 0.0, ("all-linear",))
    assert (config.learning_rate, config.schedule, config.warmup) == (1e-4, "cosine", 0.1)
    assert (config.batch_size, config.accumulation, config.epochs, config.cutoff) == (1, 8, 3.0, 2048)
    assert (config.dtype, config.packing, config.save_every, config.tensorboard) == (
        "bfloat16",
        False,
        500,
        False,
    )
    for key in (
        "trust_remote_code",
        "overwrite_output_dir",
        "plot_loss",
        "dataloader_num_workers",
        "ddp_timeout",
    ):
        assert "not needed" in noted(notes, key)
    assert "8 on each GPU" in noted(notes, "gradient_accumulation_steps")
    assert not any("unknown" in note for note in notes)


def test_what_is_left_out_gets_their_defaults() -> None:
    config, _ = read()
    assert config.kind == "sft" and config.template == "model"
    assert (config.rank, config.alpha, config.dropout) == (8, 16, 0.0)
    assert (config.learning_rate, config.schedule, config.warmup, config.epochs) == (5e-5, "linear", 0.0, 3.0)
    assert (config.batch_size, config.accumulation, config.cutoff, config.held_out) == (8, 1, 2048, 0)
    assert (config.packing, config.gradient_checkpointing, config.dtype) == (False, True, "auto")
    assert (config.weight_decay, config.max_grad_norm, config.seed) == (0.0, 1.0, 42)
    assert read(stage="pt")[0].packing and read(lora_rank=32)[0].alpha == 64


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_the_papers_settings(stage: str) -> None:
    """arXiv 2601.18350 in their words; each value against the paper, not against our presets."""
    sft = {"mask_history": True, "train_on_prompt": False} if stage == "sft" else {}
    config, notes = read(
        stage=stage,
        template="qwen3_nothink",
        lora_rank=16,
        lora_alpha=16,
        lora_target="all",
        lora_dropout=0.07,
        weight_decay=0.03,
        optim="adamw_torch",
        gradient_accumulation_steps=64,
        per_device_train_batch_size=1,
        cutoff_len=2048,
        packing=True,
        bf16=True,
        flash_attn="fa2",
        num_train_epochs=4.0 if stage == "pt" else 2.0,
        **sft,
    )
    assert (config.rank, config.alpha, config.dropout, config.weight_decay) == (16, 16, 0.07, 0.03)
    assert (config.accumulation, config.cutoff, config.packing) == (64, 2048, True)
    assert (config.dtype, config.attention, config.template) == (
        "bfloat16",
        "flash_attention_2",
        "qwen3_nothink",
    )
    assert (config.mask_history, config.train_on_prompt) == (stage == "sft", False)
    assert config.epochs == (4 if stage == "pt" else 2)
    assert any("see each other" in note for note in notes) == (stage == "sft")


def test_values_become_ours() -> None:
    config, notes = read(
        use_rslora=True,
        use_dora=True,
        lora_target="q_proj, v_proj",
        quantization_bit=4,
        neat_packing=True,
        train_on_prompt=True,
        max_steps=200,
        warmup_steps=20,
        learning_rate="1e-4",  # what YAML makes of 1e-4
        max_grad_norm=0,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        flash_attn="disabled",
        disable_gradient_checkpointing=True,
        per_device_eval_batch_size=4,
        eval_steps=25,
        save_total_limit=5,
        report_to="tensorboard",
        fsdp="full_shard auto_wrap",
        eval_dataset="held",
        dataset_dir="sets",
        mix_strategy="interleave_once",
        tests=["t.jsonl"],
    )
    assert config.rslora and config.dora and config.targets == ("q_proj", "v_proj")
    assert (config.quantization, config.packing, config.train_on_prompt) == ("nf4", True, True)
    assert (config.max_steps, config.warmup, config.learning_rate) == (200, 0.1, 1e-4)
    assert config.max_grad_norm >= 1e9 and (config.beta1, config.beta2, config.epsilon) == (0.8, 0.95, 1e-6)
    assert (config.attention, config.gradient_checkpointing, config.eval_batch_size) == ("eager", False, 4)
    assert (config.eval_every, config.keep_checkpoints, config.tensorboard) == (25, 5, True)
    assert (config.distributed, config.dataset_info, config.tests) == ("fsdp", "sets", ("t.jsonl",))
    assert [one.path for one in config.eval_data] == ["held"]
    assert not any(note.startswith(("mix_strategy", "optim", "packing")) for note in notes)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"template": "qwen3"}, "qwen3"),
        ({"template": "qwen3", "enable_thinking": True}, "qwen3"),
        ({"template": "qwen3", "enable_thinking": False}, "qwen3_empty_think"),
        ({"template": "qwen3_nothink"}, "qwen3_nothink"),
        ({"template": "llama3"}, "llama3"),
        ({"template": "chatml"}, "chatml"),
        ({}, "model"),
    ],
)
def test_templates(theirs: dict[str, Any], ours: str) -> None:
    assert read(**theirs)[0].template == ours
    assert ours == "model" or ours in templates.BUILTIN


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "dpo"}, "stage: 'dpo' has no equivalent"),
        ({"finetuning_type": "full"}, "finetuning_type: 'full' has no equivalent"),
        (
            {"template": "default"},
            r"template: 'default' has no equivalent.*\n.*chatml, llama3, qwen3, qwen3_nothink",
        ),
        ({"quantization_bit": 8}, "quantization_bit: 8"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_method: 'hqq'"),
        ({"quantization_bit": 4, "quantization_type": "fp4"}, "quantization_type: 'fp4'"),
        ({"fp16": True}, "fp16"),
        ({"flash_attn": "fa3"}, "flash_attn: 'fa3'"),
        ({"optim": "adafactor"}, "optim: 'adafactor' is not offered"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
        ({"pissa_init": True}, "pissa_init.*\n.*could not be merged"),
        ({"additional_target": "embed_tokens"}, "additional_target"),
        ({"adapter_name_or_path": "a"}, "adapter_name_or_path"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"do_train": False}, "do_train"),
        ({"mask_history": True, "train_on_prompt": True}, "exclude each other"),
        ({"stage": "pt", "mask_history": True}, "for stage sft"),
        ({"val_size": 0.1, "eval_dataset": "e"}, "exclude each other"),
        ({"dataset_dir": "ONLINE"}, "dataset_dir"),
        ({"template": "qwen3", "preserve_thinking": True, "mask_history": True}, "preserve_thinking"),
        ({"lora_rank": "many"}, "lora_rank: 'many' is no number"),
        ({"lora_rank": 8.5}, "lora_rank: 8.5 is no whole number"),
        ({"bf16": "yes"}, "bf16: 'yes' is neither"),
        ({"dataset": None}, "dataset is missing"),
        ({"model_name_or_path": None, "stage": "sft"}, "model_name_or_path is missing"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRecipeError, match=f"(?s)x.yaml: .*{said}"):
        from_llamafactory({**LEAST, **changes}, "x.yaml")


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"lora_rnak": 64}, "lora_rnak", "unknown, ignored; did you mean lora_rank"),
        ({"zzz": 1}, "zzz", "unknown, ignored"),
        ({"deepspeed": "ds_z3_config.json"}, "deepspeed", "distributed: fsdp"),
        ({"report_to": ["wandb", "tensorboard"]}, "report_to", "wandb is not served"),
        ({"optim": "paged_adamw_8bit"}, "optim", "plain AdamW"),
        ({"mix_strategy": "interleave_under"}, "mix_strategy", "every row is used once"),
        ({"interleave_probs": "0.5,0.5"}, "interleave_probs", "weight"),
        ({"val_size": 0.1}, "val_size", "at most 1,000"),
        ({"pure_bf16": True}, "pure_bf16", "float32"),
        ({"stage": "pt", "packing": False}, "packing", "always packed"),
        ({"packing": True}, "packing", "see each other"),
        ({"enable_thinking": False, "template": "chatml"}, "enable_thinking", "no effect"),
        ({"temperature": 0.6}, "temperature", "medmerge eval"),
        ({"resume_from_checkpoint": "c"}, "resume_from_checkpoint", "--resume"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "warmup", "no effect"),
        ({"save_steps": 0.1}, "save_steps", "every 500"),
    ],
)
def test_what_is_not_followed_to_the_letter_is_noted(changes: dict[str, Any], key: str, said: str) -> None:
    _, notes = read(**changes)
    assert said in noted(notes, key)


def test_every_key_is_in_one_list_and_is_ours_once_mapped() -> None:
    lists = [
        llamafactory.MAPPED,
        list(llamafactory.NOTED),
        list(llamafactory.REFUSED),
        list(llamafactory.OURS),
    ]
    keys = [key for names in lists for key in names]
    assert len(keys) == len(set(keys))
    for key in llamafactory.REFUSED:
        read(**{key: None})
        with pytest.raises(BadRecipeError, match=key):
            read(**{key: True})


def test_data_sets_are_found_by_name_and_keep_their_limit(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"instruction": "What is asthma?", "input": "", "output": "A disease."}] * 3
    (tmp_path / "data" / "some.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text('{"identity": {"file_name": "some.json"}}')
    text = EXAMPLE.replace("identity,alpaca_en_demo", "identity") + "warmup_steps: 30\nmax_steps: 300\n"
    (tmp_path / "theirs.yaml").write_text(text)
    config = read_config(tmp_path / "theirs.yaml", tmp_path)
    assert [(one.path, one.limit) for one in config.data] == [(str(tmp_path / "data" / "some.json"), 1000)]
    assert config.output == str(tmp_path / "saves/some-4b/lora/sft") and config.warmup == 0.1
    assert any("trust_remote_code" in note for note in config.notes)
