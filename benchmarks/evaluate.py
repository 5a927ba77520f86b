"""Evaluation speed beside its peers: multiple choice, a sweep, batched generation. One run, one table.

    python -m benchmarks.evaluate                 # demo base on this machine, three rounds
    python -m benchmarks.evaluate --quick         # few items, one round: does it all run?
    python -m benchmarks.evaluate --only generation --rounds 5

choice      Ours against lm-evaluation-harness on the shipped MedQA questions: same model in memory, dtype, batch size,
            items; the harness' time is its `loglikelihood` alone (tokens and scores), ours is the whole cell. Letters
            must be the same ones, or the row says how many differ.
sweep       `medmerge sweep` over five mixtures against five `medmerge eval` of one, as commands. Four model loads are
            taken off the five (a single evaluation has to load; the load is what its log says).
generation  Ours against `model.generate` at the same batch size in the order of the file, greedy: shipped questions of
            MedQuAD and abstracts with questions of PubMedQA in turns, under the even mixture, so that prompts and
            answers have many lengths. Both write the same texts in float32; in bfloat16 most, since what is beside a
            row moves its last bits there.

Rows of a group follow each other in every round, so that they share what else the machine does; ratios are medians
of the rounds' ratios. `CPU s` is what the process itself used: read it on a busy machine, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIXTURES: list[dict[str, float]] = [
    {"pt": 0, "sft": 1},
    {"pt": 0.3, "sft": 0.7},
    {"pt": 0.5, "sft": 0.5},
    {"pt": 0.7, "sft": 0.3},
    {"pt": 1, "sft": 0},
]


@dataclass
class Row:
    """One thing that was timed, round by round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    note: str = ""

    def measure(self, work: Callable[[], Any]) -> Any:
        began, used = time.perf_counter(), cpu_seconds()
        found = work()
        self.seconds.append(time.perf_counter() - began)
        self.cpu.append(cpu_seconds() - used)
        return found


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return statistics.median(b / a for a, b in zip(first, second, strict=True))


def load(workspace: Path, dtype: str, weights: dict[str, float]) -> Any:
    from engine.evaluate.live import LiveModel
    from engine.weights import Adapter, Checkpoint

    adapters = {label: Adapter.open(workspace / "adapters" / f"demo-{label}") for label in ("pt", "sft")}
    base = Checkpoint.open(workspace / "bases" / "smollm2-135m-instruct")
    live = LiveModel(base, adapters, "bfloat16", dtype, "auto")
    live.set_weights(weights)
    return live


# multiple choice


def choice_group(args: argparse.Namespace, workspace: Path) -> list[list[Row]]:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        print("choice: left out, lm_eval is not installed", file=sys.stderr)
        return []
    return [choice_rows(args, workspace, dtype) for dtype in args.dtypes]


def choice_rows(args: argparse.Namespace, workspace: Path, dtype: str) -> list[Row]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from engine.evaluate import choice
    from engine.evaluate.data import read_samples
    from engine.evaluate.likelihood import length_batches

    live = load(workspace, dtype, {})
    samples = read_samples(workspace / "data" / "medqa.jsonl", "multiple_choice", args.items)
    harness = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=args.batch, max_length=2048)

    def theirs() -> list[int]:
        requests = [
            Instance("loglikelihood", {}, (choice.choice_prompt(sample, "letters"), text), k)
            for sample in samples
            for k, text in enumerate(choice.continuations(sample, "letters"))
        ]
        found = iter(harness.loglikelihood(requests, disable_tqdm=True))
        return [choice.best([next(found)[0] for _ in sample.options]) for sample in samples]

    def ours() -> list[int]:
        pairs = [
            [
                choice.encode_pair(live.tokenizer, choice.choice_prompt(sample, "letters"), text)
                for text in choice.continuations(sample, "letters")
            ]
            for sample in samples
        ]
        letters = [0] * len(samples)
        for batch in length_batches([len(options[0][0]) + 1 for options in pairs], args.batch):
            scores = choice.score_choices(live.model, [pairs[i] for i in batch])
            for index, row in zip(batch, scores, strict=True):
                letters[index] = choice.best(row)
        return letters

    rows = [Row(f"choice, {dtype}: ours"), Row(f"choice, {dtype}: lm-evaluation-harness")]
    for _ in range(args.rounds):
        mine, other = rows[0].measure(ours), rows[1].measure(theirs)
        differing = sum(a != b for a, b in zip(mine, other, strict=True))
        rows[1].note = f"{len(samples)} items, batch {args.batch}, {differing} letters differ"
    return rows


# generation


def generation_group(args: argparse.Namespace, workspace: Path) -> list[list[Row]]:
    return [generation_rows(args, workspace, dtype) for dtype in args.dtypes]


def generation_rows(args: argparse.Namespace, workspace: Path, dtype: str) -> list[Row]:
    import torch

    from engine import templates
    from engine.evaluate.cells import TOGETHER
    from engine.evaluate.config import Decoding
    from engine.evaluate.data import read_samples
    from engine.evaluate.generate import find_stops, generate
    from engine.evaluate.likelihood import length_batches

    live = load(workspace, dtype, {"pt": 0.5, "sft": 0.5})
    short = read_samples(workspace / "data" / "medquad_short.jsonl", "generation", args.items // 2)
    long = read_samples(workspace / "data" / "pubmedqa.jsonl", "multiple_choice", args.items // 2)
    asked = [
        text for a, b in zip(short, long, strict=True) for text in (a.prompt, f"{b.context}\n\n{b.prompt}")
    ]
    template = templates.load("model", live.base.folder)
    prompts = [
        live.tokenizer(template.prompt([{"role": "user", "content": text}]), add_special_tokens=False)[
            "input_ids"
        ]
        for text in asked
    ]
    keys = [str(n) for n in range(len(prompts))]
    stops = find_stops(live.tokenizer, live.model, template.stop)
    decoding = Decoding("greedy", max_new_tokens=args.new_tokens)

    @torch.inference_mode()
    def plain() -> list[list[int]]:
        """`model.generate`, batch after batch in the order of the file."""
        answers = []
        for start in range(0, len(prompts), args.batch):
            batch = prompts[start : start + args.batch]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in batch], device=live.model.device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=live.model.device
            )
            made = live.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=args.new_tokens, do_sample=False,
                eos_token_id=sorted(stops.ids), pad_token_id=live.tokenizer.pad_token_id or 0,
            )[:, width:]  # fmt: skip
            for row in made.tolist():
                end = next((n for n, token in enumerate(row) if token in stops.ids), len(row))
                answers.append(row[:end])
        return answers

    def ours() -> list[str]:
        answers = [""] * len(prompts)
        for unit in length_batches([len(p) for p in prompts], TOGETHER * args.batch, 2**31):
            made = generate(
                live.model, live.tokenizer, [prompts[i] for i in unit], [keys[i] for i in unit], decoding,
                0, stops, args.batch,
            )  # fmt: skip
            for index, answer in zip(unit, made, strict=True):
                answers[index] = answer.raw
        return answers

    rows = [Row(f"generation, {dtype}: ours"), Row(f"generation, {dtype}: model.generate")]
    for _ in range(args.rounds):
        mine, other = rows[0].measure(ours), rows[1].measure(plain)
        texts = [live.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in other]
        same = sum(a == b for a, b in zip(mine, texts, strict=True))
        lengths = sorted(len(tokens) for tokens in other)
        rows[1].note = (
            f"{len(prompts)} prompts of {min(map(len, prompts))}-{max(map(len, prompts))} tokens, batch {args.batch}; "
            f"answers {lengths[0]}-{lengths[-1]}, median {lengths[len(lengths) // 2]}; {same} texts equal"
        )
    return rows


# a sweep


def sweep_group(args: argparse.Namespace, workspace: Path) -> list[list[Row]]:
    rows = [Row("sweep of five mixtures"), Row("five evaluations less four loads")]
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        for turn in range(args.rounds):
            rows[0].measure(partial(command, args, workspace, Path(folder), "sweep", MIXTURES, f"s{turn}"))
            loads = [
                rows_of_one(args, workspace, Path(folder), mixture, f"e{turn}-{n}")
                for n, mixture in enumerate(MIXTURES)
            ]
            walls, starts = [one[0] for one in loads], [one[1] for one in loads]
            rows[1].seconds.append(sum(walls) - 4 * statistics.median(starts))
            rows[1].cpu.append(float("nan"))
            rows[
                1
            ].note = f"one: {statistics.median(walls):.1f} s, of it load {statistics.median(starts):.1f} s"
    return [rows]


def rows_of_one(
    args: argparse.Namespace, workspace: Path, folder: Path, mixture: dict[str, float], name: str
) -> tuple[float, float]:
    """Seconds of one `medmerge eval`, and of its model load."""
    began = time.perf_counter()
    said = command(args, workspace, folder, "eval", [mixture], name)
    return time.perf_counter() - began, sum(map(float, re.findall(r"loaded in ([\d.]+) s", said)))


def command(
    args: argparse.Namespace,
    workspace: Path,
    folder: Path,
    verb: str,
    mixtures: list[dict[str, float]],
    name: str,
) -> str:
    """Run it on tasks of all kinds with a data name of its own, so that no cell is taken from another run."""
    import yaml

    data = {}
    for source in ("medquad_short", "medqa", "medical_text"):
        copied = folder / f"{name}-{source}.jsonl"  # a comment field makes its hash, and so its cells, new
        lines = (
            (workspace / "data" / f"{source}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()[: args.sweep_items]
        )
        copied.write_text("".join(json.dumps({**json.loads(line), "source": name}) + "\n" for line in lines))
        data[source] = str(copied)
    config = {
        "base": str(workspace / "bases" / "smollm2-135m-instruct"),
        "adapters": {label: str(workspace / "adapters" / f"demo-{label}") for label in ("pt", "sft")},
        "weights": mixtures,
        "decoding": [{"name": "greedy", "temperature": 0, "max_new_tokens": args.new_tokens}],
        "compute": "float32" if args.dtypes[0] == "float32" else "model",
        "tasks": [
            {"name": "answers", "kind": "generation", "data": data["medquad_short"]},
            {"name": "medqa", "kind": "multiple_choice", "data": data["medqa"]},
            {"name": "text", "kind": "perplexity", "data": data["medical_text"]},
        ],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    line = [str(Path(sys.executable).with_name("medmerge")), verb, str(path), "--out", name]
    done = subprocess.run(
        [*line, "--workspace", str(folder / "workspace")], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"medmerge {verb} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


GROUPS = {"choice": choice_group, "generation": generation_group, "sweep": sweep_group}


def table(groups: list[list[Row]], args: argparse.Namespace) -> None:
    import torch
    import transformers

    place = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, {place}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; load {os.getloadavg()[0]:.1f}; medians of "
        f"{args.rounds} rounds; ratio: the row over the first of its group, median of the rounds' ratios"
    )
    print(f"{'':44} {'seconds':>8} {'ratio':>6} {'CPU s':>8} {'ratio':>6}")
    for group in groups:
        for row in group:
            print(
                f"{row.name:44} {statistics.median(row.seconds):8.1f} {ratio(group[0].seconds, row.seconds):6.2f} "
                f"{statistics.median(row.cpu):8.1f} {ratio(group[0].cpu, row.cpu):6.2f}  {row.note}"
            )


def demo_workspace(scratch: Path) -> Path:
    made = scratch / "workspace"
    line = [str(Path(sys.executable).with_name("medmerge")), "demo", "--workspace", str(made), "--json"]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--items", type=int, default=64, help="questions and prompts (default 64)")
    parser.add_argument(
        "--sweep-items", type=int, default=12, help="rows of each task in the sweep (default 12)"
    )
    parser.add_argument("--batch", type=int, default=8, help="batch size (default 8)")
    parser.add_argument("--new-tokens", type=int, default=128, help="most tokens of an answer (default 128)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="what is multiplied in")
    parser.add_argument("--quick", action="store_true", help="few items, one round")
    parser.add_argument("--only", choices=tuple(GROUPS), help="one group of rows")
    parser.add_argument("--workspace", type=Path, help="a demo workspace (default: a new one)")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.items, args.sweep_items, args.new_tokens = 1, 8, 3, 16
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        workspace = args.workspace.absolute() if args.workspace else demo_workspace(Path(folder))
        groups = []
        for name, make in GROUPS.items():
            if args.only in (None, name):
                print(f"measuring: {name}", file=sys.stderr, flush=True)
                groups += make(args, workspace)
        table(groups, args)


if __name__ == "__main__":
    main()
