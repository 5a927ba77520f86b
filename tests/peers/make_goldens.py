"""Run mergekit on every case and keep its results: tests/peers/goldens/NAME.safetensors and parameters.json.

    make mergekit && .venv-mergekit/bin/python tests/peers/make_goldens.py [--into DIR] [CASE...]

Runs in mergekit's own environment (torch, no medmerge). parameters.json holds, for every case, the numbers that
mergekit itself resolved for each tensor, its version, and a hash of the inputs. DARE draws are seeded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from cases import CASES  # type: ignore[import-not-found]  # noqa: E402
from inputs import digest, inputs  # type: ignore[import-not-found]  # noqa: E402

SEED = 7


def merge(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """mergekit's result of a case, and the parameters it resolved for each tensor."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    resolved: dict[str, Any] = {}
    plan = MergePlanner._plan

    def keep(planner: Any) -> None:
        plan(planner)
        for weight, task in planner._tensors:
            assert isinstance(task, ExecuteMergeMethodTask)
            resolved[weight.name] = {
                "shared": dict(task.parameters.items()),
                "models": {str(model): dict(own.items()) for model, own in task.input_parameters.items()},
            }

    MergePlanner._plan = keep
    try:
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(CASES[name])),
            f"out-{name}",
            MergeOptions(
                copy_tokenizer=False, quiet=True, random_seed=SEED, lora_merge_cache=str(folder / "loras"),
                write_model_card=False,
            ),
        )  # fmt: skip
    finally:
        MergePlanner._plan = plan
    return folder / f"out-{name}", resolved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, default=HERE / "goldens")
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    peers = ("mergekit", "torch", "transformers", "peft")
    into = args.into.resolve()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = inputs(Path(scratch) / "inputs")
        os.chdir(folder)
        found: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(name) for name in peers},
            "inputs": digest(folder),
            "cases": {},
        }  # fmt: skip
        for name in args.cases:
            out, found["cases"][name] = merge(name, folder)
            files = list(out.glob("*.safetensors"))
            assert len(files) == 1, files
            shutil.copy(files[0], into / f"{name}.safetensors")
    (into / "parameters.json").write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{len(args.cases)} cases in {into}")


if __name__ == "__main__":
    main()
