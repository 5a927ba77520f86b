"""Training speed against TRL's SFTTrainer, and what masks and packing save: one run, one table.

    python -m benchmarks.train                       # demo base on this machine, three rounds
    python -m benchmarks.train --quick               # two steps a row, one round: does it all run?
    python -m benchmarks.train --only trl --rounds 5

Ours is the real entry, `training.run.train`, on the shipped MedQuAD rows; its batches are recorded once, and TRL
(in an environment of its own: `make trl`) gets the very same ones in the same order, packed, completion-only, with
the same rank, learning rate, seed and dtype, so the losses can be compared. Both keep their activations (no
checkpointing). TRL's precision is what it chooses by itself for bfloat16 (autocast), and plain float32. Every row
is a process of its own; rounds of a group's rows follow each other, so rows of a group share what else the machine
does. On a busy machine set OMP_NUM_THREADS=1 and read tokens per CPU second (waiting threads count as busy ones).
Tokens are real ones, padding is not counted; the first steps (warm-up) are left out of the speed. On a GPU a
random Qwen3-shaped model in bfloat16 is measured as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
WARM_UP = 2
QWEN3 = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
_OURS = """
    import json, sys, time
    from pathlib import Path
    import training.trainer as trainer
    from engine.jobs.events import EventWriter
    from training.config import from_mapping
    from training.run import train
    task, seen = json.loads(sys.argv[1]), []
    plain = trainer.token_loss
    def recording(model, batch):
        seen.append({key: batch[key].tolist() for key in ("input_ids", "labels", "position_ids")})
        return plain(model, batch)
    if task["record"]:
        trainer.token_loss = recording
    class Clock(EventWriter):
        cpu = []
        def metric(self, step, **values):
            if "loss" in values:
                self.cpu.append(time.process_time())
            super().metric(step, **values)
    events = Clock()
    result = train(from_mapping(task["config"]), Path(task["run"]), events)
    if task["record"]:
        Path(task["record"]).write_text(json.dumps(seen))
    points = [event.data for event in events.kept if event.type == "metric" and "loss" in event.data]
    steps, before = [], 0
    for point, cpu in zip(points, events.cpu, strict=True):
        made, before = point["tokens"] - before, point["tokens"]
        steps.append({"tokens": made, "seconds": made / point["tok_s"], "loss": point["loss"], "cpu": cpu})
    print("RESULT", json.dumps({"steps": steps, "tokens": result["tokens"]}))
"""
_TRL = """
    import json, sys, time
    task = json.loads(sys.argv[1])
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer
    config, cuda = task["config"], torch.cuda.is_available()
    rows = []
    for batch in json.load(open(task["batches"])):
        for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"]):
            starts = [index for index, position in enumerate(positions) if position == 0]
            lengths = [end - start for start, end in zip(starts, [*starts[1:], len(ids)])]
            rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    set_seed(config["seed"])
    half = config["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(config["base"], dtype=getattr(torch, config["dtype"]))
    steps = []
    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.last, self.tokens = time.perf_counter(), 0
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                now = time.perf_counter()
                steps.append({
                    "tokens": logs["num_tokens"] - self.tokens, "seconds": now - self.last, "loss": logs["loss"],
                    "cpu": time.process_time(),
                })
                self.last, self.tokens = now, logs["num_tokens"]
    args = SFTConfig(
        output_dir=task["run"], packing=True, max_length=config["cutoff"],
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
        per_device_train_batch_size=config["batch_size"], gradient_accumulation_steps=config["accumulation"],
        max_steps=config["max_steps"], learning_rate=config["learning_rate"], lr_scheduler_type="constant",
        max_grad_norm=1.0, weight_decay=0.0, bf16=half, use_cpu=not cuda, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=config["seed"],
    )
    lora = LoraConfig(
        r=config["rank"], lora_alpha=config["alpha"], lora_dropout=config["dropout"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(config["base"]), callbacks=[Clock()],
    )
    trainer.train()
    print("RESULT", json.dumps({"steps": steps, "tokens": {}}))
"""
_PEAK = """
import torch as _torch
_peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
if _torch.cuda.is_available():
    _peak = _torch.cuda.max_memory_allocated() // 1024
print("PEAK", _peak)
"""
_MODEL = """
    import json, shutil, sys
    from pathlib import Path
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    out, tokenizer, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), **shape)).to(torch.bfloat16)
    model.save_pretrained(out)
    words.save_pretrained(out)
    print("RESULT", json.dumps(sum(p.numel() for p in model.parameters())))
"""


@dataclass
class Row:
    """One thing to time: `code` run by `python` with `task`; what it said, round by round."""

    name: str
    python: Path
    code: str
    task: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    efforts: list[float] = field(default_factory=list)  # tokens per CPU second
    losses: list[float] = field(default_factory=list)
    peak: float = 0.0
    padding: float = 0.0

    def measure(self, scratch: Path) -> None:
        turn = scratch / f"turn-{len(list(scratch.iterdir()))}"
        turn.mkdir()
        task = {**self.task, "run": str(turn / "run")}
        task["config"] = {**self.task["config"], "output": str(turn / "adapter")}
        said, self.peak = process(self.python, self.code, [json.dumps(task)])
        steps, tokens = said["steps"], said["tokens"]
        skipped = min(WARM_UP, len(steps) - 1)
        timed = steps[skipped:]
        if tokens.get("padding"):
            self.padding = tokens["padding"] / (tokens["padding"] + tokens["processed"])
        self.rates.append(sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed))
        if skipped:  # a step's CPU time needs the step before it
            made = sum(step["tokens"] for step in timed)
            self.efforts.append(made / (steps[-1]["cpu"] - steps[skipped - 1]["cpu"]))
        self.losses = [step["loss"] for step in steps]


def process(python: Path, code: str, arguments: list[str]) -> tuple[Any, float]:
    """Run code in a fresh interpreter: what it printed after RESULT, and its peak memory in MB."""
    done = subprocess.run(
        [python, "-c", textwrap.dedent(code) + _PEAK, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"a row failed:\n{done.stderr[-3000:]}")
    said, _, peak = done.stdout.rpartition("PEAK ")
    return json.loads(said.rpartition("RESULT ")[2]), int(peak) * 1024 / 1e6


def settings(base: Path, kind: str, data: Path, steps: int, threads: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": kind, "base": str(base), "data": [str(data)], "rank": 16, "alpha": 16, "dropout": 0.0,
        "learning_rate": 5e-4, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant", "max_steps": steps,
        "batch_size": 1, "accumulation": 1, "cutoff": 512, "held_out": 0, "save_every": 10**6, "seed": 42,
        "dtype": "bfloat16", "threads": threads, **changes,
    }  # fmt: skip


def ours(name: str, config: dict[str, Any]) -> Row:
    return Row(name, Path(sys.executable), _OURS, {"config": config, "record": ""})


def trl_pair(what: str, config: dict[str, Any], scratch: Path) -> list[Row]:
    """Ours and TRL on the batches ours makes; without TRL's environment only ours."""
    rows = [ours(f"ours, {what}", config)]
    if not TRL_PYTHON.exists():
        print(f"TRL: left out, no {TRL_PYTHON.parents[1].name}: run `make trl`", file=sys.stderr)
        return rows
    batches = scratch / f"batches-{what.replace(', ', '-').replace(' ', '-')}.json"
    first = ours("recorded", config)
    first.task["record"] = str(batches)
    first.measure(scratch)
    rows.append(Row(f"TRL, {what}", TRL_PYTHON, _TRL, {"config": config, "batches": str(batches)}))
    return rows


def groups(args: argparse.Namespace, workspace: Path, scratch: Path) -> list[list[Row]]:
    """Rows to be measured in turns; the first of each is what the others are compared with."""
    base = args.base or workspace / "bases" / "smollm2-135m-instruct"
    text, answers = workspace / "data" / "pt_train.jsonl", workspace / "data" / "sft_train.jsonl"
    steps = WARM_UP + max(2, math.ceil(args.tokens / 512))
    found: list[list[Row]] = []

    def config(kind: str, **changes: Any) -> dict[str, Any]:
        data = text if kind == "pt" else answers
        return settings(base, kind, data, changes.pop("steps", steps), args.threads, **changes)

    if args.only in (None, "trl"):
        found.append(trl_pair("text, bf16", config("pt"), scratch))
        if not args.quick:
            found.append(trl_pair("answers only, bf16", config("sft"), scratch))
            found.append(trl_pair("text, float32", config("pt", dtype="float32"), scratch))
    if args.only in (None, "loss"):
        found.append(
            [
                ours("loss on answers", config("sft")),
                ours("loss on all positions", config("sft", train_on_prompt=True)),
            ]
        )
    if args.only in (None, "packing"):
        padded = config("sft", packing=False, batch_size=8, steps=WARM_UP + max(1, (steps - WARM_UP) // 2))
        found.append([ours("packed to 512", config("sft")), ours("padded, 8 a batch", padded)])
    if args.only in (None, "gpu"):
        found += gpu_group(base, text, args, scratch)
    return found


def gpu_group(base: Path, text: Path, args: argparse.Namespace, scratch: Path) -> list[list[Row]]:
    import torch

    if not torch.cuda.is_available():
        print(
            "no CUDA device here: the row of a larger Qwen3-shaped model in bf16 is left out", file=sys.stderr
        )
        return []
    large = scratch / "qwen3"
    count, _ = process(Path(sys.executable), _MODEL, [str(large), str(base), json.dumps(QWEN3)])
    steps = WARM_UP + max(8, math.ceil(args.tokens / 2048))
    config = settings(large, "pt", text, steps, 0, cutoff=2048)
    return [trl_pair(f"Qwen3 {count / 1e9:.1f} B, text, bf16", config, scratch)]


def demo_workspace(scratch: Path) -> Path:
    made = scratch / "workspace"
    command = [str(Path(sys.executable).with_name("medmerge")), "demo", "--workspace", str(made), "--json"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return made


def table(rounds: list[list[Row]]) -> None:
    import torch
    import transformers

    place = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    print(
        f"rank 16 on all linear layers; {os.cpu_count()} cores, {platform.machine()}, {place}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; medians of {len(rounds[0][0].rates)} rounds; "
        "ratio: the first row of its group over this one, median of the rounds' ratios"
    )
    print(
        f"{'':34} {'tok/s':>7} {'ratio':>6} {'tok/CPU s':>10} {'ratio':>6} "
        f"{'loss':>7} {'first':>7} {'padding':>8} {'peak MB':>8}"
    )
    for group in rounds:
        for row in group:
            ratio = statistics.median(a / b for a, b in zip(group[0].rates, row.rates, strict=True))
            effort = statistics.median(a / b for a, b in zip(group[0].efforts, row.efforts, strict=True))
            print(
                f"{row.name:34} {statistics.median(row.rates):7.0f} {ratio:6.2f} "
                f"{statistics.median(row.efforts):10.0f} {effort:6.2f} "
                f"{statistics.fmean(row.losses):7.4f} {row.losses[0]:7.4f} {row.padding:8.1%} {row.peak:8.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, help="timed tokens a row and round (default 8192)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="two timed steps a row, one round, one pair with TRL"
    )
    parser.add_argument("--only", choices=("trl", "loss", "packing", "gpu"), help="one group of rows")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of ours (default: torch's choice)"
    )
    parser.add_argument("--base", type=Path, help="another base model than the demo's")
    parser.add_argument("--workspace", type=Path, help="a demo workspace (default: a new one)")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.rounds = 1024, 1
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        scratch = Path(folder)
        workspace = args.workspace.absolute() if args.workspace else demo_workspace(scratch)
        rounds = groups(args, workspace, scratch)
        if not rounds:
            return
        for turn in range(args.rounds):
            for group in rounds:
                for row in group:
                    row.measure(scratch)
                    print(
                        f"round {turn + 1}: {row.name} {row.rates[-1]:.0f} tok/s", file=sys.stderr, flush=True
                    )
        table(rounds)


if __name__ == "__main__":
    main()
