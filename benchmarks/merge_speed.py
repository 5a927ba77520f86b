"""How fast is a merge against a durable copy of the same folder, and against PEFT: one run, one table.

    python benchmarks/merge_speed.py                      # 0.33 B parameters, about a minute
    python benchmarks/merge_speed.py --parameters 1.3e9 --no-peft --keep /big/disk

Makes a random bf16 Llama of about that size (written as bytes) and two rank-16 adapters on all linear layers,
then times, each in its own process with a warm page cache and everything on disk at the end (`sync`):
`cp -r`, our merge without and with its verification, and PEFT (`add_weighted_adapter(..., "cat")`,
`merge_and_unload`, `save_pretrained`). The floor is the copy: a merge reads and writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine.weights.tensorfile import encode_header  # noqa: E402

RANK, VOCABULARY = 16, 32_000
SHAPES = (  # layers, hidden, intermediate, heads
    (8, 768, 2048, 12),
    (16, 1024, 3072, 16),
    (24, 1024, 3072, 16),
    (22, 2048, 5632, 32),
    (24, 2048, 6144, 32),
)
OURS = """
    import json, sys
    from engine.jobs import EventWriter
    from engine.merge.job import run_merge
    recipe = {"base": sys.argv[1], "adapters": {
        "pt": {"path": sys.argv[2], "weight": 0.3}, "sft": {"path": sys.argv[3], "weight": 0.7}},
        "output": {"path": sys.argv[4]}}
    assert run_merge({"recipe": recipe, "verify": VERIFY}, EventWriter())["exit_code"] == 0
"""
PEFT = """
    import os, sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, sys.argv[2], adapter_name="pt")
    model.load_adapter(sys.argv[3], adapter_name="sft")
    model.add_weighted_adapter(["pt", "sft"], [0.3, 0.7], "both", combination_type="cat")
    model.set_adapter("both")
    model.merge_and_unload().save_pretrained(sys.argv[4])
    os.sync()
"""
COPY = """
    import os, subprocess, sys
    subprocess.run(["cp", "-r", sys.argv[1], sys.argv[4]], check=True)
    os.sync()
"""
PEAK = "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # kB, of this very process


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float
    peak_mb: float


def linear_shapes(layers: int, hidden: int, middle: int) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of every linear layer, by module name."""
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def make_base(folder: Path, layers: int, hidden: int, middle: int, heads: int) -> int:
    """Write a random bf16 Llama checkpoint (normal, std 0.02); returns its number of parameters."""
    folder.mkdir()
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    tensors |= {f"{module}.weight": shape for module, shape in linear_shapes(layers, hidden, middle).items()}
    for i in range(layers):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        tensors[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    random = np.random.default_rng(0)
    values = (random.standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32)
    pattern = ((values + 0x8000) >> 16).astype("<u2")
    count = 0
    with (folder / "model.safetensors").open("wb") as file:
        file.write(
            encode_header([(name, "BF16", shape) for name, shape in tensors.items()], {"format": "pt"})
        )
        for shape in tensors.values():
            left = int(np.prod(shape))
            count += left
            while left:
                start = int(random.integers(0, len(pattern) // 2))
                piece = pattern[start : start + min(left, len(pattern) // 2)]
                file.write(piece.tobytes())
                left -= len(piece)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": middle, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 4, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "dtype": "bfloat16", "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return count


def make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], seed: int) -> None:
    """Write a float32 PEFT adapter of rank 16 on all linear layers, B with std 0.02."""
    from safetensors.numpy import save_file

    random, tensors = np.random.default_rng(seed), {}
    for module, (rows, columns) in shapes.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((RANK, columns), np.float32) / 30
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((rows, RANK), np.float32) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "task_type": "CAUSAL_LM", "bias": "none",
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in shapes}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def timed(name: str, code: str, arguments: Sequence[str], out: Path) -> Row:
    """Run code in a new interpreter; wall seconds from start to end and its peak resident memory."""
    os.sync()
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code) + PEAK, *arguments, str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    shutil.rmtree(out)
    return Row(name, seconds, int(done.stdout.split()[-1]) / 1024)


def best(name: str, code: str, arguments: Sequence[str], out: Path, repeats: int) -> Row:
    """The fastest of several runs: what the machine can do when others leave it alone."""
    return min((timed(name, code, arguments, out) for _ in range(repeats)), key=lambda row: row.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=0.33e9, help="about how many (default 0.33e9)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument(
        "--where", type=Path, help="folder on the disk to test (default: the temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.where, prefix="merge-speed-") as scratch:
        run(Path(scratch), args)


def run(scratch: Path, args: argparse.Namespace) -> None:
    def size(shape: tuple[int, int, int, int]) -> float:
        layers, hidden, middle, _ = shape
        return 2 * VOCABULARY * hidden + sum(r * c for r, c in linear_shapes(layers, hidden, middle).values())

    layers, hidden, middle, heads = min(SHAPES, key=lambda shape: abs(size(shape) - args.parameters))
    parameters = make_base(scratch / "base", layers, hidden, middle, heads)
    shapes = linear_shapes(layers, hidden, middle)
    for seed, name in enumerate(("pt", "sft")):
        make_adapter(scratch / name, shapes, seed)
    arguments = [str(scratch / name) for name in ("base", "pt", "sft")]
    out = scratch / "out"
    rows = [
        best("cp -r, sync", COPY, arguments, out, args.repeats),
        best("medmerge merge --no-verify", OURS.replace("VERIFY", "False"), arguments, out, args.repeats),
        best("medmerge merge (verified)", OURS.replace("VERIFY", "True"), arguments, out, args.repeats),
    ]
    if not args.no_peft:
        rows.append(best("PEFT cat, merge, save", PEFT, arguments, out, 1))
    print(
        f"{parameters / 1e9:.2f} B parameters, {2 * parameters / 1e9:.2f} GB bf16, two rank-{RANK} adapters; "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    )
    print(f"{'':28} {'seconds':>8} {'x cp':>6} {'peak MB':>8}")
    for row in rows:
        print(f"{row.name:28} {row.seconds:8.2f} {row.seconds / rows[0].seconds:6.2f} {row.peak_mb:8.0f}")


if __name__ == "__main__":
    main()
