"""What the app can start, as data: the job's target and parameters, and the command line that does the same.

Pure functions over names and paths; the backend turns an Action into a job. Paths in params are absolute,
paths in commands are relative to the workspace where they lie below it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tui.text import weight


@dataclass(frozen=True)
class Action:
    """One job the app can start. `command` is what a person would type instead."""

    kind: str
    target: str
    params: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    command: str = ""


@dataclass(frozen=True)
class Mixture:
    """A merge as set on screen: two adapters (or one) with their weights, the method, and how to write it."""

    base: str
    adapters: dict[str, str]  # label -> path
    weights: dict[str, float]  # label -> weight
    out: str
    method: str = "linear"
    dtype: str = "bfloat16"
    parameters: dict[str, float | int] = field(default_factory=dict)  # of the method: t, density, seed
    kind: str = "checkpoint"  # or "adapter"
    gguf: tuple[str, ...] = ()  # types written beside a checkpoint

    @property
    def words(self) -> str:
        """`0.30 PT + 0.70 SFT`, and the method where it is not linear."""
        terms = " + ".join(f"{weight(self.weights[label])} {label.upper()}" for label in self.adapters)
        return terms if self.method in ("linear", "task_arithmetic") else f"{self.method} of {terms}"

    def recipe(self) -> dict[str, Any]:
        """The recipe document (engine.merge.recipe) with absolute paths."""
        document: dict[str, Any] = {
            "base": self.base,
            "method": self.method,
            "adapters": {
                label: {"path": path, "weight": self.weights[label]} for label, path in self.adapters.items()
            },
        }
        if self.parameters:
            document["parameters"] = dict(self.parameters)
        output: dict[str, Any] = {"path": self.out}
        if (
            self.kind == "adapter"
        ):  # always float32: ranks side by side, nothing is rounded to a model's dtype
            return {**document, "output": {**output, "kind": "adapter"}}
        output["dtype"] = self.dtype
        if self.gguf:
            output["gguf"] = list(self.gguf)
        return {**document, "output": output}


def command(root: Path, *words: str | Path) -> str:
    """`medmerge WORDS... --workspace ROOT`, quoted for a shell."""
    return shlex.join(["medmerge", *map(str, words), "--workspace", str(root)])


def _adapter_words(mixture: Mixture, weights: bool = True) -> list[str]:
    words = []
    for label, path in mixture.adapters.items():
        words += ["--adapter", f"{label}={path}" + (f":{mixture.weights[label]:g}" if weights else "")]
    return words


def merge(root: Path, mixture: Mixture) -> Action:
    """Merge and verify; GGUFs of the types asked for are made in the same job, from the verified result."""
    words = ["merge", "--base", mixture.base, *_adapter_words(mixture), "--method", mixture.method]
    for name, value in mixture.parameters.items():
        words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--kind", "adapter"] if mixture.kind == "adapter" else ["--dtype", mixture.dtype]
    for type_ in mixture.gguf:
        words += ["--gguf", type_]
    line = command(root, *words, "--out", mixture.out)
    title = f"merge {Path(mixture.out).name}: {mixture.words}"
    return Action(
        "merge", "engine.merge.job:run_merge", {"recipe": mixture.recipe(), "verify": True}, title, line
    )


def plan(root: Path, mixture: Mixture) -> Action:
    """What a merge would cost and lose to rounding; nothing is written."""
    return Action("plan", "engine.merge.job:run_plan", {"recipe": mixture.recipe()}, f"plan {mixture.words}")


def verify(root: Path, merged: str) -> Action:
    """Check a finished merge against what its own manifest says was asked."""
    name = Path(merged).name
    line = command(root, "verify", merged)
    return Action("verify", "engine.merge.job:run_verify", {"merged": merged}, f"verify {name}", line)


def look_into(root: Path, merged: str, base: str, adapters: dict[str, str]) -> Action:
    """Ask which weights of these adapters are in a merge that does not say what was asked."""
    params = {"merged": merged, "base": base, "adapters": dict(adapters), "weights": None}
    words = [f"{label}={path}" for label, path in adapters.items()]
    flags = [word for entry in words for word in ("--adapter", entry)]
    line = command(root, "verify", merged, "--base", base, *flags)
    title = f"what is in {Path(merged).name}"
    return Action("verify", "engine.merge.job:run_verify", params, title, line)


def check_files(root: Path, merged: str) -> Action:
    """Hash every file of a merge again and compare with its manifest (all there is to check of an adapter)."""
    params = {"merged": merged, "manifest": True}
    line = command(root, "verify", merged, "--manifest")
    return Action("verify", "engine.merge.job:run_verify", params, f"hashes of {Path(merged).name}", line)


def interference(root: Path, mixture: Mixture) -> Action:
    """How the adapters overlap, module by module."""
    params = {"adapters": dict(mixture.adapters), "base": mixture.base}
    line = command(root, "interference", "--base", mixture.base, *_adapter_words(mixture, weights=False))
    names = " and ".join(Path(path).name for path in mixture.adapters.values())
    return Action("interference", "engine.merge.job:run_interference", params, f"overlap of {names}", line)


def gguf(root: Path, source: str, out: str, type_: str) -> Action:
    """A checkpoint to a GGUF file of a llama.cpp type."""
    params = {"source": source, "out": out, "type": type_}
    line = command(root, "gguf", source, "--type", type_, "--out", out)
    return Action("gguf", "engine.gguf.job:run", params, f"gguf {Path(out).name}", line)


def demo(root: Path) -> Action:
    return Action(
        "demo",
        "training.demo.job:run",
        {"workspace": str(root)},
        "make the demo workspace",
        command(root, "demo"),
    )


def inspect(root: Path, path: str) -> Action:
    """Nothing to start: only the command that shows an adapter."""
    return Action("adapters", "", command=command(root, "adapters", path))


def train(root: Path, config: dict[str, Any]) -> Action:
    """Train an adapter with these settings (training.config); the command names the file `write_config` makes."""
    name = Path(config["output"]).name
    params = {"config": config, "run": str(root / "runs" / name)}
    line = command(root, "train", config["kind"], config_path(root, config))
    return Action("train", "training.job:run", params, f"train {config['kind']} → {name}", line)


def config_path(root: Path, config: dict[str, Any]) -> Path:
    """Where the settings of a run are written for its command line."""
    return root / "runs" / f"{Path(config['output']).name}.yaml"


def write_config(root: Path, config: dict[str, Any]) -> None:
    """Write a run's settings as the YAML file its command line names."""
    import yaml

    path = config_path(root, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def resume(root: Path, params: dict[str, Any]) -> Action:
    """Go on with a training run from its last checkpoint."""
    run = params["run"]
    line = command(root, "train", "--resume", run)
    config = params.get("config") or {}
    resumed = {"run": run, "resume": True, "config": config}
    return Action("train", "training.job:run", resumed, f"resume {Path(run).name}", line)


def preview(config: dict[str, Any], samples: int = 3) -> Action:
    """The first samples as a run with these settings would see them; a question to a child, nothing is written."""
    return Action("preview", "training.preview:run", {"config": config, "samples": samples}, "preview")


def audit(root: Path, train_files: list[str], test_files: list[str]) -> Action:
    """Look for test rows in the training data, and for repeats within it."""
    params = {"train": list(train_files), "test": list(test_files)}
    words = ["audit", "--train", *train_files, *(["--test", *test_files] if test_files else [])]
    names = ", ".join(Path(name).name for name in train_files)
    return Action("audit", "training.audit.job:run", params, f"audit {names}", command(root, *words))


def live(root: Path, base: str, adapters: dict[str, str], type_: str) -> Action:
    """Make the base's GGUF and the adapters' LoRA GGUFs, so that weights can change while they talk."""
    params = {"base": base, "adapters": dict(adapters), "type": type_, "out": str(root / "gguf")}
    words: list[str] = []
    for label, path in adapters.items():
        words += ["--adapter", f"{label}={path}"]
    line = command(root, "gguf", "--base", base, *words, "--type", type_)
    names = ", ".join(Path(path).name for path in adapters.values())
    return Action("live", "engine.gguf.job:run_live", params, f"prepare {Path(base).name} with {names}", line)


def chat(root: Path, model: str, adapters: dict[str, str], weights: dict[str, float]) -> Action:
    """Nothing to start: the command that talks to the same model line by line."""
    words: list[str] = []
    for label, path in adapters.items():
        words += ["--adapter", f"{label}={path}:{weights.get(label, 0.0):g}"]
    return Action("chat", "", command=command(root, "chat", model, *words))


def evaluation_file(root: Path, name: str) -> Path:
    """Where `write_evaluation` puts a config."""
    return root / "configs" / f"{name}.yaml"


def write_evaluation(root: Path, name: str, config: dict[str, Any]) -> Path:
    """Write a config that the app made, so that its command line works; one of the same name is replaced."""
    import yaml

    path = evaluation_file(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def sweep(root: Path, config_file: Path, config: dict[str, Any], out: str) -> Action:
    """Measure the grid of a config that was read and checked; `out` is the new run's folder."""
    params = {"config": config, "out": out, "mode": "sweep", "resume": False}
    files = len(config.get("gguf") or ()) + len(config.get("servers") or ())
    models = files + (len(config["weights"]) if config.get("base") not in (None, "", "None") else 0)
    title = f"sweep {Path(out).name}: {models} model{'s' * (models != 1)}, " + ", ".join(
        task["name"] for task in config["tasks"]
    )
    line = command(root, "sweep", config_file, "--out", Path(out).name)
    return Action("sweep", "engine.evaluate.job:run", params, title, line)


def resume_sweep(root: Path, run: Path, config: dict[str, Any], mode: str) -> Action:
    """Go on with a run that stopped, with its own config; failed cells are tried again."""
    params = {"config": config, "out": str(run), "mode": mode, "resume": True}
    line = command(root, mode, run / "config.yaml", "--out", run.name, "--resume")
    return Action(mode, "engine.evaluate.job:run", params, f"resume {run.name}", line)


def report(root: Path, run: str) -> Action:
    """Nothing to start: the command that prints a run's table."""
    return Action("report", "", command=command(root, "report", Path(run).name))
